"""`lists.bin` as `verify` goes through it: the checksum of each list, and what the labels say."""

import numpy as np
import xxhash
from numpy.typing import NDArray

from knnstore.format import BLOCK_ENTRIES, TOKEN_BITS
from knnstore.verification.files import FindingError

__all__ = ["Extents", "ListsWalk"]

_NO_TOKEN = np.uint32(0xFFFFFFFF)  # more than any token: labels hold 24 bits of it


class Extents:
    """Where the lists that have entries lie, in the order of the file."""

    def __init__(self, directory: NDArray[np.uint64], entry_bytes: int) -> None:
        used = np.flatnonzero(directory[:, 0])
        self.numbers = used[np.argsort(directory[used, 1], kind="stable")]
        self.sizes = directory[self.numbers, 0].astype(np.int64)
        self.offsets = directory[self.numbers, 1].astype(np.int64)
        capacities = -(-self.sizes // BLOCK_ENTRIES) * BLOCK_ENTRIES
        self.labels = self.offsets + capacities * entry_bytes
        self.ends = self.labels + capacities * 8
        self.checks = directory[self.numbers, 2]


class ListsWalk:
    """Goes through `lists.bin` a piece at a time: checksums of lists, and the token that each row's label carries."""

    def __init__(self, directory: NDArray[np.uint64], entry_bytes: int, n_entries: int, *, base: int, in_row_order: bool) -> None:
        """base: what labels say row 0 is."""
        self._lists = Extents(directory, entry_bytes)
        self._base, self._in_row_order = base, in_row_order
        self._tokens = np.full(n_entries, _NO_TOKEN, np.uint32)
        self._begun: xxhash.xxh3_64 | None = None  # of a list that goes on in the next piece
        self._n_strange = 0  # labels of no row of the segment
        self._n_seen = 0
        self._ordered = True
        self._ascending = True
        self._last = -1  # the label before, of the same list
        nothing = xxhash.xxh3_64_intdigest(b"")
        empty = np.flatnonzero((directory[:, 0] == 0) & (directory[:, 2] != nothing))
        self.damaged = [f"list {number}" for number in empty.tolist()]

    def take(self, begin: int, piece: memoryview) -> None:
        """The bytes of the file from begin on, where the piece before ended."""
        lists, stop = self._lists, begin + len(piece)
        some = slice(
            int(np.searchsorted(lists.ends, begin, side="right")), int(np.searchsorted(lists.offsets, stop, side="left"))
        )  # those that have bytes in this piece
        self._check(some, begin, piece)
        low = np.maximum(lists.labels[some], begin)
        counts = np.maximum(np.minimum(lists.labels[some] + 8 * lists.sizes[some], stop) - low, 0) // 8
        total = int(counts.sum())
        if not total:
            return
        words = np.frombuffer(piece, "<i8", len(piece) // 8)
        labels = words[np.repeat((low - begin) // 8 - (np.cumsum(counts) - counts), counts) + np.arange(total)]
        before = np.concatenate(([self._last], labels[:-1]))
        begins = (low == lists.labels[some]) & (counts > 0)
        before[(np.cumsum(counts) - counts)[begins]] = -1
        self._ascending &= bool((labels > before).all())
        self._last = int(labels[-1])
        self._take_labels(labels)

    def _check(self, some: slice, begin: int, piece: memoryview) -> None:
        lists, stop = self._lists, begin + len(piece)
        rows = zip(
            lists.numbers[some].tolist(), lists.offsets[some].tolist(), lists.ends[some].tolist(), lists.checks[some].tolist(), strict=True
        )
        for number, offset, end, check in rows:
            if begin <= offset and end <= stop:
                digest = xxhash.xxh3_64_intdigest(piece[offset - begin : end - begin])
            else:
                begun = self._begun or xxhash.xxh3_64()
                begun.update(piece[max(offset - begin, 0) : end - begin])
                self._begun = begun if end > stop else None
                if end > stop:
                    break
                digest = begun.intdigest()
            if digest != check:
                self.damaged.append(f"list {number}")

    def _take_labels(self, labels: NDArray[np.int64]) -> None:
        rows = (labels >> TOKEN_BITS) - self._base
        if self._in_row_order:
            self._ordered &= bool((rows == np.arange(self._n_seen, self._n_seen + len(rows))).all())
        self._n_seen += len(rows)
        known = (rows >= 0) & (rows < len(self._tokens))
        if not known.all():
            self._n_strange += int(np.count_nonzero(~known))
            labels, rows = labels[known], rows[known]
        self._tokens[rows] = labels & ((1 << TOKEN_BITS) - 1)

    def conclude(self, values: NDArray[np.generic] | None) -> None:
        """Once the file is known to be what was written. values: (n,), None where they are not sound. Raises FindingError."""
        if self._n_strange:
            raise FindingError("content", f"{self._n_strange} labels name no row of the segment's {len(self._tokens)}")
        # There are as many labels as rows: where a row has none, another has two.
        without = int(np.count_nonzero(self._tokens == _NO_TOKEN))
        if without:
            raise FindingError("content", f"{without} of {len(self._tokens)} rows are in no list, and others in several")
        if values is not None and (differ := int(np.count_nonzero(self._tokens != values))):
            raise FindingError("content", f"{differ} labels carry another token than values.bin has at their row")
        if not self._ordered:
            raise FindingError("content", "its raw keys are not in row order")
        if not self._ascending:
            raise FindingError("content", "the rows of a list do not ascend")
