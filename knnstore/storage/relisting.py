"""The lists of a segment made of those of others: list by list, so that no code waits in the order of rows.

Codes stay as they are: only their places in the blocks and the rows in their labels change.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from knnstore.format import ALIGNMENT, DIRECTORY_FILE, LISTS_FILE, TOKEN_BITS, Codec, DType, Header, Kind
from knnstore.storage.arrays import write_array
from knnstore.storage.blocks import pack, unpack
from knnstore.storage.files import FileWriter
from knnstore.storage.lists import MappedLists, entry_bytes, labels_of, padded
from knnstore.storage.manifest import FileRecord
from knnstore.storage.rows import RangeSet
from knnstore.storage.space import Space

Labels = NDArray[np.int64]

__all__ = ["LIST_BYTES", "ListSource", "ListedRows", "StoredLists", "write_joined_lists"]

LIST_BYTES = 1 << 24  # bytes of one list that may be held several times over; larger ones go another way

_GROUP = 16_384  # entries worked on at a time, by each thread: what is made of them stays in a core's cache


class ListSource(Protocol):
    """Entries by list. sizes: (nlist,) int64, of each list at most so many."""

    sizes: NDArray[np.int64]

    def take(self, first: int, stop: int) -> tuple[NDArray[np.uint8], Labels, NDArray[np.int64]]:
        """The entries of the lists [first, stop): codes as encoded (n, code_size) u8, new labels (n,) int64, and how many each list has.

        Rows in labels count from 0. List by list, rows ascending in each. Several threads call it at once.
        """
        ...


class StoredLists:
    """The lists of a segment as they are on disk, without its dead rows. at: the new row of its first live one."""

    def __init__(self, lists: MappedLists, space: Space, *, dead: RangeSet, at: int) -> None:
        self.sizes = lists.sizes
        self._lists, self._is_packed, self._code_size = lists, space.codec is Codec.PQ4, space.code_size
        self._begins, self._stops = dead[:, 0], dead[:, 1]
        self._shifts = at - np.concatenate(([0], np.cumsum(self._stops - self._begins)))  # by how many dead ranges begin before a row

    def take(self, first: int, stop: int) -> tuple[NDArray[np.uint8], Labels, NDArray[np.int64]]:
        stored, labels = self._lists.stored(first, stop)
        sizes = self.sizes[first:stop]
        codes = unpack(stored) if self._is_packed else stored.reshape(-1, self._code_size)
        at = _places(padded(sizes), sizes)
        if not len(self._begins):
            return codes[at], labels + (int(self._shifts[0]) << TOKEN_BITS), sizes
        rows = labels >> TOKEN_BITS
        before = np.searchsorted(self._begins, rows, side="right")
        live = rows >= np.concatenate(([0], self._stops))[before]
        counts = np.diff(np.concatenate(([0], np.cumsum(live)))[np.concatenate(([0], np.cumsum(sizes)))])
        return codes[at[live]], labels[live] + (self._shifts[before[live]] << TOKEN_BITS), counts


class ListedRows:
    """Entries in memory: codes (n, code_size) u8, lists (n,) u32 and tokens (n,) of consecutive rows. at: the new row of the first."""

    def __init__(self, codes: NDArray[np.uint8], lists: NDArray[np.uint32], tokens: NDArray[Any], *, nlist: int, at: int) -> None:
        order = np.argsort(lists, kind="stable")
        self.sizes = np.bincount(lists, minlength=nlist).astype(np.int64)
        self._codes, self._labels = codes[order], labels_of(at + order, tokens[order])
        self._bounds = np.concatenate(([0], np.cumsum(self.sizes))).tolist()

    def take(self, first: int, stop: int) -> tuple[NDArray[np.uint8], Labels, NDArray[np.int64]]:
        some = slice(self._bounds[first], self._bounds[stop])
        return self._codes[some], self._labels[some], self.sizes[first:stop]


@dataclass(frozen=True, slots=True)
class _Group:
    """Some lists as they are to lie in the file. table: entries, offset from the first of them and checksum of each, (m, 3) u64."""

    content: NDArray[np.uint8]
    table: NDArray[np.uint64]


def write_joined_lists(
    folder: Path,
    *,
    space: Space,
    owner: bytes,
    nlist: int,
    n_rows: int,
    base: int,
    sources: Sequence[ListSource],
    advance: Callable[[int], None] = lambda n: None,
) -> FileRecord:
    """Writes lists.bin and lists.dir with the entries of all sources, in their order within each list. Returns the record of lists.bin.

    n_rows: of all sources together; base: what labels say row 0 is. Works on all threads that faiss has; memory for each: some
    megabytes, or the longest list a few times. advance: called with the numbers of entries done.
    """
    directory = np.zeros((nlist, 3), np.uint64)
    header = Header(kind=Kind.LISTS, codec=space.codec, dtype=DType.U8, rows=n_rows, columns=entry_bytes(space), owner=owner).pack()
    digest = hashlib.sha256(header)
    with FileWriter(folder / LISTS_FILE) as writer:
        writer.write(header)
        at = 0
        for group in _made(sources, space, base):
            n = len(group.table)
            directory[at : at + n] = group.table
            directory[at : at + n, 1] += np.uint64(writer.position)
            writer.write(group.content)
            writer.write_back()
            digest.update(group.content)
            advance(int(group.table[:, 0].sum()))
            at += n
        size = writer.position
        writer.finish()
    write_array(folder / DIRECTORY_FILE, directory, kind=Kind.DIRECTORY, dtype=DType.U64, owner=owner, codec=space.codec)
    return FileRecord(name=LISTS_FILE, size=size, sha256=digest.hexdigest())


def _made(sources: Sequence[ListSource], space: Space, base: int) -> Iterator[_Group]:
    """All lists, group by group; as many are made at once as there are threads, while the caller writes."""
    bounds = _bounds(sum(source.sizes for source in sources))
    threads = max(1, min(faiss.omp_get_max_threads(), len(bounds)))
    waiting: deque[Future[_Group]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for first, stop in bounds:
            waiting.append(pool.submit(_make, sources, space, base, first, stop))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _bounds(sizes: Any) -> list[tuple[int, int]]:
    """Runs of lists of about 16,384 entries together; a larger list stands alone."""
    ends = np.cumsum(sizes)
    cuts = [0]
    while cuts[-1] < len(ends):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, before + _GROUP, side="right"))))
    return list(pairwise(cuts))


def _make(sources: Sequence[ListSource], space: Space, base: int, first: int, stop: int) -> _Group:
    taken = [source.take(first, stop) for source in sources]
    sizes = sum(counts for _, _, counts in taken) + np.zeros(stop - first, np.int64)
    capacities = padded(sizes)
    begins = np.cumsum(capacities) - capacities
    labels = np.full(int(capacities.sum()), -1, "<i8")
    codes = np.empty((len(labels), space.code_size), np.uint8)
    at = begins.copy()
    for some, of_some, counts in taken:
        places = np.repeat(at - (np.cumsum(counts) - counts), counts) + np.arange(len(of_some))
        codes[places], labels[places] = some, of_some + (base << TOKEN_BITS)
        at += counts
    codes[labels < 0] = 0
    blocks = (pack(codes) if space.codec is Codec.PQ4 else codes).reshape(-1)
    width = entry_bytes(space)
    lengths = -(-capacities * (width + 8) // ALIGNMENT) * ALIGNMENT
    offsets = np.cumsum(lengths) - lengths
    content, table = np.empty(int(lengths.sum()), np.uint8), np.zeros((len(sizes), 3), np.uint64)
    table[:, 0], table[:, 1] = sizes, offsets
    tails = labels.view(np.uint8)
    rows = zip(begins.tolist(), capacities.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
    for number, (begin, n, offset, length) in enumerate(rows):
        body = content[offset : offset + n * (width + 8)]
        body[: n * width] = blocks[begin * width : (begin + n) * width]
        body[n * width :] = tails[8 * begin : 8 * (begin + n)]
        content[offset + len(body) : offset + length] = 0
        table[number, 2] = xxhash.xxh3_64_intdigest(body)
    return _Group(content, table)


def _places(capacities: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the entries of padded lists are, (n,)."""
    shifts = (np.cumsum(capacities) - capacities) - (np.cumsum(sizes) - sizes)
    places: NDArray[np.int64] = np.repeat(shifts, sizes) + np.arange(int(sizes.sum()))
    return places
