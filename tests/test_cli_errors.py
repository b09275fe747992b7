"""The command line's exit codes: each kind of failure is one message on stderr, whatever raised it; signals unwind."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from commands import ESCAPE, change_model, cli, fields_of, knnstore, shell, well

from knnstore import errors

ERRORS = [getattr(errors, name) for name in errors.__all__]


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
    other = change_model(default_model_dir, tmp_path / "other")
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
