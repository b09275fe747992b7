"""What a command does to a snapshot, and how that becomes the next one, also where others committed meanwhile.

A `Change` names what comes, what is replaced and which rows die. It is applied to the newest snapshot while nobody else commits: where
that is not the one the work began from, it still goes through if the documents it adds and the segments it replaces are untouched.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import ConflictError
from knnstore.filters import document_domain, live_records
from knnstore.storage.catalog import StoreFolder, commit, now
from knnstore.storage.files import replace_file
from knnstore.storage.jobs import MOVES_FILE
from knnstore.storage.manifest import Calibration, CoarseRecord, Manifest, Operation, SegmentRecord, SpaceRecord
from knnstore.storage.manifest_json import canonical
from knnstore.storage.rows import RangeSet, as_ranges, contains, count, intersect
from knnstore.storage.segment import Segment, open_segments

__all__ = ["Change", "DocumentKey", "Staged", "commit_change", "domain_counts"]

Record = TypeVar("Record", SpaceRecord, CoarseRecord, SegmentRecord)


@dataclass(frozen=True, slots=True)
class DocumentKey:
    """A document by what identifies it, and the content it is expected to have (None where it was never hashed)."""

    domain: str
    id: str
    content_hash: str | None


@dataclass(frozen=True, slots=True)
class Staged(Generic[Record]):
    """A folder that waits to be renamed into its place, and what a manifest says of it."""

    folder: Path
    record: Record


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a command does to a snapshot.

    spaces, coarse, segments: what comes, staged. documents: how many come to each domain. replaced: segments that go, as they were seen.
    dead: rows that die, by segment uuid, with `gone`, the documents they were, by domain. removes: documents that go, looked for
    when it is applied. checked: uuids of the segments in which the documents that come were looked for.
    """

    operation: Operation
    spaces: Sequence[Staged[SpaceRecord]] = ()
    coarse: Sequence[Staged[CoarseRecord]] = ()
    segments: Sequence[Staged[SegmentRecord]] = ()
    documents: Mapping[str, int] = field(default_factory=dict)
    replaced: Sequence[SegmentRecord] = ()
    dead: Mapping[str, RangeSet] = field(default_factory=dict)
    gone: Mapping[str, int] = field(default_factory=dict)
    removes: Sequence[DocumentKey] = ()
    checked: frozenset[str] = frozenset()
    stale: bool = False


def commit_change(store: StoreFolder, start: Manifest, change: Change, *, job: Path | None = None) -> Manifest:
    """The next snapshot. start: of a new store what its first manifest says beside the change, with snapshot 0.

    job: the folder that keeps what is staged; it remembers what was moved out of it. Raises ConflictError naming the other commit.
    """
    moves = [(staged.folder, store.space(staged.record.id)) for staged in change.spaces]
    moves += [(staged.folder, store.coarse(staged.record.id)) for staged in change.coarse]
    moves += [(staged.folder, store.segment(staged.record.content.uuid)) for staged in change.segments]
    moves = [(source, target) for source, target in moves if source != target]  # a segment that stays, with other rows dead

    def build(number: int, parent: tuple[int, str] | None, current: Manifest | None) -> Manifest:
        if current is None and start.snapshot:
            raise ConflictError(f"{store.path}: the store was removed meanwhile. Run the command again.")
        if current is not None and not start.snapshot:
            raise ConflictError(f"{store.path}: snapshot {current.snapshot} ({_named(current)}) was committed to it meanwhile.")
        made = _Application(store, current or start, change).manifest()
        if job is not None and moves:
            pairs = [[str(source.relative_to(job)), str(target.relative_to(store.path))] for source, target in moves]
            replace_file(job / MOVES_FILE, canonical(pairs))
        return replace(made, snapshot=number, parent=parent, time=now(), operation=change.operation)

    return commit(store, build, staged=moves)


def domain_counts(records: Sequence[SegmentRecord]) -> dict[str, int]:
    """Live entries of each domain."""
    entries: Counter[str] = Counter()
    for record in records:
        dead = record.dead_ranges()
        for domain, first, stop in record.runs:
            entries[domain] += stop - first - count(intersect(as_ranges([(first, stop)]), dead))
    return dict(entries)


def _named(manifest: Manifest) -> str:
    return f"{manifest.operation.name}, {manifest.time}"


class _Application:
    """A change applied to the newest snapshot."""

    def __init__(self, store: StoreFolder, current: Manifest, change: Change) -> None:
        self._store, self._current, self._change = store, current, change
        self._dead: dict[str, list[tuple[int, int]]] = {}
        self._gone: Counter[str] = Counter(change.gone)

    def _conflict(self, what: str) -> ConflictError:
        current = self._current
        return ConflictError(
            f"{self._store.path}: {what} by snapshot {current.snapshot} or one before it (the newest: {_named(current)}) while this was "
            "built. Nothing was changed; run the command again."
        )

    def manifest(self) -> Manifest:
        current, change = self._current, self._change
        records = {record.content.uuid: record for record in current.segments}
        for seen in change.replaced:
            if records.get(seen.content.uuid) != seen:
                raise self._conflict(f"segment {seen.content.uuid} was changed or replaced")
        self._mark_dead(records)
        self._find_removed()
        self._check_added()
        documents = Counter(current.documents)
        documents.update(change.documents)
        documents.subtract(self._gone)
        segments = self._segments()
        return replace(
            current,
            segments=segments,
            **_index_of(segments, current, change),
            documents={domain: n for domain, n in sorted(documents.items()) if n},
            calibration=_calibration(current.calibration, segments, stale=change.stale),
        )

    def _mark_dead(self, records: Mapping[str, SegmentRecord]) -> None:
        for uuid, ranges in self._change.dead.items():
            record = records.get(uuid)
            if record is None or len(intersect(ranges, record.dead_ranges())):
                raise self._conflict(f"rows of segment {uuid} were removed or rewritten")
            self._dead.setdefault(uuid, []).extend(map(tuple, ranges.tolist()))

    def _find_removed(self) -> None:
        """Rows of the documents that go. One that went already is no conflict; one whose content is another by now is."""
        if not self._change.removes:
            return
        segments = open_segments(self._store, self._current)
        rewritten = {record.content.uuid for record in self._change.replaced}  # without the documents that go
        for key in self._change.removes:
            found = False
            for number, domain, record in live_records(segments, key.id):
                if domain != key.domain:
                    continue
                if record.last and record.content_hash != key.content_hash:
                    raise self._conflict(f"document {key.id!r} of domain {key.domain!r} was replaced")
                found = True
                uuid = segments[number].content.uuid
                if uuid not in rewritten:
                    self._dead.setdefault(uuid, []).append((record.first_row, record.first_row + record.n_entries))
            self._gone[key.domain] += found

    def _check_added(self) -> None:
        """No document that comes may be there already, in what others committed since it was looked for."""
        seen = self._change.checked | {record.content.uuid for record in self._change.replaced}
        unseen = [record for record in self._current.segments if record.content.uuid not in seen]
        if not unseen or not self._change.documents:
            return
        others = open_segments(self._store, replace(self._current, segments=tuple(unseen)))
        for staged in self._change.segments:
            ours = Segment(staged.folder, staged.record, others[0].space, None)  # only its documents are looked at
            hashes = ours.ids.rows(0, len(ours.ids))[:, 0]
            for other in others:
                self._compare(ours, hashes, other)
            ours.close()

    def _compare(self, ours: Segment, hashes: NDArray[np.uint64], other: Segment) -> None:
        known = other.ids.rows(0, len(other.ids))[:, 0]
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        for place in np.flatnonzero(known[at] == hashes).tolist():
            record = ours.contexts.document_at(int(ours.ids.rows(place, place + 1)[0, 1]))
            domain = document_domain(ours.record, record.first_row)
            dying = as_ranges(self._dead.get(other.content.uuid, []))
            for _, of_other, there in live_records([other], record.id):
                if of_other == domain and not contains(dying, np.array([there.first_row]))[0]:
                    raise self._conflict(f"document {record.id!r} of domain {domain!r} was added")

    def _segments(self) -> tuple[SegmentRecord, ...]:
        """Those that stay, with their dead rows, then those that come; one whose rows are all dead goes."""
        change = self._change
        gone = {record.content.uuid for record in change.replaced}
        kept = []
        for record in self._current.segments:
            if record.content.uuid in gone:
                continue
            ranges = as_ranges([*record.dead, *self._dead.get(record.content.uuid, [])])
            record = replace(record, dead=tuple((int(first), int(stop)) for first, stop in ranges))
            if record.n_live():
                kept.append(record)
        return (*kept, *(staged.record for staged in change.segments))


def _index_of(
    segments: Sequence[SegmentRecord], current: Manifest, change: Change
) -> dict[str, tuple[SpaceRecord, ...] | tuple[CoarseRecord, ...]]:
    """Spaces and coarse quantizers that are used; of a store without entries the last space remains."""
    spaces = {record.id: record for record in (*current.spaces, *(staged.record for staged in change.spaces))}
    coarse = {record.id: record for record in (*current.coarse, *(staged.record for staged in change.coarse))}
    used = {record.content.space for record in segments} or set(list(spaces)[-1:])
    lists = {record.content.coarse for record in segments}
    return {
        "spaces": tuple(record for name, record in spaces.items() if name in used),
        "coarse": tuple(record for name, record in coarse.items() if name in lists),
    }


def _calibration(calibration: Calibration | None, segments: Sequence[SegmentRecord], *, stale: bool) -> Calibration | None:
    """What was fitted stays; it is stale where there are spaces or domains now that it was not fitted on."""
    if calibration is None or calibration.status == "default":
        return calibration
    spaces = {record.content.space for record in segments}
    domains = {domain for record in segments for domain, _, _ in record.runs}
    if stale or not spaces <= set(calibration.spaces) or not domains <= set(calibration.domains):
        return replace(calibration, status="stale")
    return calibration
