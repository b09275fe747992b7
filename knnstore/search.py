"""key → rotate → lists → top k of each segment → top k over segments.

Distances are squared L2. A segment's mean distortion is added to its code distances, so that segments of different spaces
compare. Results are sorted by (distance, segment, row). FastScan compares 16-bit sums, so among entries tied at the k-th
distance any may be kept; exact search keeps the smallest (segment, row).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from knnstore.errors import InvalidArgumentError
from knnstore.format import TOKEN_BITS
from knnstore.storage.lists import labels_of, rows_of, tokens_of
from knnstore.storage.rows import RangeSet, contains, count
from knnstore.storage.segment import Segment

__all__ = ["MAX_K", "Hits", "check_breadth", "check_keys", "search"]

Keys = NDArray[np.float32]
Labels = NDArray[np.int64]

MAX_K = 1 << 20  # neighbours of one query at most: what a heap of them costs is the user's to choose below this
MAX_SELECTOR_RANGES = 8  # more row ranges than this are filtered after an over-fetch: faiss asks each range for each candidate
RESULT_CELLS = 1 << 24  # (query, neighbour, segment) cells searched at a time: 200 MB
EXACT_ROWS = 32_768  # keys compared at a time in exact search
EXACT_QUERIES = 256


@dataclass(frozen=True, slots=True)
class Hits:
    """All (n, k): distances float32 (inf where fewer than k were found), values int32, segments int32, rows int64 (-1 there)."""

    distances: NDArray[np.float32]
    values: NDArray[np.int32]
    segments: NDArray[np.int32]
    rows: NDArray[np.int64]


def check_keys(keys: Any, dim: int) -> Keys:
    """Queries as (n, dim) float32; one key (dim,) becomes (1, dim). Raises InvalidArgumentError for another shape or non-finite keys."""
    try:
        array = np.asarray(keys)
    except (TypeError, ValueError) as error:  # rows of different lengths, a tensor that numpy cannot see
        raise InvalidArgumentError(f"keys are not an array: {error}. The datastore's keys are (n, {dim}) numbers.") from error
    shape = array.shape
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != dim or array.dtype.kind not in "fiu":
        raise InvalidArgumentError(f"keys of shape {shape} and type {array.dtype}: the datastore's keys are (n, {dim}) numbers.")
    with np.errstate(over="ignore"):  # said below
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise InvalidArgumentError("a key is not finite (NaN or infinity). Compute keys in float32, or check the model.")
    return array


def check_breadth(k: int, nprobe: int) -> None:
    """Raises InvalidArgumentError unless k is from 1 to MAX_K and nprobe is 1 or more."""
    if not 1 <= k <= MAX_K:
        raise InvalidArgumentError(f"k {k}: use 1 to {MAX_K}.")
    if nprobe < 1:
        raise InvalidArgumentError(f"nprobe {nprobe}: use 1 or more.")


def search(
    segments: Sequence[Segment], allowed: Sequence[RangeSet | None], keys: Keys, *, k: int, nprobe: int, exact: bool = False
) -> Hits:
    """The k nearest entries of each key among the rows that are allowed.

    allowed: for each segment the rows that count, None for all. keys: (n, dim) float32, checked. exact: by kept keys.
    Raises InvalidArgumentError for k, nprobe out of range, or exact search where keys were not kept; DamageError.
    """
    check_breadth(k, nprobe)
    parts = [(i, segment, rows) for i, (segment, rows) in enumerate(zip(segments, allowed, strict=True)) if rows is None or len(rows)]
    step = EXACT_QUERIES if exact else max(1, RESULT_CELLS // (k * max(1, len(parts))))
    pieces = [_search_piece(parts, keys[at : at + step], k, nprobe, exact) for at in range(0, max(1, len(keys)), step)]
    if len(pieces) == 1:
        return pieces[0]
    return Hits(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("distances", "values", "segments", "rows")))


def _search_piece(parts: Sequence[tuple[int, Segment, RangeSet | None]], keys: Keys, k: int, nprobe: int, exact: bool) -> Hits:
    n = len(keys)
    found: list[tuple[int, NDArray[np.float32], Labels]] = []
    rotated: dict[str, Keys] = {}
    probes: dict[str, tuple[Keys, Labels]] = {}
    for number, segment, rows in parts:
        if exact:
            found.append((number, *_exact(segment, rows, keys, k)))
            continue
        if segment.space.id not in rotated:
            rotated[segment.space.id] = segment.space.rotate(keys)
        x = rotated[segment.space.id]
        probe = _probe(segment, x, nprobe, probes)
        distances, labels = _segment_top(segment, rows, x, probe, k)
        distances += np.float32(segment.content.distortion)
        _sort_ties(distances, labels, segment.content.entries)
        found.append((number, distances, labels))
    return _merge(found, n, k)


def _probe(segment: Segment, x: Keys, nprobe: int, known: dict[str, tuple[Keys, Labels]]) -> tuple[Keys, Labels]:
    """Lists to search, and distances to their centroids; shared by segments of one coarse quantizer."""
    if segment.coarse is None:
        return np.zeros((len(x), 1), np.float32), np.zeros((len(x), 1), np.int64)
    if segment.coarse.id not in known:
        known[segment.coarse.id] = segment.coarse.probe(x, min(nprobe, segment.coarse.nlist))
    return known[segment.coarse.id]


def _segment_top(
    segment: Segment, rows: RangeSet | None, x: Keys, probe: tuple[Keys, Labels], k: int
) -> tuple[NDArray[np.float32], Labels]:
    """Distances without distortion and labels, (n, k), ascending; inf and -1 where fewer count."""
    segment.lists.check(probe[1])
    if rows is None or len(rows) <= MAX_SELECTOR_RANGES:
        return _faiss_top(segment, x, probe, k, rows)
    return _filtered_top(segment, rows, x, probe, k)


def _filtered_top(segment: Segment, rows: RangeSet, x: Keys, probe: tuple[Keys, Labels], k: int) -> tuple[NDArray[np.float32], Labels]:
    """Fetches more than k and keeps the rows that count; queries left with too few are asked again, for more."""
    distances, labels = np.full((len(x), k), np.inf, np.float32), np.full((len(x), k), -1, np.int64)
    most = int(segment.lists.sizes[probe[1]].sum(axis=1).max(initial=1))  # entries of the lists that are searched
    fetch = min(most, k + k * segment.content.entries // count(rows))
    pending = np.arange(len(x))
    while len(pending):
        step = max(1, RESULT_CELLS // fetch)
        short = []
        for at in range(0, len(pending), step):
            some = pending[at : at + step]
            near, found = _faiss_top(segment, x[some], (probe[0][some], probe[1][some]), fetch, None)
            counts = contains(rows, rows_of(found))  # (some, fetch); not where nothing was found
            order = np.argsort(~counts, axis=1, kind="stable")[:, :k]
            kept, width = np.take_along_axis(counts, order, 1), order.shape[1]
            distances[some, :width] = np.where(kept, np.take_along_axis(near, order, 1), np.float32(np.inf))
            labels[some, :width] = np.where(kept, np.take_along_axis(found, order, 1), -1)
            short.append(some[(counts.sum(axis=1) < k) & (found[:, -1] >= 0)])
        if fetch == most:
            break
        pending, fetch = np.concatenate(short), min(4 * fetch, most)
    return distances, labels


def _faiss_top(segment: Segment, x: Keys, probe: tuple[Keys, Labels], k: int, rows: RangeSet | None) -> tuple[NDArray[np.float32], Labels]:
    n = len(x)
    distances, labels = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    parameters = faiss.SearchParametersIVF(nprobe=probe[1].shape[1])
    if rows is not None:
        selectors = [faiss.IDSelectorRange(int(first) << TOKEN_BITS, int(stop) << TOKEN_BITS) for first, stop in rows]
        chain = [selectors[0]]  # faiss keeps bare pointers: every link must live until the search is done
        for selector in selectors[1:]:
            chain.append(faiss.IDSelectorOr(chain[-1], selector))
        parameters = faiss.SearchParametersIVF(nprobe=probe[1].shape[1], sel=chain[-1])
    lists, centroid_distances = np.ascontiguousarray(probe[1]), np.ascontiguousarray(probe[0])
    segment.index.search_preassigned_c(
        n,
        faiss.swig_ptr(x),
        k,
        faiss.swig_ptr(lists),
        faiss.swig_ptr(centroid_distances),
        faiss.swig_ptr(distances),
        faiss.swig_ptr(labels),
        False,
        parameters,
    )
    distances[labels < 0] = np.inf
    return distances, labels


def _sort_ties(distances: NDArray[np.float32], labels: Labels, n_rows: int) -> None:
    """Puts labels of equal distance in row order, in place. distances: (n, k), ascending in each row."""
    equal = distances[:, 1:] == distances[:, :-1]
    equal &= labels[:, 1:] >= 0
    if not equal.any():
        return
    tied = np.zeros(distances.shape, dtype=bool)
    tied[:, 1:] |= equal
    tied[:, :-1] |= equal
    begins = tied.copy()
    begins[:, 1:] &= ~equal
    at = np.flatnonzero(tied)
    group = np.cumsum(begins.reshape(-1)[at])
    flat = labels.reshape(-1)
    of_group = flat[at]
    row_bits = max(1, n_rows.bit_length())
    if row_bits + int(group[-1]).bit_length() < 63:
        order = np.argsort((group << row_bits) | rows_of(of_group))
    else:
        order = np.lexsort((of_group, group))
    flat[at] = of_group[order]


def _merge(found: Sequence[tuple[int, NDArray[np.float32], Labels]], n: int, k: int) -> Hits:
    """The k smallest over segments by (distance, segment, row); each part is sorted by (distance, row)."""
    if not found:
        nothing = np.full((n, k), -1, np.int64)
        return Hits(np.full((n, k), np.inf, np.float32), nothing.astype(np.int32), nothing.astype(np.int32), nothing)
    if len(found) == 1:
        number, distances, labels = found[0]
        segments = np.where(labels >= 0, np.int32(number), np.int32(-1))
        return Hits(distances, tokens_of(labels), segments, rows_of(labels))
    all_distances = np.concatenate([distances for _, distances, _ in found], axis=1)
    all_labels = np.concatenate([labels for _, _, labels in found], axis=1)
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]  # stable: equal distances stay in segment order
    distances, labels = np.take_along_axis(all_distances, order, 1), np.take_along_axis(all_labels, order, 1)
    numbers = np.array([number for number, _, _ in found], np.int32)
    segments = np.where(labels >= 0, numbers[order // k], np.int32(-1))
    return Hits(distances, tokens_of(labels), segments, rows_of(labels))


def _exact(segment: Segment, rows: RangeSet | None, keys: Keys, k: int) -> tuple[NDArray[np.float32], Labels]:
    """By brute force over kept keys, in float64 rounded to float32; ties go to the smallest row."""
    n, dim = keys.shape
    queries = keys.astype(np.float64)
    query_norms = np.square(queries).sum(axis=1)
    best = np.full((n, k), np.inf, np.float32)
    best_rows = np.full((n, k), -1, np.int64)
    ranges = [(0, segment.content.entries)] if rows is None else [(int(a), int(b)) for a, b in rows]
    for first, stop in ranges:
        for at in range(first, stop, EXACT_ROWS):
            stored = segment.exact_keys(at, min(at + EXACT_ROWS, stop)).astype(np.float64)
            norms = np.square(stored).sum(axis=1)
            rough = query_norms[:, None] - 2.0 * (queries @ stored.T) + norms  # (n, rows)
            slack = 4 * dim * np.finfo(np.float64).eps * (query_norms + norms.max())  # what its rounding may be
            for i in range(n):
                _take_in(best[i], best_rows[i], queries[i], stored, rough[i], float(slack[i]), at)
    found = best_rows >= 0
    tokens = np.zeros(best_rows.shape, np.int64)
    tokens[found] = segment.values.rows(0, segment.content.entries)[:, 0][best_rows[found]]
    return best, np.where(found, labels_of(best_rows, tokens), -1)


def _take_in(
    best: NDArray[np.float32],
    best_rows: Labels,
    query: NDArray[np.float64],
    stored: NDArray[np.float64],
    rough: NDArray[np.float64],
    slack: float,
    first_row: int,
) -> None:
    """Merges a run of rows into the best k of one query so far, in place, keeping the smaller row where distances tie.

    rough: (rows,) distances by the expanded square. It rounds equal keys differently, so it only says which rows to measure.
    """
    k = len(best)
    candidates = np.flatnonzero(rough <= _reach(float(best[-1]), slack))
    if len(candidates) > k:
        kth = float(np.partition(rough[candidates], k - 1)[k - 1])
        candidates = candidates[rough[candidates] <= _reach(kth, slack)]
    distances = np.square(stored[candidates] - query).sum(axis=1).astype(np.float32)
    both = np.concatenate((best, distances))
    both_rows = np.concatenate((best_rows, candidates + first_row))
    order = np.argsort(both, kind="stable")[:k]
    best[:], best_rows[:] = both[order], both_rows[order]


def _reach(distance: float, slack: float) -> float:
    """What a rough distance may be whose true one rounds to this float32 or less."""
    return distance * (1 + 2.0**-22) + 2 * slack
