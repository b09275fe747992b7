"""The command line: what it prints and where, exit codes, help, and that it starts quickly."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from knnstore import errors
from knnstore._version import __version__

cli: click.Group = import_module("knnstore_cli.main").cli
render = import_module("knnstore_cli.render")
reporting = import_module("knnstore_cli.reporting")
texts = import_module("knnstore_cli.text")

ROOT = Path(__file__).parent.parent
ESCAPE = "\x1b"
HOSTILE = "He wrote [bold red]markup[/] and [link=file:///x]more[/link] :smile:\nthen \x1b[31mred\x07 and \u202eback\u202c.\t[end"
BOOK = "Marley was dead, to begin with. There is no doubt whatever about that. " * 3
ERRORS = [getattr(errors, name) for name in errors.__all__]


def knnstore(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
    """The command in this process: its output, and its exit code."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin, env=environment)


def well(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
    """A command that must end with 0."""
    done = knnstore(*arguments, stdin=stdin, **environment)
    assert done.exit_code == 0, done.output
    return done


def fields_of(*arguments: str | Path) -> dict[str, Any]:
    """The one JSON object that a command prints on stdout, with nothing beside it and no NaN."""
    done = well(*arguments, "--json")
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("\n")
    fields = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert isinstance(fields, dict)
    return fields


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus and the datastore `store.knn` made of it, with kept keys."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "carol.txt").write_text(BOOK, encoding="utf-8")
    (folder / "corpus" / "hostile.txt").write_text(HOSTILE, encoding="utf-8", newline="")
    lines = [{"id": "letter 1", "text": "My dear Bob, “a merry Christmas” to you.", "year": 1843}, {"text": "Humbug! 🎄 Humbug!"}]
    (folder / "corpus" / "letters.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "corpus" / "empty.txt").write_text("", encoding="utf-8")
    well("create", folder / "corpus", "--store", folder / "store.knn", "--domain", "dickens", "--keep-keys", "--quiet")
    return folder


@pytest.fixture(scope="module")
def store(work: Path) -> Path:
    return work / "store.knn"


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A datastore that a test may spoil."""
    return Path(shutil.copytree(store, tmp_path / "copy.knn"))


@pytest.fixture(scope="module")
def command_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH that has `knnstore`, whether or not it is installed beside this interpreter."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "knnstore"
    script.write_text(f"#!{sys.executable}\nfrom knnstore_cli.main import cli\ncli()\n", encoding="utf-8")
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def shell(line: str, folder: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line as a user types it."""
    variables = {name: value for name, value in os.environ.items() if name not in ("KNNSTORE", "KNNSTORE_DEBUG", "NO_COLOR", "COLUMNS")}
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**variables, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# What is printed


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


# Exit codes and errors


def failing(error: BaseException) -> Result:
    """A command of the group that raises."""

    @click.command()
    def fail() -> None:
        raise error

    group = type(cli)("knnstore", commands={"fail": fail})
    return CliRunner().invoke(group, ["fail"])


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_each_error_has_its_exit_code(kind: type[errors.KnnstoreError]) -> None:
    """An error of the package ends in one message on stderr and the exit code of its class."""
    done = failing(kind("x.knn: [bold]this[/] is wrong. Do that."))
    assert done.exit_code == kind.exit_code
    assert done.stderr == "error: x.knn: [bold]this[/] is wrong. Do that.\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "a.bin"), 9, "a.bin: No space left on device. Free"),
        (PermissionError(13, "Permission denied", "a.bin"), 9, "a.bin: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero"), 1, "unexpected: ZeroDivisionError: by zero"),
        (EOFError(), 1, "unexpected: EOFError"),
        (MemoryError(), 1, "unexpected: MemoryError"),
        (click.UsageError("no"), 2, "error: no"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_other_errors(error: BaseException, code: int, message: str) -> None:
    """Errors of the system, of Python and of the command line likewise, without a traceback."""
    done = failing(error)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_traceback_is_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """KNNSTORE_DEBUG=1 shows where an error was raised; without, the message says how to see it."""
    assert "KNNSTORE_DEBUG=1" in failing(ZeroDivisionError()).stderr
    monkeypatch.setenv("KNNSTORE_DEBUG", "1")
    done = failing(ZeroDivisionError())
    assert "Traceback" in done.stderr
    assert "KNNSTORE_DEBUG=1" not in done.stderr


def test_control_characters_in_messages() -> None:
    """A path in a message cannot send escapes to the terminal."""
    assert ESCAPE not in failing(errors.NotFoundError("\x1b[2J.knn: not there.")).stderr


def test_warnings_are_one_line() -> None:
    """A warning for users is one line, once; one for developers is not shown."""

    @click.command()
    def warn() -> None:
        for _ in range(2):
            warnings.warn("λ may not fit.", UserWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = CliRunner().invoke(type(cli)("knnstore", commands={"warn": warn}), ["warn"])
    assert done.stderr == "warning: λ may not fit.\n"


def test_not_found(tmp_path: Path, store: Path) -> None:
    """3: no such datastore, snapshot, corpus, document or domain; the message has its name."""
    for arguments in (
        ["info", "--store", tmp_path / "gone.knn"],
        ["query", "x", "--store", tmp_path / "gone.knn"],
        ["verify", "--store", tmp_path / "gone.knn"],
        ["snapshots", "--store", tmp_path / "gone.knn"],
        ["create", tmp_path / "gone", "--store", tmp_path / "new.knn"],
    ):
        done = knnstore(*arguments)
        assert done.exit_code == 3, done.output
        assert "gone" in done.stderr
    assert knnstore("info", "--store", store, "--at", "7").exit_code == 3
    assert knnstore("query", "x", "--store", store, "--domain", "law").exit_code == 3
    assert knnstore("query", "x", "--store", store, "--exclude", "law.txt").exit_code == 3


def test_exists_already(store: Path, work: Path) -> None:
    """4: a datastore is there."""
    assert knnstore("create", work / "corpus", "--store", store).exit_code == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["query"],
        ["query", "x", "--bogus"],
        ["query", "x", "--top", "0"],
        ["query", "x", "-k", "0"],
        ["query", "x", "--lambda", "1.5"],
        ["query", "x", "--lambda", "nan"],
        ["query", "x", "--temperature", "0"],
        ["query", "x", "--domain", "dickens=much"],
        ["query", "x", "--domain", "=1"],
        ["query", "x", "--domain", "dickens", "--domain", "dickens=2"],
        ["query", "x", "--domain", "dickens=-1"],
        ["query", "x", "--device", "toaster"],
        ["verify", "--level", "deep"],
        ["create"],
        ["create", "-"],
        ["create", "x.txt", "--codec", "pq5"],
        ["bogus"],
        ["--bogus"],
        [],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], store: Path, tmp_path: Path) -> None:
    """2: what cannot be understood or is out of range, with a message on stderr and nothing on stdout."""
    where = tmp_path / "new.knn" if "create" in arguments else store
    done = knnstore(*arguments, KNNSTORE=str(where))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr
    assert "unexpected: " not in done.stderr


def test_query_text_must_be_utf8(store: Path) -> None:
    """2: bytes on standard input that are no UTF-8."""
    done = knnstore("query", "-", "--store", store, stdin=b"caf\xe9")
    assert done.exit_code == 2
    assert "UTF-8" in done.stderr


def test_keep_keys_takes_a_value_or_none(work: Path, tmp_path: Path) -> None:
    """--keep-keys alone does not swallow the corpus after it."""
    for number, (option, bytes_each) in enumerate({("--keep-keys",): 2, ("--keep-keys", "f32"): 4, ("--keep-keys=bf16",): 2}.items()):
        made = fields_of("create", *option, work / "corpus" / "carol.txt", "--store", tmp_path / f"{number}.knn")
        assert made["bytes"]["keys"] >= made["entries"] * made["key"]["dim"] * bytes_each


def test_checkpoint_mismatch(store: Path, default_model_dir: Path, tmp_path: Path) -> None:
    """6: another model; with --allow-model-mismatch a warning."""
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(default_model_dir, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("ln_f.bias"))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ("query", "x", "--store", store, "--model", other)
    assert knnstore(*arguments).exit_code == 6
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the warning is what is looked for, not a failure
        done = well(*arguments, "--allow-model-mismatch")
    assert "warning: " in done.stderr


def test_format_not_supported(copy: Path) -> None:
    """7: a datastore of a later format."""
    identity = copy / "KNNSTORE"
    identity.write_bytes(identity.read_bytes().replace(b'"format":1', b'"format":2'))
    assert knnstore("info", "--store", copy).exit_code == 7
    assert knnstore("query", "x", "--store", copy).exit_code == 7


def invert(path: Path, at: int) -> None:
    """Inverts one byte of a file; this always changes it."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_damage(copy: Path) -> None:
    """8: `verify` names the damaged file, also in JSON; `query` refuses to read it."""
    lists = next(copy.glob("segments/*/lists.bin"))
    invert(lists, 64 + 5)
    done = knnstore("verify", "--store", copy, "--json")
    assert done.exit_code == 8
    fields = json.loads(done.stdout)
    assert fields["ok"] is False
    assert fields["problems"]
    assert all(set(problem) >= {"kind", "path", "detail"} for problem in fields["problems"])
    assert any("lists.bin" in problem["path"] for problem in fields["problems"])
    told = knnstore("verify", "--store", copy)
    assert told.exit_code == 8
    assert "lists.bin" in told.stdout
    assert knnstore("query", "Marley was", "--store", copy).exit_code == 8


@pytest.mark.parametrize("device", [Path("/dev/full")], ids=str)
def test_no_space(device: Path, store: Path, work: Path, command_path: str) -> None:
    """9: stdout cannot be written; Python's own complaint at exit does not come."""
    if not device.exists():
        pytest.skip(f"no {device} here")
    done = shell(f"knnstore info --json > {device}", work, command_path, KNNSTORE=str(store))
    assert done.returncode == 9
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_closed_pipe(store: Path) -> None:
    """A reader that went away is no error to talk about; the exit code is that of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", "from knnstore_cli.main import cli; cli()", "info", "--json", "--store", str(store)],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    finally:
        os.close(write)
    assert ended.returncode == 141
    assert ended.stderr == b""


WAITING = """
import signal, sys, tempfile, time
import click
from knnstore_cli.main import cli
@cli.command()
def wait():
    with tempfile.TemporaryDirectory() as folder:
        print(folder, flush=True)
        time.sleep(60)
cli(["wait"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_signals(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Ctrl-C gives 130, SIGTERM another code than 0; both unwind, so temporary files go."""
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert not folder.exists()
    assert "Traceback" not in told


# Progress


def test_progress_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal, a stage is one line at its end and a note one line; with quiet nothing."""
    progress = import_module("knnstore_cli.progress")
    for quiet in (False, True):
        with progress.shown_progress(starting="loading", quiet=quiet) as shown, shown.stage("embedding", total=10, unit="tokens") as stage:
            stage.advance(4)
            stage.advance(6)
            shown.note("a.txt: left out (empty)")
        told = capsys.readouterr()
        assert told.out == ""
        assert (told.err == "") is quiet
        if not quiet:
            assert re.fullmatch(r"note: a.txt: left out \(empty\)\nembedding: 10 tokens in [\d.]+ s\n", told.err)


BARS = """
import time
from knnstore_cli.progress import shown_progress
with shown_progress(starting="loading") as progress:
    time.sleep(0.3)
    with progress.stage("embedding", total=1000, unit="tokens", done=200) as stage:
        for _ in range(7):
            time.sleep(0.1)
            stage.advance(100)
        progress.note("[bold]note[/]")
    with progress.stage("unknown [b]length[/]", total=None, unit="tokens") as stage:
        stage.advance(5)
        time.sleep(0.3)
"""


def on_a_terminal(*command: str) -> str:
    """All that a command writes to a terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(command[0], command)
    written = b""
    while True:
        try:
            block = os.read(fd, 1 << 16)
        except OSError:  # Linux: the other end was closed
            break
        if not block:
            break
        written += block
    os.close(fd)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, written
    return written.decode()


# A fork of a process with threads of torch and faiss: the child only calls exec.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_progress_on_a_terminal() -> None:
    """On a terminal: what is going on, how much of how much, rate, time left; a resumed stage begins where it was."""
    written = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", on_a_terminal(sys.executable, "-c", BARS))
    assert "loading" in written
    assert re.search(r"embedding .* [3-9]00 of 1,000 tokens", written)
    assert re.search(r"\d+(?:\.\d)?/s", written)
    assert re.search(r"\d s left", written)
    assert "note: [bold]note[/]" in written
    assert "unknown [b]length[/]" in written


# Help, reference, completion, start


def commands() -> Iterator[tuple[str, click.Command]]:
    """The group and each of its commands, by what is typed."""
    yield "knnstore", cli
    for name, command in cli.commands.items():
        yield f"knnstore {name}", command


def example_of(typed: str) -> str:
    """The example in a command's help."""
    out = well(*typed.split()[1:], "--help").stdout
    assert out.count("\nExample:\n") == 1
    return "\n".join(line.removeprefix("  ") for line in out.partition("\nExample:\n")[2].splitlines())


def test_commands_are_listed_in_the_order_of_use() -> None:
    """The help of the group has one whole line for each command."""
    out = well("--help").stdout
    listed = re.findall(r"^  ([a-z]+) {2,}(\S.*)$", out.partition("Commands:")[2].partition("Example:")[0], re.MULTILINE)
    assert [name for name, _ in listed] == ["create", "query", "info", "verify", "snapshots", "demo", "completion"]
    assert all(line.endswith(".") and not line.endswith("...") for _, line in listed)


def test_version() -> None:
    """--version prints the name and the version."""
    assert well("--version").stdout == f"knnstore {__version__}\n"


def test_options_of_the_contract() -> None:
    """Every option that the design names is there under its name."""
    promised = {
        "create": "--store -s --model -m --revision --token --cache-dir --domain --name --codec --rotation --keep-keys --key-layer "
        "--context --stride --no-eos --device --dtype --seed --json --quiet -q",
        "query": "--store -s --at -k --nprobe --lambda --temperature --top --domain --exclude --exact --model -m --device --dtype "
        "--allow-model-mismatch --json",
        "info": "--store -s --at --documents --json",
        "verify": "--store -s --level --json",
        "snapshots": "--store -s --json",
        "demo": "--store",
    }
    for name, options in promised.items():
        has = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert has >= set(options.split()), name


def test_dtypes_are_those_of_the_package() -> None:
    """--dtype offers what the package takes."""
    from knnstore.lm.devices import DTYPES

    assert set(import_module("knnstore_cli.options").DTYPES) == {"auto", *DTYPES}


def test_every_parameter_has_help() -> None:
    """Each option says what it is for."""
    for _, command in commands():
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


@pytest.mark.timeout(300)
def test_examples_work_as_typed(tmp_path: Path, command_path: str) -> None:
    """The examples of the help, typed one after the other in an empty folder, all end well; the demo has a test of its own."""
    for typed, command in commands():
        if command not in (cli, cli.commands["demo"]):
            example = example_of(typed)
            assert typed in example
            done = shell(example, tmp_path, command_path)
            assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_example(tmp_path: Path, command_path: str) -> None:
    """The demo shows the perplexity without and with the datastore, the second lower by a fifth at least, and leaves nothing behind."""
    assert example_of("knnstore") == example_of("knnstore demo") == "knnstore demo"
    (tmp_path / "tmp").mkdir()
    done = shell("knnstore demo", tmp_path, command_path, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    without, with_it = (float(number) for number in re.findall(r"perplexity with.*?: +([\d.]+)", done.stdout))
    assert with_it < 0.8 * without
    assert re.search(r"\d+\.\d% lower", done.stdout)
    assert re.search(r"p_LM.*p_kNN.*p: both", done.stdout)
    assert list((tmp_path / "tmp").glob("knnstore*")) == []


def test_reference_is_what_help_says() -> None:
    """docs/cli.md is what tools/cli_reference.py writes now."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "cli_reference.py"), "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_script(name: str) -> None:
    """A script for each shell, which calls the command under its own name."""
    out = well("completion", name).stdout
    assert "_KNNSTORE_COMPLETE" in out
    assert "knnstore" in out
    if shutil.which(name):
        subprocess.run([name, "-n", "/dev/stdin"], input=out, text=True, timeout=60, check=True)


def test_completion_completes(tmp_path: Path, command_path: str) -> None:
    """What the script asks for is answered: commands, options and choices."""
    for words, answer in {"knnstore ver": "verify", "knnstore verify --le": "--level", "knnstore verify --level q": "quick"}.items():
        n = len(words.split()) - 1
        done = shell("knnstore", tmp_path, command_path, _KNNSTORE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(n))
        assert answer in done.stdout


LIGHT = """
import os, sys
os.environ.update({environment!r})
from knnstore_cli.main import cli
try:
    cli({arguments!r})
except SystemExit:
    pass
sys.stderr.write("loaded: " + " ".join(sorted(set(sys.modules) & {{"torch", "transformers", "faiss", "numpy", "rich", "lmdb"}})))
"""


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--help"], {}),
        (["query", "--help"], {}),
        (["--version"], {}),
        (["completion", "zsh"], {}),
        ([], {"_KNNSTORE_COMPLETE": "zsh_complete", "COMP_WORDS": "knnstore q", "COMP_CWORD": "1"}),
    ],
    ids=["help", "query-help", "version", "completion", "complete"],
)
def test_start_loads_no_heavy_library(arguments: list[str], environment: dict[str, str]) -> None:
    """Help, version and completion load nothing that takes long."""
    code = (
        LIGHT.format(arguments=arguments, environment=environment)
        .replace("cli([", "cli(args=[")
        .replace("cli(args=[])", "cli(prog_name='knnstore')")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    assert done.stderr == "loaded: "


def seconds(code: str) -> float:
    """The shortest of five runs of a Python program."""

    def run() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60, check=False)
        return time.perf_counter() - begin

    return min(run() for _ in range(5))


def test_help_starts_quickly() -> None:
    """`--help` takes at most four times what importing click takes."""
    assert seconds("from knnstore_cli.main import cli; cli(['--help'])") <= 4 * seconds("import click")
