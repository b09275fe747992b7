"""What it costs that a store lives: appends to a small and a large one, many small appends, merging beside copying.

    python benchmarks/living.py FOLDER [--entries 3000000] [--appends 2000] [--dim 256]

Makes stores of generated keys in FOLDER (some hundred bytes an entry; kept for the next run). Prints one JSON object. Each figure to
look at is a ratio of things measured side by side in this run; the times are the machine's mood.
"""

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import knnstore
from knnstore import Checkpoint, EntryDocument
from knnstore.storage import files

VOCABULARY = 1_000
CLUSTERS = 512
DOCUMENT = 3_000  # entries of a document of the large stores
CHECKPOINT = Checkpoint(name="none", revision=None, identity="ab" * 32, tokenizer=None, architecture="None", vocab_size=VOCABULARY)


class CountingDisk(files.Disk):
    """The disk, counting the bytes that are written to it."""

    written = 0

    def write(self, fd: int, data: memoryview, path: Path) -> None:
        CountingDisk.written += len(data)
        super().write(fd, data, path)

    def pwrite(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        CountingDisk.written += len(data)
        super().pwrite(fd, data, offset, path)


class Drawn:
    """Keys around common centers, reproducible by number."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._centers = np.random.default_rng(0).standard_normal((CLUSTERS, dim)).astype(np.float32)

    def batch(self, seed: Sequence[int], n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Keys (n, dim) float32 and values (n,)."""
        rng = np.random.default_rng(seed)
        keys = self._centers[rng.integers(0, CLUSTERS, n)] + 0.5 * rng.standard_normal((n, self.dim), dtype=np.float32)
        return keys, rng.integers(0, VOCABULARY, n)


def make(path: Path, n: int, seed: int, drawn: Drawn) -> None:
    """A store of n entries, unless it is there."""
    if (path / "CURRENT").exists():
        return

    def batches() -> Iterator[tuple[Any, Any, list[EntryDocument]]]:
        for number in range(n // DOCUMENT):
            yield *drawn.batch((seed, number), DOCUMENT), [EntryDocument(id=f"{seed}/{number}", n_entries=DOCUMENT)]

    training = drawn.batch((seed, n), 1 << 17)[0]
    knnstore.create_from_entries(
        path,
        batches(),
        checkpoint=CHECKPOINT,
        dim=drawn.dim,
        vocab_size=VOCABULARY,
        training_keys=training,
        expected_entries=n,
    )


def small_document(name: str, n: int) -> EntryDocument:
    """A document of n words."""
    words = [f"word{i % 97}" for i in range(n)]
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    return EntryDocument(id=name, n_entries=n, text=" ".join(words), starts=starts, ends=starts + [len(word) for word in words])


def append_one(path: Path, number: int, n: int, drawn: Drawn) -> float:
    """Seconds that it takes to append one small document."""
    keys, values = drawn.batch((7, number), n)
    began = time.perf_counter()
    knnstore.append_entries(path, [(keys, values, [small_document(f"new {number}", n)])])
    return time.perf_counter() - began


def append_costs(small: Path, large: Path, drawn: Drawn, *, rounds: int = 20, n: int = 64) -> dict[str, Any]:
    """Time and bytes of appends of one small document to a small and a large store, interleaved."""
    seconds: dict[Path, list[float]] = {small: [], large: []}
    written = []
    first = time.time_ns() // 1_000_000 % 10**9
    for number in range(first, first + rounds):
        for path, times in seconds.items():
            before = CountingDisk.written
            times.append(append_one(path, number, n, drawn))
            if path == large:
                with knnstore.open(large) as store:
                    lmdb = store.manifest.segments[-1].content.size_of("contexts.lmdb")
                written.append(CountingDisk.written - before + lmdb - (large / f"manifests/{store.snapshot}.json").stat().st_size)
    return {
        "entries": n,
        "seconds": {path.name: statistics.median(times) for path, times in seconds.items()},
        "ratio": statistics.median(seconds[large]) / statistics.median(seconds[small]),
        "bytes_without_manifest": {"least": min(written), "median": statistics.median(written), "most": max(written)},
        "allowed": 200 * n + 65_536,
    }


def many_appends(path: Path, base: Path, drawn: Drawn, *, n_appends: int, n: int = 64) -> dict[str, Any]:
    """The number of segments after many small appends, and the rate of searching them beside the compacted store."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base, path)
    began = time.perf_counter()
    most = 0
    for number in range(n_appends):
        append_one(path, number, n, drawn)
        most = max(most, _segments(path))
    seconds = time.perf_counter() - began
    n_segments = _segments(path)
    compacted = path.with_suffix(".compacted")
    shutil.rmtree(compacted, ignore_errors=True)
    shutil.copytree(path, compacted)
    knnstore.compact(compacted)
    queries = drawn.batch((8, 8), 4_096)[0]
    with knnstore.open(path) as many, knnstore.open(compacted) as one:
        for store in (many, one):
            store.search(queries)
        rates: dict[str, list[float]] = {"appended": [], "compacted": []}
        for _ in range(9):
            for name, store in (("appended", many), ("compacted", one)):
                began = time.perf_counter()
                store.search(queries)
                rates[name].append(len(queries) / (time.perf_counter() - began))
        n_compacted = len(one.manifest.segments)
    return {
        "appends": n_appends,
        "seconds_an_append": seconds / n_appends,
        "segments": n_segments,
        "segments_at_most": most,
        "segments_compacted": n_compacted,
        "search_ratio": statistics.median(a / b for a, b in zip(rates["appended"], rates["compacted"], strict=True)),
    }


def _segments(path: Path) -> int:
    with knnstore.open(path) as store:
        return len(store.manifest.segments)


def merge_rates(a: Path, b: Path, folder: Path, *, rounds: int = 5) -> dict[str, Any]:
    """Seconds of `cp -r` and `sync -f`, of merge and of merge with links, for the same two stores, interleaved."""
    seconds: dict[str, list[float]] = {"copy": [], "merge": [], "link": []}
    size = sum(file.stat().st_size for path in (a, b) for file in path.rglob("*") if file.is_file())
    for _ in range(rounds):
        for name, times in seconds.items():
            out = folder / "out.knn"
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            began = time.perf_counter()
            if name == "copy":
                out.mkdir()
                subprocess.run(["cp", "-r", str(a), str(b), str(out)], check=True)
                subprocess.run(["sync", "-f", str(out)], check=True)
            else:
                knnstore.merge([a, b], out, link=name == "link").close()
            times.append(time.perf_counter() - began)
    copy, merged, linked = (statistics.median(times) for times in seconds.values())
    return {"bytes": size, "seconds": {"copy": copy, "merge": merged, "link": linked}, "merge": copy / merged, "link": copy / linked}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--entries", default=3_000_000, show_default=True)
@click.option("--appends", default=2_000, show_default=True)
@click.option("--dim", default=256, show_default=True)
def main(folder: Path, entries: int, appends: int, dim: int) -> None:
    """Measures in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn(dim)
    a, b, small = folder / "a.knn", folder / "b.knn", folder / "small.knn"
    for path, n, seed in ((a, entries, 1), (b, entries, 2), (small, entries // 10, 3)):
        make(path, n, seed, drawn)
    figures: dict[str, Any] = {"entries": entries, "dim": dim, "merge": merge_rates(a, b, folder)}
    files.disk.__class__ = CountingDisk
    figures["append"] = append_costs(small, a, drawn)
    figures["many"] = many_appends(folder / "many.knn", small, drawn, n_appends=appends)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
