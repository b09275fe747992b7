"""`knnstore generate`: its JSON, what it shows with and without colours, how it draws, and the file it writes."""

import json
import re
import unicodedata
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from commands import BOOK, ESCAPE, HOSTILE, fields_of, knnstore, well
from generations import generations, made, sequence, source, token
from hypothesis import given
from hypothesis import strategies as st

from knnstore import KnnLM

report = import_module("knnstore_cli.generation_report")
output = import_module("knnstore_cli.output")
pages = import_module("knnstore_cli.pages")
text_module = import_module("knnstore_cli.text")

TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}


def shown(fields: dict[str, Any], **environment: str | None) -> str:
    """What is printed for fields."""

    @click.command()
    def show() -> None:
        report.print_generation(fields)

    return CliRunner().invoke(show, env={"FORCE_COLOR": None, **environment}, catch_exceptions=False).stdout


def without_styles(out: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", out)


# --- what it prints for programs


def test_json_is_the_text_of_the_library_and_its_trace(store: Path) -> None:
    """The text is what `KnnLM.generate` gives, each token with its numbers and sources; all shares sum to 1."""
    fields = fields_of("generate", "Marley was", "--store", store, "--max-new-tokens", "12", "-k", "50", "--lambda", "0.6")
    assert fields["prompt"] == "Marley was"
    assert {name: fields[name] for name in ("snapshot", "k", "lambda", "exact", "gate", "retrieval")} == {
        "snapshot": 1,
        "k": 50,
        "lambda": 0.6,
        "exact": False,
        "gate": None,
        "retrieval": "full",
    }
    assert fields["decoding"] == {
        "max_new_tokens": 12,
        "num_beams": 1,
        "sample": False,
        **dict.fromkeys(("top_k", "top_p", "sampling_temperature", "seed")),
    }
    (found,) = fields["sequences"]
    lm = KnnLM.load(store, k=50, lmbda=0.6)
    assert "Marley was" + found["text"].removesuffix("<|endoftext|>") == lm.generate("Marley was", max_new_tokens=12)
    assert found["text"].startswith(" dead, to begin with.")
    assert len(found["tokens"]) <= 12
    for one in found["tokens"]:
        assert one["share"] + one["lm_share"] == pytest.approx(1.0)
        assert sum(item["share"] for item in one["sources"]) + one["others"]["share"] == pytest.approx(one["share"], abs=1e-9)
    assert sum(item["share"] for item in found["documents"]) + found["lm_share"] == pytest.approx(1.0)
    assert found["domains"] == {"dickens": pytest.approx(found["share"])}
    first = found["tokens"][0]["sources"][0]
    assert (first["document"], first["token"], first["domain"]) == ("carol.txt", " dead", "dickens")
    assert BOOK[first["char_start"] : first["char_end"]] == " dead"


def test_texts_are_drawn_by_the_seed(store: Path) -> None:
    """The same seed draws the same texts; a seed that was not given is told, and draws them again; another draws others."""
    base = ("generate", "The", "--store", store, "--max-new-tokens", "10", "--lambda", "0.1")
    arguments = (*base, "--sample", "--num-return-sequences", "2")

    def texts(*more: str) -> tuple[list[str], dict[str, Any]]:
        fields = fields_of(*arguments, *more)
        return [found["text"] for found in fields["sequences"]], fields["decoding"]

    drawn, decoding = texts()
    assert len(set(drawn)) == 2
    assert (decoding["top_k"], decoding["top_p"], decoding["sampling_temperature"]) == (50, 1.0, 1.0)
    assert texts("--seed", str(decoding["seed"]))[0] == drawn
    assert texts("--seed", str((decoding["seed"] + 1) % 1000))[0] != drawn
    coldest, decoding = texts("--top-k", "1", "--top-p", "0.5", "--sampling-temperature", "0.5")
    assert coldest[0] == coldest[1] == fields_of(*base)["sequences"][0]["text"]
    assert (decoding["top_k"], decoding["top_p"], decoding["sampling_temperature"]) == (1, 0.5, 0.5)


def test_options_reach_the_search_and_the_decoding(store: Path) -> None:
    """--num-beams, --exclude, --domain, --exact and - for standard input each do what they say."""
    base = ("generate", "Marley was", "--store", store, "--max-new-tokens", "4")
    beams = fields_of(*base, "--num-beams", "3", "--num-return-sequences", "2")
    assert len({found["text"] for found in beams["sequences"]}) == 2
    assert beams["decoding"]["num_beams"] == 3
    excluded = fields_of(*base, "--exclude", "carol.txt", "--domain", "dickens=2.5")
    assert "carol.txt" not in {item["document"] for item in excluded["sequences"][0]["documents"]}
    assert fields_of(*base, "--exact")["exact"] is True
    done = well("generate", "-", "--store", store, "--max-new-tokens", "2", "--json", stdin="Marley “was\n")
    assert json.loads(done.stdout)["prompt"] == "Marley “was"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", "5"], "--top-k is about drawing tokens. Give --sample too"),
        (["--seed", "0"], "--seed is about drawing"),
        (["--num-return-sequences", "2"], "2 texts need --sample, or --num-beams 2"),
        (["--num-beams", "2", "--num-return-sequences", "3"], "3 texts need --sample"),
        (["--sample", "--top-p", "0"], "0.0<x<=1.0"),
        (["--max-new-tokens", "0"], "x>=1"),
    ],
)
def test_options_that_say_nothing_are_refused(store: Path, options: list[str], words: str) -> None:
    """With exit code 2, before the model is loaded."""
    done = knnstore("generate", "x", "--store", store, *options)
    assert done.exit_code == 2
    assert words in done.stderr


# --- what it prints for people


def test_piped_it_is_plain_and_says_all_in_words(store: Path) -> None:
    """No escapes, lines of at most 120 columns; brackets instead of colours; documents with shares, and passages with their tokens."""
    done = well("generate", "Marley was", "--store", store, "--max-new-tokens", "8", "--lambda", "0.9", "--quiet")
    assert done.stderr == ""
    out = done.stdout
    assert ESCAPE not in out
    assert all(len(line) <= 120 for line in out.splitlines())
    assert out.startswith("Marley was [dead, to begin")
    assert re.search(r"\d+ tokens; \d\d% of their probability is from the datastore", out)
    assert re.search(r"^the language model +<?\d+%", out, re.MULTILINE)
    assert re.search(r"^carol\.txt +dickens +\d+%  #+$", out, re.MULTILINE)
    # A passage that was copied is one passage.
    assert re.search(r"^ +\d +\d+% .*Marley was \[dead, to begin.*\].* +carol\.txt$", out, re.MULTILINE)
    assert "λ 0.9" in out
    assert "decoded greedily" in out


def test_brackets_stand_around_what_is_at_least_half_the_datastores() -> None:
    """Neighbouring tokens share them; spaces and newlines stay outside."""
    shares = [0.2, 0.5, 0.9, 0.4999, 0.7, 0.8]
    texts = (" a", " b", " c", " d", "\n", " e")
    tokens = [token(text, [source("a.txt", share, text)]) for text, share in zip(texts, shares, strict=True)]
    out = shown({**made(), "prompt": "p", "sequences": [sequence(tokens)]})
    assert out.startswith("p a [b c] d\n [e]\n")


def test_marks_say_both_of_their_colors(store: Path) -> None:
    """On a terminal a mark has a colour for its letters and one for what is behind them, so that it can be read on any; spaces have none.

    With NO_COLOR there are brackets, and no colour.
    """
    arguments = ("generate", "Marley was", "--store", store, "--max-new-tokens", "6", "--lambda", "0.9")
    out = well(*arguments, **TERMINAL, COLUMNS="100").stdout
    text = out[: out.index("tokens;")]
    assert re.search(r"38;2;\d+;\d+;\d+;48;2;[\d;]+m(dead|begin)", text)
    for style in re.findall(r"\x1b\[([\d;]*48;2[\d;]*)m", out):
        assert "38;2" in style
    assert not re.search(r"48;2;[\d;]+m ", text)
    assert "[" not in without_styles(text)
    assert all(len(line) <= 100 for line in without_styles(out).splitlines())
    plain = well(*arguments, **TERMINAL, NO_COLOR="1", COLUMNS="100").stdout
    assert not re.search(r"\x1b\[(?:\d+;)*[34]\d(?:;\d+)*m", plain)
    assert "[dead" in without_styles(plain)


def test_several_texts_are_told_apart(store: Path) -> None:
    """Each has its number, its text and its sources."""
    out = well("generate", "The", "--store", store, "--max-new-tokens", "3", "--num-beams", "2", "--num-return-sequences", "2").stdout
    assert [line for line in out.splitlines() if line.startswith("text ")] == ["text 1 of 2", "text 2 of 2"]
    assert out.count("the language model") == 2
    assert "with 2 beams" in out


@given(fields=generations(), width=st.integers(60, 200), terminal=st.booleans())
def test_any_generation_can_be_shown(fields: dict[str, Any], width: int, terminal: bool) -> None:
    """Whatever texts and names are, nothing in them reaches the terminal as a control, and no line is wider than it."""
    lines = without_styles(shown(fields, COLUMNS=str(width), **(TERMINAL if terminal else {}))).split("\n")
    assert all(text_module.visible(line) == line for line in lines)
    assert all(report.cell_len(line) <= width for line in lines)


def test_hostile_texts_are_shown_as_they_are(store: Path) -> None:
    """Markup is none, and control characters of documents and prompt reach no terminal."""
    out = without_styles(well("generate", HOSTILE, "--store", store, "--max-new-tokens", "4", **TERMINAL, COLUMNS="300").stdout)
    assert "[bold red]markup[/]" in out
    assert not any(unicodedata.category(char) in ("Cc", "Cf") for char in out if char != "\n")


# --- passages


@given(indices=st.lists(st.none() | st.tuples(st.sampled_from("ab"), st.integers(0, 3)), min_size=1, max_size=12))
def test_passages_are_the_runs_of_a_document(indices: list[tuple[str, int] | None]) -> None:
    """Each token that has a source is in one passage: with the one before it just where its source is the next token there."""
    tokens = [token("x", [] if at is None else [source(at[0], 0.125, f"{i},", token_index=at[1])]) for i, at in enumerate(indices)]
    runs: list[list[int]] = []
    for i, at in enumerate(indices):
        if at is None:
            continue
        before = indices[i - 1] if i else None
        if before is not None and before == (at[0], at[1] - 1):
            runs[-1].append(i)
        else:
            runs.append([i])
    found = report.passages(tokens)
    assert sorted(passage.text for passage in found) == sorted("".join(f"{i}," for i in run) for run in runs)
    assert [passage.n_tokens for passage in found] == sorted(map(len, runs), reverse=True)
    assert all(passage.share == pytest.approx(0.125) for passage in found)
    for passage in found:
        at = [indices[int(number)] for number in passage.text.split(",")[:-1]]
        assert [(item["document"], item["token_index"]) for item in (passage.first, passage.last)] == [at[0], at[-1]]


# --- the page


def test_page_is_written_and_replaced(store: Path, tmp_path: Path) -> None:
    """--html writes the page of the same fields that --json prints, beside them; an older file of that name is replaced, with its mode."""
    path = tmp_path / "page.html"
    path.write_text("old", encoding="utf-8")
    path.chmod(0o640)
    link = tmp_path / "link.html"
    link.symlink_to(path)
    arguments = ("generate", "Marley was", "--store", store, "--max-new-tokens", "4", "--html", link)
    done = well(*arguments, "--json")
    assert path.read_text(encoding="utf-8") == pages.generation_page(json.loads(done.stdout))
    assert re.search(r"note: .*link\.html: [\d.]+ kB of HTML; open it in a browser\.", done.stderr)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert {file.name for file in tmp_path.iterdir()} == {"page.html", "link.html"}
    assert well(*arguments, "--quiet").stderr == ""


def test_page_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is whole, or is not there."""
    path = tmp_path / "page.html"
    path.write_text("old", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            output.write_whole(path, "new")
    with pytest.raises(UnicodeEncodeError):
        output.write_whole(path, "half of it \udc80")
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    output.write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize(
    ("name", "code", "words"), [("none/page.html", 3, r"no folder .*none\. Make it"), (".", 2, "it is a folder. Name a file")]
)
def test_page_that_cannot_be_written_is_refused_at_once(
    store: Path, tmp_path: Path, name: str, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded."""
    monkeypatch.setattr(KnnLM, "load", lambda *_, **__: pytest.fail("loaded"))
    done = knnstore("generate", "x", "--store", store, "--html", tmp_path / name)
    assert done.exit_code == code
    assert re.search(words, done.stderr)
