"""What it costs that a store is in several segments: the same entries in 1, 2, 4, 8 and 20, searched in turn, and after `compact`."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import knnstore
from benchmarks.measuring import in_turn, ratio
from benchmarks.page import spread, table, verdict
from benchmarks.workloads import Bench, fresh_folder, real_queries, real_store
from knnstore.store import Datastore

NAME = "segments"
LARGE = False

COUNTS = (1, 2, 4, 8, 20)
BATCHES = {1: 400, 32: 20, 1_024: 1}  # keys asked at a time, and how many times in a round
K, NPROBE = 1_024, 32
TRAINING = 131_072  # keys: 64 for each of 2,048 lists
ROWS = 65_536  # read of the kept keys at a time; a document of the copies
LEAST = {8: 0.8, 20: 0.5}  # of the rate of one segment, in batches of 1,024: the limits


def run(bench: Bench) -> dict[str, Any]:
    folder = fresh_folder(bench, "segments")
    queries = real_queries(bench).keys
    with knnstore.open(real_store(bench)) as real:
        stores = {}
        for count in COUNTS:
            bench.log(f"{count} segments")
            stores[count] = _copy(real, folder, count)
    found = {"entries": len(stores[1]), "k": K, "nprobe": NPROBE, "rates": _rates(stores, queries, bench.rounds)}
    most = COUNTS[-1]
    bench.log("compacting")
    knnstore.compact(folder / f"{most}.knn")
    compacted = {1: stores[1], most: knnstore.open(folder / f"{most}.knn")}
    found["compacted"] = {"of": most, "segments": len(compacted[most].segments), "rates": _rates(compacted, queries, bench.rounds)}
    return found


def _copy(real: Datastore, folder: Path, count: int) -> Datastore:
    """The real store's entries in so many segments: a merge of stores that were trained on the same keys, so of one space and lists."""
    n, parts = len(real), []
    (segment, *_) = real.segments
    sample = np.sort(np.random.default_rng(0).choice(segment.content.entries, min(segment.content.entries, TRAINING), replace=False))
    training = segment.exact_keys(0, segment.content.entries)[sample]
    bounds = np.linspace(0, n, count + 1).astype(int).tolist()
    for number, (first, stop) in enumerate(pairwise(bounds)):
        parts.append(folder / f"{count}-{number}.knn")
        knnstore.create_from_entries(
            parts[-1],
            _batches(real, first, stop),
            checkpoint=real.manifest.checkpoint,
            dim=real.dim,
            vocab_size=real.manifest.checkpoint.vocab_size,
            training_keys=training,
            expected_entries=n,
        )
    path = parts[0]
    if count > 1:
        path = folder / f"{count}.knn"
        knnstore.merge(parts, path, link=True)
    return knnstore.open(path)


def _batches(real: Datastore, first: int, stop: int) -> Iterator[tuple[NDArray[np.float32], NDArray[Any], list[knnstore.EntryDocument]]]:
    """The entries [first, stop) of all."""
    before = 0
    for segment in real.segments:
        begin, end = max(first - before, 0), min(stop - before, segment.content.entries)
        for at in range(begin, end, ROWS):
            upto = min(at + ROWS, end)
            document = knnstore.EntryDocument(id=str(before + at), n_entries=upto - at)
            yield segment.exact_keys(at, upto), segment.values.rows(at, upto)[:, 0], [document]
        before += segment.content.entries


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
