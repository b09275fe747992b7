"""Datastores of one model joined to one: their files are listed together; nothing is decoded and no model is loaded."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knnstore.build import begin_store, blank_manifest, check_vacant, take_back
from knnstore.changes import Change, Staged, commit_change
from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import SEGMENT_FILE
from knnstore.overlap import CHOICES, Plan, Source, check_alike, open_source
from knnstore.progress import SILENT, Progress, Stage
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.files import adopt, disk
from knnstore.storage.jobs import remove_abandoned, run_attempt, run_job
from knnstore.storage.manifest import CoarseRecord, FileRecord, Manifest, Operation, SegmentRecord, SpaceRecord
from knnstore.storage.parse import read_small
from knnstore.store import Datastore, open_store

__all__ = ["merge"]

_COMMAND = "merge"


def merge(
    sources: str | Path | Sequence[str | Path],
    into: str | Path,
    *,
    domains: Mapping[str, str] | None = None,
    on_conflict: str | None = None,
    link: bool = False,
    progress: Progress = SILENT,
) -> Datastore:
    """One datastore with all documents of others that were built with the same checkpoint and key layer.

    into: a new store, or one there is, to which the others are added in one commit. domains: {path as in sources: the name that its
    domain `default` gets}; without, the store's file name. Other domains keep their names, and so do all of a store that is merged
    into. A document that several stores have is taken once; where its contents differ, on_conflict says which stays: `keep-first` or
    `keep-last`, in the order given (a store that is merged into comes first). link: hard links instead of copies (same file system;
    gc and delete stay safe, files never change). Files are copied by sharing blocks where the file system can. Memory: 24 bytes a
    document. The calibration of the largest store is kept and marked stale; that of a store that is merged into is its own.
    Called again after a kill with the same arguments, it begins anew with what is copied, and finishes.
    Returns the datastore, open at the new snapshot (at the one there was, where all is there already). Raises
    CheckpointMismatchError, ExistsError listing conflicting documents, ConflictError where others changed the same segments of `into`
    meanwhile, InvalidArgumentError, NotFoundError, FormatError, DamageError, StorageError.
    """
    if on_conflict not in (None, *CHOICES):
        raise InvalidArgumentError(f"on_conflict {on_conflict!r}: use {' or '.join(CHOICES)}.")
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    target = StoreFolder(Path(into))
    names = {str(path): name for path, name in (domains or {}).items()}
    unknown = sorted(set(names) - {str(path) for path in sources})
    if unknown:
        raise InvalidArgumentError(f"domains: {unknown[0]!r} is not one of the stores to merge ({', '.join(map(str, sources))}).")
    with ExitStack() as stack:
        opened = []
        if target.current.exists():
            opened.append(open_source(target, None, stack, kept=True))
        else:
            check_vacant(target)
        for path in sources:
            store = StoreFolder(Path(path))
            if not (opened and opened[0].kept and _is_same(store, target)):
                opened.append(open_source(store, names.get(str(path)), stack))
            elif str(path) in names:
                raise InvalidArgumentError(f"{path}: the others are merged into it, so its domains keep their names. Leave the name out.")
        if not sources or (len(opened) < 2 and opened[0].kept):
            raise InvalidArgumentError("no stores to merge were given beside the one they go into. Name one or more.")
        check_alike(opened)
        plan = Plan(opened, on_conflict)
        if plan.is_there():
            remove_abandoned(target, _COMMAND)  # as where one was killed right after its commit
        else:
            _Merge(target, opened, plan, link, progress).commit()
    return open_store(into)


def _is_same(a: StoreFolder, b: StoreFolder) -> bool:
    return a.path.exists() and b.path.exists() and a.path.samefile(b.path)


@dataclass(slots=True)
class _Merge:
    """A merge, from its plan to its commit."""

    target: StoreFolder
    sources: Sequence[Source]
    plan: Plan
    link: bool
    progress: Progress
    taken: list[Path] = field(default_factory=list)  # folders in the job that are to be made durable

    def commit(self) -> None:
        """Copies or links into a job's folder, then commits."""
        for folder, files in self._folders():
            for file in files:
                _check_file(folder, file)  # of all: before anything is made
        if self.sources[0].kept:
            with run_attempt(self.target, _COMMAND) as job:
                self._commit(job, self.sources[0].manifest)
            return
        arguments = {
            "command": _COMMAND,
            "sources": [[source.manifest.uuid, source.manifest.snapshot, source.documents] for source in self.sources],
        }
        _, store_uuid, name = begin_store(self.target.path, arguments)
        with run_job(self.target, name, arguments) as job:
            take_back(self.target, job)
            for leftover in ("segments", "index"):
                disk.remove_tree(job / leftover)
            self._commit(job, self._blank(store_uuid))

    def _blank(self, store_uuid: str) -> Manifest:
        """What the new store says of itself before anything is in it: in most what the largest says."""
        like = max(self.sources, key=lambda source: source.n_live).manifest
        manifests = [source.manifest for source in self.sources]
        said = (manifest.checkpoint.tokenizer for manifest in (like, *manifests))
        tokenizer = next((name for name in said if name is not None), None)
        return blank_manifest(
            store_uuid,
            checkpoint=replace(like.checkpoint, tokenizer=tokenizer),
            key=like.key,
            tokens=next((manifest.tokens for manifest in (like, *manifests) if manifest.tokens is not None), None),
            windows=next((manifest.windows for manifest in (like, *manifests) if manifest.windows is not None), None),
            index=like.index,
            calibration=like.calibration,
            k=like.k,
            nprobe=like.nprobe,
        )

    def _commit(self, job: Path, start: Manifest) -> None:
        plan, kept = self.plan, self.sources[0] if self.sources[0].kept else None
        before = kept.documents if kept is not None else {}
        change = Change(
            operation=Operation(
                name=_COMMAND,
                arguments={"sources": [str(source.store.path) for source in self.sources if not source.kept]},
                counts={
                    "stores": len(self.sources),
                    "documents": sum(plan.documents.values()),
                    "repeated": plan.repeated,
                    "entries": sum(record.n_live() for _, record in plan.records.values()),
                },
            ),
            **self._stage(job),
            documents={domain: n - before.get(domain, 0) for domain, n in plan.documents.items()},
            checked={record.content.uuid: record.dead_ranges() for record in start.segments},
            stale=True,
        )
        commit_change(self.target, start, change, job=job)

    def _folders(self) -> Iterator[tuple[Path, tuple[FileRecord, ...]]]:
        """The folders of the sources that are needed and not there, with their files."""
        for source in self.sources:
            if not source.kept:
                for space in source.manifest.spaces:
                    yield source.store.space(space.id), space.files
                for lists in source.manifest.coarse:
                    yield source.store.coarse(lists.id), lists.files
        for source, record in self.plan.records.values():
            if not source.kept and record.n_live():
                folder = source.store.segment(record.content.uuid)
                yield folder, (*record.content.files, _segment_file(folder, record))

    def _stage(self, job: Path) -> dict[str, Any]:
        """Copies or links what the target does not have. Returns fields of a `Change`."""
        first = self.sources[0]
        there = {record.content.uuid: record for record in first.records} if first.kept else {}
        coming = [record for source, record in self.plan.records.values() if not source.kept and record.n_live()]
        total = sum(file.size for record in coming for file in record.content.files)
        segments: list[Staged[SegmentRecord]] = []
        with self.progress.stage("linking" if self.link else "copying", total=total, unit="bytes") as stage:
            spaces, coarse = self._index(job)
            for uuid, (source, record) in self.plan.records.items():
                if not record.n_live() or there.get(uuid) == record:
                    continue
                folder = self.target.segment(uuid)
                if not source.kept:
                    folder = job / "segments" / uuid
                    at = source.store.segment(uuid)
                    self._take(at, folder, (*record.content.files, _segment_file(at, record)), stage)
                segments.append(Staged(folder, record))
            self._make_durable()
        replaced = [record for uuid, record in there.items() if self.plan.records[uuid][1] != record]
        return {"spaces": spaces, "coarse": coarse, "segments": segments, "replaced": replaced}

    def _index(self, job: Path) -> tuple[list[Staged[SpaceRecord]], list[Staged[CoarseRecord]]]:
        """Spaces and coarse quantizers of all sources, each once."""
        spaces: dict[str, Staged[SpaceRecord]] = {}
        coarse: dict[str, Staged[CoarseRecord]] = {}
        first = self.sources[0].manifest
        known = {record.id for record in first.spaces} | {record.id for record in first.coarse} if self.sources[0].kept else set()
        for source in self.sources:
            for space in source.manifest.spaces:
                if space.id not in known and space.id not in spaces:
                    spaces[space.id] = Staged(job / "index" / "spaces" / space.id, space)
                    self._take(source.store.space(space.id), spaces[space.id].folder, space.files)
            for lists in source.manifest.coarse:
                if lists.id not in known and lists.id not in coarse:
                    coarse[lists.id] = Staged(job / "index" / "coarse" / lists.id, lists)
                    self._take(source.store.coarse(lists.id), coarse[lists.id].folder, lists.files)
        return list(spaces.values()), list(coarse.values())

    def _take(self, source: Path, folder: Path, files: Sequence[FileRecord], stage: Stage | None = None) -> None:
        """Copies or links files into a new folder; their sizes are compared, their content is not read."""
        disk.make_folder(folder)
        self.taken.append(folder)
        for file in files:
            _check_file(source, file)
            if self.link:
                disk.link(source / file.name, folder / file.name)
            else:
                disk.copy(source / file.name, folder / file.name)
            if stage is not None:
                stage.advance(file.size)

    def _make_durable(self) -> None:
        """Syncs what was taken. After all of it was copied: the disk writes meanwhile."""
        for folder in self.taken:
            for file in sorted(folder.iterdir()):
                if not self.link:  # a link's content was synced when it was made
                    adopt(file)
            disk.sync_folder(folder)
        for parent in sorted({folder.parent for folder in self.taken}):
            disk.sync_folder(parent)


def _segment_file(folder: Path, record: SegmentRecord) -> FileRecord:
    """A segment's own file: small, so that it is read. Raises DamageError."""
    path = folder / SEGMENT_FILE
    raw = read_small(path)
    if hashlib.sha256(raw).hexdigest() != record.sha256:
        raise DamageError(f"{path}: its content does not match its checksum. Run `knnstore verify` on that store.")
    return FileRecord(name=path.name, size=len(raw), sha256=record.sha256)


def _check_file(folder: Path, file: FileRecord) -> None:
    path = folder / file.name
    if not path.is_file() or path.is_symlink():
        raise DamageError(f"{path}: not there as a plain file. Run `knnstore verify` on that store.")
    if path.stat().st_size != file.size:
        raise DamageError(f"{path}: {path.stat().st_size} bytes, {file.size} are recorded. Run `knnstore verify` on that store.")
