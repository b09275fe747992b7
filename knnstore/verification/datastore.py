"""`verify`: whether every file of a datastore is what was written, and whether they agree with each other.

Levels: `quick` reads what is small (identity, manifests, spaces, coarse quantizers, list directories, tables of checksums) and
looks at kind, size and header of the rest; `full` reads every byte of every file that a kept snapshot names, once.

Kinds of problems:

- `missing`, `type`, `size`, `unreadable`: a file is not there; is a link, FIFO, device or folder; is shorter or longer than recorded;
  cannot be read;
- `checksum`, `header`: its bytes are not those that were written;
- `content`: its bytes are those that were written, but what they say does not add up;
- `identity`, `current`, `manifest`, `tag`: KNNSTORE, CURRENT, a manifest or a tag says something else than was written, or a tag
  names a snapshot that is not there.

Files that no kept snapshot names (left by a command that was killed, or belonging to one that is running) are listed apart, as
`orphans`: they are no damage. `LOCK`, `staging/`, `quarantine/` and what a gc removes meanwhile are none either.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from knnstore.errors import FormatError, InvalidArgumentError
from knnstore.format import COARSE, MANIFESTS, SEGMENT_FILE, SEGMENTS, SPACES, STAGING, TAGS
from knnstore.progress import SILENT, Progress
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.coarse import load_coarse
from knnstore.storage.manifest import CoarseRecord, FileRecord, Manifest, SegmentRecord, SpaceRecord
from knnstore.storage.space import load_space
from knnstore.verification.catalog import CatalogCheck
from knnstore.verification.contexts import DocumentRows, OpenParts
from knnstore.verification.documents import Names, check_documents
from knnstore.verification.files import FindingError, Findings, Problem, check_folder, check_plain, file_reading
from knnstore.verification.segment import ExpectedSegment, SegmentCheck
from knnstore.verification.tags import check_tags

__all__ = ["LEVELS", "Examination", "Part", "Problem", "SegmentSample", "VerifyReport", "verify"]

LEVELS = ("quick", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentSample:
    """What came of running a model over windows of a segment again. segment: its uuid. windows, entries: how many were sampled.

    equal: share of the sub-codes stored that are those that the model gives now (of raw keys: of numbers that are nearly so). dtype:
    what the model computed in now, recorded: then; where they differ, equal is only told.
    """

    segment: str
    windows: int
    entries: int
    equal: float
    dtype: str
    recorded: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """checked_bytes: read and compared. problems: what is damaged. orphans: paths in the store that no kept snapshot names.

    samples: of the segments that were sampled, where it was asked for.
    """

    checked_bytes: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    samples: tuple[SegmentSample, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems


def verify(path: str | Path, *, level: str = "full", progress: Progress = SILENT) -> VerifyReport:
    """Looks for damage in a datastore and changes nothing. May run beside readers and writers.

    level: `quick` or `full`. Memory: 8 bytes for each entry of the largest segment (67 MB at its default size), 33 bytes for each
    document of all segments and some 80 for each of one snapshot, one space or coarse quantizer at a time, and some megabytes.
    Raises NotFoundError where there is no datastore or no snapshot yet, FormatError for a store of a later format; damage is never raised.
    """
    if level not in LEVELS:
        raise InvalidArgumentError(f"level {level!r}: use quick or full.")
    with contextlib.ExitStack() as pins:
        return Examination(StoreFolder(Path(path)), pins, full=level == "full").run(progress)


@dataclass(slots=True)
class Part:
    """A folder that snapshots name. record: as the newest of them has it; snapshots: their numbers, descending."""

    record: SpaceRecord | CoarseRecord | ExpectedSegment
    dim: int
    snapshots: list[int] = field(default_factory=list)

    def files(self) -> tuple[FileRecord, ...]:
        return self.record.record.content.files if isinstance(self.record, ExpectedSegment) else self.record.files

    def lasting(self) -> object:
        """What every snapshot says alike (rows die, and domains are renamed)."""
        return (self.record.record.content, self.record.record.sha256) if isinstance(self.record, ExpectedSegment) else self.record


class Examination:
    """One look at a datastore, and what was learned of it besides its problems.

    catalog: of the manifests. parts: the folders that sound manifests name. documents: of each segment whose contexts were read and are
    sound, by uuid.
    """

    def __init__(self, store: StoreFolder, pins: contextlib.ExitStack, *, full: bool) -> None:
        """pins: what holds the manifests while their files are read."""
        self._store, self._full = store, full
        self._findings = Findings(store.path)
        self.catalog = CatalogCheck(store, self._findings, pins)
        self.parts: dict[Path, Part] = {}
        self.documents: dict[str, DocumentRows] = {}
        self._tags: set[Path] = set()  # files of tags
        self._said: dict[tuple[tuple[SegmentRecord, ...], tuple[tuple[str, int], ...]], list[int]] = {}  # by which snapshots
        self._records: dict[SegmentRecord, SegmentRecord] = {}  # each once, however many snapshots have it

    def run(self, progress: Progress) -> VerifyReport:
        findings, listed = self._findings, self._listed()
        for manifest in self.catalog.manifests():
            self._name_parts(manifest)
        self._check_folders()
        size = sum(file.size for part in self.parts.values() for file in part.files())
        with progress.stage("verifying", total=size if self._full else None, unit="bytes") as stage:
            findings.advance = stage.advance
            self._check_parts()
            findings.advance = None
        self._compare_documents()
        # Where a manifest is damaged, it is not known what it names.
        orphans = () if self.catalog.n_damaged else tuple(sorted(self._orphans(listed)))
        if orphans:
            progress.note(
                f"{self._store.path}: no snapshot names {len(orphans)} of the files and folders here. They are left by a command that "
                "was killed, or of one that is running; they are no damage."
            )
        return VerifyReport(checked_bytes=findings.checked_bytes, problems=tuple(findings.problems), orphans=orphans)

    def _check_folders(self) -> None:
        """Folders are folders and not links; what is no part of a snapshot is at least of the right kind."""
        for name in (MANIFESTS, SPACES, COARSE, SEGMENTS, TAGS, STAGING):
            with self._findings.of(self._store.path / name):
                if os.path.lexists(self._store.path / name):  # empty ones are lost in some ways of copying, which harms nothing
                    check_folder(self._store.path / name)
        if os.path.lexists(self._store.lock):
            with self._findings.of(self._store.lock):
                check_plain(self._store.lock)
        self._tags = check_tags(self._store, self._findings, self._store.path / TAGS)

    def _name_parts(self, manifest: Manifest) -> None:
        """Takes down the folders that a snapshot names."""
        store, spaces = self._store, {record.id: record for record in manifest.spaces}
        for space in manifest.spaces:
            self._name(store.space(space.id), Part(space, manifest.key.dim), manifest.snapshot)
        for coarse in manifest.coarse:
            self._name(store.coarse(coarse.id), Part(coarse, manifest.key.dim), manifest.snapshot)
        segments = tuple(self._records.setdefault(segment, segment) for segment in manifest.segments)
        self._said.setdefault((segments, tuple(sorted(manifest.documents.items()))), []).append(manifest.snapshot)
        for segment in segments:
            space = spaces[segment.content.space]
            expected = ExpectedSegment(
                record=segment,
                codec=space.codec,
                n_sub=space.n_sub,
                dim=manifest.key.dim,
                vocab_size=manifest.checkpoint.vocab_size,
            )
            self._name(store.segment(segment.content.uuid), Part(expected, manifest.key.dim), manifest.snapshot)

    def _name(self, folder: Path, part: Part, snapshot: int) -> None:
        known = self.parts.setdefault(folder, part)
        if known.lasting() != part.lasting():
            name = folder.relative_to(self._store.path).as_posix()
            other = f"it says other things of {name} than snapshot {known.snapshots[0]} does"
            self._findings.add("manifest", self._store.manifest(snapshot), other)
        known.snapshots.append(snapshot)

    def _check_parts(self) -> None:
        open_parts: OpenParts = {}
        for folder, part in self.parts.items():
            before = len(self._findings.problems)
            with self._findings.of(folder) as outcome:
                check_folder(folder)
            if outcome.sound and isinstance(part.record, ExpectedSegment):
                rows = SegmentCheck(self._findings, folder, part.record, open_parts, full=self._full).run()
                if rows is not None:
                    self.documents[folder.name] = rows
            elif outcome.sound:
                self._check_quantizer(folder, part)
            # A gc removes manifests first: files that no manifest names any more are not missed.
            if len(self._findings.problems) > before and not any(os.path.lexists(self._store.manifest(n)) for n in part.snapshots):
                del self._findings.problems[before:]

    def _check_quantizer(self, folder: Path, part: Part) -> None:
        """The files of a space or coarse quantizer, and the hash in its name."""
        sound = True
        for file in part.files():
            with self._findings.of(folder / file.name) as outcome, file_reading(self._findings, folder, file):
                pass
            sound = sound and outcome.sound
        if not sound:
            return
        with self._findings.of(folder):
            try:
                said, expected = _loaded(folder, part)
            except FormatError as error:
                raise FindingError("content", self._findings.plain_detail(error, folder)) from error
            if said != expected:
                raise FindingError("content", f"it says {said}, the manifest says {expected}")

    def _compare_documents(self) -> None:
        """What each snapshot says of its documents, where the contexts of all its segments were read and are sound."""
        for (segments, documents), snapshots in self._said.items():
            paths = [path for path in map(self._store.manifest, snapshots) if os.path.lexists(path)]
            if not paths or not all(segment.content.uuid in self.documents for segment in segments):
                continue
            before = len(self._findings.problems)
            with self._findings.of(paths[0]), Names(self._store, segments, self.documents) as names:
                check_documents(segments, dict(documents), self.documents, names)
            for problem in self._findings.problems[before:]:
                for path in paths[1:]:
                    self._findings.add(problem.kind, path, problem.detail)

    def _listed(self) -> set[Path]:
        """What is in the folders of snapshots now."""
        store = self._store
        return {child for name in (MANIFESTS, SPACES, COARSE, SEGMENTS, TAGS) for child in _children(store.path / name)}

    def _orphans(self, listed: set[Path]) -> Iterator[str]:
        """Of what was listed before manifests were read, and of what lies in their folders, what no snapshot names."""
        named = self.catalog.kept | set(self.parts) | self._tags
        for folder, part in self.parts.items():
            files = {file.name for file in part.files()}
            listed |= {child for child in _children(folder) if child.name not in files}
            if isinstance(part.record, ExpectedSegment):
                named.add(folder / SEGMENT_FILE)
        return (path.relative_to(self._store.path).as_posix() for path in listed - named if os.path.lexists(path))


def _children(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it cannot be read, which is a problem of its own."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _loaded(folder: Path, part: Part) -> tuple[object, object]:
    """What a space or coarse quantizer says of itself, and what the manifest says. Raises DamageError, FormatError."""
    record = part.record
    if isinstance(record, SpaceRecord):
        space = load_space(folder, record.id, record.files)
        said = (space.dim, space.codec, space.n_sub, space.rotation_kind, space.distortion)
        return said, (part.dim, record.codec, record.n_sub, record.rotation, record.distortion)
    assert isinstance(record, CoarseRecord)
    return load_coarse(folder, record.id, space=record.space, dim=part.dim).nlist, record.nlist
