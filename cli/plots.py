"""Figures of what commands print, drawn with matplotlib (the extra `plot`), which is loaded only here."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnstore.errors import InvalidArgumentError, MissingExtraError

from .output import check_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot", "evaluation_plot", "save_plot", "surface_plot"]

SUFFIXES = (".png", ".svg", ".pdf")
GAIN, LOSS, NEITHER = "#0072b2", "#d55e00", "#999999"  # told apart without red and green (Okabe and Ito 2008)


def check_plot(path: str) -> None:
    """Whether a figure can be drawn to this path: said before the work it shows is done.

    Raises MissingExtraError without matplotlib, InvalidArgumentError for another kind of file, NotFoundError, StorageError.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError('--plot needs matplotlib. Install with: pip install "knnstore[plot]"')
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InvalidArgumentError(f"{path}: no kind of figure. Give the file one of these endings: {', '.join(SUFFIXES)}.")
    check_file(path)


def save_plot(figure: "Figure", path: str) -> None:
    """Writes a figure in the form its suffix names."""
    figure.savefig(path, dpi=150)


def evaluation_plot(fields: Mapping[str, Any], path: str) -> None:
    """Which tokens gain and lose, and by how much; perplexity by how often a token occurs. fields: as `evaluate --json` prints them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _gains(left, fields["histogram"])
    _frequencies(right, fields["frequency"])
    lm, mixed = fields["perplexity"]["lm"], fields["perplexity"]["mixed"]
    settings = f"k {fields['k']}, mean λ {fields['lambda']:.3f}, temperature {fields['temperature']:g}"
    figure.suptitle(f"{fields['tokens']:,} tokens: perplexity {lm:.2f} without, {mixed:.2f} with the datastore ({settings})")
    save_plot(figure, path)


def _gains(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    full = [number for number, item in enumerate(bins) if item["tokens"]]
    shown = bins[full[0] : full[-1] + 1]
    colors = [LOSS if item["high"] <= 0 else GAIN if item["low"] >= 0 else NEITHER for item in shown]
    places = range(len(shown))
    axes.bar(places, [100.0 * item["share"] for item in shown], color=colors, width=0.9)
    edges = {place - 0.5: item["low"] for place, item in enumerate(shown)} | {place + 0.5: item["high"] for place, item in enumerate(shown)}
    ticks = {place: edge for place, edge in edges.items() if math.isfinite(edge)}  # the outermost bins have no end
    axes.set_xticks(list(ticks), [f"{edge:g}" for edge in ticks.values()])
    axes.set_xlabel("log2(p / p_LM): bits lost and gained")
    axes.set_ylabel("tokens, %")
    axes.set_title("helped and hurt")


def _frequencies(axes: "Axes", buckets: Sequence[Mapping[str, Any]]) -> None:
    shown = [item for item in buckets if item["tokens"]]
    places = range(len(shown))
    for name, title, color, marker in (("lm", "without", NEITHER, "o"), ("mixed", "with the datastore", GAIN, "s")):
        axes.plot(places, [item["perplexity"][name] for item in shown], color=color, marker=marker, label=title)
    names = ["never" if item["high"] == 0 else f"{item['low']:,.0f}+" for item in shown]
    axes.set_xticks(list(places), [f"{name}\n{100.0 * item['share']:.0f}%" for name, item in zip(names, shown, strict=True)])
    axes.set_yscale("log")
    axes.set_xlabel("occurrences per million entries; share of tokens")
    axes.set_ylabel("perplexity")
    axes.set_title("by how often the token occurs in the datastore")
    axes.legend()


def surface_plot(fields: Mapping[str, Any], path: str) -> None:
    """Perplexity over temperature and a fixed λ, as lines of equal perplexity, and the best of it. fields: as `tune --json` prints them."""
    from matplotlib.figure import Figure

    surface, calibration = fields["surface"], fields["calibration"]
    temperatures, lambdas, heights = surface["temperatures"], surface["lambdas"], surface["perplexity"]
    lm = calibration["perplexity"]["lm"]
    lowest = min(min(row) for row in heights)
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    # Most of the surface lies above the LM's own perplexity, without a bound: the levels are for what is below it, and a little more.
    step = max(lm - lowest, 1e-3 * lm) / 10.0
    columns = [[row[i] for row in heights] for i in range(len(lambdas))]
    filled = axes.contourf(temperatures, lambdas, columns, levels=[lowest + step * i for i in range(16)], cmap="viridis_r", extend="max")
    figure.colorbar(filled, ax=axes, label="perplexity", format="{x:.1f}")
    axes.contour(temperatures, lambdas, columns, levels=[lm], colors="white", linestyles="dashed")
    axes.plot([calibration["temperature"]], [calibration["lambda"]], marker="x", color=LOSS, markersize=10, markeredgewidth=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("temperature (squared distance)")
    axes.set_ylabel("λ, the same for every token")
    axes.set_title(f"{calibration['tokens']:,} tokens, k {calibration['k']:,}: {lowest:.2f} at best; dashed: {lm:.2f}, the model alone")
    save_plot(figure, path)
