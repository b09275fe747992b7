"""`repair`: takes what is damaged out of use, goes on from what is sound, and says what was lost. Nothing is deleted.

In this order, so that a kill at any moment leaves a store in which everything is in its place or in `quarantine/`, and typing the command
again finishes: KNNSTORE is written anew; what only a damaged manifest can have named is put aside; the documents lost are written down;
a snapshot of what is sound is committed; then what is damaged is put aside, the manifests that name it last. From the commit on the
newest snapshot opens.
"""

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from knnstore.errors import DamageError, StorageError
from knnstore.format import COARSE, SEGMENTS, SPACES, TAGS
from knnstore.progress import SILENT, Progress
from knnstore.quarantine import Losses, LostDocument, Moved, Quarantine, unfinished_losses
from knnstore.salvage import documents_beside, find_damage, salvage
from knnstore.storage.catalog import StoreFolder, folders_of, identity_bytes, list_manifests, now
from knnstore.storage.commits import check_features, write_snapshot
from knnstore.storage.files import disk, hold_lock, replace_file, sha256_file, unless_held
from knnstore.storage.jobs import moved_by
from knnstore.storage.manifest import Manifest, Operation
from knnstore.storage.manifest_json import SNAPSHOT_MAX
from knnstore.storage.tags import read_tag, tag_name
from knnstore.verification.datastore import Examination, Problem, VerifyReport

__all__ = ["RepairReport", "repair"]

_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # why a sound file cannot be read by us, or now
_PARTS = (SPACES, COARSE, SEGMENTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """What a repair did, or a dry run would do.

    problems: as `verify` found them; where there are none, nothing was done. base: the snapshot gone on from; snapshot: the newest one
    now, another where one was committed; documents, entries: of it. moved: what was put aside. lost: documents that are not there any
    more, by name; unnamed: by domain, how many besides, whose names cannot be read; lost_snapshots: newer ones than base, whose
    manifests are damaged. held: snapshots that name what is damaged and that a process has open: they stay until it ends and repair is
    called again.
    """

    dry_run: bool
    problems: tuple[Problem, ...]
    base: int
    snapshot: int
    documents: int
    entries: int
    moved: tuple[Moved, ...]
    lost: tuple[LostDocument, ...]
    unnamed: dict[str, int]
    lost_snapshots: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def lossless(self) -> bool:
        """Whether every document of the newest snapshot is still there."""
        return not (self.lost or self.unnamed or self.lost_snapshots)


def repair(path: str | Path, *, dry_run: bool = False, progress: Progress = SILENT) -> RepairReport:
    """Puts what is damaged aside, commits a snapshot of what is sound, and says which documents were lost, to be appended again.

    A segment goes where one of its files, its space or its coarse quantizer is damaged, and so do snapshots and tags that name what is
    damaged, all to `quarantine/`. Where CURRENT or the newest manifest is damaged, the newest snapshot that is whole is gone on from.
    A sound store is left as it is. Nobody commits meanwhile; readers keep what they have open. dry_run: nothing is changed.
    Memory: as `verify`, and a name for each document that is lost. Raises DamageError where nothing is left to go on from,
    NotFoundError, FormatError, StorageError also where a file cannot be read for another reason than damage.
    """
    store = StoreFolder(Path(path))
    before = _state(store)
    examination, report = _examine(store, progress)
    work = _Repair(store, examination, report.problems, dry_run=dry_run)
    if dry_run or not (report.problems or unfinished_losses(store)):
        return work.run()
    work.free_lock()
    with hold_lock(store.lock, purpose="repairing this store", wait=True):
        if _state(store) != before:  # another command came first
            examination, report = _examine(store, progress)
            work = _Repair(store, examination, report.problems, dry_run=False)
        with progress.stage("repairing", total=None, unit="files"):
            return work.run()


def _examine(store: StoreFolder, progress: Progress) -> tuple[Examination, VerifyReport]:
    with ExitStack() as pins:
        examination = Examination(store, pins, full=True)
        report = examination.run(progress)
    for problem in report.problems:
        if problem.kind == "unreadable" and problem.detail in map(os.strerror, _NOT_DAMAGE):
            raise StorageError(
                f"{store.path / problem.path}: cannot read: {problem.detail}. Nothing was changed. Check permissions and limits, and "
                "try again."
            )
    return examination, report


def _state(store: StoreFolder) -> list[tuple[str, int, int]]:
    """What changes with every commit, gc and tag: names, inodes and times of CURRENT, manifests and tags."""
    listed = []
    for path in (store.identity, store.current, *_children(store.manifests), *_children(store.path / TAGS)):
        try:
            status = path.lstat()
        except OSError:
            continue
        listed.append((str(path), status.st_ino, status.st_mtime_ns))
    return listed


def _children(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it cannot be read, which is a problem of its own."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


class _Repair:
    """One repair: what is to be done is found out first. Raises DamageError, FormatError where it cannot be done."""

    def __init__(self, store: StoreFolder, examination: Examination, problems: tuple[Problem, ...], *, dry_run: bool) -> None:
        self._store, self._examination, self._problems, self._dry_run = store, examination, problems, dry_run
        self._damage = find_damage(store, problems)
        for folder in self._damage.folders:
            if folder.is_symlink() and folder.is_dir():
                raise DamageError(
                    f"{folder}: a symbolic link where a folder belongs. Nothing was changed; put the folder in its place, then try again."
                )
        self._salvage = salvage(store, examination, self._damage)
        base = self._base = self._salvage.base
        check_features(store, base)
        catalog = examination.catalog
        named = 0 if catalog.current is None else catalog.current[0]
        counts = catalog.believed and named == base.snapshot and base.snapshot not in self._damage.contradicted
        self._commits = not counts or self._salvage.changes()
        numbers = [number for number in list_manifests(store) if number < SNAPSHOT_MAX]
        named = named if named < SNAPSHOT_MAX else 0
        self._uncounted = [number for number in numbers if catalog.believed and number > named] if self._commits else []
        self._number = max(named, *numbers) + 1 if self._commits else base.snapshot
        self._quarantine = Quarantine(store, self._number, dry_run=dry_run)

    def free_lock(self) -> None:
        """Before LOCK can be taken, it must be a file."""
        if self._damage.lock:
            self._quarantine.take(self._store.lock, "damaged")

    def run(self) -> RepairReport:
        """All steps in order."""
        store, damage, base = self._store, self._damage, self._base
        with ExitStack() as stack:
            doomed, held = self._doomed_snapshots(stack)
            needed = self._needed(doomed)
            beside = self._beside(needed)
            losses = self._losses(beside)
            if damage.identity:
                self._quarantine.take_copy(store.identity, "damaged")
                if not self._dry_run:
                    replace_file(store.identity, identity_bytes(base.uuid))
            for folder in sorted(damage.folders):
                self._quarantine.take(folder, "not a folder")
                if not self._dry_run:
                    disk.make_folder(folder)
                    disk.sync_folder(store.path)
            self._quarantine.write_down(losses)
            for path in beside:
                self._quarantine.take(path, "of a snapshot whose manifest is damaged")
            if self._commits:
                self._commit(losses)
            for path, part in self._examination.parts.items():
                if path not in needed and (path in damage.parts or doomed.issuperset(part.snapshots)):
                    self._quarantine.take(path, "damaged" if path in damage.parts else "only needed by snapshots that go")
            for path, why in self._doomed_tags(doomed):
                self._quarantine.take(path, why)
            for number in sorted(doomed):
                whole = number in self._examination.catalog.sound and number not in damage.manifests
                self._quarantine.take(store.manifest(number), "names what is damaged" if whole else "damaged")
            self._quarantine.finish()
        return self._report(losses, held)

    def _doomed_snapshots(self, stack: ExitStack) -> tuple[set[int], list[int]]:
        """Snapshots that go, and those that would and that a process has open. The former are locked until the end."""
        named = {
            number for path in self._damage.parts if path in self._examination.parts for number in self._examination.parts[path].snapshots
        }
        doomed, held = set(), []
        for number in sorted(self._damage.manifests | self._damage.contradicted | named):
            if stack.enter_context(unless_held(self._store.manifest(number))):
                doomed.add(number)
            else:
                held.append(number)
        return doomed, held

    def _needed(self, doomed: set[int]) -> set[Path]:
        """Folders that the newest snapshot and all that stay name."""
        needed = {folder for folder, _ in folders_of(self._store, self._manifest())}
        return needed | {path for path, part in self._examination.parts.items() if not doomed.issuperset(part.snapshots)}

    def _beside(self, needed: set[Path]) -> list[Path]:
        """What no manifest names that can be read, where one cannot be, or a tag misses one."""
        if not (self._damage.manifests or self._damage.tags):
            return []
        jobs = {target for job in _children(self._store.staging) for target in moved_by(self._store, job)}
        known = needed | set(self._examination.parts) | jobs
        found = [path for part in _PARTS for path in _children(self._store.path / part)]
        return [path for path in found if path not in known and path.suffix != ".tmp"]

    def _losses(self, beside: list[Path]) -> Losses:
        """What is lost, with what repairs that were killed had found lost."""
        salvaged = self._salvage
        segments = [path for path in beside if path.parent.name == SEGMENTS]
        losses = Losses(
            documents=(*salvaged.lost, *documents_beside(segments, salvaged.hashes)),
            unnamed=salvaged.unnamed,
            snapshots=tuple(sorted(number for number in self._damage.manifests if number > self._base.snapshot)),
        )
        before = unfinished_losses(self._store)
        return losses.and_also(replace(before, documents=tuple(item for item in before.documents if not salvaged.has(item))))

    def _doomed_tags(self, doomed: set[int]) -> list[tuple[Path, str]]:
        damaged = self._damage.tags
        tags = [path for path in _children(self._store.path / TAGS) if path not in damaged and tag_name(path) is not None]
        going = [(path, "of a snapshot that goes") for path in tags if read_tag(path).snapshot in doomed]
        return [*((path, "damaged") for path in sorted(damaged)), *going]

    def _manifest(self, losses: Losses | None = None) -> Manifest:
        """The newest snapshot after the repair."""
        base, salvaged = self._base, self._salvage
        if not self._commits:
            return base
        spaces = {segment.content.space for segment in salvaged.segments}
        if not spaces:  # one always remains
            spaces = {space.id for space in base.spaces if self._store.space(space.id) not in self._damage.parts}
        coarse = {segment.content.coarse for segment in salvaged.segments}
        calibration = base.calibration
        if calibration is not None and calibration.status == "fresh" and salvaged.segments != base.segments:
            calibration = replace(calibration, status="stale")
        counts = {"documents": sum(salvaged.documents.values()), "entries": sum(segment.n_live() for segment in salvaged.segments)}
        if losses is not None:
            counts["lost"] = len(losses.documents) + sum(losses.unnamed.values())
        return replace(
            base,
            snapshot=self._number,
            parent=(base.snapshot, sha256_file(self._store.manifest(base.snapshot))[1]),
            time=now(),
            operation=Operation(name="repair", arguments={"continued": base.snapshot}, counts=counts),
            spaces=tuple(space for space in base.spaces if space.id in spaces),
            coarse=tuple(item for item in base.coarse if item.id in coarse),
            segments=salvaged.segments,
            documents=salvaged.documents,
            calibration=calibration,
        )

    def _commit(self, losses: Losses) -> None:
        for number in self._uncounted:  # it would count with a newer one above it
            self._quarantine.take(self._store.manifest(number), "of a commit that was cut off")
        if self._damage.current:
            self._quarantine.take_copy(self._store.current, "damaged")
        if not self._dry_run:
            write_snapshot(self._store, self._manifest(losses))

    def _report(self, losses: Losses, held: list[int]) -> RepairReport:
        return RepairReport(
            dry_run=self._dry_run,
            problems=self._problems,
            base=self._base.snapshot,
            snapshot=self._number,
            documents=sum(self._salvage.documents.values()),
            entries=sum(segment.n_live() for segment in self._salvage.segments),
            moved=tuple(self._quarantine.moved),
            lost=losses.documents,
            unnamed=losses.unnamed,
            lost_snapshots=losses.snapshots,
            held=tuple(held),
        )
