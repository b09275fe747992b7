"""Peak anonymous memory of `create` on one million tokens of books and on as many as there are: it should not grow with the corpus."""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.measuring import peak_anonymous
from benchmarks.page import table, verdict
from benchmarks.workloads import SAMPLE, Bench, fresh_folder

NAME = "build_memory"
LARGE = True

CHARACTERS = (3_950_000, 56_000_000)  # some 1 and 14 million tokens of the default model
SMOKE_CHARACTERS = (20_000, 40_000)
MOST_GROWTH = 1.1  # peak of the large corpus over that of the small one
MOST_ABOVE_MODEL = 2e9  # bytes

CODE = """
import sys
import knnstore
from knnstore.lm.models import load_language_model
model = load_language_model(None)
print("BEGIN")
with knnstore.create(sys.argv[1], sys.argv[2], model=model) as store:
    print("END")
    print(len(store))
"""


def run(bench: Bench) -> dict[str, Any]:
    """One `create` in a child process for each size."""
    folder = fresh_folder(bench, "build-memory")
    found = []
    for number, characters in enumerate(SMOKE_CHARACTERS if bench.smoke else CHARACTERS):
        texts = folder / f"texts-{number}"
        texts.mkdir()
        _write_texts(bench, texts, characters)
        bench.log(f"create of {characters:,} characters")
        seen = peak_anonymous(CODE, folder / f"{number}.knn", texts)
        found.append(
            {
                "entries": int(seen["printed"][-1]),
                "peak_bytes": seen["peak_bytes"],
                "model_bytes": seen["at_start_bytes"],
                "seconds": round(seen["seconds"], 1),
            }
        )
    shutil.rmtree(folder)
    return {"sizes": found}


def _write_texts(bench: Bench, folder: Path, characters: int) -> None:
    """Books until there are enough characters; where they end too early, or there are none, copies of them under other names."""
    files = sorted(bench.books.rglob("*.txt")) if bench.books is not None and not bench.smoke else [SAMPLE]
    left, number = characters, 0
    while left > 0:
        text = files[number % len(files)].read_text(encoding="utf-8")[:left]
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
        left, number = left - len(text), number + 1


TEXT = """The most anonymous memory (`RssAnon`, sampled every 5 ms in a child process) of `create` with the default model. Beside the
model and the libraries it holds one batch, what training the index takes, and 4 bytes an entry of one segment (of 8,388,608 entries at
most). What is mapped from files is not counted: the system takes it back when memory is short.
"""


def render(result: dict[str, Any], plots: Path) -> str:
    """Its part of docs/benchmarks.md."""
    small, large = result["sizes"]
    growth = large["peak_bytes"] / small["peak_bytes"]
    above = max(size["peak_bytes"] - size["model_bytes"] for size in result["sizes"])
    return "\n".join(
        (
            "## Memory of `create`\n",
            TEXT,
            table(
                ("entries", "peak, MB", "of it the model and libraries, MB", "seconds"),
                (
                    (
                        f"{size['entries']:,}",
                        f"{size['peak_bytes'] / 1e6:,.0f}",
                        f"{size['model_bytes'] / 1e6:,.0f}",
                        f"{size['seconds']:,.0f}",
                    )
                    for size in result["sizes"]
                ),
            ),
            f"- The peak of the large corpus is {growth:.2f} times that of the small one: {verdict(growth, MOST_GROWTH, least=False)}",
            f"- {above / 1e6:,.0f} MB above the model: {verdict(above / 1e6, MOST_ABOVE_MODEL / 1e6, least=False)}\n",
        )
    )
