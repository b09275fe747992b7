"""How much of the bare model's rate `create` keeps: the same windows, batches and dtype, side by side in one run.

    python benchmarks/create_rate.py TEXT [--model M] [--rounds 3] [--characters N]

Each round times `create` (model loading and calibration left out) and then the model's trunk over the same batches, without
hooks, codes or files. Prints one JSON object; the figure to look at is the ratio, on the wall clock and in seconds of cores, which
other work on the machine disturbs less. The times are the machine's mood.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

import knnstore
from knnstore.lm.embed import Embedder, SegmentTokens, right_padded
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.progress import Stage


class StageClock:
    """A Progress that adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, NDArray[np.float64]] = {}

    @contextmanager
    def stage(self, title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Stage]:
        began = clocks()
        yield _NoStage()
        self.seconds[title] = self.seconds.get(title, np.zeros(2)) + clocks() - began

    def note(self, message: str) -> None:
        pass


class _NoStage:
    def advance(self, n: int) -> None:
        pass


def clocks() -> NDArray[np.float64]:
    """Seconds on the wall, and of all cores that this process had."""
    return np.array([time.perf_counter(), time.process_time()])


def trunk_seconds(store: knnstore.Datastore, model: LanguageModel) -> tuple[NDArray[np.float64], int]:
    """Seconds (wall, cores) of the bare trunk over all windows of a store, and how many entries they give."""
    embedder = Embedder(model, store.manifest.key.layer)
    trunk, seconds, entries = model.model.base_model, np.zeros(2), 0
    for segment in store.segments:
        rule = segment.content.windows
        assert rule is not None
        tokens = SegmentTokens(segment.values, segment.contexts, context=rule.context, stride=rule.stride)
        for batch in embedder.batches(tokens, np.arange(len(tokens.windows))):
            ids = right_padded([tokens.inputs(int(window)) for window in batch], model.model.device)
            began = clocks()
            with torch.inference_mode():
                trunk(input_ids=ids, use_cache=False)
            seconds += clocks() - began
        entries += segment.content.entries
    return seconds, entries


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default=None, help="As for `knnstore create`.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--characters", default=None, type=int, help="Of the text at most.")
@click.option("--dtype", default=None)
def main(text: Path, model: str | None, rounds: int, characters: int | None, dtype: str | None) -> None:
    """Measure `create` beside the bare trunk."""
    loaded = load_language_model(model, dtype=dtype)
    created: list[NDArray[np.float64]] = []
    bare: list[NDArray[np.float64]] = []
    entries = 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "text.txt"
        corpus.write_text(text.read_text(encoding="utf-8")[:characters], encoding="utf-8")
        clock = StageClock()
        for number in range(rounds):
            clock = StageClock()
            began = clocks()
            store = knnstore.create(Path(folder) / f"{number}.knn", corpus, model=loaded, progress=clock)
            created.append(clocks() - began - clock.seconds["fitting λ and temperature"])
            seconds, entries = trunk_seconds(store, loaded)
            bare.append(seconds)
            store.close()
    report = {
        "model": loaded.checkpoint.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "entries": entries,
        "stages_s": {title: round(float(seconds[0]), 2) for title, seconds in clock.seconds.items()},
    }
    for at, name in enumerate(("wall", "cores")):
        ratios = [float(trunk[at] / whole[at]) for trunk, whole in zip(bare, created, strict=True)]
        report[name] = {
            "create_s": [round(float(whole[at]), 2) for whole in created],
            "trunk_s": [round(float(trunk[at]), 2) for trunk in bare],
            "ratio": {"median": round(statistics.median(ratios), 3), "all": [round(ratio, 3) for ratio in ratios]},
        }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
