"""A datastore of 100 million generated entries: made in chunks, never kept as floats; and the same entries in other numbers of lists.

It is written segment by segment, as `create_from_entries` does it, but from a seed: so that a run that was cut off continues after its last
segment. The exact neighbours of some queries are found on the way, while the keys are there.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

import knnstore
from benchmarks.workloads import Bench, GeneratedKeys
from knnstore import Checkpoint, IndexOptions
from knnstore.build import (
    Index,
    StagedSegment,
    begin_store,
    blank_manifest,
    encode_runs,
    load_index,
    sample_size,
    save_index,
    staged_index,
    staged_segment,
    take_back,
    train_index,
)
from knnstore.changes import Change, commit_change
from knnstore.errors import NotFoundError
from knnstore.format import SEGMENT_ENTRIES, SEGMENT_FILE
from knnstore.growth import Ground
from knnstore.joining import copy_documents
from knnstore.progress import SILENT
from knnstore.rewriting import Rewriting
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.checkpoint import KeyLayer
from knnstore.storage.coarse import Coarse, choose_nprobe, train_coarse
from knnstore.storage.jobs import run_attempt, run_job
from knnstore.storage.lists import rows_of
from knnstore.storage.manifest import Operation
from knnstore.storage.segment import Segment
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment, tidy_segment

__all__ = ["CHECKPOINT", "Plan", "Truth", "keys_of", "made_store", "relisted_store", "training_keys"]

Keys = NDArray[np.float32]

VOCABULARY = 32_000
DOCUMENT = 4_096  # entries
CANDIDATES = 32  # new lists that an entry of an old list may be in
CHECKPOINT = Checkpoint(name="none", revision=None, identity="ab" * 32, tokenizer=None, architecture="None", vocab_size=VOCABULARY)
TRAINING = 1 << 40  # the number of the chunk that is trained on: none of those that are stored


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made. chunk: entries at a time. n_queries: those whose k nearest are found exactly."""

    n_entries: int
    dim: int
    segment_entries: int = SEGMENT_ENTRIES
    chunk: int = 1 << 17
    n_queries: int = 128
    k: int = 1_024
    seed: int = 0

    def sizes(self) -> list[int]:
        """Entries of each segment."""
        return [min(self.segment_entries, self.n_entries - at) for at in range(0, self.n_entries, self.segment_entries)]


@dataclass(frozen=True, slots=True)
class Truth:
    """Exact squared distances and places (segment * segment_entries + row) of the k nearest, (n, k) each, ascending."""

    distances: NDArray[np.float32]
    places: NDArray[np.int64]

    @classmethod
    def of_all(cls, parts: "list[Truth]", k: int) -> "Truth":
        distances = np.concatenate([part.distances for part in parts], axis=1)
        places = np.concatenate([part.places for part in parts], axis=1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        return cls(np.take_along_axis(distances, order, 1), np.take_along_axis(places, order, 1))


def keys_of(plan: Plan) -> GeneratedKeys:
    return GeneratedKeys(plan.dim, plan.seed)


def training_keys(plan: Plan) -> Keys:
    """Keys to train on that are not stored, as many as a store of this size samples."""
    return keys_of(plan).chunk(TRAINING, sample_size(plan.n_entries, plan.dim))


class _Nearest:
    """The k nearest of some queries among keys that come in chunks, by brute force."""

    def __init__(self, queries: Keys, k: int) -> None:
        self._queries, self._k = queries, k
        self._norms = np.square(queries).sum(axis=1)
        self.found = [(np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in queries]

    def take(self, keys: Keys, place: int) -> None:
        rough = self._queries @ keys.T
        rough *= -2
        rough += np.square(keys).sum(axis=1)
        for number, (distances, places) in enumerate(self.found):
            bound = distances.max() - self._norms[number] if len(distances) == self._k else np.inf
            near = np.flatnonzero(rough[number] < bound)
            both = np.concatenate((distances, rough[number][near] + self._norms[number]))
            of_both = np.concatenate((places, near + place))
            if len(both) > self._k:
                kept = np.argpartition(both, self._k - 1)[: self._k]
                both, of_both = both[kept], of_both[kept]
            self.found[number] = both, of_both

    def truth(self) -> Truth:
        n = min(len(distances) for distances, _ in self.found)
        orders = [np.argsort(distances, kind="stable")[:n] for distances, _ in self.found]
        pairs = [(distances[order], places[order]) for (distances, places), order in zip(self.found, orders, strict=True)]
        return Truth(np.stack([distances for distances, _ in pairs]), np.stack([places for _, places in pairs]))


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


def made_store(bench: Bench, plan: Plan) -> tuple[Path, Truth, dict[str, float]]:
    """The store, the exact neighbours of `keys_of(plan).queries(n_queries)`, and the seconds of each stage of making it. Made once."""
    path = bench.folder / f"large-{plan.n_entries}.knn"
    notes = bench.folder / f"large-{plan.n_entries}"
    notes.mkdir(parents=True, exist_ok=True)
    if not (path / "CURRENT").exists():
        bench.log(f"making {path.name}, {len(plan.sizes())} segments (kept for the next run)")
        _make(bench, plan, path, notes)
    parts, seconds = [], Counter(json.loads((notes / "training.json").read_text(encoding="utf-8")))
    for number in range(len(plan.sizes())):
        with np.load(notes / f"{number}.npz") as arrays:
            parts.append(Truth(arrays["distances"], arrays["places"]))
            seconds.update(json.loads(str(arrays["seconds"])))
    return path, Truth.of_all(parts, plan.k), dict(seconds)


def _make(bench: Bench, plan: Plan, path: Path, notes: Path) -> None:
    arguments = {"command": "benchmarks.large", **asdict(plan)}
    store, store_uuid, name = begin_store(path, arguments)
    options = IndexOptions(segment_entries=plan.segment_entries, seed=plan.seed)
    with run_job(store, name, arguments) as job:
        take_back(store, job)
        index = _index(bench, plan, job, options, notes)
        staged = []
        for number, n in enumerate(plan.sizes()):
            staged.append(_segment(bench, plan, job, index, number, n, notes))
        n_documents = sum(-(-n // DOCUMENT) for n in plan.sizes())
        nlist = 1 if index[1] is None else index[1].nlist
        start = blank_manifest(
            store_uuid,
            checkpoint=CHECKPOINT,
            key=KeyLayer(layer="external", dim=plan.dim),
            tokens=None,
            windows=None,
            index=options,
            nprobe=choose_nprobe(plan.n_entries, nlist),
        )
        change = Change(
            operation=Operation(name="create_from_entries", arguments={}, counts={"documents": n_documents, "entries": plan.n_entries}),
            **staged_index(job, plan.dim),
            segments=[staged_segment(segment) for segment in staged],
            documents={"default": n_documents},
        )
        commit_change(store, start, change, job=job)


def _index(bench: Bench, plan: Plan, job: Path, options: IndexOptions, notes: Path) -> Index:
    try:
        return load_index(job, plan.dim)
    except NotFoundError:
        bench.log("training the index")
    began = time.perf_counter()
    index = train_index(training_keys(plan), plan.n_entries, options)
    save_index(job, *index)
    (notes / "training.json").write_text(json.dumps({"train": time.perf_counter() - began}), encoding="utf-8")
    return load_index(job, plan.dim)


def _segment(bench: Bench, plan: Plan, job: Path, index: Index, number: int, n: int, notes: Path) -> StagedSegment:
    """One segment, unless it is there, with the neighbours in it in `notes`."""
    name = uuid.uuid5(uuid.NAMESPACE_OID, f"{plan.seed} {number}").hex
    folder, runs = job / "segments" / name, (("default", 0, n),)
    if (folder / SEGMENT_FILE).exists() and (notes / f"{number}.npz").exists():
        tidy_segment(folder)
        return StagedSegment(folder, runs)
    clock, source = _Clock(), keys_of(plan)
    nearest = _Nearest(source.queries(plan.n_queries), plan.k)
    rng = np.random.default_rng((plan.seed, number))
    with DocumentsWriter(folder, uuid=name, vocab_size=VOCABULARY) as documents, clock("documents"):
        for at in range(0, n, DOCUMENT):
            documents.add(rng.integers(0, VOCABULARY, min(DOCUMENT, n - at), np.uint16))
            documents.end_document(
                id=f"{number}/{at}", source="", prefix=(), metadata={}, content_hash=None, n_chars=None, part=0, last=True, first_token=0
            )
        documents.finish()
    chunks_before = number * -(-plan.segment_entries // plan.chunk)
    with CodesWriter(folder, n_rows=n, space=index[0], keys=None) as codes:
        for at in range(0, n, plan.chunk):
            with clock("generate"):
                keys = source.chunk(chunks_before + at // plan.chunk, min(plan.chunk, n - at))
            with clock("encode"):
                encode_runs(codes, [at], [keys], *index)
            with clock("truth"):
                nearest.take(keys, number * plan.segment_entries + at)
        distortion = codes.distortion_sum / codes.distortion_count
    with clock("lists"):
        finish_segment(
            folder,
            uuid=name,
            n_documents=documents.n_documents,
            text=False,
            space=index[0],
            coarse=index[1],
            keys=None,
            distortion=distortion,
            dtype=None,
            windows=None,
        )
    truth, seconds = nearest.truth(), dict(clock.seconds)
    np.savez(notes / f"{number}.npz", distances=truth.distances, places=truth.places, seconds=json.dumps(seconds))
    each = ", ".join(f"{stage} {1e6 * took / n:.1f}" for stage, took in seconds.items())
    bench.log(f"segment {number + 1} of {len(plan.sizes())}: {sum(seconds.values()):.0f} s; µs an entry: {each}")
    return StagedSegment(folder, runs)


def relisted_store(bench: Bench, plan: Plan, source: Path, nlist: int) -> Path:
    """The same entries and codes in another number of lists; the rest is linked. Made once.

    An entry goes to the nearest of the 32 new lists that are nearest to its old one, by its code: a hundredth of what comparing it with
    all of them takes.
    """
    path = source.with_name(f"{source.stem}-{nlist}.knn")
    if (path / "relisted").exists():
        return path
    bench.log(f"making {path.name} (kept for the next run)")
    if not (path / "CURRENT").exists():
        knnstore.merge([source], into=path, link=True).close()
    store = StoreFolder(path)
    base, pin = open_snapshot(store)
    ground = Ground.of(store, base)
    try:
        with run_attempt(store, "relist") as job:
            work = Rewriting(store, ground, job, SILENT)
            space, old = ground.segments[0].space, ground.segments[0].coarse
            assert old is not None, "stores of this size have lists"
            coarse = train_coarse(space.rotate(training_keys(plan)), space=space.id, nlist=nlist, seed=plan.seed)
            work.stage(coarse)
            near = coarse.probe(old.centroids, min(CANDIDATES, coarse.nlist))[1]
            for segment in ground.segments:
                work.made.append(([segment], _relisted_segment(job / "segments", segment, coarse, near)))
                bench.log(f"{path.name}: {len(work.made)} of {len(ground.segments)} segments")
            work.commit("relist", {"nlist": nlist}, stale=False)
    finally:
        ground.close()
        pin.release()
    knnstore.gc(path, keep=1)
    (path / "relisted").touch()
    return path


def _relisted_segment(parent: Path, segment: Segment, coarse: Coarse, near: NDArray[np.int64]) -> StagedSegment:
    """near: (old lists, candidates), -1 for none."""
    folder, runs, n_documents = copy_documents(parent, [segment])
    n, space = segment.content.entries, segment.space
    codes, lists = np.empty((n, space.code_size), np.uint8), np.empty(n, np.uint32)
    for number in np.flatnonzero(segment.lists.sizes).tolist():
        some, labels = segment.lists.entries(number)
        rows, candidates = rows_of(labels), near[number][near[number] >= 0]
        nearest = faiss.knn(space.decode(some), np.ascontiguousarray(coarse.centroids[candidates]), 1)[1][:, 0]
        codes[rows], lists[rows] = some, candidates[nearest]
    with CodesWriter(folder, n_rows=n, space=space, keys=None) as writer:
        writer.put(0, codes, lists, None)
    finish_segment(
        folder,
        uuid=folder.name,
        n_documents=n_documents,
        text=False,
        space=space,
        coarse=coarse,
        keys=None,
        distortion=segment.content.distortion,
        dtype=None,
        windows=None,
    )
    return StagedSegment(folder, runs)
