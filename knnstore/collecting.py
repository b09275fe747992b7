"""gc: removes what no kept snapshot, tag or running reader needs, and what killed commands left.

In this order, so that a kill at any moment leaves a store that opens and verifies, and a later gc finishes: manifests (each while its
lock is held, so that no reader can have it), then the folders that no manifest names any more, then unfinished jobs.
"""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from knnstore.errors import DamageError, InvalidArgumentError, NotFoundError, StorageError
from knnstore.format import (
    COARSE,
    CURRENT_FILE,
    MANIFESTS,
    QUARANTINE,
    SEGMENT_FILE,
    SEGMENTS,
    SPACES,
    STAGING,
    STORE_FILE,
    TAGS,
)
from knnstore.progress import SILENT, Progress, Stage
from knnstore.storage.catalog import StoreFolder, folders_of, list_manifests, read_current, read_identity, read_manifest
from knnstore.storage.commits import check_features
from knnstore.storage.files import disk, hold_lock, unless_held
from knnstore.storage.jobs import is_held, moved_by, remove_job
from knnstore.storage.tags import TAG_PREFIX, list_tags, resolve, tag_name

__all__ = ["KEEP", "Collected", "Kept", "gc"]

KEEP = 10  # snapshots that stay unless it is said otherwise: what the last commands did can be undone after a gc too
_DOOMED = ".tmp"  # at the end of a name: it means nothing any more
_PARTS = (SPACES, COARSE, SEGMENTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A snapshot that stays. why: `current`, `recent` (one of the last), `reader` (a process has it open), `tag:NAME`."""

    snapshot: int
    why: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What a gc removed, or a dry run would remove.

    snapshots: numbers. segments, spaces, coarse: folder names. jobs: names of unfinished jobs. leftovers: paths in the store of
    what killed commands left. quarantined: paths of what repair had put aside. freed_bytes: of files (0 for one with other hard links).
    kept: snapshots that stay. kept_jobs: those that a process is at, or that were to be kept. history_bytes: of files that only kept
    snapshots other than the current one need.
    """

    dry_run: bool
    snapshots: tuple[int, ...]
    segments: tuple[str, ...]
    spaces: tuple[str, ...]
    coarse: tuple[str, ...]
    jobs: tuple[str, ...]
    leftovers: tuple[str, ...]
    quarantined: tuple[str, ...]
    freed_bytes: int
    kept: tuple[Kept, ...]
    kept_jobs: tuple[str, ...]
    history_bytes: int


def gc(
    path: str | Path,
    *,
    keep: int = KEEP,
    dry_run: bool = False,
    keep_jobs: bool = False,
    quarantine: bool = False,
    progress: Progress = SILENT,
) -> Collected:
    """Removes snapshots but the last `keep`, those with a tag and those that a reader has open; then every file that only they needed.

    Unfinished jobs that no process is at go too, unless keep_jobs: their commands then begin anew. quarantine: also what repair put
    aside. dry_run: says what would be removed, and changes nothing. Nobody commits meanwhile; readers are not disturbed.
    Raises DamageError where a snapshot that stays, or a tag, is damaged (what it needs is not known then), FormatError where a
    later version has changed the store, NotFoundError, InvalidArgumentError, StorageError.
    """
    if keep < 1:
        raise InvalidArgumentError(f"keep {keep}: use 1 or more; the current snapshot always stays.")
    store = StoreFolder(Path(path))
    read_identity(store)
    read_current(store)  # before LOCK is made in what is no store
    with (
        hold_lock(store.lock, purpose="changing this store", wait=True),
        progress.stage("looking for what can go" if dry_run else "removing", total=None, unit="bytes") as stage,
    ):
        return _Collection(store, keep, dry_run, keep_jobs, stage).run(quarantine)


@dataclass(slots=True)
class _Collection:
    store: StoreFolder
    keep: int
    dry_run: bool
    keep_jobs: bool
    stage: Stage
    why: dict[int, list[str]] = field(default_factory=dict)  # snapshots that stay
    needed: dict[Path, dict[str, int]] = field(default_factory=dict)  # folder → size of each file, of the snapshots that stay
    current_folders: frozenset[Path] = frozenset()
    freed_bytes: int = 0

    def run(self, quarantine: bool) -> Collected:
        """All steps in order."""
        for name in (MANIFESTS, TAGS, STAGING, *_PARTS):
            if (self.store.path / name).is_symlink():  # nothing is removed elsewhere
                raise DamageError(f"{self.store.path / name}: a symbolic link where a folder belongs. Run `knnstore verify`.")
        current, sha256 = read_current(self.store)
        self._choose(current)
        self._need(current, sha256, "`knnstore restore` goes back to an earlier snapshot")
        self.current_folders = frozenset(self.needed)
        for number in self.why.keys() - {current}:
            self._need(number)
        leftovers = self._drop_leftovers(current)
        snapshots = self._drop_manifests(current)
        jobs, kept_jobs = self._sort_jobs()
        moved = {target for name in kept_jobs for target in moved_by(self.store, self.store.staging / name)}
        dropped = {part: self._drop_folders(part, moved) for part in _PARTS}
        leftovers += [name for part in _PARTS for name in self._drop_strays(part)]
        busy = [name for name in jobs if not self._drop_job(self.store.staging / name)]
        aside = self._drop_quarantine() if quarantine else []
        return Collected(
            dry_run=self.dry_run,
            snapshots=tuple(snapshots),
            segments=tuple(dropped[SEGMENTS]),
            spaces=tuple(dropped[SPACES]),
            coarse=tuple(dropped[COARSE]),
            jobs=tuple(name for name in jobs if name not in busy),
            leftovers=tuple(sorted(leftovers)),
            quarantined=tuple(aside),
            freed_bytes=self.freed_bytes,
            kept=tuple(Kept(snapshot=number, why=tuple(why)) for number, why in sorted(self.why.items())),
            kept_jobs=tuple(sorted(kept_jobs + busy)),
            history_bytes=sum(sum(files.values()) for folder, files in self.needed.items() if folder not in self.current_folders),
        )

    # What stays

    def _choose(self, current: int) -> None:
        """The snapshots that stay, and why."""
        numbers = [number for number in list_manifests(self.store) if number <= current]
        for number in numbers[-self.keep :]:
            self.why[number] = ["current" if number == current else "recent"]
        self.why.setdefault(current, ["current"])  # its manifest may be missing, which is said when it is read
        for name in list_tags(self.store):
            self.why.setdefault(resolve(self.store, name).snapshot, []).append(f"{TAG_PREFIX}{name}")
        for number in numbers:
            if number not in self.why:
                with unless_held(self.store.manifest(number)) as free:
                    if not free:
                        self.why[number] = ["reader"]

    def _need(self, number: int, sha256: str | None = None, advice: str = "a smaller --keep may leave it out") -> None:
        """Takes down the folders and files that a snapshot needs. advice: what can be done where that is not known."""
        try:
            manifest = read_manifest(self.store, number, sha256)
        except (DamageError, NotFoundError) as error:
            what = str(error).removesuffix(" Run `knnstore verify`.")
            if isinstance(error, NotFoundError):
                what = f"{self.store.manifest(number)}: the file is missing."
            raise DamageError(
                f"{what} What snapshot {number} needs is not known, and nothing that it may need was removed. "
                f"`knnstore verify` says what is damaged; {advice}."
            ) from error
        check_features(self.store, manifest)
        for folder, files in folders_of(self.store, manifest):
            own = {SEGMENT_FILE: 0} if folder.parent.name == SEGMENTS else {}  # its size is in no manifest, and some hundred bytes
            self.needed.setdefault(folder, own).update((file.name, file.size) for file in files)

    # What goes

    def _remove(self, path: Path) -> None:
        """Removes a file or a folder with all in it, unless this is a dry run; either way its bytes are counted."""
        size = _size(path)
        self.freed_bytes += size
        if not self.dry_run:
            disk.remove_tree(path)
        self.stage.advance(size)

    def _sync(self, folders: Iterable[Path]) -> None:
        for folder in sorted(set(folders)):
            if not self.dry_run:
                disk.sync_folder(folder)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.store.path).as_posix()

    def _drop_leftovers(self, current: int) -> list[str]:
        """Temporary files, and manifests of commits that were cut off before they counted."""
        store, counted = self.store, {self.store.manifest(number) for number in list_manifests(self.store) if number <= current}
        found = [store.path / f"{name}{_DOOMED}" for name in (CURRENT_FILE, STORE_FILE)]
        found += [path for path in _children(store.manifests) if path not in counted]
        found += [path for path in _children(store.path / TAGS) if tag_name(path) is None]
        found += [path for path in _children(store.staging) if path.suffix == _DOOMED or _is_other(path)]
        found += [path for part in _PARTS for path in _children(store.path / part) if path.suffix == _DOOMED]
        found = [path for path in found if os.path.lexists(path)]
        for path in found:
            self._remove(path)
        self._sync(path.parent for path in found)
        return [self._name(path) for path in found]

    def _drop_manifests(self, current: int) -> list[int]:
        """Manifests of the snapshots that go. A reader that was about to open one finds that it has no name any more, and tries again."""
        dropped = []
        for number in list_manifests(self.store):
            if number in self.why or number > current:
                continue
            with unless_held(self.store.manifest(number)) as free:
                if free:
                    self._remove(self.store.manifest(number))
                    dropped.append(number)
            if not free:  # a reader has come since it was looked at
                self.why[number] = ["reader"]
                self._need(number)
        if dropped:
            self._sync([self.store.manifests])
        return dropped

    def _sort_jobs(self) -> tuple[list[str], list[str]]:
        """Names of the unfinished jobs that go and of those that stay."""
        jobs = [path for path in _children(self.store.staging) if path.suffix != _DOOMED and _is_folder(path)]
        kept = [path.name for path in jobs if self.keep_jobs or is_held(path)]
        return [path.name for path in jobs if path.name not in kept], kept

    def _drop_folders(self, part: str, moved: set[Path]) -> list[str]:
        """The folders of spaces, coarse quantizers or segments that nothing needs.

        They are renamed before anything in them is removed: half a space under its name would be taken for the whole by a later commit.
        """
        parent = self.store.path / part
        found = [path for path in _children(parent) if path not in self.needed and path not in moved and path.suffix != _DOOMED]
        if self.dry_run:
            for path in found:
                self._remove(path)
            return [path.name for path in found]
        doomed = [path.with_name(f"{path.name}{_DOOMED}") for path in found]
        for path, target in zip(found, doomed, strict=True):
            disk.rename(path, target)
        if doomed:
            disk.sync_folder(parent)
            for path in doomed:
                self._remove(path)
            disk.sync_folder(parent)
        return [path.name for path in found]

    def _drop_strays(self, part: str) -> list[str]:
        """Files in the folders of what stays that do not belong there."""
        strays = [path for folder in _children(self.store.path / part) for path in self._strays(folder)]
        for path in strays:
            self._remove(path)
        self._sync(path.parent for path in strays)
        return [self._name(path) for path in strays]

    def _strays(self, folder: Path) -> list[Path]:
        files = self.needed.get(folder)
        return [] if files is None or not _is_folder(folder) else [path for path in _children(folder) if path.name not in files]

    def _drop_job(self, folder: Path) -> bool:
        """Removes a job; gives False where a process has come to it since it was looked at."""
        size = _size(folder)
        if not self.dry_run and not remove_job(folder):
            return False
        self.freed_bytes += size
        self.stage.advance(size)
        self._sync([folder.parent])
        return True

    def _drop_quarantine(self) -> list[str]:
        folder = self.store.path / QUARANTINE
        found = [self._name(path) for path in _children(folder)]
        if os.path.lexists(folder):
            self._remove(folder)
            self._sync([self.store.path])
        return found


def _children(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing where it is not there."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{folder}: cannot read: {error.strerror}. Check the path and its permissions.") from error


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder itself, and not a link to one: nothing is removed elsewhere."""
    return path.is_dir() and not path.is_symlink()


def _is_other(path: Path) -> bool:
    """Whether a path is there and no folder. The folder of a job that has just ended is not there, and may be again in the next moment."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, that are freed when it goes: none for one that has other names too."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    if stat.S_ISDIR(status.st_mode):
        return sum(map(_size, _children(path)))
    return status.st_size if status.st_nlink == 1 else 0
