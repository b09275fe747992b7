"""`verify`: whether every file of a datastore is what was written, and whether they agree with each other.

Levels: `quick` reads what is small (identity, manifests, spaces, coarse quantizers, list directories, tables of checksums) and
looks at kind, size and header of the rest; `full` reads every byte of every file that a kept snapshot names, once.

Kinds of problems:

- `missing`, `type`, `size`, `unreadable`: a file is not there; is a link, FIFO, device or folder; is shorter or longer than recorded;
  cannot be read;
- `checksum`, `header`: its bytes are not those that were written;
- `content`: its bytes are those that were written, but what they say does not add up;
- `identity`, `current`, `manifest`: KNNSTORE, CURRENT or a manifest says something else than was written.

Files that no kept snapshot names (left by a command that was killed, or belonging to one that is running) are listed apart, as
`orphans`: they are no damage. `LOCK`, `staging/` and what a gc removes meanwhile are none either.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from knnstore.errors import DamageError, FormatError, InvalidArgumentError, NotFoundError
from knnstore.format import COARSE, LOCK_FILE, MANIFEST_MAX, MANIFESTS, SEGMENTS, SPACES, STAGING, TAGS
from knnstore.progress import SILENT, Progress
from knnstore.storage.catalog import Pin, StoreFolder, list_manifests, read_current, read_identity
from knnstore.storage.coarse import load_coarse
from knnstore.storage.manifest import CoarseRecord, FileRecord, Manifest, SegmentRecord, SpaceRecord
from knnstore.storage.manifest_json import canonical, parse_manifest
from knnstore.storage.parse import parse_json_bytes
from knnstore.storage.rows import contains
from knnstore.storage.space import load_space
from knnstore.verification_contexts import DocumentRows, OpenParts
from knnstore.verification_files import FileReading, FindingError, Findings, Problem, check_folder, check_plain, file_reading, open_plain
from knnstore.verification_segment import ExpectedSegment, SegmentCheck

__all__ = ["LEVELS", "Problem", "VerifyReport", "verify"]

LEVELS = ("quick", "full")
_PINNED = 128  # manifests held while their files are read; of more than these, a file that a gc removed is told by its manifest
_TRIES = 20  # times that the newest snapshot may be replaced and removed while it is looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """checked_bytes: read and compared. problems: what is damaged. orphans: paths in the store that no kept snapshot names."""

    checked_bytes: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems


def verify(path: str | Path, *, level: str = "full", progress: Progress = SILENT) -> VerifyReport:
    """Looks for damage in a datastore and changes nothing. May run beside readers and writers.

    level: `quick` or `full`. Memory: 8 bytes for each entry of the largest segment (67 MB at its default size), one space or coarse
    quantizer at a time, and some megabytes. Raises NotFoundError where there is no datastore or no snapshot yet, FormatError for a
    store of a later format; damage is never raised.
    """
    if level not in LEVELS:
        raise InvalidArgumentError(f"level {level!r}: use quick or full.")
    with contextlib.ExitStack() as pins:
        return _Verification(StoreFolder(Path(path)), pins, full=level == "full").run(progress)


@dataclass(slots=True)
class _Part:
    """A folder that snapshots name. record: as the newest of them has it; snapshots: their numbers, descending."""

    record: SpaceRecord | CoarseRecord | ExpectedSegment
    dim: int
    snapshots: list[int] = field(default_factory=list)

    def files(self) -> tuple[FileRecord, ...]:
        return self.record.record.content.files if isinstance(self.record, ExpectedSegment) else self.record.files

    def identity(self) -> object:
        """What is the same in every snapshot."""
        return (self.record.record.content, self.record.record.sha256) if isinstance(self.record, ExpectedSegment) else self.record


class _Verification:
    def __init__(self, store: StoreFolder, pins: contextlib.ExitStack, *, full: bool) -> None:
        self._store, self._pins, self._full = store, pins, full
        self._findings = Findings(store.path)
        self._parts: dict[Path, _Part] = {}
        self._named_as_parent: dict[int, tuple[int, str]] = {}  # snapshot → (its child, sha256 the child gives)
        self._uuids: dict[int, str] = {}  # of each sound manifest
        self._damaged_manifests = False
        self._newest: Manifest | None = None  # what CURRENT names, if sound
        self._documents: dict[str, DocumentRows] = {}  # of its segments

    def run(self, progress: Progress) -> VerifyReport:
        later: FormatError | None = None
        identity: str | None = None
        self._check_path()
        try:
            identity = self._read_identity()
        except FormatError as error:
            later = error
        self._check_folders()
        listed = set(self._listed())
        self._read_manifests()
        if later is not None:
            if self._newest is None:
                raise later
            self._findings.add("identity", self._store.identity, f"it names a later format, and snapshot {self._newest.snapshot} does not")
        self._compare_uuids(identity)
        size = sum(file.size for part in self._parts.values() for file in part.files()) if self._full else None
        with progress.stage("verifying", total=size, unit="bytes") as stage:
            self._findings.advance = stage.advance
            self._check_parts()
            self._findings.advance = None
        self._compare_documents()
        orphans = () if self._damaged_manifests else tuple(sorted(self._orphans(listed)))
        if orphans:
            progress.note(
                f"{len(orphans)} files and folders in {self._store.path} belong to no snapshot: "
                "left by a command that was killed, or of one that is running. They are no damage."
            )
        return VerifyReport(checked_bytes=self._findings.checked_bytes, problems=tuple(self._findings.problems), orphans=orphans)

    def _check_path(self) -> None:
        store = self._store
        if not store.path.is_dir():
            raise NotFoundError(f"{store.path}: no such datastore. Name one with --store, or make one with `knnstore create`.")
        if not any(map(os.path.lexists, (store.identity, store.current, store.manifests))):
            raise NotFoundError(f"{store.path}: not a datastore (it has no {store.identity.name} file). Check the path.")

    def _read_identity(self) -> str | None:
        """The store's uuid, None where KNNSTORE is damaged. Raises FormatError."""
        path = self._store.identity
        with self._findings.of(path, "identity"):
            self._findings.checked(check_plain(path).st_size)
            try:
                return read_identity(self._store)
            except FormatError as error:
                later = error
            raise _Later(later)
        return None

    def _check_folders(self) -> None:
        """Folders are folders and not links; what is no part of a snapshot is at least of the right kind."""
        for name in (MANIFESTS, SPACES, COARSE, SEGMENTS, TAGS, STAGING):
            with self._findings.of(self._store.path / name):
                if os.path.lexists(self._store.path / name):  # empty ones are lost in some ways of copying, which harms nothing
                    check_folder(self._store.path / name)
        if os.path.lexists(self._store.lock):
            with self._findings.of(self._store.lock):
                check_plain(self._store.lock)
        for path in _children(self._store.path / TAGS):
            with self._findings.of(path):
                check_plain(path)
