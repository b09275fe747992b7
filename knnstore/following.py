"""Neighbours of the step before, one token on: row + 1 of an entry is what came next in its document.

RetoMaton (Alon et al. 2022, "Neuro-Symbolic Language Modeling with Automaton-augmented Retrieval"): where many of a step's neighbours
had the token that really came, their next entries, and those of the same clusters, are neighbours of the next step; no search is needed.
The clusters are the inverted lists that a store has.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnstore.search import Hits, search
from knnstore.storage.places import Places
from knnstore.storage.rows import RangeSet, as_ranges, contains
from knnstore.storage.segment import Segment
from knnstore.storage.stack import Stack

__all__ = ["Follower", "nothing"]

Keys = NDArray[np.float32]
Numbers = NDArray[np.int64]


class Follower:
    """Follows entries of a snapshot's segments. Memory: 4 bytes an entry of each segment that is followed into, from then on.

    allowed: for each segment the rows that count, None for all. exact: distances to kept keys, as exact search has them; there, and in
    segments of one list, next entries are followed without their clusters.
    """

    def __init__(self, segments: Sequence[Segment], stacks: Sequence[Stack], allowed: Sequence[RangeSet | None], *, exact: bool) -> None:
        self._segments, self._stacks, self._allowed, self._exact = segments, stacks, allowed, exact
        self._places = [Places(segment.lists, segment.space) for segment in segments]
        self._clustered = np.array([segment.coarse is not None and not exact for segment in segments])
        none = as_ranges([])
        self._in_clusters = [some if clustered else none for some, clustered in zip(allowed, self._clustered, strict=True)]
        self._distortions = np.zeros(len(segments), np.float32)
        for stack in stacks:
            self._distortions[stack.numbers] = stack.distortion

    def has_next(self, segments: NDArray[np.int32], rows: Numbers) -> NDArray[np.bool_]:
        """Whether row + 1 is the next entry of the same document, in the same segment, and counts. All (m,)."""
        found = np.zeros(len(rows), bool)
        for number in np.unique(segments).tolist():
            at = np.flatnonzero(segments == number)
            after = rows[at] + 1
            begins, allowed = self._segments[number].contexts.first_rows, self._allowed[number]
            document = np.minimum(np.searchsorted(begins, after), len(begins) - 1)
            counts = (after < self._segments[number].content.entries) & (begins[document] != after)
            found[at] = counts if allowed is None else counts & contains(allowed, after)
        return found

    def follow(
        self, keys: Keys, owners: Numbers, segments: NDArray[np.int32], rows: Numbers, weights: NDArray[np.float64], *, k: int, n_lists: int
    ) -> Hits:
        """The k nearest of the entries given and of all that count in the lists where most weight of them is.

        keys: (n, dim) float32. owners, segments, rows, weights: (m,), the key each entry is for, the entry, and its weight.
        n_lists: of each key. Distances are those of a search. Raises DamageError.
        """
        clustered = np.flatnonzero(self._clustered[segments])
        if not len(clustered):
            return self._compared(keys, owners, segments, rows, k)
        lists, inside = self._lists(len(keys), owners[clustered], segments[clustered], rows[clustered], weights[clustered], n_lists)
        found = search(self._segments, self._in_clusters, keys, k=k, nprobe=1, stacks=self._stacks, lists=lists)
        alone = np.ones(len(rows), bool)
        alone[clustered[inside]] = False  # found with the others of their list
        return _merged(found, self._compared(keys, owners[alone], segments[alone], rows[alone], k), k) if alone.any() else found

    def _lists(
        self, n: int, owners: Numbers, segments: NDArray[np.int32], rows: Numbers, weights: NDArray[np.float64], n_lists: int
    ) -> tuple[dict[str, Numbers], NDArray[np.bool_]]:
        """By coarse quantizer, the lists to search for each of n keys, (n, n_lists), -1 for none; of equal weight, the first. And which
        of the entries are in one of their key's lists, (m,)."""
        coarse = {segment.coarse.id: segment.coarse.nlist for segment in self._segments if segment.coarse is not None}
        bases = dict(zip(coarse, np.cumsum([0, *coarse.values()])[:-1].tolist(), strict=True))
        n_all = sum(coarse.values())  # lists that segments share are one
        cells = np.empty(len(rows), np.int64)
        for number in np.unique(segments).tolist():
            at = segments == number
            base = bases[self._segments[number].content.coarse or ""]
            cells[at] = owners[at] * n_all + base + self._places[number].lists(rows[at])
        cells, which = np.unique(cells, return_inverse=True)
        order = np.lexsort((-np.bincount(which, weights), cells // n_all))
        of = cells[order] // n_all
        rank = np.empty(len(cells), np.int64)
        rank[order] = np.arange(len(of)) - np.searchsorted(of, of)
        taken = rank < n_lists
        chosen = np.full((n, n_lists), -1)
        chosen[cells[taken] // n_all, rank[taken]] = cells[taken] % n_all
        lists = {
            name: np.where((chosen >= bases[name]) & (chosen < bases[name] + nlist), chosen - bases[name], -1)
            for name, nlist in coarse.items()
        }
        return lists, taken[which]

    def _compared(self, keys: Keys, owners: Numbers, segments: NDArray[np.int32], rows: Numbers, k: int) -> Hits:
        """Entries with their distances to the keys they are for, sorted, k of each key at most."""
        distances, values = np.empty(len(rows), np.float32), np.empty(len(rows), np.int32)
        rotated: dict[str, Keys] = {}
        for number in np.unique(segments).tolist():
            at, segment = np.flatnonzero(segments == number), self._segments[number]
            if self._exact:
                distances[at] = _exact_distances(segment, keys, owners[at], rows[at])
                values[at] = self._places[number].tokens(rows[at])
                continue
            if segment.space.id not in rotated:
                rotated[segment.space.id] = segment.space.rotate(keys)
            distances[at], values[at] = self._places[number].distances(rotated[segment.space.id], owners[at], rows[at])
            distances[at] += self._distortions[number]
        order = np.lexsort((rows, segments, distances, owners))
        owners = owners[order]
        rank = np.arange(len(order)) - np.searchsorted(owners, owners)
        order, owners, rank = order[rank < k], owners[rank < k], rank[rank < k]
        hits = nothing(len(keys), k)
        hits.distances[owners, rank], hits.values[owners, rank] = distances[order], values[order]
        hits.segments[owners, rank], hits.rows[owners, rank] = segments[order], rows[order]
        return hits


def nothing(n: int, k: int) -> Hits:
    """n keys without a neighbour."""
    return Hits(
        np.full((n, k), np.inf, np.float32), np.full((n, k), -1, np.int32), np.full((n, k), -1, np.int32), np.full((n, k), -1, np.int64)
    )


def _merged(one: Hits, other: Hits, k: int) -> Hits:
    """The k nearest of both, which share no entry."""
    distances, values, segments, rows = (
        np.concatenate((getattr(one, name), getattr(other, name)), axis=1) for name in ("distances", "values", "segments", "rows")
    )
    order = np.lexsort((rows, segments, distances), axis=1)[:, :k]
    return Hits(*(np.take_along_axis(array, order, 1) for array in (distances, values, segments, rows)))


def _exact_distances(segment: Segment, keys: Keys, owners: Numbers, rows: Numbers) -> Keys:
    """As exact search has them: in float64, rounded to float32."""
    out = np.empty(len(rows), np.float32)
    unique, which = np.unique(rows, return_inverse=True)
    stored = np.concatenate([segment.exact_keys(row, row + 1) for row in unique.tolist()]).astype(np.float64)
    for at in range(0, len(rows), 4_096):
        some = slice(at, at + 4_096)
        out[some] = np.square(keys[owners[some]].astype(np.float64) - stored[which[some]]).sum(axis=1)
    return out
