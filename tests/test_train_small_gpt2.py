"""The scripts that made and measured the default model run, and make what transformers loads."""

import importlib
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The training script, with a clock that goes on by a second each time it is read: as many steps on any machine."""
    monkeypatch.syspath_prepend(TOOLS)
    script = importlib.import_module("train_small_gpt2")
    clock = itertools.count()
    monkeypatch.setattr(script, "time", SimpleNamespace(time=lambda: float(next(clock))))
    return script


@pytest.fixture(scope="module")
def books(sample_book: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short texts cut from the sample book; v.txt is for validation."""
    folder = tmp_path_factory.mktemp("books")
    text = sample_book.read_text(encoding="utf-8")
    for name, start in (("a", 0), ("b", 40_000), ("v", 100_000)):
        (folder / f"{name}.txt").write_text(text[start : start + 30_000], encoding="utf-8")
    return folder


@pytest.mark.slow
def test_training_learns_and_writes_a_model(
    training: ModuleType, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some 300 steps of a tiny model bring perplexity far below that of guessing; the folder loads, and measures the same."""
    tiny = ["--minutes", "5", "--vocab", "300", "--dim", "32", "--layers", "2", "--heads", "2", "--context", "64", "--batch", "4"]
    training.main(["--books", str(books), "--valid", "v.txt", "--out", str(tmp_path), *tiny])
    printed = capsys.readouterr().out
    assert printed.startswith("2 books, ")
    measured = re.search(r"averaged ([0-9.]+) tokens (\d+)", printed)
    assert measured, printed
    averaged, n_tokens = float(measured[1]), int(measured[2])
    assert averaged < 300 / 3  # 300: every token of the vocabulary as likely as any other
    assert 250 * 4 * 64 < n_tokens <= 300 * 4 * 64

    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 200]
    assert all(row["tokens"] == 4 * 64 * row["step"] for row in rows)

    monkeypatch.setattr(sys, "argv", ["measure_perplexity.py", str(tmp_path), str(books / "v.txt"), "--context", "64"])
    importlib.import_module("measure_perplexity").main()
    printed = capsys.readouterr().out
    again = re.search(r"perplexity ([0-9.]+),", printed)
    assert again, printed
    assert math.isclose(float(again[1]), averaged, rel_tol=0.02)  # float16 weights, and the last short window counts too


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--vocab", "100"], "--vocab 100"), (["--heads", "3"], "--heads 3"), (["--valid", "none.txt"], "no such file")],
    ids=["vocab", "heads", "valid"],
)
def test_training_refuses_wrong_options(
    training: ModuleType, books: Path, tmp_path: Path, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that cannot work ends the script at once, with the value in the message."""
    with pytest.raises(SystemExit, match="2"):
        training.main(["--books", str(books), "--valid", "v.txt", "--out", str(tmp_path / "out"), *wrong])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
