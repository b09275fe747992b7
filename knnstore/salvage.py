"""What of a damaged datastore is sound: what `repair` goes on from, and which documents it loses."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError
from knnstore.format import COARSE, CONTEXTS_FILE, CURRENT_FILE, LOCK_FILE, MANIFESTS, SEGMENTS, SPACES, STORE_FILE, TAGS
from knnstore.quarantine import LostDocument
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.contexts import ContextsReader, id_hash
from knnstore.storage.files import sha256_file
from knnstore.storage.manifest import Manifest, SegmentRecord
from knnstore.storage.manifest_json import parse_manifest
from knnstore.storage.parse import read_small
from knnstore.storage.rows import as_ranges
from knnstore.storage.segment import read_segment_content
from knnstore.verification.contexts import DocumentRows
from knnstore.verification.datastore import Examination, Problem
from knnstore.verification.documents import LiveRecords, Names, domain_seed, is_whole, live_records, misfits
from knnstore.verification.files import FindingError, check_plain

__all__ = ["Damage", "Salvage", "documents_beside", "find_damage", "salvage"]

Rows = Mapping[str, DocumentRows]  # by uuid of the segment


@dataclass(slots=True)
class Damage:
    """The problems of a store by what they are of.

    identity, current, lock: whether that file is damaged. folders: those of the store's own folders that are none. manifests: numbers of
    those that cannot be believed; contradicted: of those that only say wrong things of their documents. parts: folders of spaces,
    coarse quantizers and segments. tags: their files.
    """

    identity: bool = False
    current: bool = False
    lock: bool = False
    folders: set[Path] = field(default_factory=set)
    manifests: set[int] = field(default_factory=set)
    contradicted: set[int] = field(default_factory=set)
    parts: set[Path] = field(default_factory=set)
    tags: set[Path] = field(default_factory=set)


def find_damage(store: StoreFolder, problems: Iterable[Problem]) -> Damage:
    """Sorts problems by what is to be done about them."""
    damage = Damage()
    for problem in problems:
        top, *below = problem.path.split("/")
        if top == STORE_FILE:
            damage.identity = True
        elif top == CURRENT_FILE:
            damage.current = True
        elif top == LOCK_FILE:
            damage.lock = True
        elif not below:
            damage.folders.add(store.path / top)
        elif top == MANIFESTS:
            # What a manifest says of documents can be found out again; what else is wrong with one makes it worthless.
            kinds = damage.contradicted if problem.kind == "content" else damage.manifests
            kinds.add(int(below[0].removesuffix(".json")))
        elif top == TAGS:
            damage.tags.add(store.path / top / below[0])
        elif top in (SPACES, COARSE, SEGMENTS):
            damage.parts.add(store.path / top / below[0])
    damage.contradicted -= damage.manifests
    return damage


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Salvage:
    """What a repair goes on from: a manifest, and of its segments those that are sound, with the rows that are dead in them now.

    documents: how many each domain has left. keys, hashes: u64, of domain and id, and of the id, of each record left. lost: documents that
    the newest snapshot has besides, by name. unnamed: by domain, how many more, whose names cannot be read.
    """

    base: Manifest
    segments: tuple[SegmentRecord, ...]
    documents: dict[str, int]
    keys: NDArray[np.uint64]
    hashes: NDArray[np.uint64]
    lost: tuple[LostDocument, ...]
    unnamed: dict[str, int]

    def changes(self) -> bool:
        """Whether a snapshot of it would be another than its base."""
        return self.segments != self.base.segments or self.documents != {domain: n for domain, n in self.base.documents.items() if n}

    def has(self, document: LostDocument) -> bool:
        """Whether a document is there after all; where its domain is not known, whether its id is."""
        wanted = id_hash(document.id)
        if document.domain is None:
            return bool((self.hashes == np.uint64(wanted)).any())
        return bool((self.keys == np.uint64(wanted ^ domain_seed(document.domain))).any())


def salvage(store: StoreFolder, examination: Examination, damage: Damage) -> Salvage:
    """Goes through the snapshots that are whole, newest first, to the first of which something is left.

    Raises DamageError where nothing is left of any.
    """
    newest: Manifest | None = None
    for manifest in _whole_manifests(store, examination, damage):
        newest = newest or manifest
        kept = [segment for segment in manifest.segments if _is_sound(store, segment, examination, damage)]
        spaces = [space for space in manifest.spaces if store.space(space.id) not in damage.parts]
        if not kept and (manifest.segments or len(spaces) < min(1, len(manifest.spaces))):
            continue
        found = _salvage(store, newest, manifest, kept, examination.documents)
        if found.segments or not manifest.segments:
            return found
    what = "no document of any snapshot is whole" if newest is not None else "no manifest is whole"
    raise DamageError(
        f"{store.path}: nothing to go on from: {what}. Nothing was changed. Bring files back from a copy (`knnstore verify` names them), "
        "or make the datastore again."
    )


def _whole_manifests(store: StoreFolder, examination: Examination, damage: Damage) -> Iterator[Manifest]:
    newest = examination.catalog.newest
    for number in examination.catalog.sound:
        if number not in damage.manifests:
            path = store.manifest(number)
            yield newest if newest is not None and newest.snapshot == number else parse_manifest(read_small(path), str(path))


def _is_sound(store: StoreFolder, segment: SegmentRecord, examination: Examination, damage: Damage) -> bool:
    """Whether nothing is wrong with a segment, the space and lists it needs, and where its domains begin."""
    content = segment.content
    folders = {store.segment(content.uuid), store.space(content.space)}
    if content.coarse is not None:
        folders.add(store.coarse(content.coarse))
    rows = examination.documents.get(content.uuid)
    if folders & damage.parts or rows is None:
        return False
    return bool(np.isin([first for _, first, _ in segment.runs], rows.first_rows).all())


def _salvage(store: StoreFolder, newest: Manifest, base: Manifest, kept: Sequence[SegmentRecord], rows: Rows) -> Salvage:
    segments = _with_whole_documents(store, [_with_whole_dead(segment, rows) for segment in kept], rows)
    live = live_records(segments, rows)
    readable = [segment for segment in newest.segments if segment.content.uuid in rows]
    of_newest = live_records(readable, rows)
    lost: Counter[tuple[str, str]] = Counter()
    with Names(store, readable, rows) as names:
        for place in np.flatnonzero(~np.isin(of_newest.keys, live.keys)).tolist():
            name = names(int(of_newest.segments[place]), int(of_newest.rows[place]))
            lost[of_newest.names[of_newest.domains[place]], name] += int(of_newest.n_entries[place])
    unnamed = {}
    if len(readable) < len(newest.segments):
        named = np.bincount(of_newest.domains[np.unique(of_newest.keys, return_index=True)[1]], minlength=len(of_newest.names))
        known = dict(zip(of_newest.names, named.tolist(), strict=True))
        unnamed = {domain: n - known.get(domain, 0) for domain, n in newest.documents.items() if n > known.get(domain, 0)}
    hashes = [rows[segment.content.uuid].hashes[live.rows[live.segments == number]] for number, segment in enumerate(segments)]
    return Salvage(
        base=base,
        segments=segments,
        documents=live.counts(),
        keys=live.keys,
        hashes=np.concatenate([np.zeros(0, np.uint64), *hashes]),
        lost=tuple(LostDocument(domain=domain, id=name, entries=n) for (domain, name), n in sorted(lost.items())),
        unnamed=unnamed,
    )


def _with_whole_dead(segment: SegmentRecord, rows: Rows) -> SegmentRecord:
    """A segment in which a document some of whose rows are dead is dead."""
    of_segment, dead = rows[segment.content.uuid], segment.dead_ranges()
    edges = np.append(of_segment.first_rows, segment.content.entries)
    lengths = np.concatenate(([0], np.cumsum(dead[:, 1] - dead[:, 0])))
    begun = np.searchsorted(dead[:, 0], edges, side="right")  # ranges that begin at or before each edge
    beyond = np.where(begun > 0, np.append(dead[:, 1], 0)[begun - 1] - edges, 0)  # rows of the last of these that are after it
    touched = np.diff(lengths[begun] - np.maximum(beyond, 0)) > 0
    return _with_dead(segment, list(zip(edges[:-1][touched].tolist(), edges[1:][touched].tolist(), strict=True)))


def _with_whole_documents(store: StoreFolder, segments: Sequence[SegmentRecord], rows: Rows) -> tuple[SegmentRecord, ...]:
    """Segments in which documents are dead that are not there with all of their parts, and of those that are there twice all but one copy;
    without the segments in which all are dead."""
    live = live_records(segments, rows)
    dying: dict[int, list[tuple[int, int]]] = {}
    with Names(store, segments, rows) as names:
        for _, places in misfits(live, names):
            for place in np.setdiff1d(places, _one_copy(live, places)).tolist():
                number = int(live.segments[place])
                first = int(rows[segments[number].content.uuid].first_rows[live.rows[place]])
                dying.setdefault(number, []).append((first, first + int(live.n_entries[place])))
    changed = (_with_dead(segment, dying.get(number, [])) for number, segment in enumerate(segments))
    return tuple(segment for segment in changed if segment.n_live())


def _one_copy(live: LiveRecords, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of the records of a document those of one whole copy, the one that was added last; none where there is none."""
    for order in (places, places[::-1]):  # a later record takes the place of one before it
        copy = np.array(list(dict(zip(live.parts[order].tolist(), order.tolist(), strict=True)).values()))
        if is_whole(live, copy):
            return copy
    return places[:0]


def _with_dead(segment: SegmentRecord, more: Sequence[tuple[int, int]]) -> SegmentRecord:
    ranges = as_ranges([*segment.dead, *more])
    return replace(segment, dead=tuple((int(first), int(stop)) for first, stop in ranges)) if more else segment


def documents_beside(folders: Iterable[Path], hashes: NDArray[np.uint64]) -> Iterator[LostDocument]:
    """Documents of segments that only a damaged manifest can have named, where they can be read and their ids are not among these."""
    known = np.unique(hashes)
    for folder in folders:
        with contextlib.suppress(DamageError, FindingError, OSError):
            check_plain(folder / CONTEXTS_FILE)
            content, _ = read_segment_content(folder)
            recorded = next((file.sha256 for file in content.files if file.name == CONTEXTS_FILE), None)
            if sha256_file(folder / CONTEXTS_FILE)[1] != recorded:  # a damaged page of LMDB can end the process
                continue
            reader = ContextsReader(folder / CONTEXTS_FILE, n_rows=content.entries)
            try:
                entries: Counter[str] = Counter()
                for record in reader.documents():
                    at = int(np.searchsorted(known, wanted := np.uint64(id_hash(record.id))))
                    if at == len(known) or known[at] != wanted:
                        entries[record.id] += record.n_entries
            finally:
                reader.close()
            yield from (LostDocument(domain=None, id=name, entries=n) for name, n in sorted(entries.items()))
