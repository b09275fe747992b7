"""Inverted lists on disk: written once, mapped, and searched by faiss as they lie there.

`lists.bin` holds the lists one after another, each at a multiple of 64: codes of its entries (PQ4: packed blocks of 32), then
as many labels (int64), both padded to a multiple of 32 entries with zeros and -1. `lists.dir` says for each list how many
entries it has, where it begins, and the xxh3-64 of its bytes, which is compared when a process first searches that list.
"""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from knnstore.errors import DamageError
from knnstore.format import (
    ALIGNMENT,
    BLOCK_ENTRIES,
    DIRECTORY_FILE,
    HEADER_SIZE,
    LISTS_FILE,
    TOKEN_BITS,
    Codec,
    DType,
    Header,
    Kind,
    aligned,
    parse_header,
)
from knnstore.storage.arrays import map_file, read_array, write_array
from knnstore.storage.blocks import block_bytes, pack, single_codes, unpack
from knnstore.storage.files import FileWriter
from knnstore.storage.rows import RangeSet, contains
from knnstore.storage.space import Space

__all__ = [
    "MappedLists",
    "entry_bytes",
    "labels_of",
    "padded",
    "rows_of",
    "single_query_index",
    "stacked_index",
    "tokens_of",
    "write_lists",
]

Labels = NDArray[np.int64]

SINGLE_IMPLEM = 11  # faiss's scan of one query, list by list, which does not pack its table anew for each of them: a tenth faster

_SORTED = 262_144  # rows sorted by their list at a time
_GROUP = 65_536  # entries packed at a time: stays in the cache, bounds the memory of writing


def labels_of(rows: NDArray[np.int64], tokens: NDArray[Any]) -> Labels:
    """row << 24 | token."""
    return (rows.astype(np.int64) << TOKEN_BITS) | tokens.astype(np.int64)


def rows_of(labels: Labels) -> NDArray[np.int64]:
    """The row of each label; -1 stays -1."""
    return labels >> TOKEN_BITS


def tokens_of(labels: Labels, *, whole: bool = False) -> NDArray[np.int32]:
    """The token of each label; -1 where the label is -1. whole: there is none such."""
    tokens = np.empty(labels.shape, np.int32)
    np.bitwise_and(labels, (1 << TOKEN_BITS) - 1, out=tokens, casting="unsafe")
    if not whole:
        tokens[labels < 0] = -1
    return tokens


def entry_bytes(space: Space) -> int:
    """Bytes of an entry's code as it lies in a list."""
    return block_bytes(space.n_sub) // BLOCK_ENTRIES if space.codec is Codec.PQ4 else space.code_size


def write_lists(
    folder: Path,
    *,
    space: Space,
    owner: bytes,
    codes: NDArray[np.uint8],
    lists: NDArray[np.uint32] | None,
    nlist: int,
    values: NDArray[Any],
    base: int,
) -> None:
    """Writes lists.bin and lists.dir.

    codes: (n, code_size) u8 in row order, may be mapped; lists: (n,) u32, the list of each row, None for one list;
    values: (n,) token ids; base: what labels say row 0 is. Takes 4 bytes of memory an entry, and what the larger of 65,536 entries
    and the longest list takes on disk.
    """
    n = len(codes)
    width = entry_bytes(space)
    if lists is None:
        sizes, order = np.array([n], np.int64), None
    else:
        sizes, order = _by_list(lists, nlist)
    begins = np.concatenate(([0], np.cumsum(sizes)))
    directory = np.zeros((len(sizes), 3), np.uint64)
    header = Header(kind=Kind.LISTS, codec=space.codec, dtype=DType.U8, rows=n, columns=width, owner=owner)
    with FileWriter(folder / LISTS_FILE, header_size=HEADER_SIZE) as writer:
        for first, stop in _groups(sizes):
            some = slice(begins[first], begins[stop])
            rows = np.arange(some.start, some.stop) if order is None else order[some].astype(np.int64)
            blocks, labels, at = _lay_out(space, codes, values, rows, sizes[first:stop], base)
            for number, (lo, hi) in enumerate(pairwise(at), start=first):
                body, tail = blocks[lo * width : hi * width], labels[lo:hi]
                digest = xxhash.xxh3_64(body)
                digest.update(tail)
                directory[number] = (sizes[number], writer.position, digest.intdigest())
                writer.write(body)
                writer.write(tail)
                writer.pad_to(aligned(writer.position))
        writer.finish(header.pack())
    write_array(folder / DIRECTORY_FILE, directory, kind=Kind.DIRECTORY, dtype=DType.U64, owner=owner, codec=space.codec)


def _by_list(lists: NDArray[np.uint32], nlist: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Entries of each list, (nlist,), and all rows in the order of their lists, (n,) u32. Sorted run by run: sorting all at once takes four
    times the memory of the result."""
    sizes = np.zeros(nlist, np.int64)
    for at in range(0, len(lists), _SORTED):
        sizes += np.bincount(lists[at : at + _SORTED], minlength=nlist)
    order = np.empty(len(lists), np.uint32)
    free = np.cumsum(sizes) - sizes  # the next place of each list
    for at in range(0, len(lists), _SORTED):
        some = lists[at : at + _SORTED]
        by_list = np.argsort(some.astype(np.uint16) if nlist <= 1 << 16 else some, kind="stable")  # numpy sorts 16-bit keys by radix
        of_each = np.bincount(some, minlength=nlist)
        order[np.arange(len(some)) + np.repeat(free - (np.cumsum(of_each) - of_each), of_each)] = by_list + at
        free += of_each
    return sizes, order


def padded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sizes rounded up to whole blocks of 32."""
    return -(-sizes // BLOCK_ENTRIES) * BLOCK_ENTRIES


def _groups(sizes: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Runs of lists of about 65,536 entries together; a larger list stands alone."""
    cuts = [0]
    total = 0
    for number, size in enumerate(sizes.tolist()):
        if total and total + size > _GROUP:
            cuts.append(number)
            total = 0
        total += size
    cuts.append(len(sizes))
    return list(pairwise(cuts))


def _lay_out(
    space: Space, codes: NDArray[np.uint8], values: NDArray[Any], rows: NDArray[np.int64], sizes: NDArray[np.int64], base: int
) -> tuple[NDArray[np.uint8], Labels, list[int]]:
    """Codes and labels of a group of lists, each list padded: bytes (padded * width,), labels (padded,), bounds of the lists."""
    capacities = padded(sizes)
    at = np.concatenate(([0], np.cumsum(capacities)))
    total = int(at[-1])
    shift = np.repeat(at[:-1] - np.concatenate(([0], np.cumsum(sizes)[:-1])), sizes)
    place = np.arange(len(rows)) + shift
    labels = np.full(total, -1, "<i8")
    labels[place] = labels_of(rows + base, values[rows])
    blocks = np.empty(total * entry_bytes(space), np.uint8)
    laid = np.zeros((min(total, _GROUP), space.code_size), np.uint8)
    # A list may be larger than a group (a flat segment, a crowded list): it goes through in pieces of whole blocks.
    for begin in range(0, total, _GROUP):
        end = min(total, begin + _GROUP)
        lo, hi = np.searchsorted(place, (begin, end))
        piece = laid[: end - begin]
        piece[:] = 0
        piece[place[lo:hi] - begin] = codes[rows[lo:hi]]
        stored = pack(piece) if space.codec is Codec.PQ4 else piece
        blocks[begin * entry_bytes(space) : end * entry_bytes(space)] = stored.reshape(-1)
    return blocks, labels, at.tolist()


class MappedLists:
    """The lists of one segment, mapped. Opening reads the directory (24 bytes a list) and nothing of the lists.

    Its methods count rows from 0; in the file, and in what faiss finds there, labels count them from `base`.
    """

    def __init__(self, folder: Path, *, space: Space, owner: bytes, nlist: int, n_entries: int, size: int, base: int) -> None:
        """size: bytes of lists.bin by the manifest. Raises DamageError where directory and file do not fit together."""
        self.base = base
        self.path = folder / LISTS_FILE
        self._space, self._width = space, entry_bytes(space)
        directory = read_array(folder / DIRECTORY_FILE, kind=Kind.DIRECTORY, owner=owner, shape=(nlist, 3))
        self._raw = map_file(self.path, size)
        header = parse_header(self._raw[:HEADER_SIZE].tobytes(), str(self.path), kind=Kind.LISTS, owner=owner)
        self.sizes = directory[:, 0].astype(np.int64)  # what is larger than an int64 becomes negative
        self.offsets = directory[:, 1].astype(np.int64)
        self.capacities = padded(self.sizes)
        self._checks = directory[:, 2]
        if (
            (header.rows, header.columns, header.codec) != (n_entries, self._width, space.codec)
            or ((self.sizes < 0) | (self.sizes > n_entries)).any()
            or int(self.sizes.sum()) != n_entries
            or ((self.offsets < HEADER_SIZE) | (self.offsets > size) | (self.offsets % ALIGNMENT != 0)).any()
            or (self.offsets + self.capacities * (self._width + 8) > size).any()
        ):
            raise DamageError(f"{self.path}: it does not fit its directory. Run `knnstore verify`.")
        self._seen = np.append(self.sizes == 0, True)  # the last: of list -1

    @property
    def nlist(self) -> int:
        return len(self.sizes)

    @property
    def n_bytes(self) -> int:
        return self._raw.nbytes

    def check(self, numbers: NDArray[np.int64]) -> None:
        """Compares the checksums of these lists (any shape, -1 ignored) if this process has not yet. Raises DamageError."""
        unseen = numbers[~self._seen[numbers]]
        if not len(unseen):
            return
        for number in np.unique(unseen).tolist():
            if xxhash.xxh3_64_intdigest(self._bytes(number)) != self._checks[number]:
                raise DamageError(f"{self.path}: list {number} does not match its checksum. Run `knnstore verify`.")
            self._seen[number] = True

    def _bytes(self, number: int) -> NDArray[np.uint8]:
        begin = int(self.offsets[number])
        return self._raw[begin : begin + int(self.capacities[number]) * (self._width + 8)]

    def entries(self, number: int) -> tuple[NDArray[np.uint8], Labels]:
        """One list's codes as encoded (n, code_size) u8 and labels (n,) int64, checked."""
        self.check(np.array([number]))
        n = int(self.sizes[number])
        return self._codes(number, 0, n), self._labels(number)

    def labels(self, number: int) -> Labels:
        """One list's labels, (n,) int64, checked."""
        self.check(np.array([number]))
        return self._labels(number)

    def stored(self, first: int, stop: int) -> tuple[NDArray[np.uint8], Labels]:
        """The lists [first, stop) one after the other, checked: codes as they lie there, padding too, and labels (n,) int64.

        4-bit codes: blocks (b, block_bytes) u8; others (padded entries, width) u8.
        """
        self.check(np.arange(first, stop))
        begins, ends = self.offsets[first:stop], self.offsets[first:stop] + self.capacities[first:stop] * self._width
        codes = np.concatenate([self._raw[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])
        sizes = self.sizes[first:stop]
        at = np.repeat(ends // 8 - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))
        labels = self._raw[: len(self._raw) // 8 * 8].view("<i8")[at]
        labels -= self.base << TOKEN_BITS
        return codes.reshape(-1, block_bytes(self._space.n_sub) if self._space.codec is Codec.PQ4 else self._width), labels

    def at(self, numbers: Labels, within: Labels) -> tuple[NDArray[np.uint8], Labels]:
        """Codes as encoded (n, code_size) u8 and labels (n,) int64 of single entries, by list and place in it, both (n,); checked."""
        self.check(numbers)
        begins = self.offsets[numbers]
        labels = self._raw[: len(self._raw) // 8 * 8].view("<i8")[(begins + self.capacities[numbers] * self._width) // 8 + within]
        labels -= self.base << TOKEN_BITS
        if self._space.codec is Codec.PQ4:
            return single_codes(self._raw, begins, within, self._space.n_sub), labels
        return self._raw[(begins + within * self._width)[:, None] + np.arange(self._width)], labels

    def _labels(self, number: int) -> Labels:
        cut = int(self.capacities[number]) * self._width
        stored: Labels = self._bytes(number)[cut:].view("<i8")[: int(self.sizes[number])]
        return stored - (self.base << TOKEN_BITS)

    def _codes(self, number: int, lo: int, hi: int) -> NDArray[np.uint8]:
        """Codes of the entries [lo, hi) of a list, (hi - lo, code_size) u8."""
        codes = self._bytes(number)[: int(self.capacities[number]) * self._width]
        if self._space.codec is not Codec.PQ4:
            return codes.reshape(-1, self._width)[lo:hi]
        first, blocks = lo // BLOCK_ENTRIES, codes.reshape(-1, block_bytes(self._space.n_sub))
        begin = first * BLOCK_ENTRIES
        return unpack(blocks[first : -(-hi // BLOCK_ENTRIES)])[lo - begin : hi - begin]

    def by_row(self, first: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Codes as encoded (n, code_size) u8 and lists (n,) u32 of the rows [first, stop), checked. Looks at every list once."""
        self.check(np.arange(self.nlist))
        codes, lists = np.zeros((stop - first, self._space.code_size), np.uint8), np.zeros(stop - first, np.uint32)
        bounds = np.array([first, stop]) << TOKEN_BITS
        for number in np.flatnonzero(self.sizes).tolist():
            labels = self._labels(number)
            lo, hi = np.searchsorted(labels, bounds).tolist()
            if lo < hi:
                rows = rows_of(labels[lo:hi]) - first
                codes[rows] = self._codes(number, lo, hi)
                lists[rows] = number
        return codes, lists

    def codes_in(self, ranges: RangeSet) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Rows (n,) and codes as encoded (n, code_size) u8 of all rows in ranges, ascending, checked. Looks at every list once.

        Memory: what it returns, 8 bytes an entry of the longest list, and 65,536 codes.
        """
        self.check(np.arange(self.nlist))
        found_rows, found_codes = [np.zeros(0, np.int64)], [np.zeros((0, self._space.code_size), np.uint8)]
        for number in np.flatnonzero(self.sizes).tolist():
            rows = rows_of(self._labels(number))
            places = np.flatnonzero(contains(ranges, rows))
            for begin in np.unique(places // _GROUP * _GROUP).tolist():
                some = places[(places >= begin) & (places < begin + _GROUP)]
                found_rows.append(rows[some])
                found_codes.append(self._codes(number, int(some[0]), int(some[-1]) + 1)[some - some[0]])
        joined = np.concatenate(found_rows)
        order = np.argsort(joined)
        return joined[order], np.concatenate(found_codes)[order]

    @property
    def address(self) -> int:
        """Where the file is mapped."""
        return int(self._raw.ctypes.data)

    def repacked(self) -> Any:
        """A faiss index over the same lists in memory, packed by faiss itself from codes as they are encoded, for an installed faiss that
        packs 4-bit codes otherwise than this format. Looks at every list's checksum."""
        space = self._space
        quantizer = faiss.IndexFlatL2(space.dim)
        plain = faiss.IndexIVFPQ(quantizer, space.dim, self.nlist, space.n_sub, 4)
        _finish_shell(plain, space, quantizer)
        for number in range(self.nlist):
            codes, labels = self.entries(number)
            labels += self.base << TOKEN_BITS
            plain.invlists.add_entries(number, len(labels), faiss.swig_ptr(labels), faiss.swig_ptr(np.ascontiguousarray(codes)))
        plain.ntotal = int(self.sizes.sum())
        shell = faiss.IndexIVFPQFastScan(plain, BLOCK_ENTRIES)
        _finish_shell(shell, space, quantizer)
        return shell


def stacked_index(space: Space, members: Sequence[MappedLists], numbers: Sequence[NDArray[np.int64]]) -> Any:
    """A faiss index over the mapped lists of several segments, to be searched with `search_preassigned_c` only (it has no centroids).

    numbers: for each member, what number each of its lists has in the index. faiss asks where a list is, counted from where one file is
    mapped: lists of the other files are counted from there too.
    """
    nlist = sum(member.nlist for member in members)
    shell = _shell(space, nlist)
    lists = faiss.OnDiskInvertedLists(nlist, entry_bytes(space), str(members[0].path))
    lists.read_only = True
    lists.totsize = members[0].n_bytes
    lists.do_mmap()
    lists.prefetch_nthread = 0
    table = np.empty((nlist, 3), np.uint64)
    for member, at in zip(members, numbers, strict=True):
        distance = np.uint64((member.address - int(lists.ptr)) % (1 << 64))
        table[at, 0], table[at, 1] = member.sizes, member.capacities
        table[at, 2] = member.offsets.astype(np.uint64) + distance  # may wrap around, as faiss's own sum will
    _fill(lists, table)
    shell.replace_invlists(lists, True)
    lists.this.disown()
    shell.ntotal = int(table[:, 0].sum())
    shell.referenced_objects += members  # whose files must stay mapped
    return shell


def single_query_index(space: Space, index: Any) -> Any:
    """An index over the same lists for one query at a time."""
    if space.codec is not Codec.PQ4:
        return index
    shell = _shell(space, index.nlist)
    shell.replace_invlists(index.invlists, False)
    shell.ntotal = index.ntotal
    shell.implem = SINGLE_IMPLEM
    shell.referenced_objects.append(index)
    return shell


def _shell(space: Space, nlist: int) -> Any:
    """An index of the space's codec, without centroids of its own and so far without lists."""
    quantizer = faiss.IndexFlatL2(space.dim)
    if space.codec is Codec.RAW:
        shell = faiss.IndexIVFFlat(quantizer, space.dim, nlist)
    elif space.codec is Codec.PQ4:
        shell = faiss.IndexIVFPQFastScan(quantizer, space.dim, nlist, space.n_sub, 4, faiss.METRIC_L2, BLOCK_ENTRIES)
    else:
        shell = faiss.IndexIVFPQ(quantizer, space.dim, nlist, space.n_sub, 8)
    _finish_shell(shell, space, quantizer)
    return shell


def _finish_shell(shell: Any, space: Space, quantizer: Any) -> None:
    """Gives an index the space's centroids, and keeps alive the coarse quantizer that faiss asks for and never uses here."""
    if space.centroids is not None:
        shell.by_residual = False
        shell.use_precomputed_table = 0
        faiss.copy_array_to_vector(np.ascontiguousarray(space.centroids).reshape(-1), shell.pq.centroids)
    shell.is_trained = True
    shell.own_fields = False
    shell.referenced_objects = [quantizer]  # faiss keeps a bare pointer


def _fill(lists: Any, table: NDArray[np.uint64]) -> None:
    """Sets (size, capacity, offset) of every list at once: three u64 a list in the vector's own memory."""
    vector = lists.lists
    vector.resize(len(table))
    memory = (ctypes.c_uint64 * table.size).from_address(int(vector.data().this))
    np.frombuffer(memory, dtype=np.uint64).reshape(-1, 3)[:] = table
    last = vector.at(len(table) - 1)
    assert (last.size, last.capacity, last.offset) == tuple(table[-1].tolist()), "faiss lays out OnDiskOneList otherwise"
