"""`repair`: takes what is damaged out of use, goes on from what is sound, and says what was lost. Nothing is deleted.

In this order, so that a kill at any moment leaves a store in which everything is in its place or in `quarantine/`, and typing the command
again finishes: KNNSTORE is written anew; what only a damaged manifest can have named is put aside; the documents lost are written down;
a snapshot of what is sound is committed; then what is damaged is put aside, the manifests that name it last. From the commit on the
newest snapshot opens.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from knnstore.errors import DamageError, FormatError, StorageError
from knnstore.format import COARSE, MANIFESTS, QUARANTINE, SEGMENTS, SPACES, STAGING, TAGS, WRITER_FEATURES
from knnstore.progress import SILENT, Progress
from knnstore.salvage import Damage, LostDocument, Salvage, documents_beside, find_damage, salvage
from knnstore.storage.catalog import StoreFolder, folders_of, identity_bytes, list_manifests, now, write_snapshot
from knnstore.storage.files import disk, hold_lock, replace_file, sha256_file, unless_held
from knnstore.storage.jobs import moved_by
from knnstore.storage.manifest import Manifest, Operation
from knnstore.storage.manifest_json import canonical
from knnstore.storage.tags import read_tag, tag_name
from knnstore.verification.datastore import Examination, Problem, VerifyReport

__all__ = ["Moved", "RepairReport", "repair"]

LOST_FILE = "lost.jsonl"  # in the quarantine of a snapshot: the documents that were lost, one a line
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # why a sound file may be unreadable to us
_PARTS = (SPACES, COARSE, SEGMENTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What is put aside. path, to: in the store; why: in words."""

    path: str
    to: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """What a repair did, or a dry run would do.

    problems: as `verify` found them; none: nothing was done. base: the snapshot it went on from; snapshot: the newest one now, another
    one where a snapshot was committed. documents, entries: of it. moved: what was put aside. held: snapshots that name what is damaged
    and that a process has open; they stay until it ends and repair is called again. lost: documents that were lost, by name; unnamed:
    by domain, how many more, whose names cannot be read. lost_snapshots: newer ones whose manifests were damaged.
    """

    dry_run: bool
    problems: tuple[Problem, ...]
    base: int
    snapshot: int
    documents: int
    entries: int
    moved: tuple[Moved, ...]
    held: tuple[int, ...]
    lost: tuple[LostDocument, ...]
    unnamed: dict[str, int]
    lost_snapshots: tuple[int, ...]

    @property
    def committed(self) -> bool:
        """Whether there is a new snapshot."""
        return self.snapshot != self.base

    @property
    def lossless(self) -> bool:
        """Whether every document of the newest snapshot is still there."""
        return not (self.lost or self.unnamed or self.lost_snapshots)


def repair(path: str | Path, *, dry_run: bool = False, progress: Progress = SILENT) -> RepairReport:
    """Puts what is damaged aside, commits a snapshot of what is sound, and says which documents were lost; they can be appended again.

    Damaged are a segment of which a file is, and all that need a damaged space or coarse quantizer; they move to `quarantine/` with every
    snapshot and tag that names them. Where CURRENT or the newest manifest is damaged, the newest snapshot that is whole is gone on from.
    A sound store is left as it is. Nobody commits meanwhile; readers are not disturbed. dry_run: changes nothing.
    Memory: as `verify`, and each document that is lost. Raises DamageError where nothing is left to go on from, NotFoundError, FormatError,
    StorageError where a file cannot be read for another reason than damage.
    """
    store = StoreFolder(Path(path))
    before = _state(store)
    examination, report = _examine(store, progress)
    if not report.problems or dry_run:
        return _Repair(store, examination, report.problems, dry_run=True).report(dry_run)
    _free_lock(store, examination, report)
    with hold_lock(store.lock, purpose="repairing this store", wait=True):
        if _state(store) != before:  # another command has come first
            examination, report = _examine(store, progress)
        work = _Repair(store, examination, report.problems, dry_run=False)
        if report.problems:
            with progress.stage("repairing", total=None, unit="files") as stage:
                work.run()
                stage.advance(len(work.moved))
        return work.report(dry_run)


def _examine(store: StoreFolder, progress: Progress) -> tuple[Examination, VerifyReport]:
    with ExitStack() as pins:
        examination = Examination(store, pins, full=True)
        return examination, examination.run(progress)
