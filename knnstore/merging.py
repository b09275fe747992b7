"""Datastores of one model joined to one: their files are listed together; nothing is decoded and no model is loaded."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from knnstore.build import begin_store, blank_manifest, check_vacant, take_back
from knnstore.changes import Change, Staged, check_features, commit_change
from knnstore.errors import CheckpointMismatchError, DamageError, ExistsError, InvalidArgumentError
from knnstore.filters import document_domain
from knnstore.format import SEGMENT_FILE
from knnstore.progress import SILENT, Progress, Stage
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.files import adopt, disk
from knnstore.storage.jobs import job_name, run_job
from knnstore.storage.manifest import CoarseRecord, FileRecord, Manifest, Operation, SegmentRecord, SpaceRecord
from knnstore.storage.parse import read_small
from knnstore.storage.rows import RangeSet, as_ranges, complement, contains, subtract
from knnstore.storage.segment import Segment, open_segments
from knnstore.store import Datastore, open_store

__all__ = ["merge"]

CHOICES = ("keep-first", "keep-last")
_SHOWN = 20  # conflicting documents named in an error


@dataclass(frozen=True)
class _Source:
    """A store to be merged, its domains renamed. kept: it is the store that the others are merged into."""

    store: StoreFolder
    manifest: Manifest
    records: tuple[SegmentRecord, ...]
    documents: dict[str, int]
    kept: bool = False

    @property
    def n_live(self) -> int:
        return sum(record.n_live() for record in self.records)


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
    document. The calibration of the largest store is kept and marked stale.
    Returns the datastore, open at the new snapshot. Raises CheckpointMismatchError, ExistsError listing conflicting documents,
    ConflictError where others changed the same segments of `into` meanwhile, InvalidArgumentError, NotFoundError, FormatError, DamageError,
    StorageError.
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
            opened.append(_open(target, None, stack, kept=True))
        else:
            check_vacant(target)
        for path in sources:
            store = StoreFolder(Path(path))
            if not (opened and opened[0].kept and _is_same(store, target)):
                opened.append(_open(store, names.get(str(path), store.path.absolute().stem), stack))
            elif str(path) in names:
                raise InvalidArgumentError(f"{path}: the others are merged into it, so its domains keep their names. Leave the name out.")
        if not sources or (len(opened) < 2 and opened[0].kept):
            raise InvalidArgumentError("no stores to merge were given beside the one they go into. Name one or more.")
        for one, other in combinations(opened, 2):  # each with each: not all say by which rule they were tokenized
            _check_alike(one, other)
        plan = _Plan(opened, on_conflict)
        _commit(target, opened, plan, link=link, progress=progress)
    return open_store(into)


def _is_same(a: StoreFolder, b: StoreFolder) -> bool:
    return a.path.exists() and b.path.exists() and a.path.samefile(b.path)


def _open(store: StoreFolder, default: str | None, stack: ExitStack, *, kept: bool = False) -> _Source:
    """default: what the domain `default` is called in the merged store, None for the same."""
    manifest, pin = open_snapshot(store)
    stack.callback(pin.release)
    check_features(store, manifest)
    if default == "":
        raise InvalidArgumentError(f"{store.path}: an empty name for its domain. Give one.")
    names = {"default": default} if default is not None else {}
    documents: Counter[str] = Counter()
    for domain, n in manifest.documents.items():
        documents[names.get(domain, domain)] += n
    records = tuple(replace(record, runs=_renamed(record.runs, names)) for record in manifest.segments)
    return _Source(store, manifest, records, dict(documents), kept)


def _renamed(runs: Sequence[tuple[str, int, int]], names: Mapping[str, str]) -> tuple[tuple[str, int, int], ...]:
    renamed: list[tuple[str, int, int]] = []
    for domain, first, stop in runs:
        domain = names.get(domain, domain)
        if renamed and renamed[-1][0] == domain:
            first = renamed.pop()[1]
        renamed.append((domain, first, stop))
    return tuple(renamed)


def _check_alike(a: _Source, b: _Source) -> None:
    """Raises CheckpointMismatchError naming both sides."""
    one, two = a.manifest, b.manifest
    if one.checkpoint.identity != two.checkpoint.identity:
        sides = [f"{manifest.checkpoint.name} {manifest.checkpoint.identity[:12]}" for manifest in (one, two)]
        raise _unlike(a, b, "checkpoint", *sides)
    pairs = (
        ("tokenizer", one.checkpoint.tokenizer, two.checkpoint.tokenizer),
        ("vocabulary", one.checkpoint.vocab_size, two.checkpoint.vocab_size),
        ("key layer", f"{one.key.layer} ({one.key.dim})", f"{two.key.layer} ({two.key.dim})"),
        ("rule of tokens", _without_eos(one.tokens), _without_eos(two.tokens)),
    )
    for what, left, right in pairs:
        if left != right and None not in (left, right):
            raise _unlike(a, b, what, left, right)


def _unlike(a: _Source, b: _Source, what: str, left: object, right: object) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{a.store.path} and {b.store.path} cannot be merged: {what} {left} in the first, {right} in the second. "
        "Merge stores that were built with the same model and key layer."
    )


def _without_eos(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if rule is None else {name: value for name, value in rule.items() if name != "eos"}


@dataclass(slots=True)
class _Occurrence:
    """A document of one source: its rows, by segment uuid, and its content hash."""

    source: int
    rows: list[tuple[str, int, int]] = field(default_factory=list)
    content_hash: str | None = None


class _Plan:
    """What the merged store lists. records: each segment once, by uuid, with its source; documents: by domain."""

    def __init__(self, sources: Sequence[_Source], on_conflict: str | None) -> None:
        self.records: dict[str, tuple[_Source, SegmentRecord]] = {}
        self.documents: Counter[str] = Counter()
        live: dict[str, RangeSet] = {}
        for source in sources:
            self.documents.update(source.documents)
            for record in source.records:
                uuid = record.content.uuid
                known = self.records.setdefault(uuid, (source, record))[1]
                if known.runs != record.runs:
                    raise InvalidArgumentError(
                        f"{self.records[uuid][0].store.path} and {source.store.path} share segment {uuid}, under the domains "
                        f"{_names(known)} and {_names(record)}. Give them the same domain (--domain STORE=NAME)."
                    )
                rows = subtract(as_ranges([(0, record.content.entries)]), record.dead_ranges())
                live[uuid] = as_ranges(np.concatenate((live.get(uuid, rows), rows)))
        self.repeated = 0
        losers = self._losers(sources, on_conflict)
        for uuid, (source, record) in self.records.items():
            rows = subtract(live[uuid], as_ranges(losers.get(uuid, [])))
            dead = complement(rows, record.content.entries)
            self.records[uuid] = (source, replace(record, dead=tuple((int(first), int(stop)) for first, stop in dead)))

    def _losers(self, sources: Sequence[_Source], on_conflict: str | None) -> dict[str, list[tuple[int, int]]]:
        """Rows of documents that another store's stand for."""
        losers: dict[str, list[tuple[int, int]]] = {}
        conflicts = []
        for (domain, document_id), found in _repeated(sources).items():
            keep = found[-1] if on_conflict == "keep-last" else found[0]
            if len({item.content_hash or f"unknown {n}" for n, item in enumerate(found)}) > 1 and not _all_same_rows(found):
                if on_conflict is None:
                    stores = " and ".join(str(sources[item.source].store.path) for item in found)
                    conflicts.append(f"{document_id!r} of domain {domain!r} in {stores}")
            else:
                keep = found[0]
            for item in found:
                if item is not keep:
                    self.repeated += 1
                    self.documents[domain] -= 1
                    for uuid, first, stop in set(item.rows) - set(keep.rows):
                        losers.setdefault(uuid, []).append((first, stop))
        if conflicts:
            more = f", and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
            raise ExistsError(
                f"{len(conflicts)} documents have different contents: {'; '.join(conflicts[:_SHOWN])}{more}. "
                "Choose with --on-conflict keep-first or keep-last."
            )
        return losers


def _names(record: SegmentRecord) -> str:
    return ", ".join(sorted({domain for domain, _, _ in record.runs}))


def _all_same_rows(found: Sequence[_Occurrence]) -> bool:
    return all(set(item.rows) == set(found[0].rows) for item in found)


def _repeated(sources: Sequence[_Source]) -> dict[tuple[str, str], list[_Occurrence]]:
    """Documents that come more than once, in the order of the sources. Records are read only where hashes of ids meet."""
    with ExitStack() as stack:
        opened = [_open_records(source, stack) for source in sources]
        tables = [(number, segment, segment.ids.rows(0, len(segment.ids))) for number, some in enumerate(opened) for segment in some]
        if not tables:
            return {}
        hashes = np.concatenate([table[:, 0] for _, _, table in tables])
        unique, counts = np.unique(hashes, return_counts=True)
        several = unique[counts > 1]
        found: dict[tuple[str, str], dict[tuple[int, str], _Occurrence]] = {}
        for number, segment, table in tables:
            for first_row in table[np.isin(table[:, 0], several), 1].tolist():
                if contains(segment.record.dead_ranges(), np.array([first_row]))[0]:
                    continue
                record = segment.contexts.document_at(int(first_row))
                domain = document_domain(segment.record, first_row)
                of_key = found.setdefault((domain, record.id), {})
                of_store = document_domain(_original(sources[number], segment.content.uuid), first_row)
                item = of_key.setdefault((number, of_store), _Occurrence(number))
                item.rows.append((segment.content.uuid, first_row, first_row + record.n_entries))
                item.content_hash = record.content_hash or item.content_hash
        return {key: list(items.values()) for key, items in found.items() if len(items) > 1}


def _original(source: _Source, uuid: str) -> SegmentRecord:
    return next(record for record in source.manifest.segments if record.content.uuid == uuid)


def _open_records(source: _Source, stack: ExitStack) -> list[Segment]:
    segments = [
        Segment(segment.folder, record, segment.space, segment.coarse)
        for segment, record in zip(open_segments(source.store, source.manifest), source.records, strict=True)
    ]
    for segment in segments:
        stack.callback(segment.close)
    return segments


def _commit(target: StoreFolder, sources: Sequence[_Source], plan: _Plan, *, link: bool, progress: Progress) -> None:
    largest = max(sources, key=lambda source: source.n_live)
    arguments = {
        "command": "merge",
        "sources": [[source.manifest.uuid, source.manifest.snapshot, source.documents] for source in sources if not source.kept],
        "into": [source.manifest.snapshot for source in sources if source.kept],
        "documents": dict(plan.documents),
    }
    if sources[0].kept:
        start, name = sources[0].manifest, job_name(arguments)
    else:
        _, store_uuid, name = begin_store(target.path, arguments)
        start = replace(
            largest.manifest,
            **_blank(store_uuid, largest.manifest),
            tokens=next((source.manifest.tokens for source in sources if source.manifest.tokens is not None), None),
            windows=next((source.manifest.windows for source in sources if source.manifest.windows is not None), None),
        )
    with run_job(target, name, arguments) as job:
        take_back(target, job)
        staged, replaced = _stage(target, job, sources, plan, link=link, progress=progress)
        before = sources[0].documents if sources[0].kept else {}
        gained = {domain: plan.documents[domain] - before.get(domain, 0) for domain in plan.documents}
        change = Change(
            operation=Operation(
                name="merge",
                arguments={"sources": [str(source.store.path) for source in sources if not source.kept]},
                counts={
                    "stores": len(sources),
                    "documents": sum(plan.documents.values()),
                    "repeated": plan.repeated,
                    "entries": sum(record.n_live() for _, record in plan.records.values()),
                },
            ),
            documents=gained,
            replaced=replaced,
            checked={record.content.uuid: record.dead_ranges() for record in start.segments},
            stale=True,
            **staged,
        )
        commit_change(target, start, change, job=job)


def _blank(store_uuid: str, like: Manifest) -> dict[str, Any]:
    """The fields of a manifest that has nothing in it yet; the rest is as in another store."""
    blank = blank_manifest(store_uuid, checkpoint=like.checkpoint, key=like.key, tokens=like.tokens, windows=like.windows, index=like.index)
    names = ("uuid", "snapshot", "parent", "time", "operation", "spaces", "coarse", "segments", "documents")
    return {name: getattr(blank, name) for name in names}


def _stage(
    target: StoreFolder, job: Path, sources: Sequence[_Source], plan: _Plan, *, link: bool, progress: Progress
) -> tuple[dict[str, Any], list[SegmentRecord]]:
    """Copies or links what the target does not have. Returns fields of a `Change`, and the target's records that change."""
    there = {record.content.uuid: record for record in sources[0].manifest.segments} if sources[0].kept else {}
    known = _index_ids(sources[0].manifest) if sources[0].kept else frozenset()
    segments: list[Staged[SegmentRecord]] = []
    replaced = []
    moving = [record for source, record in plan.records.values() if not source.kept]
    total = sum(file.size for record in moving for file in record.content.files)
    with progress.stage("linking" if link else "copying", total=total, unit="bytes") as stage:
        spaces: dict[str, Staged[SpaceRecord]] = {}
        coarse: dict[str, Staged[CoarseRecord]] = {}
        for source in sources:
            for item in source.manifest.spaces:
                if item.id not in known and item.id not in spaces:
                    folder = job / "index" / "spaces" / item.id
                    _take(source.store.space(item.id), folder, item.files, link=link, stage=None)
                    spaces[item.id] = Staged(folder, item)
            for lists in source.manifest.coarse:
                if lists.id not in known and lists.id not in coarse:
                    folder = job / "index" / "coarse" / lists.id
                    _take(source.store.coarse(lists.id), folder, lists.files, link=link, stage=None)
                    coarse[lists.id] = Staged(folder, lists)
        for uuid, (source, record) in plan.records.items():
            if source.kept and there[uuid] != record:
                replaced.append(there[uuid])
            if record.n_live() and (not source.kept or there[uuid] != record):
                folder = target.segment(uuid) if source.kept else job / "segments" / uuid
                if not source.kept:
                    files = (*record.content.files, _segment_file(source, record))
                    _take(source.store.segment(uuid), folder, files, link=link, stage=stage)
                segments.append(Staged(folder, record))
        folders = [item.folder for item in spaces.values()] + [item.folder for item in coarse.values()]
        _make_durable([*folders, *(item.folder for item in segments if item.folder.is_relative_to(job))])
    return {"spaces": list(spaces.values()), "coarse": list(coarse.values()), "segments": segments}, replaced


def _index_ids(manifest: Manifest) -> frozenset[str]:
    return frozenset(record.id for record in manifest.spaces) | frozenset(record.id for record in manifest.coarse)


def _segment_file(source: _Source, record: SegmentRecord) -> FileRecord:
    """A segment's own file: small, so that it is read. Raises DamageError."""
    path = source.store.segment(record.content.uuid) / SEGMENT_FILE
    raw = read_small(path)
    if hashlib.sha256(raw).hexdigest() != record.sha256:
        raise DamageError(f"{path}: its content does not match its checksum. Run `knnstore verify` on that store.")
    return FileRecord(name=path.name, size=len(raw), sha256=record.sha256)


def _take(source: Path, folder: Path, files: Sequence[FileRecord], *, link: bool, stage: Stage | None) -> None:
    """Copies or links files into a new folder; their sizes are compared, their content is not read."""
    disk.remove_tree(folder)
    disk.make_folder(folder)
    for file in files:
        path = source / file.name
        if not path.is_file() or path.is_symlink():
            raise DamageError(f"{path}: not there as a plain file. Run `knnstore verify` on that store.")
        if path.stat().st_size != file.size:
            raise DamageError(f"{path}: {path.stat().st_size} bytes, {file.size} are recorded. Run `knnstore verify` on that store.")
        if link:
            disk.link(path, folder / file.name)
        else:
            disk.copy(path, folder / file.name)
        if stage is not None:
            stage.advance(file.size)


def _make_durable(folders: Sequence[Path]) -> None:
    """Syncs what was taken. After all of it was copied: the disk writes meanwhile."""
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.stat().st_nlink == 1:  # a link's content was synced when it was made
                adopt(file)
        disk.sync_folder(folder)
    for parent in sorted({folder.parent for folder in folders}):
        disk.sync_folder(parent)
