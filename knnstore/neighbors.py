"""What a search returns: arrays, and contexts that are read from disk only when asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.storage.contexts import DocumentRecord
from knnstore.storage.segment import Segment

__all__ = ["Context", "Neighbors"]

CONTEXT_TOKENS = 16  # tokens shown on each side of a hit


@dataclass(frozen=True, slots=True)
class Context:
    """Where a neighbour stands in its source.

    left, token, right: text around and of the value; None where the entry came without text. left_ids, right_ids: token ids.
    token_index: of the value in its document. char_start, char_end: the value's own characters in the document's decoded text.
    """

    left: str | None
    token: str | None
    right: str | None
    left_ids: tuple[int, ...]
    token_id: int
    right_ids: tuple[int, ...]
    document: str
    token_index: int
    domain: str
    source: str
    metadata: Mapping[str, Any]
    char_start: int | None
    char_end: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Neighbors:
    """The k nearest entries of n keys, sorted by (distance, segment, row). All arrays are (n, k).

    distances: float32, squared L2, inf where fewer than k were found. values: int32 token ids, segments: int32, rows: int64,
    all -1 there; segments and rows are (n, 0) where a search left places out. log_weights: float32, log of the domain's weight, None
    where all weights are 1.
    """

    distances: NDArray[np.float32]
    values: NDArray[np.int32]
    segments: NDArray[np.int32]
    rows: NDArray[np.int64]
    log_weights: NDArray[np.float32] | None
    source: Sequence[Segment]

    def __len__(self) -> int:
        return len(self.distances)

    @property
    def k(self) -> int:
        return int(self.distances.shape[1])

    @property
    def n_found(self) -> NDArray[np.int64]:
        """How many of the k were found for each key, (n,)."""
        return np.asarray(np.count_nonzero(self.values >= 0, axis=1), dtype=np.int64)

    def __getitem__(self, query: int | slice) -> "Neighbors":
        """The neighbours of one key, as (1, k) arrays, or of several."""
        at = query
        if not isinstance(at, slice):
            at = slice(at, at + 1) if at >= 0 else slice(at, at + 1 or None)
        weights = None if self.log_weights is None else self.log_weights[at]
        return Neighbors(self.distances[at], self.values[at], self.segments[at], self.rows[at], weights, self.source)

    def context(self, query: int, neighbor: int, *, left: int = CONTEXT_TOKENS, right: int = CONTEXT_TOKENS) -> Context:
        """Where one neighbour stands, with up to `left` and `right` tokens of its document beside it.

        Raises InvalidArgumentError where no neighbour was found at this place, DamageError where its files are damaged.
        """
        if not self.rows.shape[1]:
            raise InvalidArgumentError("these neighbours came without their places. Search with places=True.")
        number, row = int(self.segments[query, neighbor]), int(self.rows[query, neighbor])
        if row < 0:
            raise InvalidArgumentError(f"neighbour {neighbor} of query {query}: only {int(self.n_found[query])} were found.")
        return read_context(self.source[number], row, left=left, right=right)


def read_context(segment: Segment, row: int, *, left: int = CONTEXT_TOKENS, right: int = CONTEXT_TOKENS) -> Context:
    """The context of one row of a segment. Raises DamageError."""
    if not 0 <= row < segment.content.entries:
        raise DamageError(f"{segment.folder}: row {row} of {segment.content.entries} was found in its lists. Run `knnstore verify`.")
    first_row = int(segment.contexts.first_row_of(np.array([row]))[0])
    document: DocumentRecord = segment.contexts.document_at(first_row)
    begin, end = max(first_row, row - left), min(first_row + document.n_entries, row + 1 + right)
    ids = segment.values.rows(begin, end)[:, 0].tolist()
    here = row - begin
    domain = next(name for name, _, stop in segment.record.runs if row < stop)
    texts: tuple[str | None, str | None, str | None] = (None, None, None)
    char_start = char_end = None
    span = segment.contexts.span(begin, end) if segment.content.text else None
    if span is not None:
        char_start, char_end = int(span.starts[here]), int(span.ends[here])
        low = span.base if begin == first_row else min(int(span.starts[0]), char_start)  # the first token may have no entry
        high = max(int(span.ends[-1]), char_end)
        texts = (span.cut(low, char_start), span.cut(char_start, char_end), span.cut(char_end, high))
    return Context(
        left=texts[0],
        token=texts[1],
        right=texts[2],
        left_ids=tuple(ids[:here]),
        token_id=ids[here],
        right_ids=tuple(ids[here + 1 :]),
        document=document.id,
        token_index=document.first_token + row - first_row,
        domain=domain,
        source=document.source,
        metadata=document.metadata,
        char_start=char_start,
        char_end=char_end,
    )
