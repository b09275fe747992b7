"""Row ranges: the one filter. A range set is (m, 2) int64, [first, stop), ascending, disjoint, none empty, none touching."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["RangeSet", "as_ranges", "complement", "contains", "count", "intersect", "subtract"]

RangeSet = NDArray[np.int64]


def as_ranges(pairs: Iterable[tuple[int, int]] | RangeSet) -> RangeSet:
    """Any [first, stop) pairs as a range set: sorted, joined where they touch or overlap, empty ones dropped."""
    table = np.asarray(pairs if isinstance(pairs, np.ndarray) else list(pairs), dtype=np.int64).reshape(-1, 2)
    table = table[table[:, 1] > table[:, 0]]
    if len(table) < 2:
        return table
    table = table[np.argsort(table[:, 0], kind="stable")]
    reach = np.maximum.accumulate(table[:, 1])
    begins = np.flatnonzero(np.concatenate(([True], table[1:, 0] > reach[:-1])))
    stops = np.concatenate((reach[begins[1:] - 1], reach[-1:]))
    return np.stack((table[begins, 0], stops), axis=1)


def complement(ranges: RangeSet, n_rows: int) -> RangeSet:
    """The rows of [0, n_rows) that ranges leave out."""
    edges = np.concatenate(([0], ranges.reshape(-1), [n_rows])).reshape(-1, 2)
    return as_ranges(np.minimum(edges, n_rows))


def intersect(a: RangeSet, b: RangeSet) -> RangeSet:
    """Rows in both."""
    if not len(a) or not len(b):
        return np.zeros((0, 2), np.int64)
    n_rows = int(max(a[-1, 1], b[-1, 1]))
    return subtract(a, complement(b, n_rows))


def subtract(a: RangeSet, b: RangeSet) -> RangeSet:
    """Rows of a that are not in b."""
    if not len(a) or not len(b):
        return a
    n_rows = int(max(a[-1, 1], b[-1, 1]))
    outside = complement(a, n_rows)
    return complement(as_ranges(np.concatenate((outside, b))), n_rows)


def count(ranges: RangeSet) -> int:
    """How many rows."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def contains(ranges: RangeSet, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of rows (any shape) are in ranges; same shape, bool."""
    # an odd number of edges at or below a row: it is inside a range
    inside: NDArray[np.bool_] = np.searchsorted(ranges.reshape(-1), rows, side="right") % 2 == 1
    return inside
