"""What holds for every command: errors and warnings as one line on stderr, exit codes, signals, a reader that went away."""

import contextlib
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

import click

from knnstore.errors import KnnstoreError

from .text import visible

__all__ = ["say", "stderr_is_terminal", "watched"]

EXIT_UNEXPECTED = 1
EXIT_STORAGE = 9
EXIT_INTERRUPTED = 128 + 2  # as shells report SIGINT
EXIT_CLOSED_PIPE = 128 + 13  # as shells report SIGPIPE: a reader such as `head` has what it wanted
EXIT_TERMINATED = 128 + 15  # as shells report SIGTERM

DEBUG = "KNNSTORE_DEBUG"
_COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}


def stderr_is_terminal() -> bool:
    """Whether a person reads stderr as it comes."""
    return sys.stderr is not None and sys.stderr.isatty()


def say(kind: str, message: str) -> None:
    """One message for a person on stderr: `error: …`, `warning: …`, `note: …`."""
    label = f"{kind}:"
    if stderr_is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        label = click.style(label, fg=_COLORS.get(kind), bold=True)
    # A closed stderr must not undo work that went well, nor hide the exit code.
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"{label} {visible(message, keep=chr(10))}", err=True)


@contextlib.contextmanager
def watched(ctx: click.Context) -> Iterator[None]:
    """Around all that a command does: whatever it raises ends in a message on stderr and an exit code (`click.exceptions.Exit`)."""
    try:
        _quiet_libraries()
        with _plain_warnings(), _sigterm_unwinds():
            try:
                yield
            finally:
                sys.stdout.flush()  # here, where a full disk can still be reported
    except click.exceptions.Exit:
        raise
    except click.UsageError as error:
        raise _usage(error, ctx) from error
    except KnnstoreError as error:
        raise _failed(str(error), error.exit_code) from error
    except KeyboardInterrupt as error:
        raise _failed("interrupted.", EXIT_INTERRUPTED) from error
    except BrokenPipeError as error:
        _drop_stdout()
        raise click.exceptions.Exit(EXIT_CLOSED_PIPE) from error
    except OSError as error:
        _drop_stdout()
        raise _failed(_system_message(error), EXIT_STORAGE) from error
    except click.ClickException as error:
        raise _failed(error.format_message(), error.exit_code) from error
    except Exception as error:
        raise _failed(_unexpected(error), EXIT_UNEXPECTED) from error


def _usage(error: click.UsageError, ctx: click.Context) -> click.exceptions.Exit:
    where = error.ctx or ctx
    click.echo(f"{where.get_usage()}\nTry '{where.command_path} --help' for help.\n", err=True)
    return _failed(error.format_message(), error.exit_code)


def _failed(message: str, exit_code: int) -> click.exceptions.Exit:
    say("error", message)
    if _debugging():
        click.echo(traceback.format_exc(), err=True)
    return click.exceptions.Exit(exit_code)


def _debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def _system_message(error: OSError) -> str:
    """What the operating system said, and of which file."""
    what = error.strerror or str(error) or type(error).__name__
    advice = " Free some space, or write elsewhere." if error.errno == errno.ENOSPC else ""
    return f"{error.filename or 'input or output failed'}: {what}.{advice}"


def _unexpected(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    advice = "Give the machine more memory, or the command less work." if isinstance(error, MemoryError) else "This is a bug of knnstore's."
    more = "" if _debugging() else f" Set {DEBUG}=1 and type the command again to see where it happened."
    return f"unexpected: {said}\n{advice}{more}"


def _drop_stdout() -> None:
    """Sends what is still buffered for stdout nowhere: Python would try to write it once more when it ends, and fail again."""
    with contextlib.suppress(OSError, ValueError):
        fd = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings meant for users as `warning: …`; those meant for developers not at all."""
    shown: set[str] = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        text = str(message)
        if (_debugging() or issubclass(category, UserWarning)) and text not in shown:
            shown.add(text)
            say("warning", text)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _quiet_libraries() -> None:
    """Loggers of the model libraries say only what is an error, and they draw no bars where nobody looks. Users' own settings win."""
    defaults = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    if not stderr_is_terminal():
        defaults["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if not _debugging():
        for name, value in defaults.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that temporary files are removed on the way out."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(EXIT_TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: signals are not ours there
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
