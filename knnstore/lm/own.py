"""Which documents of a datastore a text is: their entries must not predict it."""

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from knnstore.filters import RowRange, document_domain, live_documents_of, live_records
from knnstore.lm.texts import Text
from knnstore.storage.segment import Segment

__all__ = ["OwnDocuments", "is_stored"]

HASH_DIGITS = 16  # of a content hash are compared at first: 64 bits, by which few documents of a store are alike by chance


class OwnDocuments:
    """Finds the documents of a snapshot that have a text's id, or its content. Memory: 24 bytes a document of the snapshot."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        found = array("Q")
        for number, segment in enumerate(segments):
            for _, record in live_documents_of(segment):
                if record.content_hash is not None:
                    found.extend((_beginning(record.content_hash), number, record.first_row))
        table: NDArray[np.uint64] = np.array(found, np.uint64).reshape(-1, 3)
        self._table = table[np.argsort(table[:, 0], kind="stable")]

    def rows_of(self, text: Text) -> tuple[RowRange, ...]:
        """The rows of documents with the text's id, in any domain, and of those with the same content under another id."""
        found = set(_rows_of(self._segments, text.id))
        first, stop = (
            int(np.searchsorted(self._table[:, 0], np.uint64(_beginning(text.content_hash)), side)) for side in ("left", "right")
        )
        for _, number, row in self._table[first:stop].tolist():
            segment = self._segments[number]
            record = segment.contexts.document_at(row)
            if record.content_hash == text.content_hash:  # which the last part of a document has; the others have its id and domain
                found.update(_rows_of(self._segments, record.id, document_domain(segment.record, row)))
        return tuple(sorted(found, key=lambda rows: (rows.segment, rows.first)))


def is_stored(segments: Sequence[Segment], text: Text) -> bool:
    """Whether a live document has both the text's id and its content."""
    return any(record.content_hash == text.content_hash for _, _, record in live_records(segments, text.id))


def _rows_of(segments: Sequence[Segment], document_id: str, domain: str | None = None) -> Iterator[RowRange]:
    """Rows of the live documents with an id, all parts; domain: None for any."""
    for number, of_domain, record in live_records(segments, document_id):
        if domain in (None, of_domain):
            yield RowRange(number, record.first_row, record.first_row + record.n_entries)


def _beginning(content_hash: str) -> int:
    return int(content_hash[:HASH_DIGITS], 16)
