"""Segments and stores made of drawn entries, and dull oracles for what a search of them must find."""

import functools
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import knnstore
from knnstore import Checkpoint, EntryDocument, IndexOptions
from knnstore.errors import StorageError
from knnstore.format import Codec
from knnstore.storage import files
from knnstore.storage.coarse import Coarse, train_coarse
from knnstore.storage.manifest import Manifest, SegmentRecord
from knnstore.storage.segment import Segment, read_segment_content
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment
from knnstore.storage.space import Space, raw_space, train_space

VOCABULARY = 1_000


def checkpoint(vocab_size: int = VOCABULARY) -> Checkpoint:
    """A model that does not exist."""
    return Checkpoint(name="none", revision=None, identity="ab" * 32, tokenizer=None, architecture="None", vocab_size=vocab_size)


def draw_keys(seed: int, n: int, dim: int) -> NDArray[np.float32]:
    """Keys in clusters of different width and direction, as hidden states are, (n, dim) float32."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((12, dim)) * 3
    keys = centers[rng.integers(0, 12, n)] + rng.standard_normal((n, dim)) * rng.uniform(0.3, 1.5, (n, 1))
    return keys.astype(np.float32)


def draw_values(seed: int, n: int, vocab_size: int = VOCABULARY) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, vocab_size, n)


@cache
def trained_space(codec: Codec, dim: int, seed: int = 0) -> Space:
    """A space of a codec, trained on drawn keys."""
    return raw_space(dim) if codec is Codec.RAW else train_space(draw_keys(99, 2_000, dim), codec=codec, seed=seed)


@cache
def trained_coarse(space: Space, nlist: int, seed: int = 0) -> Coarse:
    return train_coarse(space.rotate(draw_keys(98, 64 * nlist, space.dim)), space=space.id, nlist=nlist, seed=seed)


@dataclass(frozen=True)
class Document:
    """A document of a built segment."""

    id: str
    n_entries: int
    domain: str = "default"
    metadata: Any = None


def build_segment(
    parent: Path,
    keys: NDArray[np.float32],
    values: NDArray[Any],
    *,
    space: Space,
    coarse: Coarse | None = None,
    keep: str | None = None,
    documents: Sequence[Document] = (),
    dead: Sequence[tuple[int, int]] = (),
    vocab_size: int = VOCABULARY,
) -> Segment:
    """A segment on disk without a store around it, by the calls that every way of building goes through."""
    name = uuid.uuid4().hex
    folder = parent / name
    documents = documents or [Document("only", len(keys))]
    runs = []
    with DocumentsWriter(folder, uuid=name, vocab_size=vocab_size) as writer:
        for document in documents:
            at = writer.n_rows
            writer.add(np.asarray(values[at : at + document.n_entries]))
            fields = {"id": document.id, "source": "", "prefix": (), "metadata": document.metadata or {}}
            writer.end_document(**fields, content_hash=None, n_chars=None)
            runs.append((document.domain, at, writer.n_rows))
        writer.finish()
    rotated = space.rotate(keys)
    codes = space.encode(rotated)
    with CodesWriter(folder, n_rows=len(keys), space=space, keys=keep) as writer:
        writer.put(0, codes, np.zeros(len(keys), np.uint32) if coarse is None else coarse.assign(rotated), keys)
    distortion = float(np.square(rotated - space.decode(codes)).sum(axis=1).mean())
    finish_segment(
        folder,
        uuid=name,
        n_documents=len(documents),
        text=False,
        space=space,
        coarse=coarse,
        keys=keep,
        distortion=distortion,
        dtype=None,
        windows=None,
    )
    content, sha256 = read_segment_content(folder)
    return Segment(folder, SegmentRecord(content=content, runs=tuple(runs), dead=tuple(dead), sha256=sha256), space, coarse)


def with_dead(segment: Segment, dead: Sequence[tuple[int, int]]) -> Segment:
    """The same segment as a later snapshot lists it, with rows that no longer count."""
    return Segment(segment.folder, replace(segment.record, dead=tuple(dead)), segment.space, segment.coarse)


def decoded_keys(segment: Segment) -> NDArray[np.float64]:
    """What the codes of a segment stand for, in row order and in the rotated axes, (n, dim): centroids looked up one by one."""
    space = segment.space
    keys = np.zeros((segment.content.entries, space.dim))
    for number in range(segment.lists.nlist):
        codes, labels = segment.lists.entries(number)
        if space.codec is Codec.RAW:
            keys[labels >> 24] = codes.copy().view("<f4")
            continue
        nibbles = np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), 2 * codes.shape[1])
        sub = codes if space.codec is Codec.PQ8 else nibbles
        for m in range(space.n_sub):
            width = space.centroids.shape[2]
            keys[labels >> 24, m * width : (m + 1) * width] = space.centroids[m, sub[:, m]]
    return keys


def code_distances(segment: Segment, queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared distances of queries to what the codes stand for, plus the segment's distortion, (q, n)."""
    rotated = np.asarray(queries, np.float64)
    if segment.space.rotation is not None:
        rotated = rotated @ segment.space.rotation.T.astype(np.float64)
    stored = decoded_keys(segment)
    return np.square(rotated[:, None] - stored).sum(axis=2) + segment.content.distortion


def lookup_tolerance(space: Space, queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far a distance may be from the true one, for each query, (q,).

    FastScan rounds its lookup tables (squared distances of a query's sub-vectors to the centroids) to 8 bits: one step for all
    tables of a query, the widest table's span over 255, or that of all spans over 65,535 where it is larger. Each of the n_sub
    lookups is off by half a step at most. Other codecs compute in float32.
    """
    x = space.rotate(queries).astype(np.float64)
    float32 = 1e-5 * (1 + np.square(x).sum(axis=1))
    if space.codec is not Codec.PQ4:
        return float32
    parts = x.reshape(len(x), space.n_sub, 1, -1)
    tables = np.square(parts - space.centroids[None]).sum(axis=3)  # (q, n_sub, 16)
    spans = tables.max(axis=2) - tables.min(axis=2)
    step = np.maximum(spans.max(axis=1) / 255, spans.sum(axis=1) / 65_535)
    return float32 + space.n_sub * step / 2


def create_store(
    path: Path,
    keys: NDArray[np.float32],
    values: NDArray[Any],
    documents: Sequence[EntryDocument] | None = None,
    *,
    batch: int | None = None,
    vocab_size: int = VOCABULARY,
    training_keys: Any = None,
    expected_entries: int | None = None,
    **options: Any,
) -> Manifest:
    """A store of entries; batch: documents to a batch, None for one batch."""
    documents = list(documents or [EntryDocument(id="only", n_entries=len(keys))])

    def batches() -> Iterator[tuple[Any, Any, Sequence[EntryDocument]]]:
        at = 0
        for first in range(0, len(documents), batch or len(documents)):
            some = documents[first : first + (batch or len(documents))]
            stop = at + sum(document.n_entries for document in some)
            yield keys[at:stop], values[at:stop], some
            at = stop

    return knnstore.create_from_entries(
        path,
        batches(),
        checkpoint=checkpoint(vocab_size),
        dim=keys.shape[1],
        vocab_size=vocab_size,
        options=IndexOptions(**options),
        training_keys=training_keys,
        expected_entries=expected_entries,
    )


def flip(path: Path, offset: int) -> None:
    """Inverts a byte of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


class PowerCut:
    """A disk whose power is cut before the `at`th call that changes it (from 0). `lose` then takes away what was not synced.

    Content: of what was written to a file after its last sync, the file's second half is lost. Names: what was made, moved or removed
    in a folder after its last sync is undone. Both are what a file system may do; `lose(names=False)` keeps the names.
    """

    def __init__(self, at: int) -> None:
        self.at, self.n_calls = at, 0
        self._unsynced: set[Path] = set()
        self._synced: dict[Path, bytes] = {}  # content at the last sync
        self._undo: list[tuple[Path, Callable[[], None]]] = []  # (folder whose sync makes it final, how to undo it)

    @contextmanager
    def on(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """While it lasts, all of knnstore's calls go through this disk."""
        names = ("open", "write", "pwrite", "truncate", "fsync", "make_folder", "rename", "replace", "link", "remove", "remove_folder")
        # Those that are made of others (sync_folder, remove_tree) are counted by their parts.
        subclass = type("CutOff", (files.Disk,), {name: self._counted(name) for name in names})
        with monkeypatch.context() as patch:
            patch.setattr(files.disk, "__class__", subclass)
            yield

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(disk: files.Disk, *arguments: Any) -> Any:
            self.n_calls += 1
            if self.n_calls > self.at:
                raise StorageError("the power is cut")
            getattr(self, f"_before_{name}")(*arguments)
            # What a real sync would keep is known here; it would take nine tenths of the time.
            return None if name == "fsync" else getattr(files.Disk, name)(disk, *arguments)

        return call

    def _changes(self, folder: Path, undo: Callable[[], None]) -> None:
        self._undo.append((folder.absolute(), undo))

    def _before_open(self, path: Path, flags: int) -> None:
        if flags & os.O_CREAT and not path.exists():
            self._changes(path.parent, lambda: path.unlink(missing_ok=True))
        if flags & os.O_TRUNC:
            self._unsynced.add(path)

    def _before_write(self, fd: int, content: memoryview, path: Path) -> None:
        self._unsynced.add(path)

    def _before_pwrite(self, fd: int, content: memoryview, offset: int, path: Path) -> None:
        self._unsynced.add(path)

    def _before_truncate(self, fd: int, size: int, path: Path) -> None:
        self._unsynced.add(path)

    def _before_fsync(self, fd: int, path: Path) -> None:
        self._unsynced.discard(path)
        if path.is_file():
            self._synced[path] = path.read_bytes()
        self._undo = [(folder, undo) for folder, undo in self._undo if folder != path.absolute()]

    def _before_make_folder(self, path: Path) -> None:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            self._changes(folder.parent, functools.partial(shutil.rmtree, folder, ignore_errors=True))

    def _before_rename(self, source: Path, target: Path) -> None:
        self._unsynced = {target / path.relative_to(source) if path.is_relative_to(source) else path for path in self._unsynced}
        moved = {path: content for path, content in self._synced.items() if path.is_relative_to(source)}
        self._synced.update({target / path.relative_to(source): content for path, content in moved.items()})
        self._changes(target.parent, lambda: target.rename(source) if target.exists() and source.parent.exists() else None)

    def _before_replace(self, source: Path, target: Path) -> None:
        self._unsynced = {target if path == source else path for path in self._unsynced}
        self._synced[target] = self._synced.get(source, b"")
        before = target.read_bytes() if target.exists() else None
        self._changes(target.parent, lambda: target.unlink(missing_ok=True) if before is None else _put(target, before))

    def _before_link(self, source: Path, target: Path) -> None:
        self._changes(target.parent, lambda: target.unlink(missing_ok=True))

    def _before_remove(self, path: Path) -> None:
        if path.is_file():
            self._changes(path.parent, functools.partial(_put, path, path.read_bytes()))

    def _before_remove_folder(self, path: Path) -> None:
        self._changes(path.parent, lambda: path.mkdir(parents=True, exist_ok=True))

    def lose(self, *, names: bool = True) -> None:
        """What the cut costs."""
        for path in self._unsynced:
            if path.is_file():
                half = path.stat().st_size // 2
                path.write_bytes(path.read_bytes()[:half] + self._synced.get(path, b"")[half:])
        for _, undo in reversed(self._undo if names else []):
            undo()


def _put(path: Path, content: bytes) -> None:
    if path.parent.is_dir():
        path.write_bytes(content)
