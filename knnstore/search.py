"""key → rotate → lists → top k of each stack of segments → top k over all.

Distances are squared L2. The mean distortion of a space's entries is added to the distances of their codes, so that spaces
compare. Results are sorted by (distance, segment, row). FastScan compares 16-bit sums, so among entries tied at the k-th distance any
may be kept; exact search keeps the smallest (segment, row).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from knnstore.errors import InvalidArgumentError
from knnstore.format import TOKEN_BITS
from knnstore.storage.coarse import Coarse
from knnstore.storage.lists import labels_of, rows_of, tokens_of
from knnstore.storage.rows import RangeSet, as_ranges, contains, count
from knnstore.storage.segment import Segment
from knnstore.storage.space import Space
from knnstore.storage.stack import Shelf, Stack
from knnstore.threads import at_once, over_blocks, without_omp

__all__ = ["MAX_K", "Hits", "check_breadth", "check_keys", "search"]

Keys = NDArray[np.float32]
Labels = NDArray[np.int64]

MAX_K = 1 << 20  # neighbours of one query at most: what a heap of them costs is the user's to choose below this
MAX_SELECTOR_RANGES = 8  # more row ranges than this are filtered after an over-fetch: faiss asks each range for each candidate
RESULT_CELLS = 1 << 24  # (query, neighbour, segment) cells searched at a time: 200 MB
STRIPE_WORK = 49_152  # of one query, in entries scanned, that a thread gets at least: 250 µs, twice what handing it over takes
LIST_WORK = 200  # what beginning a list takes, in entries scanned: it lies elsewhere in memory
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
    segments: Sequence[Segment],
    allowed: Sequence[RangeSet | None],
    keys: Keys,
    *,
    k: int,
    nprobe: int,
    exact: bool = False,
    stacks: Sequence[Stack] | None = None,
    lists: Mapping[str, Labels] | None = None,
    places: bool = True,
) -> Hits:
    """The k nearest entries of each key among the rows that are allowed.

    allowed: for each segment the rows that count, None for all. keys: (n, dim) float32, checked. exact: by kept keys. stacks: how the
    segments are searched together, None for each by itself. lists: by coarse quantizer, those to search for each key, (n, m) with -1 for
    none, in place of the nprobe nearest. places: whether segments and rows are wanted; without, (n, 0) of them come, and entries of equal
    distance in any order.
    Raises InvalidArgumentError for k, nprobe out of range, or exact search where keys were not kept; DamageError.
    """
    check_breadth(k, nprobe)
    parts: Sequence[_Part | _ExactPart]
    if exact:
        pairs = enumerate(zip(segments, allowed, strict=True))
        parts = [_ExactPart(i, segment, rows) for i, (segment, rows) in pairs if rows is None or len(rows)]
    else:
        stacks = [Stack([i], [segment]) for i, segment in enumerate(segments)] if stacks is None else stacks
        parts = [part for part in (_Part.of(stack, allowed) for stack in stacks) if part is not None]
    step = EXACT_QUERIES if exact else max(1, RESULT_CELLS // max(1, sum(part.width(k, nprobe) for part in parts)))
    if len(keys) == 1:
        with without_omp() as threads:  # what there is to do for one query is dealt out below
            return _search_piece(parts, _Known(keys, nprobe, lists, slice(0, 1), threads), k, places)
    pieces = [
        _search_piece(parts, _Known(keys, nprobe, lists, slice(at, at + step)), k, places) for at in range(0, max(1, len(keys)), step)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return Hits(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("distances", "values", "segments", "rows")))


@dataclass(frozen=True, slots=True)
class _Found:
    """What one part found for n keys: distances (n, k) ascending, places of segments, labels; inf and -1 where fewer count."""

    distances: NDArray[np.float32]
    segments: NDArray[np.int32]
    labels: Labels


class _Known:
    """What the parts of one search share: rotated keys by space, probed lists by coarse quantizer.

    keys: all of which those `at` are searched now. lists: by coarse quantizer, where they are not to be chosen. threads: for one query.
    """

    def __init__(self, keys: Keys, nprobe: int, lists: Mapping[str, Labels] | None, at: slice, threads: int = 1) -> None:
        self.keys, self.threads, self._nprobe = keys[at], threads, nprobe
        self._rotated: dict[str, Keys] = {}
        self._probes = {name: given[at] for name, given in (lists or {}).items()}

    def rotated(self, space: Space) -> Keys:
        if space.id not in self._rotated:
            self._rotated[space.id] = space.rotate(self.keys)
        return self._rotated[space.id]

    def probe(self, space: Space, coarse: Coarse | None) -> Labels:
        """Numbers of the lists to search, (n, lists)."""
        if coarse is None:
            return np.zeros((len(self.keys), 1), np.int64)
        if coarse.id not in self._probes:
            self._probes[coarse.id] = coarse.probe(self.rotated(space), min(self._nprobe, coarse.nlist))[1]
        return self._probes[coarse.id]


@dataclass(frozen=True, slots=True)
class _ExactPart:
    """A segment to be searched by its kept keys."""

    number: int
    segment: Segment
    rows: RangeSet | None

    @property
    def last(self) -> int:
        """The largest number of its segments."""
        return self.number

    def width(self, k: int, nprobe: int) -> int:
        """Cells of arrays that a query takes."""
        return k

    def top(self, known: _Known, k: int) -> tuple[NDArray[np.float32], Labels]:
        return _exact(self.segment, self.rows, known.keys, k)

    def found(self, distances: NDArray[np.float32], labels: Labels, places: bool) -> _Found:
        return _Found(distances, np.where(labels >= 0, np.int32(self.number), np.int32(-1)), labels)


@dataclass(frozen=True, slots=True)
class _Part:
    """A stack to be searched. shelves: those of its shelves that have rows that count, and the places there of the segments that have.
    ranges: the labels that count, None for all. share: how many of those segments' entries count.
    """

    stack: Stack
    shelves: list[tuple[Shelf, NDArray[np.int64]]]
    ranges: RangeSet | None
    share: float

    @classmethod
    def of(cls, stack: Stack, allowed: Sequence[RangeSet | None]) -> "_Part | None":
        rows = [allowed[number] for number in stack.numbers.tolist()]
        if all(some is None for some in rows):
            return cls(stack, [(shelf, np.arange(len(shelf.members))) for shelf in stack.shelves], None, 1.0)
        members = [i for i, some in enumerate(rows) if some is None or len(some)]
        if not members:
            return None
        shelves = [(shelf, np.flatnonzero(np.isin(shelf.members, members))) for shelf in stack.shelves]
        shelves = [(shelf, places) for shelf, places in shelves if len(places)]
        wholes = [as_ranges([(0, stack.members[i].content.entries)]) if (some := rows[i]) is None else some for i in members]
        n_all = sum(stack.members[i].content.entries for i in members)
        n_count = sum(map(count, wholes))
        if n_count == n_all:
            return cls(stack, shelves, None, 1.0)
        ranges = [(some << TOKEN_BITS) + stack.label_bases[i] for i, some in zip(members, wholes, strict=True)]
        ranges.sort(key=lambda some: int(some[0, 0]))  # labels of two segments do not mix
        return cls(stack, shelves, np.concatenate(ranges), n_count / n_all)

    def top(self, known: _Known, k: int) -> tuple[NDArray[np.float32], Labels]:
        """Distances without distortion and labels of the k nearest; entries of equal distance in any order."""
        space = self.stack.space
        x = known.rotated(space)
        probed = [shelf.numbers(known.probe(space, shelf.coarse), places) for shelf, places in self.shelves]
        probe = probed[0] if len(probed) == 1 else np.concatenate(probed, axis=1)
        self.stack.check(probe)
        if self.ranges is None or len(self.ranges) <= MAX_SELECTOR_RANGES:
            return _faiss_top(self.stack, x, probe, k, self.ranges, known.threads)
        return self._filtered_top(x, probe, k)

    def found(self, distances: NDArray[np.float32], labels: Labels, places: bool) -> _Found:
        """What some rows of `top` stand for, in their arrays; without places, a label is good for its token."""
        distances += np.float32(self.stack.distortion)
        segments = self.stack.locate(labels, whole=_is_whole(labels)) if places else np.broadcast_to(np.int32(-1), labels.shape)
        return _Found(distances, segments, labels)

    @property
    def last(self) -> int:
        """The largest number of its segments."""
        return int(self.stack.numbers.max())

    def width(self, k: int, nprobe: int) -> int:
        """Cells of arrays that a query takes."""
        return max(k, nprobe * len(self.stack.members))

    def _filtered_top(self, x: Keys, probe: Labels, k: int) -> tuple[NDArray[np.float32], Labels]:
        """Fetches more than k and keeps the labels that count; queries left with too few are asked again, for more."""
        assert self.ranges is not None, "said by top"
        distances, labels = np.full((len(x), k), np.inf, np.float32), np.full((len(x), k), -1, np.int64)
        sizes = np.append(self.stack.sizes, 0)  # of list -1 too
        most = max(1, int(sizes[probe].sum(axis=1).max(initial=1)))  # entries of the lists that are searched
        fetch = min(most, k + int(k / self.share))
        pending = np.arange(len(x))
        while len(pending):
            step = max(1, RESULT_CELLS // fetch)
            short = []
            for at in range(0, len(pending), step):
                some = pending[at : at + step]
                near, found = _faiss_top(self.stack, x[some], probe[some], fetch, None)
                counts = contains(self.ranges, found)  # (some, fetch); not where nothing was found
                order = np.argsort(~counts, axis=1, kind="stable")[:, :k]
                kept, width = np.take_along_axis(counts, order, 1), order.shape[1]
                distances[some, :width] = np.where(kept, np.take_along_axis(near, order, 1), np.float32(np.inf))
                labels[some, :width] = np.where(kept, np.take_along_axis(found, order, 1), -1)
                short.append(some[(counts.sum(axis=1) < k) & (found[:, -1] >= 0)])
            if fetch == most:
                break
            pending, fetch = np.concatenate(short), min(4 * fetch, most)
        return distances, labels


def _search_piece(parts: "Sequence[_Part | _ExactPart]", known: _Known, k: int, places: bool) -> Hits:
    n = len(known.keys)
    tops = [part.top(known, k) for part in parts]
    # One part's own arrays are filled anew: memory that is touched for the first time is what costs most here.
    distances, rows = tops[0] if len(tops) == 1 else (np.empty((n, k), np.float32), np.empty((n, k if places else 0), np.int64))
    segments = np.empty((n, k if places else 0), np.int32)
    hits = Hits(distances, np.empty((n, k), np.int32), segments, rows if places else rows[:, :0])

    segment_bits = max((part.last.bit_length() for part in parts), default=0)

    def finish(at: slice) -> None:
        pieces = [part.found(near[at], labels[at], places) for part, (near, labels) in zip(parts, tops, strict=True)]
        found = _merge(pieces, at.stop - at.start, k)
        found = _sorted_ties(found, segment_bits) if places else found
        hits.distances[at], hits.values[at] = found.distances, tokens_of(found.labels, whole=_is_whole(found.labels))
        if places:
            hits.segments[at], hits.rows[at] = found.segments, rows_of(found.labels)

    over_blocks(finish, n, width=k * max(1, len(parts)))
    return hits


def _faiss_top(
    stack: Stack, x: Keys, lists: Labels, k: int, ranges: RangeSet | None, threads: int = 1
) -> tuple[NDArray[np.float32], Labels]:
    """Distances without distortion and labels, (n, k), ascending; inf and -1 where fewer count. ranges: of labels. threads: of one."""
    chain: list[Any] = []  # faiss keeps bare pointers: every link must live until the search is done
    if ranges is not None:
        selectors = [faiss.IDSelectorRange(int(first), int(stop)) for first, stop in ranges]
        chain.append(selectors[0])
        for selector in selectors[1:]:
            chain.append(faiss.IDSelectorOr(chain[-1], selector))
    stripes = _stripes(stack, lists, threads) if threads > 1 else [lists]
    found = at_once([partial(_scan, stack.index(len(x)), x, some, k, chain[-1] if chain else None) for some in stripes])
    return found[0] if len(found) == 1 else _nearest_of(found, k)


def _stripes(stack: Stack, lists: Labels, threads: int) -> list[Labels]:
    """The lists of one query, dealt out to threads where each gets enough to scan."""
    work = int(stack.sizes[lists].sum()) + LIST_WORK * lists.shape[1]  # with list -1 taken for the last: it is a guess
    n = max(1, min(threads, lists.shape[1], work // STRIPE_WORK))
    return [lists[:, i::n] for i in range(n)]


def _scan(index: Any, x: Keys, lists: Labels, k: int, selector: Any) -> tuple[NDArray[np.float32], Labels]:
    n = len(x)
    distances, labels = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    parameters = faiss.SearchParametersIVF(nprobe=lists.shape[1], **({} if selector is None else {"sel": selector}))
    lists, centroid_distances = np.ascontiguousarray(lists), np.zeros(lists.shape, np.float32)  # which codes of whole keys do not need
    index.search_preassigned_c(
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
    if (missing := labels < 0).any():
        distances[missing] = np.inf
    return distances, labels


def _nearest_of(found: Sequence[tuple[NDArray[np.float32], Labels]], k: int) -> tuple[NDArray[np.float32], Labels]:
    """The k nearest of what several scans found for one query."""
    distances, labels = (np.concatenate([piece[i][0] for piece in found]) for i in (0, 1))
    bits = distances.view(np.int32)
    # The bits of floats are in their order, of negative ones (rounding may make them) in reverse: so they sort, with places below them.
    order = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32) | np.arange(len(bits))
    order.sort()
    nearest = order[:k] & 0xFFFFFFFF
    return distances[nearest][None], labels[nearest][None]


def _sorted_ties(found: _Found, segment_bits: int) -> _Found:
    """With what has equal distance in order of (segment, row). segment_bits: of the largest number of a segment."""
    distances, segments, labels = found.distances, found.segments, found.labels
    known = None if _is_whole(labels) else labels >= 0
    differ = distances[:, 1:] != distances[:, :-1]
    if known is not None:
        differ |= ~known[:, 1:]
    if differ.all():
        return found
    rank = np.empty(labels.shape, np.int64)  # of the distance, in its row
    rank[:, 0] = 0
    np.cumsum(differ, axis=1, out=rank[:, 1:])
    label_bits = int(labels.max()).bit_length()
    if labels.shape[1].bit_length() + segment_bits + label_bits >= 63:
        order = np.lexsort((labels, segments, rank))
        return _Found(distances, np.take_along_axis(segments, order, 1), np.take_along_axis(labels, order, 1))
    # Rank, segment and label as one number: sorting those is several times faster than sorting places by three.
    rank <<= segment_bits + label_bits
    if segment_bits:
        labels = labels | (segments.astype(np.int64) << label_bits)
    rank |= labels if known is None else np.where(known, labels, 0)
    rank.sort(axis=1)
    if segment_bits:
        segments = ((rank >> label_bits) & ((1 << segment_bits) - 1)).astype(np.int32)
    rank &= (1 << label_bits) - 1
    if known is not None:
        segments, rank = np.where(known, segments, np.int32(-1)), np.where(known, rank, -1)
    return _Found(distances, segments, rank)


def _is_whole(labels: Labels) -> bool:
    """Whether all were found: those that were not come last in their row."""
    return not labels.size or int(labels[:, -1].min()) >= 0


def _merge(found: Sequence[_Found], n: int, k: int) -> _Found:
    """The k smallest over parts; where distances are equal, parts that come first."""
    if not found:
        nothing = np.full((n, k), -1, np.int64)
        return _Found(np.full((n, k), np.inf, np.float32), nothing.astype(np.int32), nothing)
    if len(found) == 1:
        return found[0]
    distances, segments, labels = (
        np.concatenate([getattr(part, name) for part in found], axis=1) for name in ("distances", "segments", "labels")
    )
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return _Found(*(np.take_along_axis(array, order, 1) for array in (distances, segments, labels)))


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
