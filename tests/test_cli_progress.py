"""Progress of long commands: lines in a log, bars on a terminal."""

import os
import pty
import re
import sys
from importlib import import_module

import pytest


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
