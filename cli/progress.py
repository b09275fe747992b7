"""Progress of long work on stderr: bars with rate and time left on a terminal, one line for each finished stage elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

from knnstore.progress import SILENT, Progress, Stage

from .reporting import say, stderr_is_terminal
from .text import shown_bytes, shown_duration, visible

__all__ = ["shown_progress"]


@contextmanager
def shown_progress(*, starting: str | None, quiet: bool = False, transient: bool = False) -> Iterator[Progress]:
    """What a command hands to the library as `progress`.

    starting: what goes on before the first stage; None where that draws bars of its own. transient: leave nothing.
    """
    if quiet:
        yield SILENT
    elif stderr_is_terminal():
        shown = _TerminalProgress(_bars(transient), starting)
        try:
            yield shown
        finally:
            shown.end()
    else:
        yield _PlainProgress()


class _PlainStage:
    def __init__(self, done: int) -> None:
        self.n = done

    def advance(self, n: int) -> None:
        self.n += n


class _PlainProgress:
    """For logs: nothing while a stage runs, one line at its end."""

    @contextmanager
    def stage(self, title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Stage]:
        stage = _PlainStage(done)
        begin = time.monotonic()
        yield stage
        took = time.monotonic() - begin
        amount = f"{_amount(stage.n, unit)} in " if unit and stage.n > 1 else ""
        rate = f" ({_rate((stage.n - done) / took, unit)})" if amount and took > 1.0 else ""
        click.echo(f"{title}: {amount}{shown_duration(took)}{rate}", err=True)

    def note(self, message: str) -> None:
        say("note", message)


def _amount(n: float, unit: str, total: float | None = None) -> str:
    """`12,288 of 40,960 tokens`, `1.2 GB of 3.5 GB`."""
    if unit == "bytes":
        return shown_bytes(n) if total is None else f"{shown_bytes(n)} of {shown_bytes(total)}"
    return f"{n:,.0f} {unit}" if total is None else f"{n:,.0f} of {total:,.0f} {unit}"


def _rate(speed: float, unit: str) -> str:
    if unit == "bytes":
        return f"{shown_bytes(speed)}/s"
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


class _Amount(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        unit = task.fields["unit"]
        return Text("" if not unit or task.total == 1 else _amount(task.completed, unit, task.total), style="progress.download")


class _Rate(rich_progress.ProgressColumn):
    """Units a second: over the last half minute while it runs, over all when it is done."""

    def render(self, task: rich_progress.Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        return Text("" if speed is None or not unit or task.total == 1 else _rate(speed, unit), style="progress.data.speed")


class _Time(rich_progress.ProgressColumn):
    """Time left, or, where it is not known or the stage is done, time taken."""

    max_refresh = 0.5

    def render(self, task: rich_progress.Task) -> Text:
        left = None if task.finished else task.time_remaining
        if left is not None:
            return Text(f"{shown_duration(max(1.0, round(left)))} left", style="progress.remaining")
        taken = task.finished_time if task.finished and task.finished_time is not None else task.elapsed
        return Text("" if taken is None else shown_duration(taken), style="progress.elapsed")


def _bars(transient: bool) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.SpinnerColumn(finished_text="[green]✓[/]"),
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=24),
        _Amount(),
        _Rate(),
        _Time(),
        console=Console(stderr=True, highlight=False, markup=False, emoji=False),
        refresh_per_second=5,
        transient=transient,
    )


class _TerminalStage:
    def __init__(self, bars: rich_progress.Progress, task: rich_progress.TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, n: int) -> None:
        self._bars.advance(self._task, n)


class _TerminalProgress:
    """Each stage is one line; those that are done stay."""

    def __init__(self, bars: rich_progress.Progress, starting: str | None) -> None:
        self._bars = bars
        self._starting: rich_progress.TaskID | None = None
        if starting is not None:
            self._starting = bars.add_task(starting, total=None, unit="")
            bars.start()

    def end(self) -> None:
        self._started()
        self._bars.stop()

    def _started(self) -> None:
        """What went on before the first stage is over."""
        if self._starting is not None:
            self._bars.remove_task(self._starting)
            self._starting = None

    @contextmanager
    def stage(self, title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Stage]:
        self._started()
        self._bars.start()
        task = self._bars.add_task(visible(title), total=total, completed=done, unit=unit)
        yield _TerminalStage(self._bars, task)
        # The stage may have come to its end with less than it foresaw, or without knowing how much there would be.
        completed = next(shown.completed for shown in self._bars.tasks if shown.id == task)
        self._bars.update(task, total=completed or 1, completed=completed or 1)

    def note(self, message: str) -> None:
        say("note", message)
