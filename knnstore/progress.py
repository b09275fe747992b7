"""How long work tells what it is doing. The library is silent by default; the command line draws bars."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Progress", "Stage"]


class Stage(Protocol):
    """One stretch of work."""

    def advance(self, n: int) -> None:
        """n more units are done."""


class Progress(Protocol):
    """Told of the stages of a command, and of things a person should know."""

    def stage(self, title: str, *, total: int | None, unit: str, done: int = 0) -> AbstractContextManager[Stage]:
        """A context manager around one stretch of work. total: units in all, None if unknown; done: units an earlier run did."""

    def note(self, message: str) -> None:
        """One sentence for a person."""


class _SilentStage:
    def advance(self, n: int) -> None:
        pass


class _Silent:
    @contextmanager
    def stage(self, title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Stage]:
        yield _SilentStage()

    def note(self, message: str) -> None:
        pass


SILENT: Progress = _Silent()
