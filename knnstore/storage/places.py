"""Where each row's code is: the way back from a row to its entry in a list, for rows that no search found."""

import threading

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError
from knnstore.format import Codec
from knnstore.storage.lists import MappedLists, rows_of, tokens_of
from knnstore.storage.space import Space

__all__ = ["Places"]

Rows = NDArray[np.int64]

_AT_ONCE = 8_192  # codes compared at a time: 128 sub-codes of each with their indices are 12 MB
_NOWHERE = np.iinfo(np.uint32).max


class Places:
    """The place of every row of a segment, found at first use: every list is read and checked once, then 4 bytes an entry are kept.

    A place counts the entries of all lists, each list padded as it lies there.
    """

    def __init__(self, lists: MappedLists, space: Space) -> None:
        self._lists, self._space = lists, space
        self._bases = np.concatenate(([0], np.cumsum(lists.capacities)))
        self._lock = threading.Lock()
        self._places: NDArray[np.uint32] | None = None

    def distances(self, rotated: NDArray[np.float32], owners: Rows, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Squared L2 between keys and the decoded codes of rows, without the distortion, (m,) float32, and the rows' tokens, (m,) int32.

        rotated: (n, dim) float32 keys in the space's axes. owners: (m,) the key that each row is compared with. rows: (m,).
        Raises DamageError for a damaged list.
        """
        measured, tokens = np.empty(len(rows), np.float32), np.empty(len(rows), np.int32)
        tables = None if self._space.centroids is None else _tables(rotated, self._space.centroids)
        for at in range(0, len(rows), _AT_ONCE):
            some = slice(at, at + _AT_ONCE)
            places = self._of_rows(rows[some])
            numbers = np.searchsorted(self._bases, places, side="right") - 1
            codes, labels = self._lists.at(numbers, places - self._bases[numbers])
            tokens[some] = tokens_of(labels)
            if tables is None:
                differences = rotated[owners[some]] - self._space.decode(codes)
                measured[some] = np.square(differences).sum(axis=1)
                continue
            if self._space.codec is Codec.PQ4:
                codes = np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1)[:, : self._space.n_sub]
            n_sub, n_codes = self._space.centroids.shape[:2]  # type: ignore[union-attr]  # there are tables
            cells = (owners[some, None] * n_sub + np.arange(n_sub)) * n_codes + codes
            measured[some] = tables.reshape(-1)[cells].sum(axis=1)
        return measured, tokens

    def lists(self, rows: Rows) -> Rows:
        """The list that each row is in, (m,). Raises DamageError for a damaged list."""
        return np.searchsorted(self._bases, self._of_rows(rows), side="right") - 1

    def tokens(self, rows: Rows) -> NDArray[np.int32]:
        """The token of each row, (m,) int32. Raises DamageError for a damaged list."""
        places = self._of_rows(rows)
        numbers = np.searchsorted(self._bases, places, side="right") - 1
        return tokens_of(self._lists.at(numbers, places - self._bases[numbers])[1])

    def _of_rows(self, rows: Rows) -> Rows:
        with self._lock:
            if self._places is None:
                self._places = self._find()
        return self._places[rows].astype(np.int64)

    def _find(self) -> NDArray[np.uint32]:
        lists = self._lists
        lists.check(np.arange(lists.nlist))
        found = np.full(int(lists.sizes.sum()), _NOWHERE, np.uint32)
        for number in np.flatnonzero(lists.sizes).tolist():
            rows = rows_of(lists.labels(number))
            if int(rows.min()) < 0 or int(rows.max()) >= len(found):
                raise DamageError(f"{lists.path}: list {number} has rows that the segment does not have. Run `knnstore verify`.")
            found[rows] = self._bases[number] + np.arange(len(rows))
        if (found == _NOWHERE).any():
            raise DamageError(f"{lists.path}: row {int((found == _NOWHERE).argmax())} is in no list. Run `knnstore verify`.")
        return found


def _tables(rotated: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distance of each key's parts to each centroid, (n, n_sub, 2**bits) float32."""
    n_sub, _, width = centroids.shape
    parts = rotated.reshape(len(rotated), n_sub, 1, width)
    tables: NDArray[np.float32] = np.square(parts - centroids).sum(axis=3)
    return tables
