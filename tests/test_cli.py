"""What the commands print and where: JSON for programs, tables for people; nothing in a text reaches the terminal as a control."""

import json
import re
import unicodedata
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from commands import BOOK, ESCAPE, HOSTILE, fields_of, shell, well
from hypothesis import given
from hypothesis import strategies as st

render = import_module("knnstore_cli.render")
texts = import_module("knnstore_cli.text")

QUERY_FIELDS = {"text", "snapshot", "k", "nprobe", "lambda", "temperature", "p_lm", "p_knn", "p", "neighbors"}
NEIGHBOR_FIELDS = {
    *("distance", "weight", "id", "token", "left", "right", "document", "token_index", "domain", "source", "char_start", "char_end"),
}


def test_query_json(store: Path) -> None:
    """`query --json` has the fields of the contract, lists of at most --top, most probable and nearest first."""
    fields = fields_of("query", "Marley was", "--store", store, "-k", "50", "--top", "4", "--lambda", "0.5", "--temperature", "100")
    assert set(fields) >= QUERY_FIELDS
    assert (fields["text"], fields["snapshot"], fields["k"], fields["lambda"], fields["temperature"]) == ("Marley was", 1, 50, 0.5, 100.0)
    for name in ("p_lm", "p_knn", "p"):
        assert [set(item) for item in fields[name]] == [{"id", "token", "p"}] * 4
        probabilities = [item["p"] for item in fields[name]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert all(0 < p <= 1 for p in probabilities)
    assert fields["p_knn"][0]["token"] == " dead"
    assert [set(hit) >= NEIGHBOR_FIELDS for hit in fields["neighbors"]] == [True] * 4
    distances = [hit["distance"] for hit in fields["neighbors"]]
    assert distances == sorted(distances)
    nearest = fields["neighbors"][0]
    assert nearest["left"].endswith("Marley was")
    assert (nearest["token"].strip(), nearest["document"], nearest["domain"]) == ("dead", "carol.txt", "dickens")


def test_query_json_sums_and_offsets(store: Path) -> None:
    """With --top as large as the vocabulary, each distribution and the weights sum to 1; offsets point at the token's characters."""
    fields = fields_of("query", "Humbug!", "--store", store, "--top", "100000")
    for name in ("p_lm", "p_knn", "p"):
        assert sum(item["p"] for item in fields[name]) == pytest.approx(1.0, abs=1e-5)
    assert sum(hit["weight"] for hit in fields["neighbors"]) == pytest.approx(1.0, abs=1e-9)
    for hit in fields["neighbors"]:
        path, _, line = hit["source"].partition("#")
        text = Path(path).read_bytes().decode("utf-8")
        if line:
            text = json.loads(text.split("\n")[int(line) - 1])["text"]
        assert text[hit["char_start"] : hit["char_end"]] == hit["token"]


def test_query_options(store: Path) -> None:
    """--domain, --exclude, --exact, - for standard input: each does what it says."""
    base = ("query", "Marley was", "--store", store)
    assert {hit["document"] for hit in fields_of(*base, "--exclude", "carol.txt", "--top", "1000")["neighbors"]} == {
        "hostile.txt",
        "letter 1",
        "letters.jsonl#2",
    }
    assert fields_of(*base, "--domain", "dickens=2.5")["neighbors"]
    exact = fields_of(*base, "--exact")
    assert exact["exact"] is True
    assert exact["neighbors"][0]["distance"] <= 1.0
    done = well("query", "-", "--store", store, "--json", stdin="Marley “was\n")
    assert json.loads(done.stdout)["text"] == "Marley “was"


def test_info_json(store: Path) -> None:
    """`info --json` has the fields of the contract; --documents adds a list of all."""
    fields = fields_of("info", "--store", store, "--documents")
    assert set(fields) >= {
        *("path", "format", "snapshot", "entries", "documents", "domains", "segments", "spaces", "bytes", "bytes_per_entry"),
        *("checkpoint", "key", "calibration"),
    }
    assert set(fields["bytes"]) >= {"total", "lists", "values", "contexts", "keys"}
    assert set(fields["key"]) >= {"layer", "dim"}
    assert fields["domains"] == {"dickens": {"entries": fields["entries"], "documents": 4}}
    listed = fields["document_list"]
    assert [document["id"] for document in listed] == ["carol.txt", "hostile.txt", "letter 1", "letters.jsonl#2"]
    assert listed[2]["metadata"] == {"year": 1843}
    assert sum(document["entries"] for document in listed) == fields["entries"]
    assert "document_list" not in fields_of("info", "--store", store, "--at", "1")


def test_snapshots_json(store: Path) -> None:
    """`snapshots --json` lists each snapshot and says which is current."""
    fields = fields_of("snapshots", "--store", store)
    (only,) = fields["snapshots"]
    assert (only["snapshot"], only["operation"], only["current"]) == (1, "create", True)


@pytest.mark.parametrize("level", ["quick", "full"])
def test_verify_json(store: Path, level: str) -> None:
    """`verify --json` has the fields of the contract."""
    fields = fields_of("verify", "--store", store, "--level", level)
    assert fields["ok"] is True
    assert fields["checked_bytes"] > 0
    assert fields["problems"] == []


def test_create_json(work: Path, tmp_path: Path) -> None:
    """`create --json` prints what `info --json` prints; what was left out is told on stderr, and not with --quiet."""
    made = well("create", work / "corpus", "--store", tmp_path / "a.knn", "--json")
    assert json.loads(made.stdout) == fields_of("info", "--store", tmp_path / "a.knn")
    assert "empty.txt" in made.stderr
    quiet = well("create", "-", "--name", "in.txt", "--store", tmp_path / "b.knn", "--quiet", stdin=BOOK)
    assert quiet.output == ""
    assert fields_of("info", "--store", tmp_path / "b.knn", "--documents")["document_list"][0]["id"] == "in.txt"


def test_tables_are_readable_when_piped(store: Path) -> None:
    """Piped: no escapes, no control characters, lines of at most 120 columns; the three distributions and the neighbours' places."""
    for arguments in (["query", "Marley was"], ["info", "--documents"], ["snapshots"], ["verify"]):
        out = well(*arguments, "--store", store).stdout
        assert ESCAPE not in out
        assert all(len(line) <= 120 for line in out.splitlines())
    out = well("query", "Marley was", "--store", store).stdout
    assert re.search(r"p_LM.*p_kNN.*p: both", out)
    assert re.search(r"0\.\d{2,}\s.*Marley was\[ dead\], to begin with.*carol.txt\s+dickens", out)
    assert "#" in out


def test_terminal_has_colors_unless_refused(store: Path) -> None:
    """On a terminal: colour and bars; with NO_COLOR neither a foreground nor a background colour."""
    arguments = ("query", "Marley was", "--store", store)
    colored = well(*arguments, FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="100").stdout
    assert re.search(r"\x1b\[[\d;]*3[0-7]m", colored)
    assert "█" in colored
    plain = well(*arguments, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color", COLUMNS="100").stdout
    assert not re.search(r"\x1b\[(?:\d+;)*[34]\d(?:;\d+)*m", plain)
    for line in re.sub(r"\x1b\[[\d;]*m", "", colored).splitlines():
        assert len(line) <= 100


def test_narrow_encoding(store: Path, work: Path, command_path: str) -> None:
    """Where stdout cannot hold a sign, JSON has it as an escape and tables have a question mark; nothing fails."""
    done = shell(
        "knnstore info --documents --json && knnstore info --documents", work, command_path, PYTHONIOENCODING="ascii", KNNSTORE=str(store)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_markup_in_texts_is_shown_as_it_is(store: Path) -> None:
    """Markup in a document or a query is no markup, and its control characters reach no terminal."""
    for environment in ({}, {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "300"}):
        out = well("query", HOSTILE, "--store", store, "--top", "40", **environment).stdout
        out = re.sub(r"\x1b\[[\d;]*m", "", out)
        assert "[bold red]markup[/]" in out
        assert ":smile:" in out
        assert "⏎" in out
        assert not any(unicodedata.category(char) in ("Cc", "Cf") for char in out if char != "\n")


any_text = st.text(st.characters(), max_size=40)


@st.composite
def queries(draw: st.DrawFn) -> dict[str, Any]:
    """What `query --json` may print."""
    share = st.floats(0, 1)
    tokens = st.lists(st.fixed_dictionaries({"id": st.integers(0, 10**6), "token": any_text, "p": share}), max_size=5)
    hit = dict.fromkeys(("token", "left", "right", "document", "domain", "source"), any_text)
    hits = st.lists(st.fixed_dictionaries({**hit, "id": st.integers(0, 10**6), "distance": st.floats(0, 1e6), "weight": share}), max_size=5)
    return {
        **{name: draw(tokens) for name in ("p_lm", "p_knn", "p")},
        "text": draw(any_text),
        "neighbors": draw(hits),
        "exact": draw(st.booleans()),
        "snapshot": 1,
        "k": 8,
        "nprobe": 2,
        "lambda": 0.25,
        "temperature": 1e-6,
    }


@given(fields=queries(), width=st.integers(60, 200), terminal=st.booleans())
def test_any_query_can_be_shown(fields: dict[str, Any], width: int, terminal: bool) -> None:
    """Whatever the texts are, a query's page has no control character in it and no line wider than the terminal."""

    @click.command()
    def show() -> None:
        render.print_query(fields, lambda ids: f"<{ids[0]}>")

    environment = {"COLUMNS": str(width), **({"FORCE_COLOR": "1", "TERM": "xterm"} if terminal else {"FORCE_COLOR": None})}
    done = CliRunner().invoke(show, env=environment, catch_exceptions=False)
    lines = re.sub(r"\x1b\[[\d;]*m", "", done.stdout).split("\n")
    assert all(texts.visible(line) == line for line in lines)
    assert all(render.cell_len(line) <= width for line in lines)


@given(text=any_text)
def test_visible_is_printable_and_complete(text: str) -> None:
    """A shown text has no control character, stays as it was where it had none, and loses no character that had."""
    shown = texts.visible(text)
    assert all(unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") for char in shown)
    assert len(shown) >= len(text)
    assert texts.visible(shown) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (99_950, "100 kB"), (999_600, "1.0 MB"), (5e12, "5.0 TB")],
)
def test_sizes(number: float, shown: str) -> None:
    """Sizes have the unit that keeps them short."""
    assert texts.shown_bytes(number) == shown
