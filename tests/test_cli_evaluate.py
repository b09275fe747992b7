"""`knnstore evaluate`: fields of its JSON, what its tables show, figures, and what it refuses before any work is done."""

import json
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import ESCAPE, fields_of, knnstore, well

from knnstore.lm.evaluate import evaluate

report = import_module("knnstore_cli.evaluation_report")
plots = import_module("knnstore_cli.plots")

TEXT = "Marley was dead, to begin with; a merry Christmas to you, Bob. There was no doubt whatever. Humbug!"
CONTRACT = {
    *("tokens", "bytes", "perplexity", "bits_per_byte", "lambda", "temperature", "k", "nprobe", "helped", "hurt", "tokens_per_s"),
    *("domains", "store", "checkpoint"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fields(store: Path, text: Path) -> dict[str, Any]:
    """What --json prints, with a k under the number of entries."""
    return fields_of("evaluate", text, "--store", store, "-k", "8", "--lambda", "0.4", "--temperature", "30", "--quiet")


# JSON


def test_json_fields(store: Path, text: Path, fields: dict[str, Any]) -> None:
    """The fields of the contract, each as `Evaluation.fields` has it; what is infinite is null."""
    assert set(fields) >= CONTRACT
    assert set(fields["perplexity"]) == set(fields["bits_per_byte"]) == {"lm", "knn", "mixed"}
    assert set(fields["tokens_per_s"]) == {"lm", "mixed"}
    assert set(fields["store"]) >= {"snapshot", "entries"}
    assert set(fields["checkpoint"]) >= {"name", "identity"}
    assert set(fields["domains"]) == {"dickens"}
    assert (fields["k"], fields["lambda"], fields["temperature"]) == (8, pytest.approx(0.4), 30.0)
    assert fields["bytes"] == len(TEXT.encode())
    assert fields["zero"] > 0
    assert fields["perplexity"]["knn"] is None
    assert fields["histogram"][0]["low"] is fields["histogram"][-1]["high"] is None
    assert [sum(item["tokens"] for item in fields[name]) for name in ("histogram", "frequency")] == [fields["tokens"]] * 2
    found = evaluate(store, text, k=8, lmbda=0.4, temperature=30.0).fields()
    assert set(fields) == set(found)
    for name in ("tokens", "bytes", "documents", "context", "stride", "store", "checkpoint"):
        assert fields[name] == found[name]
    for name in ("helped", "hurt", "gain", "loss", "zero", "covered", "lambda"):
        assert fields[name] == pytest.approx(found[name], rel=1e-6)
    assert fields["perplexity"]["mixed"] == pytest.approx(found["perplexity"]["mixed"], rel=1e-6)


def test_options_reach_the_search(copy: Path, text: Path, tmp_path: Path) -> None:
    """Each option changes what it says; the folder, the file and standard input are one text."""
    (tmp_path / "texts").mkdir()
    shutil.copy(text, tmp_path / "texts")
    (tmp_path / "law.txt").write_text("The party of the first part.", encoding="utf-8")
    well("append", tmp_path / "law.txt", "--store", copy, "--domain", "law", "--quiet")
    base = ["evaluate", text, "--store", copy, "--lambda", "0.4", "--temperature", "30", "--quiet"]
    plain = fields_of(*base)
    assert fields_of("evaluate", tmp_path / "texts", *base[2:])["perplexity"] == plain["perplexity"]
    typed = json.loads(well("evaluate", "-", *base[2:], "--json", stdin=TEXT).stdout)
    assert typed["perplexity"] == plain["perplexity"]
    assert set(plain["domains"]) == {"dickens", "law"}
    assert set(fields_of(*base, "--domain", "law=2")["domains"]) == {"law"}
    for option, name, value in (
        (["-k", "3"], "k", 3),
        (["--nprobe", "7"], "nprobe", 7),
        (["--exact"], "exact", True),
        (["--context", "16"], "context", 16),
        (["--context", "16", "--stride", "5"], "stride", 5),
        (["--retrieval", "pointers", "--min-knns", "4"], "retrieval", "pointers"),
        (
            ["--at", "1"],
            "store",
            {"path": str(copy), "snapshot": 1, "entries": plain["store"]["entries"] - plain["domains"]["law"]["entries"]},
        ),
    ):
        changed = fields_of(*base, *option)
        assert changed[name] == value != plain[name]
    without = fields_of(*base, "--exclude", "carol.txt")
    assert without["domains"]["dickens"]["entries"] < plain["domains"]["dickens"]["entries"]
    assert without["perplexity"]["mixed"] > plain["perplexity"]["mixed"]


def test_own_documents(store: Path, work: Path) -> None:
    """A text of the datastore predicts itself, and a note says so; with --exclude-own it does not, and the table says that."""
    arguments = ["evaluate", work / "corpus" / "carol.txt", "--store", store, "--lambda", "0.4", "--temperature", "30"]
    cheating, honest = well(*arguments), well(*arguments, "--exclude-own")
    assert "carol.txt: it is in the datastore" in cheating.stderr
    assert "--exclude-own" in cheating.stderr
    assert "it is in the datastore" not in honest.stderr
    assert "in the datastore too: 1 document" in honest.stdout
    assert shown_perplexity(honest) > 2 * shown_perplexity(cheating)
    assert well(*arguments, "--quiet").stderr == ""


def shown_perplexity(done: Result) -> float:
    """With the datastore, as the table shows it."""
    found = re.search(r"^perplexity +[\d.,]+ +([\d.,]+)", done.stdout, re.MULTILINE)
    assert found is not None
    return float(found[1].replace(",", ""))


# Tables


def test_tables(store: Path, text: Path, fields: dict[str, Any]) -> None:
    """What JSON has is what the tables show, without a control character where stdout is no terminal."""
    done = well("evaluate", text, "--store", store, "-k", "8", "--lambda", "0.4", "--temperature", "30", "--quiet")
    shown = done.stdout
    assert ESCAPE not in shown
    assert f"{fields['tokens']} tokens of 1 document" in shown
    assert f"{fields['perplexity']['lm']:.2f}" in shown
    assert shown_perplexity(done) == pytest.approx(fields["perplexity"]["mixed"], abs=0.006)
    for name in ("helped", "hurt"):
        assert f"{name}: {100 * fields[name]:.1f}% of tokens" in shown
    rows = re.findall(r"^(\S.*?) {2,}([\d.]+)% +([+-][\d.]+)( +#+)?$", shown, re.MULTILINE)
    full = [item for item in fields["histogram"] if item["tokens"]]
    assert [float(share) for _, share, _, _ in rows if float(share)] == [pytest.approx(100 * item["share"], abs=0.06) for item in full]
    longest = max(len(bar.strip()) for *_, bar in rows)
    assert longest == max(len(bar.strip()) for _, share, _, bar in rows if float(share) == max(float(row[1]) for row in rows))
    assert "perplexity with it alone" not in shown  # of one domain there is nothing to tell apart


def some_fields(**changed: Any) -> dict[str, Any]:
    """Of an evaluation that none had: infinite, empty and hostile."""
    part = {"entries": 5, "share": 0.5, "zero": 1.0, "perplexity": {"knn": float("inf"), "mixed": float("inf")}}
    return {
        "tokens": 3,
        "bytes": 4,
        "documents": 1,
        "perplexity": {"lm": 2.0, "knn": float("inf"), "mixed": float("inf")},
        "bits_per_byte": {"lm": 1.0, "knn": float("inf"), "mixed": float("inf")},
        "zero": 1.0,
        "covered": {"lm": float("nan"), "knn": float("nan")},
        "lambda": 1.0,
        "temperature": 1.0,
        "k": 1,
        "nprobe": 1,
        "exact": True,
        "retrieval": "confident",
        "context": 8,
        "stride": 4,
        "helped": 0.0,
        "hurt": 1 / 3,
        "gain": 0.0,
        "loss": float("-inf"),
        "histogram": [
            {"low": float("-inf"), "high": -4.0, "tokens": 1, "bits": float("-inf"), "share": 1 / 3},
            {"low": -4.0, "high": float("inf"), "tokens": 2, "bits": 0.0, "share": 2 / 3},
        ],
        "frequency": [
            {"low": 0.0, "high": 0.0, "tokens": 3, "share": 1.0, "perplexity": {"lm": 2.0, "mixed": float("inf")}},
            {"low": 0.0, "high": 1.0, "tokens": 0, "share": 0.0, "perplexity": {"lm": float("nan"), "mixed": float("nan")}},
        ],
        "domains": {"[red]law\x1b[31m": part, "poems": part},
        "searched": 0.25,
        "own": 0,
        "tokens_per_s": {"lm": 10.0, "mixed": 5.0},
        "store": {"path": "a\x1b.knn", "snapshot": 1, "entries": 5},
        **changed,
    }


@pytest.mark.parametrize("columns", ["20", "60", "200"])
def test_tables_of_anything(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite and missing numbers, names that are no names, and narrow terminals."""
    monkeypatch.setenv("COLUMNS", columns)
    report.print_evaluation(some_fields())
    shown = capsys.readouterr().out
    assert ESCAPE not in shown
    assert "∞" in shown
    if columns == "200":
        assert "[red]law␛[31m" in shown
        assert "searched: for 25.0% of tokens (confident)" in shown
        assert "neither: 66.7% of tokens" in shown
        assert "2.00 and more" not in shown


# Figures


@pytest.mark.parametrize("name", ["out.png", "out.svg", "out.PDF"])
def test_plot(name: str, store: Path, text: Path, tmp_path: Path) -> None:
    """A figure of the kind that its name says; the report is printed too."""
    pytest.importorskip("matplotlib")
    arguments = ["--lambda", "0.4", "--temperature", "30", "--quiet", "--plot", tmp_path / name]
    assert "perplexity" in well("evaluate", text, "--store", store, *arguments).stdout
    begin = (tmp_path / name).read_bytes()[:600]
    assert begin.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[name[-3:].lower()])
    assert name != "out.svg" or b"<svg" in begin


def test_plot_of_anything(tmp_path: Path) -> None:
    """Infinite and missing numbers."""
    pytest.importorskip("matplotlib")
    plots.evaluation_plot(some_fields(), str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 1_000


@pytest.fixture
def refused(store: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A command that must end before the datastore is opened."""
    monkeypatch.setattr("knnstore.open", lambda *arguments, **options: pytest.fail("it was opened"))
    return lambda *arguments: knnstore("evaluate", text, "--store", store, *arguments)


def test_plots_that_cannot_be_are_refused_first(refused: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kind of file, a folder that is not there, no matplotlib."""
    monkeypatch.setattr(plots, "find_spec", lambda name: True)
    for path, code, said in (
        (tmp_path / "a.txt", 2, "a.txt: no kind of figure. Give the file one of these endings: .png, .svg, .pdf."),
        (tmp_path / "none" / "a.png", 3, "no folder"),
    ):
        done = refused("--plot", path)
        assert (done.exit_code, done.stdout) == (code, "")
        assert said in done.stderr
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    done = refused("--plot", tmp_path / "a.png")
    assert done.exit_code == 2
    assert 'pip install "knnstore[plot]"' in done.stderr


# What is refused


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "Missing argument 'TEXT...'"),
        (["nowhere.txt"], 3, "nowhere.txt: no such file or folder"),
        (["TEXT", "--retrieval", "sometimes"], 2, "'sometimes' is not one of 'full', 'pointers', 'confident'"),
        (["TEXT", "--retrieval", "confident"], 2, "knnstore tune"),
        (["TEXT", "--domain", "poems"], 3, "poems"),
        (["TEXT", "--context", "100000"], 2, "context 100000"),
        (["TEXT", "--stride", "0"], 2, "stride is 0"),
        (["TEXT", "-k", "0"], 2, "k 0: use 1"),
        (["TEXT", "--lambda", "2"], 2, "lambda 2"),
        (["TEXT", "--at", "9"], 3, "9"),
    ],
)
def test_refused(store: Path, text: Path, arguments: list[str], code: int, said: str) -> None:
    """One message on stderr, nothing on stdout."""
    given = [text if argument == "TEXT" else argument for argument in arguments]
    done = knnstore("evaluate", *given, "--store", store, "--temperature", "30", "--quiet")
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert done.stdout == ""


def test_nothing_to_predict(store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = knnstore("evaluate", tmp_path / "empty.txt", "--store", store, "--lambda", "0.4", "--temperature", "30")
    assert done.exit_code == 2
    assert "empty.txt: left out (empty)" in done.stderr
    assert "nothing to predict" in done.stderr
