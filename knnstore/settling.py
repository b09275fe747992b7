"""The last step of what adds to a store: small segments are joined and it is committed, again where others came between."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from knnstore.build import Index, StagedSegment, staged_index
from knnstore.changes import Change, commit_change
from knnstore.errors import ConflictError
from knnstore.growth import Ground, settle
from knnstore.progress import SILENT, Progress
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.files import disk
from knnstore.storage.manifest import Manifest

__all__ = ["commit_growth"]

_TRIES = 50  # commits of others that may come between


def commit_growth(
    store: StoreFolder,
    job: Path,
    ground: Ground,
    new: Sequence[StagedSegment],
    index: Index,
    change: Change,
    *,
    progress: Progress = SILENT,
) -> Manifest:
    """Commits a change with new segments, as they are or joined with small ones of the store. Returns the new snapshot's manifest.

    ground: the snapshot that the work began with; the caller holds it open. change: all but its spaces, coarse, segments and replaced.
    Where others changed a segment that was joined, it is joined anew on the newest snapshot, and nothing else is done again.
    Raises ConflictError naming the other commit where it added, or replaced, a document of this change.
    """
    dim, at = ground.manifest.key.dim, ground
    come = {item.folder for item in new}
    with ExitStack() as stack:
        for tries_left in reversed(range(_TRIES)):
            settled = settle(job, at, new, index, dying=at.rows_of(change.removes), progress=progress)
            try:
                return commit_change(store, _start(ground, at), replace(change, **settled, **staged_index(job, dim)), job=job)
            except ConflictError:
                seen = at.manifest.snapshot
                stack.close()
                manifest, pin = open_snapshot(store)
                stack.callback(pin.release)
                if manifest.snapshot == seen or not tries_left:
                    raise  # on the newest snapshot there is: it is not about what was joined
                at = Ground.of(store, manifest)
                stack.callback(at.close)
            for staged in settled["segments"]:
                if staged.folder not in come:
                    disk.remove_tree(staged.folder)
    raise AssertionError("the last attempt returns or raises")


def _start(ground: Ground, at: Ground) -> Manifest:
    """What the work began from, with all spaces and lists that its segments may be in: of both, also where others dropped them since."""
    first, newer = ground.manifest, at.manifest
    return replace(first, spaces=(*first.spaces, *newer.spaces), coarse=(*first.coarse, *newer.coarse))
