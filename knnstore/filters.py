"""Which rows count: domains, metadata, exclusions and dead rows, all as row ranges of each segment."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import InvalidArgumentError, NotFoundError
from knnstore.storage.contexts import DocumentRecord
from knnstore.storage.manifest import SegmentRecord
from knnstore.storage.rows import RangeSet, as_ranges, contains, intersect, subtract
from knnstore.storage.segment import Segment

__all__ = [
    "Domains",
    "RowRange",
    "Where",
    "allowed_rows",
    "document_domain",
    "domain_weights",
    "find_document_rows",
    "live_documents",
    "live_documents_of",
    "live_hashes",
    "live_records",
    "live_with_ids",
    "log_weights",
    "matches",
]

Domains = str | Sequence[str] | Mapping[str, float]
Where = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [first, stop) of segment number `segment` of a snapshot."""

    segment: int
    first: int
    stop: int


def domain_weights(segments: Sequence[Segment], domains: Domains | None) -> dict[str, float] | None:
    """Weight of each domain to be searched; None for all at weight 1. Domains not named are not searched.

    Raises NotFoundError for a domain that is not there, InvalidArgumentError for a weight that is negative or not finite.
    """
    if domains is None:
        return None
    if isinstance(domains, str):
        domains = [domains]
    if not isinstance(domains, Mapping):
        domains = dict.fromkeys(domains, 1.0)
    weights = {str(name): float(weight) for name, weight in domains.items()}
    known = {name for segment in segments for name, _, _ in segment.record.runs}
    for name, weight in weights.items():
        if name not in known:
            raise NotFoundError(f"domain {name!r}: not in this datastore. It has {', '.join(sorted(known)) or 'none'}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidArgumentError(f"domain {name!r}: weight {weight}; use a number that is 0 or more.")
    return weights


def allowed_rows(
    segments: Sequence[Segment],
    *,
    weights: Mapping[str, float] | None = None,
    where: Where | None = None,
    exclude: str | RowRange | Iterable[str | RowRange] | None = None,
) -> list[RangeSet | None]:
    """For each segment the rows that count; None where all do.

    where: metadata fields a document must have, with these values. exclude: document ids (in any domain) and row ranges; rows
    beyond a segment's own are no harm. Raises NotFoundError for a document that is not there, InvalidArgumentError for a segment
    that is not.
    """
    if weights is None and where is None and exclude is None:
        return [
            subtract(as_ranges([(0, segment.content.entries)]), segment.record.dead_ranges()) if segment.record.dead else None
            for segment in segments
        ]
    if isinstance(exclude, str | RowRange):
        exclude = [exclude]
    excluded: list[list[tuple[int, int]]] = [[] for _ in segments]
    for item in exclude or ():
        for rows in [item] if isinstance(item, RowRange) else find_document_rows(segments, item):
            if not 0 <= rows.segment < len(segments):
                raise InvalidArgumentError(f"segment {rows.segment}: the snapshot has {len(segments)}, numbered from 0.")
            excluded[rows.segment].append((max(rows.first, 0), min(rows.stop, segments[rows.segment].content.entries)))
    return [_allowed(segment, weights, where, as_ranges(excluded[i])) for i, segment in enumerate(segments)]


def _allowed(segment: Segment, weights: Mapping[str, float] | None, where: Where | None, excluded: RangeSet) -> RangeSet | None:
    n_rows = segment.content.entries
    everything = as_ranges([(0, n_rows)])
    rows = everything
    if weights is not None:
        rows = as_ranges([(first, stop) for name, first, stop in segment.record.runs if weights.get(name, 0.0) > 0.0])
    rows = subtract(subtract(rows, segment.record.dead_ranges()), excluded)
    if where is not None and len(rows):
        rows = intersect(rows, _rows_where(segment, where))
    return None if np.array_equal(rows, everything) else rows


def _rows_where(segment: Segment, where: Where) -> RangeSet:
    return as_ranges(
        [
            (document.first_row, document.first_row + document.n_entries)
            for document in segment.contexts.documents()
            if matches(document.metadata, where)
        ]
    )


def matches(metadata: Mapping[str, object], where: Where) -> bool:
    """Whether a document's metadata has all of these fields with these values."""
    return all(name in metadata and _same_json(metadata[name], value) for name, value in where.items())


def _same_json(one: object, other: object) -> bool:
    """Whether two values are the same in JSON: true is not 1 there, as it is in Python."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same_json(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same_json, one, other))
    return one == other


def document_domain(record: SegmentRecord, first_row: int) -> str:
    """The domain of the document that begins at a row."""
    return record.runs[bisect_right(record.runs, first_row, key=lambda run: run[1]) - 1][0]


def live_records(segments: Sequence[Segment], document_id: str) -> Iterator[tuple[int, str, DocumentRecord]]:
    """The live records with this id, in every domain: number of the segment, domain, record (each part of a document in parts)."""
    for number, segment in enumerate(segments):
        for record in segment.find(document_id):
            if not contains(segment.record.dead_ranges(), np.array([record.first_row]))[0]:
                yield number, document_domain(segment.record, record.first_row), record


def live_with_ids(segment: Segment, hashes: NDArray[np.uint64]) -> Iterator[tuple[str, DocumentRecord]]:
    """Domain and record of the live documents whose id has one of these hashes."""
    table = segment.ids.rows(0, len(segment.ids))
    rows = table[np.isin(table[:, 0], hashes), 1].astype(np.int64)
    for first_row in rows[~contains(segment.record.dead_ranges(), rows)].tolist():
        yield document_domain(segment.record, first_row), segment.contexts.document_at(first_row)


def live_documents_of(segment: Segment) -> Iterator[tuple[str, DocumentRecord]]:
    """Domain and record of each document (or part) of a segment that lives, in row order."""
    rows = segment.contexts.first_rows
    dead = set(rows[contains(segment.record.dead_ranges(), rows)].tolist())
    for record in segment.contexts.documents():
        if record.first_row not in dead:
            yield document_domain(segment.record, record.first_row), record


def live_documents(segments: Sequence[Segment]) -> Iterator[dict[str, Any]]:
    """Each document with live rows once: id, domain, source, entries, metadata."""
    parts: dict[tuple[str, str], list[DocumentRecord]] = {}
    for segment in segments:
        for domain, record in live_documents_of(segment):
            known = [*parts.pop((domain, record.id), []), record]
            n_parts = next((part.part + 1 for part in known if part.last), 0)
            if len(known) != n_parts:  # segments that were joined may hold later parts before earlier ones
                parts[domain, record.id] = known
                continue
            entries = sum(part.n_entries for part in known)
            yield {"id": record.id, "domain": domain, "source": record.source, "entries": entries, "metadata": record.metadata}


def live_hashes(segments: Sequence[Segment], domain: str) -> Iterator[tuple[str, str | None]]:
    """Id and content hash of each document of a domain with live rows."""
    for segment in segments:
        if any(of_domain == domain for of_domain, _, _ in segment.record.runs):
            for of_domain, record in live_documents_of(segment):
                if record.last and of_domain == domain:
                    yield record.id, record.content_hash


def find_document_rows(segments: Sequence[Segment], document_id: str) -> list[RowRange]:
    """Where a document's live rows are, in every domain that has one of this id. Raises NotFoundError where none has."""
    found = [
        RowRange(number, record.first_row, record.first_row + record.n_entries) for number, _, record in live_records(segments, document_id)
    ]
    if not found:
        raise NotFoundError(f"document {document_id!r}: not in this datastore. `knnstore info --documents` lists them.")
    return found


def log_weights(
    segments: Sequence[Segment], weights: Mapping[str, float] | None, hit_segments: NDArray[np.int32], hit_rows: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """Log of the domain weight of each hit, (n, k) float32; None where all weights are 1."""
    if weights is None or all(weight in (0.0, 1.0) for weight in weights.values()):
        return None
    out = np.zeros(hit_rows.shape, np.float32)
    for number, segment in enumerate(segments):
        of_segment = hit_segments == number
        if of_segment.any():
            stops = np.array([stop for _, _, stop in segment.record.runs], np.int64)
            logs = np.array([math.log(weights[name]) if weights.get(name) else 0.0 for name, _, _ in segment.record.runs], np.float32)
            out[of_segment] = logs[np.searchsorted(stops, hit_rows[of_segment], side="right")]
    return out
