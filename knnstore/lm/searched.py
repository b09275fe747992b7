"""What of a datastore is searched under some settings: the entries of each domain, and how often each token is a value among them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from knnstore import filters
from knnstore.errors import DamageError
from knnstore.lm.settings import Settings
from knnstore.neighbors import Neighbors
from knnstore.storage.rows import as_ranges, contains, count, intersect
from knnstore.store import Datastore

__all__ = ["Searched"]

ROWS_AT_ONCE = 1 << 20  # values counted at a time


class Searched:
    """The rows of a snapshot that settings let count. n_rows: how many. domains: name → entries of it, in the order of `numbers_of`."""

    def __init__(self, store: Datastore, settings: Settings) -> None:
        self._segments = store.segments
        self._allowed = filters.allowed_rows(self._segments, weights=settings.domains, exclude=settings.exclude)
        pairs = [
            (segment, as_ranges([(0, segment.content.entries)]) if rows is None else rows)
            for segment, rows in zip(self._segments, self._allowed, strict=True)
        ]
        names = [name for name in store.domains if settings.domains is None or settings.domains.get(name, 0.0) > 0.0]
        self.n_rows = sum(count(rows) for _, rows in pairs)
        self.domains = {name: sum(count(intersect(segment.record.domain_ranges(name), rows)) for segment, rows in pairs) for name in names}
        place = {name: number for number, name in enumerate(names)}
        self._stops = [np.array([stop for _, _, stop in segment.record.runs], np.int64) for segment in self._segments]
        # Nothing of a domain that is not searched is found: any number does for it.
        self._numbers = [np.array([place.get(name, 0) for name, _, _ in segment.record.runs], np.int64) for segment in self._segments]

    def numbers_of(self, neighbors: Neighbors) -> NDArray[np.int64]:
        """The place in `domains` of each neighbour's domain, (n, k) int64; 0 where there is no neighbour."""
        out = np.zeros(neighbors.rows.shape, np.int64)
        for segment, (stops, numbers) in enumerate(zip(self._stops, self._numbers, strict=True)):
            of_segment = neighbors.segments == segment
            out[of_segment] = numbers[np.searchsorted(stops, neighbors.rows[of_segment], side="right")]
        return out

    def token_counts(self, vocab_size: int, advance: Callable[[int], None]) -> NDArray[np.int64]:
        """How often each token is a value, (vocab_size,) int64. advance: told of entries that were counted. Raises DamageError."""
        counts = np.zeros(vocab_size, np.int64)
        for segment, rows in zip(self._segments, self._allowed, strict=True):
            n = segment.content.entries if rows is None or len(rows) else 0
            for first in range(0, n, ROWS_AT_ONCE):
                stop = min(first + ROWS_AT_ONCE, n)
                values = segment.values.rows(first, stop)[:, 0]
                if rows is not None:
                    values = values[contains(rows, np.arange(first, stop))]
                found = np.bincount(values, minlength=vocab_size)
                if len(found) > vocab_size:
                    raise DamageError(
                        f"{segment.folder}: token {len(found) - 1}, but the vocabulary has {vocab_size}. Run `knnstore verify`."
                    )
                counts += found
                advance(len(values))
        return counts
