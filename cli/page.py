"""The page that a command shows on stdout: as wide as the terminal, and without colours and rules where stdout is piped."""

import io
import os
import sys

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.table import Table

__all__ = ["GAP", "Page", "cut_left", "cut_right", "padded"]

PIPED_WIDTH = 120  # columns, where stdout is no terminal and $COLUMNS does not say
GAP = 2  # columns between columns
EIGHTHS = " ▏▎▍▌▋▊▉█"


class Page:
    """Collects what a command shows, then prints it.

    plain: no styles, so words must say what they would. colors: whether there are colours (there may be styles without).
    """

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # in an encoding without a sign that is shown, a question mark for it
        self._console = Console(highlight=False, markup=False, emoji=False)
        if not self._console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
            self._console.width = PIPED_WIDTH
        self.width = self._console.width
        self.plain = self._console.color_system is None
        self.colors = not self.plain and not self._console.no_color
        self._parts: list[RenderableType] = []

    def add(self, *parts: RenderableType) -> None:
        self._parts += parts

    def table(self, *, headers: bool = True) -> Table:
        """A table without borders; on a terminal a rule under its headers."""
        style = box.SIMPLE_HEAD if headers and not self.plain else None
        return Table(box=style, show_edge=False, show_header=headers, pad_edge=False, padding=(0, GAP if style is None else GAP - 1, 0, 0))

    def bar(self, share: float, width: int) -> str:
        """A bar of up to `width` columns, in steps of an eighth of a column, or of # where there are no styles."""
        if self.plain:
            return "#" * round(share * width)
        eighths = round(share * width * 8)
        return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()

    def print(self) -> None:
        if not self.plain:
            for part in self._parts:
                self._console.print(part)
            return
        with self._console.capture() as captured:
            for part in self._parts:
                self._console.print(part)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def padded(text: str, width: int) -> str:
    """The text with spaces up to a width in columns."""
    return text + " " * (width - cell_len(text))


def cut_right(text: str, width: int) -> str:
    """The beginning of a text that is too wide, with … for the rest."""
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)).rstrip() + "…" * (width > 0)


def cut_left(text: str, width: int) -> str:
    """The end of a text that is too wide, with … for the rest."""
    if cell_len(text) <= width:
        return text
    kept, used = len(text), 0
    while kept and used + cell_len(text[kept - 1]) <= width - 1:
        kept -= 1
        used += cell_len(text[kept])
    return "…" * (width > 0) + text[kept:]
