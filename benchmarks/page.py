"""docs/benchmarks.md and its plots, from the results of the sections."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "figure", "newest", "picture", "save", "save_results", "spread", "table", "verdict", "write_page"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart without red and green (Okabe and Ito 2008)
INK = "#808080"  # of axes and words: seen on white and on black

HEAD = """# Benchmarks

What knnstore costs, beside the limit and beside what one would use instead. This page is written by

<!-- not run: it takes most of an hour -->
```sh
make bench
```

and `make bench-large`, which measures what takes hours. Each run leaves a dated file in `benchmarks/results/`; a section shows the newest.

Every figure to look at is a **ratio of things that were timed in turn in one run**, on the same keys: the median of the rounds, and in
brackets the least and the greatest. A time that stands beside it is that machine's.
"""


def figure(width: float = 7.0, height: float = 4.2, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure with axes side by side, in ink that is seen on white and on black."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": INK,
        "grid.alpha": 0.25,
        "axes.grid": True,
        "axes.facecolor": "none",
        "legend.facecolor": "none",
        "legend.edgecolor": INK,
        "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    }
    with matplotlib.rc_context(style):
        made = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        return made, list(made.subplots(1, columns, squeeze=False)[0])


def save(made: "Figure", path: Path) -> None:
    """Writes a figure as SVG: the same bytes for the same figure."""
    import matplotlib

    for axes in made.axes:
        if axes.get_legend() is not None:
            for text in axes.get_legend().get_texts():
                text.set_color(INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        made.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def picture(path: Path, alt: str) -> str:
    """A line of Markdown that shows a plot of the page. alt: what is seen in it."""
    return f"![{alt}]({path.parent.name}/{path.name})\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def spread(found: Mapping[str, float], digits: int = 2) -> str:
    """A ratio as it stands on the page: median (least to greatest)."""
    return f"{found['median']:.{digits}f} ({found['least']:.{digits}f} to {found['greatest']:.{digits}f})"


def verdict(found: float, limit: float, *, least: bool) -> str:
    """Whether a figure is within what was asked for. least: the limit is the least it may be, else the most."""
    met = found >= limit if least else found <= limit
    return f"{'met' if met else '**not met**'} (asked for: at {'least' if least else 'most'} {limit:g})"


def save_results(folder: Path, date: str, machine: Mapping[str, Any], sections: Mapping[str, Any]) -> Path:
    """Adds sections to the file of a day. folder: of all results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["sections"] if path.exists() else {}
    content = {"date": date, "machine": machine, "sections": {**before, **sections}}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def newest(folder: Path) -> dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """The newest result of each section by its name: date, machine, result."""
    found: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        day = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: (day["date"], day["machine"], result) for name, result in day["sections"].items()}
    return found


def write_page(results: Path, docs: Path, sections: Sequence[Any]) -> Path:
    """Writes benchmarks.md and the folder benchmarks/ beside it. sections: modules, in the order of the page."""
    found = newest(results)
    shown = [section for section in sections if section.NAME in found]
    parts = [HEAD]
    machines: list[Mapping[str, Any]] = []
    bodies = []
    for section in shown:
        date, machine, result = found[section.NAME]
        if machine not in machines:
            machines.append(machine)
        body = section.render(result, docs / "benchmarks").rstrip() + "\n"
        bodies.append(f"{body}\nMeasured on {date}{'' if machine == machines[0] else f', machine {machines.index(machine) + 1}'}.\n")
    parts += [_machine_text(number, machine, len(machines)) for number, machine in enumerate(machines, start=1)]
    path = docs / "benchmarks.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts + bodies), encoding="utf-8")
    return path


def _machine_text(number: int, machine: Mapping[str, Any], of: int) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    name = f"Machine {number}" if of > 1 else "The machine"
    instructions = f" ({', '.join(machine['instructions'])})" if machine["instructions"] else ""
    return (
        f"{name}: {machine['cores']} cores of {machine['cpu']}{instructions}, {machine['memory_gb']:g} GB, {machine['system']}, "
        f"Python {machine['python']}; {versions}.\n"
    )
