"""What a command does to a snapshot, and how that becomes the next one, also where others committed meanwhile.

A `Change` names what comes, what is replaced and which rows die. It is applied to the newest snapshot while nobody else commits: where
that is not the one the work began from, it still goes through if the documents it adds and the segments it replaces are untouched.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from knnstore.errors import ConflictError
from knnstore.filters import live_records, live_with_ids
from knnstore.storage.calibration import Calibration
from knnstore.storage.catalog import StoreFolder, now
from knnstore.storage.commits import commit
from knnstore.storage.files import replace_file
from knnstore.storage.jobs import MOVES_FILE
from knnstore.storage.manifest import CoarseRecord, Manifest, Operation, SegmentRecord, SpaceRecord
from knnstore.storage.manifest_json import canonical
from knnstore.storage.rows import RangeSet, as_ranges, contains, intersect, subtract
from knnstore.storage.segment import Segment, open_segments
from knnstore.storage.space import raw_space

__all__ = ["Change", "DocumentKey", "Staged", "commit_change"]

Record = TypeVar("Record", SpaceRecord, CoarseRecord, SegmentRecord)

_ANY_SPACE = raw_space(1)  # of segments of which only the documents are read


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

    spaces, coarse, segments: what comes, staged; a segment that is there already takes the place of its record. documents: how many
    come to each domain. replaced: segments that go, as they were seen. places: uuid of one that goes → uuid of the one that comes where
    it was; others come last. dead: rows that die, by segment uuid, with `gone`, the documents they were, by domain. removes: documents
    that go, looked for when it is applied. checked: uuid → dead rows, then, of each segment in which the documents that come were
    looked for. stale: whether the calibration is so afterwards in any case. calibration: one that takes the place of the store's.
    """

    operation: Operation
    spaces: Sequence[Staged[SpaceRecord]] = ()
    coarse: Sequence[Staged[CoarseRecord]] = ()
    segments: Sequence[Staged[SegmentRecord]] = ()
    documents: Mapping[str, int] = field(default_factory=dict)
    replaced: Sequence[SegmentRecord] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    dead: Mapping[str, RangeSet] = field(default_factory=dict)
    gone: Mapping[str, int] = field(default_factory=dict)
    removes: Sequence[DocumentKey] = ()
    checked: Mapping[str, RangeSet] = field(default_factory=dict)
    stale: bool = False
    calibration: Calibration | None = None


def commit_change(store: StoreFolder, start: Manifest, change: Change, *, job: Path | None = None) -> Manifest:
    """The next snapshot. start: of a new store what its first manifest says beside the change, with snapshot 0.

    job: the folder that keeps what is staged; it remembers what was moved out of it. Raises ConflictError naming the other commit.
    """
    moves: list[tuple[Path, Path]] = []  # known once the manifest is: what nothing uses stays behind

    def build(number: int, parent: tuple[int, str] | None, current: Manifest | None) -> Manifest:
        if current is None and start.snapshot:
            raise ConflictError(f"{store.path}: the store was removed meanwhile. Run the command again.")
        if current is not None and not start.snapshot:
            raise ConflictError(f"{store.path}: snapshot {current.snapshot} ({_named(current)}) was committed to it meanwhile.")
        if current is not None and current.uuid != start.uuid:
            raise ConflictError(f"{store.path}: another datastore was put in its place meanwhile. Run the command again.")
        made = _Application(store, start, current or start, change).manifest()
        moves.extend(_moves(store, change, made))
        if job is not None and moves:
            pairs = [[str(source.relative_to(job)), str(target.relative_to(store.path))] for source, target in moves]
            replace_file(job / MOVES_FILE, canonical(pairs))
        return replace(made, snapshot=number, parent=parent, time=now(), operation=change.operation)

    return commit(store, build, staged=moves)


def _moves(store: StoreFolder, change: Change, made: Manifest) -> list[tuple[Path, Path]]:
    """(from, to) of the staged folders that a manifest names."""
    named = {record.id for record in made.spaces} | {record.id for record in made.coarse}
    named |= {record.content.uuid for record in made.segments}
    places = [(item.folder, store.space(item.record.id), item.record.id) for item in change.spaces]
    places += [(item.folder, store.coarse(item.record.id), item.record.id) for item in change.coarse]
    places += [(item.folder, store.segment(item.record.content.uuid), item.record.content.uuid) for item in change.segments]
    return [(source, target) for source, target, name in places if name in named and source != target]


def _named(manifest: Manifest) -> str:
    return f"{manifest.operation.name}, {manifest.time}"


class _Application:
    """A change applied to the newest snapshot."""

    def __init__(self, store: StoreFolder, start: Manifest, current: Manifest, change: Change) -> None:
        self._store, self._start, self._current, self._change = store, start, current, change
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
            **self._index_of(segments),
            documents={domain: n for domain, n in sorted(documents.items()) if n},
            calibration=self._calibration(segments),
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
        with ExitStack() as stack:
            segments = open_segments(self._store, self._current)
            for segment in segments:
                stack.callback(segment.close)
            for key in self._change.removes:
                found = False
                for number, domain, record in live_records(segments, key.id):
                    if domain != key.domain:
                        continue
                    if record.last and record.content_hash != key.content_hash:
                        raise self._conflict(f"document {key.id!r} of domain {key.domain!r} was replaced")
                    found = True
                    rows = record.first_row, record.first_row + record.n_entries
                    self._dead.setdefault(segments[number].content.uuid, []).append(rows)
                self._gone[key.domain] += found

    def _check_added(self) -> None:
        """No document that comes may be there already, in what others committed since it was looked for."""
        if not self._change.documents:
            return
        unseen = {record.content.uuid: record for record in self._current.segments if not self._was_seen(record)}
        rewritten = unseen.keys() & {record.content.uuid for record in self._change.replaced}
        if not unseen:
            return
        with ExitStack() as stack:
            others = tuple(record for uuid, record in unseen.items() if uuid not in rewritten)
            opened = open_segments(self._store, replace(self._current, segments=others))
            ours = [Segment(staged.folder, staged.record, _ANY_SPACE, None) for staged in self._change.segments]
            for segment in (*opened, *ours):
                stack.callback(segment.close)
            for mine in ours:
                for other in opened:
                    self._compare(mine, other)
            if rewritten:
                self._find_twins(ours)

    def _was_seen(self, record: SegmentRecord) -> bool:
        """Whether the documents that come were looked for among all that live in a segment: a restore may have brought some back."""
        dead = self._change.checked.get(record.content.uuid)
        return dead is not None and not len(subtract(dead, record.dead_ranges()))

    def _compare(self, ours: Segment, other: Segment) -> None:
        """Raises ConflictError for a document that comes and lives in another segment, unless that is the one it replaces."""
        known = other.ids.rows(0, len(other.ids))[:, 0]
        for domain, record in live_with_ids(ours, known):
            dying = as_ranges(self._dead.get(other.content.uuid, []))
            for _, of_other, there in live_records([other], record.id):
                if of_other == domain and not contains(dying, np.array([there.first_row]))[0]:
                    raise self._conflict(f"document {record.id!r} of domain {domain!r} was added")

    def _find_twins(self, ours: Sequence[Segment]) -> None:
        """Raises ConflictError for a document that is in what comes twice: taken over from what others committed, and added."""
        hashes, counts = np.unique(np.concatenate([segment.ids.rows(0, len(segment.ids))[:, 0] for segment in ours]), return_counts=True)
        found: set[tuple[str, str, int]] = set()
        for segment in ours:
            for domain, record in live_with_ids(segment, hashes[counts > 1]):
                key = domain, record.id, record.part
                if key in found:
                    raise self._conflict(f"document {record.id!r} of domain {domain!r} was added")
                found.add(key)

    def _segments(self) -> tuple[SegmentRecord, ...]:
        """Those that stay, with their dead rows, then those that come; one whose rows are all dead goes."""
        gone = {record.content.uuid for record in self._change.replaced}
        come = {staged.record.content.uuid: staged.record for staged in self._change.segments}
        kept = []
        for record in self._current.segments:
            if record.content.uuid in come:
                kept.append(come.pop(record.content.uuid))
                continue
            if record.content.uuid in gone:
                taker = self._change.places.get(record.content.uuid)
                if taker is not None:
                    kept.append(come.pop(taker))
                continue
            ranges = as_ranges([*record.dead, *self._dead.get(record.content.uuid, [])])
            record = replace(record, dead=tuple((int(first), int(stop)) for first, stop in ranges))
            if record.n_live():
                kept.append(record)
        return (*kept, *come.values())

    def _calibration(self, segments: Sequence[SegmentRecord]) -> Calibration | None:
        """What was fitted stays; it is stale where there are spaces or domains now that it was not fitted on.

        One that was fitted by this change is stale too where others made that of the store so meanwhile.
        """
        calibration, stale = self._current.calibration, self._change.stale
        if self._change.calibration is not None:
            stale = stale or (calibration is not None and calibration.status == "stale" and calibration != self._start.calibration)
            calibration = self._change.calibration
        if calibration is None or calibration.status == "default":
            return calibration
        spaces = {record.content.space for record in segments}
        domains = {domain for record in segments for domain, _, _ in record.runs}
        if stale or not spaces <= set(calibration.spaces) or not domains <= set(calibration.domains):
            return replace(calibration, status="stale")
        return calibration

    def _index_of(self, segments: Sequence[SegmentRecord]) -> dict[str, Any]:
        """Spaces and coarse quantizers that are used; of a store without entries the last space remains.

        One that the work began with may have been dropped by others since; its files are there still, since its snapshot is held open.
        """
        current, start, change = self._current, self._start, self._change
        come = [staged.record for staged in change.spaces]
        spaces = {record.id: record for record in (*current.spaces, *start.spaces, *come)}
        coarse = {record.id: record for record in (*current.coarse, *start.coarse, *(staged.record for staged in change.coarse))}
        used = {record.content.space for record in segments} or {record.id for record in (*current.spaces, *come)[-1:]}
        lists = {record.content.coarse for record in segments}
        return {
            "spaces": tuple(record for name, record in spaces.items() if name in used),
            "coarse": tuple(record for name, record in coarse.items() if name in lists),
        }
