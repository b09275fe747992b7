"""What `verify` checks of the documents of a snapshot: that they are whole, there once, and as many as it says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from knnstore.format import CONTEXTS_FILE
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.contexts import ContextsReader
from knnstore.storage.manifest import SegmentRecord
from knnstore.storage.rows import contains
from knnstore.verification.contexts import DocumentRows
from knnstore.verification.files import FindingError

__all__ = ["LiveRecords", "Names", "check_documents", "domain_seed", "is_whole", "live_records", "misfits"]


@dataclass(frozen=True, slots=True)
class LiveRecords:
    """The document records of some segments whose rows count, one an element of each array, (m,).

    segments: places in the list of segments. rows: of DocumentRows, places in that of the segment. keys: u64, of domain and id: records
    of one document have the same, of different ones (but for a freak) different ones. domains: numbers in `names`.
    """

    names: tuple[str, ...]
    segments: NDArray[np.int32]
    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]
    domains: NDArray[np.int32]
    parts: NDArray[np.int64]
    last: NDArray[np.bool_]
    first_tokens: NDArray[np.int64]
    n_entries: NDArray[np.int64]

    def counts(self) -> dict[str, int]:
        """Documents of each domain that has any."""
        held = np.bincount(self.domains[self.last], minlength=len(self.names))
        return {name: n for name, n in zip(self.names, held.tolist(), strict=True) if n}


def domain_seed(name: str) -> int:
    """64 bits that tell the keys of one domain from those of another."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))


def live_records(segments: Sequence[SegmentRecord], rows: Mapping[str, DocumentRows]) -> LiveRecords:
    """The records of the documents whose first row is alive. rows: by uuid of the segment. Some 50 bytes a record."""
    names: dict[str, int] = {}
    columns: list[tuple[NDArray[np.generic], ...]] = []
    for number, segment in enumerate(segments):
        of_segment = rows[segment.content.uuid]
        alive = np.flatnonzero(~contains(segment.dead_ranges(), of_segment.first_rows))
        run_domains = np.array([names.setdefault(name, len(names)) for name, _, _ in segment.runs], np.int32)
        run_seeds = np.array([domain_seed(name) for name, _, _ in segment.runs], np.uint64)
        run_of = np.searchsorted([stop for _, _, stop in segment.runs], of_segment.first_rows[alive], side="right")
        columns.append(
            (
                np.full(len(alive), number, np.int32),
                alive,
                of_segment.hashes[alive] ^ run_seeds[run_of],
                run_domains[run_of],
                of_segment.parts[alive],
                of_segment.last[alive],
                of_segment.first_tokens[alive],
                of_segment.n_entries(segment.content.entries)[alive],
            )
        )
    types = (np.int32, np.int64, np.uint64, np.int32, np.int64, np.bool_, np.int64, np.int64)
    joined = [np.concatenate([column[i] for column in columns] or [np.zeros(0, dtype)]) for i, dtype in enumerate(types)]
    return LiveRecords(tuple(names), *joined)


class Names:
    """Ids of documents, read from contexts that are sound. A context manager: files are opened when the first name in them is asked for."""

    def __init__(self, store: StoreFolder, segments: Sequence[SegmentRecord], rows: Mapping[str, DocumentRows]) -> None:
        self._store, self._segments, self._rows = store, segments, rows
        self._readers: dict[int, ContextsReader] = {}

    def __call__(self, segment: int, row: int) -> str:
        """The id of a record, by its place in the list of segments and in the rows of the segment. Raises DamageError."""
        content = self._segments[segment].content
        if segment not in self._readers:
            self._readers[segment] = ContextsReader(self._store.segment(content.uuid) / CONTEXTS_FILE, n_rows=content.entries)
        return self._readers[segment].document_at(int(self._rows[content.uuid].first_rows[row])).id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for reader in self._readers.values():
            reader.close()


def misfits(live: LiveRecords, names: Names) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Id and places of the records of each document that is there twice, or not with all of its parts, in the order of segments."""
    order = np.lexsort((live.parts, live.keys))
    if not len(order):
        return
    begins = np.flatnonzero(np.concatenate(([True], np.diff(live.keys[order]) != 0)))
    stops = np.append(begins[1:], len(order))
    fits = np.logical_and.reduceat(_fitting(live, order, begins), begins)
    for group in np.flatnonzero(~fits).tolist():
        # Keys are hashes: records that share one may, once in a universe, be of different documents.
        by_name: dict[tuple[int, str], list[int]] = {}
        for place in np.sort(order[begins[group] : stops[group]]).tolist():
            name = names(int(live.segments[place]), int(live.rows[place]))
            by_name.setdefault((int(live.domains[place]), name), []).append(place)
        for (_, name), places in by_name.items():
            if not is_whole(live, np.array(places)):
                yield name, np.array(places)


def is_whole(live: LiveRecords, places: NDArray[np.int64]) -> bool:
    """Whether these records are the parts of one document, all of them and each once."""
    return bool(_fitting(live, places[np.argsort(live.parts[places], kind="stable")], np.zeros(1, np.int64)).all())


def _fitting(live: LiveRecords, order: NDArray[np.int64], begins: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each record is what follows the one before, (m,): parts 0, 1, 2 … to the last, each beginning where the one before ends.

    order: (m,) places, grouped by document and sorted by part; begins: where in it each document begins.
    """
    sizes = np.diff(np.append(begins, len(order)))
    number = np.arange(len(order)) - np.repeat(begins, sizes)
    entries = live.n_entries[order]
    begun = live.first_tokens[order] - (np.cumsum(entries) - entries)  # alike in all parts of a document, if less those before it
    fits: NDArray[np.bool_] = live.parts[order] == number
    fits &= live.last[order] == (number == np.repeat(sizes, sizes) - 1)
    fits &= begun == np.repeat(begun[begins], sizes)
    return fits


def check_documents(
    segments: Sequence[SegmentRecord], documents: Mapping[str, int], rows: Mapping[str, DocumentRows], names: Names
) -> None:
    """Compares a snapshot with the documents in its segments. rows: by uuid of the segment. Raises FindingError, DamageError."""
    for segment in segments:
        of_segment = rows[segment.content.uuid]
        edges = np.append(of_segment.first_rows, segment.content.entries)
        if not np.isin([first for _, first, _ in segment.runs], edges).all():
            raise FindingError("content", f"segment {segment.content.uuid}: a domain begins within a document")
        if not np.isin(segment.dead_ranges(), edges).all():
            raise FindingError("content", f"segment {segment.content.uuid}: dead rows begin or end within a document")
    live = live_records(segments, rows)
    if live.counts() != {domain: n for domain, n in documents.items() if n}:
        raise FindingError("content", f"it counts documents {dict(documents)}, its segments hold {live.counts()}"[:500])
    for name, places in misfits(live, names):
        domain, parts = live.names[live.domains[places[0]]], ", ".join(map(str, live.parts[places].tolist()[:10]))
        raise FindingError("content", f"document {name!r} of domain {domain!r} is not there once, with all of its parts: it has {parts}")
