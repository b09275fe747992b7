"""Segments: immutable files that hold a run of documents. Written by `segment_writer`, read by `Segment`."""

import hashlib
import os
import threading
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import CONTEXTS_FILE, IDS_FILE, KEYS_FILE, LISTS_FILE, SEGMENT_FILE, VALUES_FILE, Codec, DType, Kind
from knnstore.storage.arrays import MappedArray, map_file, to_float32
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.coarse import Coarse, load_coarse
from knnstore.storage.contexts import ContextsReader, DocumentRecord, id_hash
from knnstore.storage.lists import MappedLists
from knnstore.storage.manifest import Manifest, SegmentContent, SegmentRecord
from knnstore.storage.manifest_json import parse_segment_content
from knnstore.storage.parse import parse_json_bytes, read_small
from knnstore.storage.space import Space, load_space

__all__ = ["Segment", "open_index", "open_segments", "read_segment_content"]

_IDS_AT_ONCE = 2_048  # rows of `ids.bin` searched at once: half a block of checksums
_SAME_HASH = 16  # rows looked at for more of one hash


def read_segment_content(folder: Path) -> tuple[SegmentContent, str]:
    """A segment.json and its sha256."""
    raw = read_small(folder / SEGMENT_FILE)
    at = str(folder / SEGMENT_FILE)
    return parse_segment_content(parse_json_bytes(raw, at), at), hashlib.sha256(raw).hexdigest()


class Segment:
    """A segment open for reading. Files are mapped at first use, their sizes compared with the manifest before that."""

    def __init__(self, folder: Path, record: SegmentRecord, space: Space, coarse: Coarse | None) -> None:
        self.folder, self.record, self.space, self.coarse = folder, record, space, coarse
        self.content = record.content
        self._owner = bytes.fromhex(record.content.uuid)
        self._lock = threading.Lock()
        self._contexts: ContextsReader | None = None
        self._pid = os.getpid()

    @cached_property
    def lists(self) -> MappedLists:
        content = self.content
        size = content.size_of(LISTS_FILE)
        return MappedLists(
            self.folder,
            space=self.space,
            owner=self._owner,
            nlist=content.nlist,
            n_entries=content.entries,
            size=size,
            base=content.label_base,
        )

    @cached_property
    def values(self) -> MappedArray:
        return MappedArray(
            self.folder / VALUES_FILE,
            kind=Kind.VALUES,
            owner=self._owner,
            n_rows=self.content.entries,
            dtype=DType[self.content.values.upper()],
            size=self.content.size_of(VALUES_FILE),
        )

    @cached_property
    def keys(self) -> MappedArray | None:
        """Kept keys, where there are any."""
        if self.content.keys is None:
            return None
        return MappedArray(
            self.folder / KEYS_FILE,
            kind=Kind.KEYS,
            owner=self._owner,
            n_rows=self.content.entries,
            columns=self.space.dim,
            dtype=DType[self.content.keys.upper()],
            size=self.content.size_of(KEYS_FILE),
        )

    @cached_property
    def ids(self) -> MappedArray:
        """Hash of the id and first row of each document (or part), (m, 2) u64, sorted."""
        content = self.content
        size = content.size_of(IDS_FILE)
        return MappedArray(self.folder / IDS_FILE, kind=Kind.IDS, owner=self._owner, n_rows=content.documents, columns=2, size=size)

    def find_rows(self, document_id: str) -> NDArray[np.int64]:
        """First rows of the documents whose id has the hash of this one, ascending; other ids may share it. Reads `ids.bin` alone."""
        wanted, n = np.uint64(id_hash(document_id)), len(self.ids)
        first, stop = 0, n
        while stop - first > _IDS_AT_ONCE:  # a checksum is looked at for each block touched: so of few blocks, where there are many
            middle = (first + stop) // 2
            if self.ids.rows(middle, middle + 1)[0, 0] < wanted:
                first = middle + 1
            else:
                stop = middle
        first += int(np.searchsorted(self.ids.rows(first, stop)[:, 0], wanted))
        found: list[int] = []
        while first < n:
            hashes, rows = self.ids.rows(first, min(first + _SAME_HASH, n)).T
            same = rows[hashes == wanted]
            found += same.tolist()
            if len(same) < _SAME_HASH:
                break
            first += _SAME_HASH
        return np.array(found, np.int64)

    def find(self, document_id: str) -> list[DocumentRecord]:
        """The records with this id (several where domains or parts share it), in row order, dead ones too.

        Contexts are opened only where a hash is that of the id.
        """
        records = [self.contexts.document_at(row) for row in self.find_rows(document_id).tolist()]
        return [record for record in records if record.id == document_id]

    def check_exact(self) -> None:
        """Raises InvalidArgumentError unless exact search can be done."""
        if self.space.codec is not Codec.RAW and self.content.keys is None:
            raise InvalidArgumentError(
                f"segment {self.content.uuid}: its keys were not kept, so exact search cannot be done. Create the store with --keep-keys."
            )

    def exact_keys(self, first: int, stop: int) -> NDArray[np.float32]:
        """Keys of the rows [first, stop) as kept, (n, dim) float32, in the key's own axes. Raises InvalidArgumentError without."""
        if self.space.codec is Codec.RAW:
            return self.space.decode(self.lists.entries(0)[0][first:stop])  # one flat list, in row order
        self.check_exact()
        assert self.keys is not None, "said by check_exact"
        return to_float32(self.keys.rows(first, stop), self.keys.header.dtype)

    @property
    def contexts(self) -> ContextsReader:
        """Documents and text. The whole file's hash is compared before its first use (LMDB pages have no checksums)."""
        with self._lock:
            if self._contexts is None or self._pid != os.getpid():
                record = next((file for file in self.content.files if file.name == CONTEXTS_FILE), None)
                path = self.folder / CONTEXTS_FILE
                if record is None or hashlib.sha256(map_file(path, record.size)).hexdigest() != record.sha256:
                    raise DamageError(f"{path}: its content does not match its checksum. Run `knnstore verify`.")
                self._contexts = ContextsReader(path, n_rows=self.content.entries)
                self._pid = os.getpid()
            return self._contexts

    def close(self) -> None:
        if self._contexts is not None and self._pid == os.getpid():
            self._contexts.close()
            self._contexts = None


def open_index(store: StoreFolder, manifest: Manifest) -> tuple[dict[str, Space], dict[str, Coarse]]:
    """The spaces and coarse quantizers of a snapshot by their ids, loaded."""
    spaces = {record.id: load_space(store.space(record.id), record.id, record.files) for record in manifest.spaces}
    dim = manifest.key.dim
    return spaces, {record.id: load_coarse(store.coarse(record.id), record.id, space=record.space, dim=dim) for record in manifest.coarse}


def open_segments(
    store: StoreFolder, manifest: Manifest, index: tuple[dict[str, Space], dict[str, Coarse]] | None = None
) -> tuple[Segment, ...]:
    """The segments of a snapshot. index: its spaces and coarse quantizers, where they are loaded already."""
    spaces, coarse = index or open_index(store, manifest)
    return tuple(
        Segment(store.segment(record.content.uuid), record, spaces[record.content.space], coarse.get(record.content.coarse or ""))
        for record in manifest.segments
    )
