"""When a datastore is searched: at every position, only where the model is not confident, or only where pointers have run out."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnstore import filters
from knnstore.following import Follower, nothing
from knnstore.lm.gates import gate_lambdas
from knnstore.lm.mixing import LmView
from knnstore.lm.settings import Settings
from knnstore.neighbors import Neighbors
from knnstore.search import Hits
from knnstore.store import Datastore

__all__ = ["Found", "Retriever", "retriever_for"]

Keys = NDArray[np.float32]
Numbers = NDArray[np.int64]

LISTS_SHARE = 8  # of the lists of a search, one in this many is looked into where pointers are followed: measured, docs/evaluation.md


@dataclass(frozen=True, slots=True)
class Found:
    """Neighbours of n positions, and whether they come from a search, (n,) bool. A position without neighbours has p = p_LM."""

    neighbors: Neighbors
    searched: NDArray[np.bool_]


class Retriever:
    """Searches at every position. n_positions, n_searched: how many were asked for, and how many of them were searched, so far."""

    def __init__(
        self, store: Datastore, settings: Settings, exclude: Iterable[str | filters.RowRange] = (), *, places: bool = True
    ) -> None:
        self._store, self._settings, self._exclude, self._places = store, settings, [*settings.exclude, *exclude], places
        self.n_positions = self.n_searched = 0

    def find(self, keys: Keys, view: LmView | None, *, sequence: Numbers, came: Numbers) -> Found:
        """Neighbours of positions of one or more texts.

        keys: (n, dim) float32. view: of p_LM at the same positions; `confident` needs it. sequence: (n,) int64, any labels: the
        positions of one label are consecutive in a text, in reading order. came: (n,) int64, the token read at each position, which
        is the last one that its key knows. A label that was in the call before goes on from there; others begin anew.
        Raises InvalidArgumentError, DamageError.
        """
        found = self._find(keys, view, sequence, came)
        self.n_positions += len(keys)
        self.n_searched += int(found.searched.sum())
        return found

    def reset(self) -> None:
        """Forgets all sequences; the counts stay."""

    def _find(self, keys: Keys, view: LmView | None, sequence: Numbers, came: Numbers) -> Found:
        return Found(self._search(keys), np.ones(len(keys), bool))

    def _search(self, keys: Keys) -> Neighbors:
        settings = self._settings
        return self._store.search(
            keys,
            k=settings.k,
            nprobe=settings.nprobe,
            domains=settings.domains,
            exclude=self._exclude or None,
            exact=settings.exact,
            places=self._places,
        )


class ConfidentRetriever(Retriever):
    """Searches where it is as probable as the threshold, by the LM alone, that a search pays."""

    def _find(self, keys: Keys, view: LmView | None, sequence: Numbers, came: Numbers) -> Found:
        settings = self._settings
        assert settings.before is not None, "refused with the settings"
        assert view is not None, "the callers know that it is needed"
        features = {"lm_max": view.log_max, "lm_entropy": view.entropy}
        searched = gate_lambdas(settings.before, features, np.zeros(len(keys))) >= settings.threshold
        return Found(_spread(self._search(keys[searched]), np.flatnonzero(searched), len(keys)), searched)


class PointerRetriever(Retriever):
    """Follows the neighbours of the step before that had the token which came; searches where fewer than min_knns of them are left.

    Source: Alon et al. 2022, the inverted lists being its clusters; pointers that are left are not added to what a search finds.
    """

    def __init__(
        self, store: Datastore, settings: Settings, exclude: Iterable[str | filters.RowRange] = (), *, places: bool = True
    ) -> None:
        super().__init__(store, settings, exclude, places=True)  # they are what is followed
        allowed = filters.allowed_rows(store.segments, weights=settings.domains, exclude=self._exclude)
        self._follower = Follower(store.segments, store.stacks, allowed, exact=settings.exact)
        self.reset()

    def reset(self) -> None:
        self._labels, self._last = np.zeros(0, np.int64), nothing(0, self._settings.k)

    def _find(self, keys: Keys, view: LmView | None, sequence: Numbers, came: Numbers) -> Found:
        n = len(keys)
        hits = _joined(nothing(n, self._settings.k), self._last)  # what was found before stands behind the n new rows
        before, rank, last = _order(sequence, self._labels)
        searched = np.zeros(n, bool)
        for step in range(int(rank.max(initial=-1)) + 1):
            at = np.flatnonzero(rank == step)
            searched[at] = self._step(hits, at, before[at], keys[at], came[at])
        self._labels, self._last = sequence[last], _rows(hits, last)
        settings, segments = self._settings, self._store.segments
        hits = _rows(hits, np.arange(n))
        weights = filters.log_weights(segments, settings.domains, hits.segments, hits.rows)
        return Found(Neighbors(hits.distances, hits.values, hits.segments, hits.rows, weights, segments), searched)

    def _step(self, hits: Hits, at: Numbers, before: Numbers, keys: Keys, came: Numbers) -> NDArray[np.bool_]:
        """Fills the rows `at` of hits, one position of each sequence, from the rows `before` (-1 for none). Returns where it searched."""
        settings = self._settings
        owners, places = np.nonzero((hits.values[before] == came[:, None]) & (before >= 0)[:, None])
        known = before[owners], places
        kept = self._follower.has_next(hits.segments[known], hits.rows[known])
        searched = np.bincount(owners[kept], minlength=len(at)) < settings.min_knns
        followed = np.flatnonzero(~searched)
        if len(followed):
            kept &= ~searched[owners]
            known, owners = (known[0][kept], known[1][kept]), np.searchsorted(followed, owners[kept])
            found = self._follower.follow(
                keys[followed],
                owners,
                hits.segments[known],
                hits.rows[known] + 1,
                _weights(owners, hits.distances[known], settings.temperature),
                k=settings.k,
                n_lists=max(1, settings.nprobe // LISTS_SHARE),
            )
            _put(hits, at[followed], found)
        if searched.any():
            _put(hits, at[searched], self._search(keys[searched]))
        return searched


def retriever_for(
    store: Datastore, settings: Settings, exclude: Iterable[str | filters.RowRange] = (), *, places: bool = True
) -> Retriever:
    """The retriever that settings ask for. exclude: rows that do not count, besides those of the settings. places: as for a search.

    Raises NotFoundError for a document that is not there.
    """
    kinds = {"full": Retriever, "pointers": PointerRetriever, "confident": ConfidentRetriever}
    return kinds[settings.retrieval](store, settings, exclude, places=places)


def _weights(owners: Numbers, distances: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """exp(-distance / temperature), from the nearest of each owner; (m,), owners ascending."""
    begins = np.flatnonzero(np.diff(owners, prepend=-1))
    nearest = np.minimum.reduceat(distances.astype(np.float64), begins)
    weights: NDArray[np.float64] = np.exp((np.repeat(nearest, np.diff(begins, append=len(owners))) - distances) / temperature)
    return weights


def _order(sequence: Numbers, labels: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """For each position the one before it in its sequence (counted on behind the positions: one of the last call; -1: none) and its rank
    there, (n,) each; and the last position of each sequence, by label ascending. labels: of the last call, ascending."""
    n = len(sequence)
    order = np.argsort(sequence, kind="stable")
    ordered = sequence[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    rank, before = np.empty(n, np.int64), np.full(n, -1)
    rank[order] = np.arange(n) - np.repeat(begins, np.diff(begins, append=n))
    before[order[1:]] = order[:-1]
    known = np.minimum(np.searchsorted(labels, ordered[begins]), max(0, len(labels) - 1))
    goes_on = labels[known] == ordered[begins] if len(labels) else np.zeros(len(begins), bool)
    before[order[begins]] = np.where(goes_on, n + known, -1)
    return before, rank, order[np.append(begins[1:], n)[: len(begins)] - 1]


_ARRAYS = ("distances", "values", "segments", "rows")


def _joined(one: Hits, other: Hits) -> Hits:
    return Hits(*(np.concatenate((getattr(one, name), getattr(other, name))) for name in _ARRAYS))


def _rows(hits: Hits, at: Numbers) -> Hits:
    return Hits(*(getattr(hits, name)[at] for name in _ARRAYS))


def _put(hits: Hits, at: Numbers, found: Hits | Neighbors) -> None:
    for name in _ARRAYS if found.rows.shape[1] else _ARRAYS[:2]:
        getattr(hits, name)[at] = getattr(found, name)


def _spread(neighbors: Neighbors, at: Numbers, n: int) -> Neighbors:
    """The neighbours of the rows `at` among n rows; the others have none."""
    hits = nothing(n, neighbors.k)
    _put(hits, at, neighbors)
    weights = neighbors.log_weights
    if weights is not None:
        weights = np.zeros((n, neighbors.k), np.float32)
        weights[at] = neighbors.log_weights
    return Neighbors(hits.distances, hits.values, hits.segments, hits.rows, weights, neighbors.source)
