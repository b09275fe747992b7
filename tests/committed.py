"""A small store of raw keys, and a further commit to it."""

import dataclasses
from pathlib import Path

from stores import build_segment, create_store, draw_keys, draw_values, trained_space

import knnstore
from knnstore.errors import ConflictError
from knnstore.format import Codec
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.commits import commit
from knnstore.storage.files import disk
from knnstore.storage.manifest import Manifest, Operation

DIM = 4
KEYS, VALUES = draw_keys(0, 30, DIM), draw_values(0, 30)


def make(path: Path) -> Manifest:
    return create_store(path, KEYS, VALUES)


def commit_next(path: Path, base: Manifest, *, name: str = "append") -> Manifest:
    """One more segment of 10 entries, as an append will make it: built in staging, then committed."""
    store = StoreFolder(path)
    job = store.staging / name
    disk.make_folder(job)
    segment = build_segment(job, draw_keys(1, 10, DIM), draw_values(1, 10), space=trained_space(Codec.RAW, DIM))
    staged = (segment.folder, store.segment(segment.folder.name))

    def build(number: int, parent: tuple[int, str] | None, current: Manifest | None) -> Manifest:
        if current is None or current.snapshot != base.snapshot:
            raise ConflictError(f"built on snapshot {base.snapshot}")
        return dataclasses.replace(
            base,
            snapshot=number,
            parent=parent,
            operation=Operation(name=name, arguments={}, counts={}),
            segments=(*base.segments, segment.record),
        )

    return commit(store, build, staged=[staged])


def entries_at(path: Path) -> int:
    """How many entries a search of the newest snapshot finds, all of them in place and sound."""
    with knnstore.open(path) as store:
        found = store.search(KEYS[:1], k=1_000)
        assert int(found.n_found[0]) == len(store)
        for segment in store.segments:
            n = segment.content.entries
            assert len(segment.values.rows(0, n)) == n
            assert sum(document.n_entries for document in segment.contexts.documents()) == n
        return len(store)
