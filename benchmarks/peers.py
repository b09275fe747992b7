"""What one would use instead of a datastore to find neighbours, each over the same keys, built once and kept."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads import folder_bytes
from knnstore.storage.segment import Segment
from knnstore.store import Datastore

__all__ = [
    "GRAPH_ENTRIES",
    "Built",
    "FieldIndex",
    "Found",
    "LanceTable",
    "RamLists",
    "StoredKeys",
    "UsearchGraph",
    "exact_top",
    "installed",
]

Keys = NDArray[np.float32]
Found = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]  # distances, values, rows: (n, k), -1 where none was found

CHUNK = 65_536  # keys read at a time
SAMPLES_PER_LIST = 64  # keys that the lists of faiss are trained on, as ours are
QUANTIZER_SAMPLE = 65_536  # keys that faiss trains a product quantizer on at most
N_SUB = 64  # sub-quantizers of 8 bits: the field's own setting
LANCE_ITERATIONS = 10  # of its k-means; its own 50 take several times as long
GRAPH_ENTRIES = 250_000  # a graph of all entries takes an hour to build on two cores


@dataclass(frozen=True, slots=True)
class Built:
    """What it took to build a peer. seconds: of all of it, on the machine as it was then. n_bytes: on disk."""

    seconds: float
    n_entries: int
    n_bytes: int


def installed(*modules: str) -> bool:
    return all(find_spec(module) is not None for module in modules)


class StoredKeys:
    """The kept keys and values of a datastore, in the order of its rows."""

    def __init__(self, store: Datastore) -> None:
        self.segments = store.segments
        self.n, self.dim = len(store), store.dim

    def chunks(self, most: int | None = None) -> Iterator[tuple[int, Keys, NDArray[np.int32]]]:
        """First row, keys (n, dim) float32 and values (n,) int32, a chunk at a time."""
        at, most = 0, self.n if most is None else min(most, self.n)
        for segment in self.segments:
            for first in range(0, segment.content.entries, CHUNK):
                stop = min(first + CHUNK, segment.content.entries, first + most - at)
                if first >= stop:
                    return
                yield at, segment.exact_keys(first, stop), segment.values.rows(first, stop)[:, 0].astype(np.int32)
                at += stop - first

    def sample(self, n: int, seed: int = 0) -> Keys:
        """n keys drawn over all rows."""
        chosen = np.sort(np.random.default_rng(seed).choice(self.n, min(n, self.n), replace=False))
        parts = []
        for at, keys, _ in self.chunks():
            lo, hi = np.searchsorted(chosen, (at, at + len(keys)))
            parts.append(keys[chosen[lo:hi] - at])
        return np.concatenate(parts)


def _once(folder: Path, n_entries: int, build: Callable[[Path], None]) -> Built:
    """Builds into a folder, unless it is there; a folder without its record is half of one."""
    record = folder / "built.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.perf_counter()
        build(folder)
        seconds = time.perf_counter() - began
        record.write_text(json.dumps({"seconds": seconds, "n_entries": n_entries, "n_bytes": folder_bytes(folder)}), encoding="utf-8")
    return Built(**json.loads(record.read_text(encoding="utf-8")))


class FieldIndex:
    """faiss as the field uses it: IndexIVFPQ of residuals, 64 x 8 bits, written and read whole, and an array of values."""

    name = "faiss IVFPQ"

    def __init__(self, folder: Path, keys: StoredKeys, nlist: int) -> None:
        self.folder = folder

        def build(into: Path) -> None:
            index = faiss.IndexIVFPQ(faiss.IndexFlatL2(keys.dim), keys.dim, nlist, N_SUB, 8)
            index.train(keys.sample(max(QUANTIZER_SAMPLE, SAMPLES_PER_LIST * nlist)))
            values = np.empty(keys.n, np.int32)
            for at, some, tokens in keys.chunks():
                index.add(some)
                values[at : at + len(some)] = tokens
            faiss.write_index(index, str(into / "index.faiss"))
            np.save(into / "values.npy", values)

        self.built = _once(folder, keys.n, build)
        self.index = faiss.read_index(str(folder / "index.faiss"))
        self.values = np.load(folder / "values.npy")

    def search(self, keys: Keys, *, k: int, nprobe: int) -> Found:
        self.index.nprobe = nprobe
        distances, rows = self.index.search(keys, k)
        return distances, self.values[rows], rows


class RamLists:
    """faiss's own FastScan index over copies of a segment's lists in memory, and the rotation: the limit of what a datastore can do."""

    name = "faiss FastScan, the same lists in RAM"

    def __init__(self, segment: Segment) -> None:
        space, lists, coarse = segment.space, segment.lists, segment.coarse
        self.rotate = space.rotate
        quantizer = faiss.IndexFlatL2(space.dim)
        quantizer.add(np.zeros((1, space.dim), np.float32) if coarse is None else np.ascontiguousarray(coarse.centroids))
        plain = faiss.IndexIVFPQ(quantizer, space.dim, lists.nlist, space.n_sub, 4)
        plain.by_residual, plain.is_trained = False, True
        faiss.copy_array_to_vector(np.ascontiguousarray(space.centroids).reshape(-1), plain.pq.centroids)
        for number in range(lists.nlist):
            codes, labels = (np.ascontiguousarray(array) for array in lists.entries(number))
            plain.invlists.add_entries(number, len(labels), faiss.swig_ptr(labels), faiss.swig_ptr(codes))
        plain.ntotal = segment.content.entries
        self.index = faiss.IndexIVFPQFastScan(plain, 32)
        self.index.referenced_objects = [quantizer]

    def search(self, keys: Keys, *, k: int, nprobe: int) -> tuple[Keys, NDArray[np.int64]]:
        """Distances and labels."""
        self.index.nprobe = nprobe
        return self.index.search(self.rotate(keys), k)  # type: ignore[no-any-return]


class LanceTable:
    """LanceDB: a table of keys (float32) and values with an IVF_PQ index."""

    name = "LanceDB IVF_PQ"

    def __init__(self, folder: Path, keys: StoredKeys, nlist: int) -> None:
        import lancedb
        import pyarrow
        from lancedb.index import IvfPq

        def batches() -> Iterator[Any]:
            for at, some, tokens in keys.chunks():
                vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(some.reshape(-1)), keys.dim)
                rows = pyarrow.array(np.arange(at, at + len(some)))
                yield pyarrow.record_batch([vectors, pyarrow.array(tokens), rows], schema=schema)

        schema = pyarrow.schema(
            [("vector", pyarrow.list_(pyarrow.float32(), keys.dim)), ("value", pyarrow.int32()), ("row", pyarrow.int64())]
        )

        def build(into: Path) -> None:
            table = lancedb.connect(into).create_table("entries", data=batches(), schema=schema)
            config = IvfPq(distance_type="l2", num_partitions=nlist, num_sub_vectors=N_SUB, max_iterations=LANCE_ITERATIONS)
            table.create_index("vector", config=config)

        self.built = _once(folder, keys.n, build)
        self.table = lancedb.connect(folder).open_table("entries")

    def search(self, keys: Keys, *, k: int, nprobe: int) -> Found:
        query = self.table.search(list(keys) if len(keys) > 1 else keys[0], vector_column_name="vector")
        found = query.nprobes(nprobe).limit(k).select(["value", "row", "_distance"]).to_arrow()
        numbers = found["query_index"].to_numpy() if len(keys) > 1 else np.zeros(len(found), np.int64)
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        places = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
        distances = np.full((len(keys), k), np.inf, np.float32)
        values, rows = np.full((len(keys), k), -1, np.int32), np.full((len(keys), k), -1, np.int64)
        for out, name in ((distances, "_distance"), (values, "value"), (rows, "row")):
            out[numbers, places] = found[name].to_numpy()[order]
        return distances, values, rows


class UsearchGraph:
    """usearch: a graph (HNSW) of keys kept as float16, of the first entries only; nprobe is how far it looks (expansion), in k."""

    name = "usearch HNSW"

    def __init__(self, folder: Path, keys: StoredKeys, n_entries: int = GRAPH_ENTRIES) -> None:
        from usearch.index import Index

        n = min(n_entries, keys.n)
        index = Index(ndim=keys.dim, metric="l2sq", dtype="f16")

        def build(into: Path) -> None:
            values = []
            for at, some, tokens in keys.chunks(n):
                index.add(np.arange(at, at + len(some)), some)
                values.append(tokens)
            index.save(into / "graph.usearch")
            np.save(into / "values.npy", np.concatenate(values))

        self.built = _once(folder, n, build)
        self.index = Index.restore(folder / "graph.usearch", view=False)
        self.values = np.load(folder / "values.npy")

    def search(self, keys: Keys, *, k: int, nprobe: int) -> Found:
        self.index.expansion_search = k * nprobe
        found = self.index.search(keys, k)
        rows = np.atleast_2d(found.keys).astype(np.int64)
        distances = np.atleast_2d(found.distances)
        if rows.shape[1] < k:
            missing = ((0, 0), (0, k - rows.shape[1]))
            distances, rows = np.pad(distances, missing, constant_values=np.inf), np.pad(rows, missing, constant_values=-1)
        return distances, np.where(rows >= 0, self.values[rows], np.int32(-1)), rows


def exact_top(stored: StoredKeys, keys: Keys, k: int, most: int | None = None) -> Found:
    """The k nearest of all kept keys (or of the first `most`), by comparing each."""
    heap = faiss.ResultHeap(len(keys), k)
    values = []
    for at, some, tokens in stored.chunks(most):
        distances, rows = faiss.knn(keys, some, min(k, len(some)))
        heap.add_result(distances, rows + at)
        values.append(tokens)
    heap.finalize()
    return heap.D, np.concatenate(values)[heap.I], heap.I
