"""python -m benchmarks: measures, writes a dated JSON, and writes docs/benchmarks.md again from the newest results."""

import datetime
import importlib
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.measuring import machine
from benchmarks.page import save_results, write_page
from benchmarks.workloads import Bench

ROOT = Path(__file__).resolve().parents[1]
BOOKS = ROOT.parent / "shared" / "books"

# In the order of the page.
SECTIONS = (
    "search_peers",
    "segments",
    "building",
    "decoding",
    "living",
    "starting",
    "build_memory",
    "growth",
    "large",
)


def sections() -> list[Any]:
    """The modules that measure, each with NAME, LARGE, run and render."""
    return [importlib.import_module(f"benchmarks.{name}") for name in SECTIONS]


def chosen(only: str | None, *, large: bool) -> list[Any]:
    """The sections named; or all that take hours if `large`, and all others if not."""
    modules = sections()
    if only is None:
        return [module for module in modules if large == module.LARGE]
    names = [name.strip() for name in only.split(",")]
    known = {module.NAME for module in modules}
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{', '.join(unknown)}: use some of {', '.join(sorted(known))}.", param_hint="--only")
    return [module for module in modules if module.NAME in names]


def log(message: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {message}", err=True)


@click.command()
@click.option("--only", metavar="NAME,...", help="Sections to measure.  [default: all, but for those that take hours]")
@click.option("--large", is_flag=True, help="Measure the sections that take hours instead.")
@click.option("--smoke", is_flag=True, help="Tiny sizes: whether it runs at all. The figures mean nothing, and go to the folder.")
@click.option("--render", is_flag=True, help="Only write the page again.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where workloads are kept.  [default: build/bench]")
@click.option("--books", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Texts.  [default: the sample of the package]")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Rounds of what is repeated.")
def main(only: str | None, large: bool, smoke: bool, render: bool, folder: Path | None, books: Path | None, rounds: int) -> None:
    """What knnstore costs, beside the limit and beside what one would use instead (docs/benchmarks.md)."""
    folder = (folder or ROOT / "build" / "bench") / ("smoke" if smoke else "")
    results, docs = (folder / "results", folder / "docs") if smoke else (ROOT / "benchmarks" / "results", ROOT / "docs")
    if not render:
        if books is None and BOOKS.is_dir():
            books = BOOKS
        bench = Bench(folder=folder, books=books, rounds=1 if smoke else rounds, smoke=smoke, large=large, log=log)
        folder.mkdir(parents=True, exist_ok=True)
        for section in chosen(only, large=large):
            log(f"{section.NAME}:")
            began = time.perf_counter()
            result = section.run(bench)
            took = time.perf_counter() - began
            log(f"{section.NAME}: {took:.0f} s")
            result = {**result, "took_s": round(took), "rounds": bench.rounds}
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            save_results(results, date, machine(), {section.NAME: result})  # after each: a long run that ends early keeps what it has
    click.echo(write_page(results, docs, sections()))


if __name__ == "__main__":
    main()
