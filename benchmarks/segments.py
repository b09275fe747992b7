"""What it costs that a store is in several segments: the same entries in 1, 2, 4, 8 and 20, searched in turn, and after `compact`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import knnstore
from benchmarks.measuring import in_turn, ratio
from benchmarks.page import spread, table, verdict
from benchmarks.workloads import Bench, fresh_folder, real_queries, real_store
from knnstore.storage.manifest import IndexOptions
from knnstore.store import Datastore

NAME = "segments"
LARGE = False

COUNTS = (1, 2, 4, 8, 20)
BATCHES = {1: 400, 32: 20, 1_024: 1}  # keys asked at a time, and how many times in a round
K, NPROBE = 1_024, 32
ROWS = 65_536  # read of the kept keys at a time; a document of the copies
LEAST = {8: 0.8, 20: 0.5}  # of the rate of one segment, in batches of 1,024: the limits


def run(bench: Bench) -> dict[str, Any]:
    folder = fresh_folder(bench, "segments")
    queries = real_queries(bench).keys
    with knnstore.open(real_store(bench)) as real:
        stores = {}
        for count in COUNTS:
            bench.log(f"{count} segments")
            stores[count] = _copy(real, folder / f"{count}.knn", count)
    found = {"entries": len(stores[1]), "k": K, "nprobe": NPROBE, "rates": _rates(stores, queries, bench.rounds)}
    most = COUNTS[-1]
    bench.log("compacting")
    knnstore.compact(folder / f"{most}.knn")
    compacted = {1: stores[1], most: knnstore.open(folder / f"{most}.knn")}
    found["compacted"] = {"of": most, "segments": len(compacted[most].segments), "rates": _rates(compacted, queries, bench.rounds)}
    return found


def _copy(real: Datastore, path: Path, count: int) -> Datastore:
    """The real store's entries in so many segments, with the same index for each count."""
    n = len(real)
    segment_entries = -(-n // count)

    def batches() -> Iterator[tuple[NDArray[np.float32], NDArray[Any], list[knnstore.EntryDocument]]]:
        for number, segment in enumerate(real.segments):
            for at in range(0, segment.content.entries, ROWS):
                stop = min(at + ROWS, segment.content.entries)
                document = knnstore.EntryDocument(id=f"{number}.{at}", n_entries=stop - at)
                yield segment.exact_keys(at, stop), segment.values.rows(at, stop)[:, 0], [document]

    sample = np.sort(np.random.default_rng(0).choice(n, min(n, 131_072), replace=False))
    (first, *_) = real.segments
    training = first.exact_keys(0, first.content.entries)[sample[sample < first.content.entries]]
    knnstore.create_from_entries(
        path,
        batches(),
        checkpoint=real.manifest.checkpoint,
        dim=real.dim,
        vocab_size=real.manifest.checkpoint.vocab_size,
        options=IndexOptions(segment_entries=segment_entries),
        training_keys=training,
        expected_entries=n,
    )
    return knnstore.open(path)


def _rates(stores: dict[int, Datastore], queries: NDArray[np.float32], rounds: int) -> list[dict[str, Any]]:
    """For each batch and store, its rate over that of the store in one segment."""
    rows = []
    for batch, times in BATCHES.items():
        keys = queries[: batch * times]

        def ask(store: Datastore, keys: NDArray[np.float32] = keys, batch: int = batch) -> None:
            for at in range(0, len(keys), batch):
                store.search(keys[at : at + batch], k=K, nprobe=NPROBE)

        taken = dict(zip(stores, in_turn(rounds, *(partial(ask, store) for store in stores.values())), strict=True))
        rows += [
            {"batch": batch, "asked": count, "segments": len(stores[count].segments), "passes": len(stores[count].stacks)}
            | {"rate": ratio(taken[1], taken[count])}
            for count in stores
        ]
    return rows


def render(result: dict[str, Any], plots: Path) -> str:
    rates = result["rates"]
    batches = list(dict.fromkeys(row["batch"] for row in rates))
    rows = []
    for row in (row for row in rates if row["batch"] == batches[0]):
        cells = {other["batch"]: other["rate"] for other in rates if other["asked"] == row["asked"]}
        limit = LEAST.get(row["asked"])
        said = verdict(cells[batches[-1]]["median"], limit, least=True) if limit is not None else ""
        rows.append([row["segments"], row["passes"], *(spread(cells[batch]) for batch in batches), said])
    compacted = result["compacted"]
    cells = {row["batch"]: row["rate"] for row in compacted["rates"] if row["asked"] == compacted["of"]}
    rows.append([f"{compacted['of']}, compacted to {compacted['segments']}", 1, *(spread(cells[batch]) for batch in batches), ""])
    heads = ["segments", "passes of faiss", *(f"{batch:,} at a time" for batch in batches), f"limit at {batches[-1]:,}"]
    return (
        "## In several segments\n\n"
        f"The rate of searching the same {result['entries']:,} entries in several segments, over that of one segment in the same round: "
        f"k {result['k']:,}, nprobe {result['nprobe']}. All segments of a space are searched in one pass of faiss over their mapped lists. "
        "A list in eight parts is eight short lists: each begins at another place of the memory, and is padded to 32 entries.\n\n"
        + table(heads, rows)
    )
