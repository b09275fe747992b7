"""What comes of writing segments again, from a job's folder to its commit, whatever others delete meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from knnstore.build import StagedSegment, coarse_record, space_record, staged_segment
from knnstore.changes import Change, Staged, commit_change
from knnstore.errors import ConflictError
from knnstore.growth import Ground
from knnstore.progress import Progress
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.coarse import Coarse, save_coarse
from knnstore.storage.files import disk
from knnstore.storage.manifest import CoarseRecord, Manifest, Operation, SegmentRecord, SpaceRecord
from knnstore.storage.rows import as_ranges, count, intersect, subtract
from knnstore.storage.segment import Segment, open_segments
from knnstore.storage.space import Space, save_space

__all__ = ["Rewriting"]

_TRIES = 50  # deletions of others that may come between


@dataclass
class Rewriting:
    """made: what was written again, and what it became, with its files in the job's folder. spaces, coarse: what they need."""

    store: StoreFolder
    ground: Ground
    job: Path
    progress: Progress
    spaces: list[Staged[SpaceRecord]] = field(default_factory=list)
    coarse: list[Staged[CoarseRecord]] = field(default_factory=list)
    made: list[tuple[list[Segment], StagedSegment]] = field(default_factory=list)

    def stage(self, item: Space | Coarse | None) -> None:
        """Puts a space or coarse quantizer that the store has not into the job's folder."""
        if item is None or item.id in self.ground.known_index():
            return
        if isinstance(item, Space):
            folder = self.job / "index" / "spaces" / item.id
            save_space(item, folder)
            self.spaces.append(Staged(folder, space_record(item, folder)))
        else:
            folder = self.job / "index" / "coarse" / item.id
            save_coarse(item, folder)
            self.coarse.append(Staged(folder, coarse_record(item, folder)))
        disk.sync_folder(folder.parent)

    def commit(self, command: str, arguments: Mapping[str, Any], *, stale: bool) -> Manifest:
        """What was written takes the place of what it was written from; what others deleted meanwhile is dead there too.

        Raises ConflictError naming the commit that rewrote or removed a segment, or brought rows back to life.
        """
        parts = [segment for pack, _ in self.made for segment in pack]
        n_live = sum(part.record.n_live() for part in parts)
        counts = {
            "replaced": len(parts),
            "segments": len(self.made),
            "entries": n_live,
            "dropped": sum(part.content.entries for part in parts) - n_live,
        }
        operation = Operation(name=command, arguments=dict(arguments), counts=counts)
        seen = self.ground.manifest
        for _ in range(_TRIES):
            try:
                return commit_change(self.store, self.ground.manifest, self._change(seen, operation, stale=stale), job=self.job)
            except ConflictError:
                newest, pin = open_snapshot(self.store)
                try:
                    if newest.snapshot == seen.snapshot or self._is_lost(newest):
                        raise
                finally:
                    pin.release()
                seen = newest
        raise ConflictError(f"{self.store.path}: others kept deleting from the same segments. Run the command again.")

    def _is_lost(self, newest: Manifest) -> bool:
        """Whether a snapshot has other rows of what was written again than those, or fewer of them."""
        records = {record.content.uuid: record for record in newest.segments}
        gone = []
        for part in (segment for pack, _ in self.made for segment in pack):
            record = records.get(part.content.uuid)
            if record is None:
                gone.append(part)  # its last document was deleted, unless it was rewritten: then its documents are elsewhere now
            elif record.sha256 != part.record.sha256 or len(subtract(part.record.dead_ranges(), record.dead_ranges())):
                return True
        known = {record.content.uuid for record in self.ground.manifest.segments}
        others = tuple(record for record in newest.segments if record.content.uuid not in known)
        ids = [segment.ids.rows(0, len(segment.ids))[:, 0] for segment in open_segments(self.store, replace(newest, segments=others))]
        return any(np.isin(part.ids.rows(0, len(part.ids))[:, 0], of_other).any() for part in gone for of_other in ids)

    def _change(self, seen: Manifest, operation: Operation, *, stale: bool) -> Change:
        """What was written, as a change of a snapshot that may have more dead rows than the ground."""
        records = {record.content.uuid: record for record in seen.segments}
        come, replaced, places = [], [], {}
        for pack, staged in self.made:
            item = staged_segment(StagedSegment(staged.folder, staged.runs, _dead_now(pack, records)))
            there = [records[part.content.uuid] for part in pack if part.content.uuid in records]
            replaced += there
            if item.record.n_live():
                come.append(item)
                places[there[0].content.uuid] = staged.folder.name
        return Change(
            operation=operation,
            spaces=self.spaces,
            coarse=self.coarse,
            segments=come,
            replaced=replaced,
            places=places,
            stale=stale,
        )


def _dead_now(pack: Sequence[Segment], records: Mapping[str, SegmentRecord]) -> tuple[tuple[int, int], ...]:
    """Rows of what a pack became that died after it was written."""
    at, dead = 0, []
    for part in pack:
        left_out, record = part.record.dead_ranges(), records.get(part.content.uuid)
        now = as_ranges([(0, part.content.entries)]) if record is None else record.dead_ranges()
        for first, stop in subtract(now, left_out).tolist():
            begin = at + first - count(intersect(as_ranges([(0, first)]), left_out))
            dead.append((begin, begin + stop - first))
        at += part.record.n_live()
    return tuple((int(first), int(stop)) for first, stop in as_ranges(dead))
