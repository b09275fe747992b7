"""Datastores beside each other: whether they can be one, which documents several have, and which of these stay."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from knnstore.errors import CheckpointMismatchError, ExistsError, InvalidArgumentError
from knnstore.filters import document_domain, live_with_ids
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.commits import check_features
from knnstore.storage.manifest import Manifest, SegmentRecord
from knnstore.storage.rows import RangeSet, as_ranges, complement, subtract
from knnstore.storage.segment import Segment, open_segments

__all__ = ["CHOICES", "Plan", "Source", "check_alike", "open_source"]

CHOICES = ("keep-first", "keep-last")
_SHOWN = 20  # conflicting documents named in an error


@dataclass(frozen=True)
class Source:
    """A store to be merged, its domains renamed. kept: it is the store that the others are merged into."""

    store: StoreFolder
    manifest: Manifest
    records: tuple[SegmentRecord, ...]
    documents: dict[str, int]
    kept: bool = False

    @property
    def n_live(self) -> int:
        return sum(record.n_live() for record in self.records)


def open_source(store: StoreFolder, name: str | None, stack: ExitStack, *, kept: bool = False) -> Source:
    """A store to be merged, open as long as the stack is. name: what its domain `default` gets, None: the store's file name.

    kept: the others are merged into it, and its domains keep their names. Raises NotFoundError, FormatError, InvalidArgumentError.
    """
    manifest, pin = open_snapshot(store)
    stack.callback(pin.release)
    check_features(store, manifest)
    if name is not None and "default" not in manifest.documents:
        raise InvalidArgumentError(
            f"{store.path}: it has no domain 'default' that would be called {name!r}, only {', '.join(manifest.domains()) or 'none'}; "
            "these keep their names. Leave the name out."
        )
    if name == "":
        raise InvalidArgumentError(f"{store.path}: an empty name for its domain. Give one.")
    names = {} if kept else {"default": name or store.path.absolute().stem}
    documents: Counter[str] = Counter()
    for domain, n in manifest.documents.items():
        documents[names.get(domain, domain)] += n
    records = tuple(replace(record, runs=_renamed(record.runs, names)) for record in manifest.segments)
    return Source(store, manifest, records, dict(documents), kept)


def _renamed(runs: Sequence[tuple[str, int, int]], names: Mapping[str, str]) -> tuple[tuple[str, int, int], ...]:
    renamed: list[tuple[str, int, int]] = []
    for domain, first, stop in runs:
        domain = names.get(domain, domain)
        if renamed and renamed[-1][0] == domain:
            first = renamed.pop()[1]
        renamed.append((domain, first, stop))
    return tuple(renamed)


def check_alike(sources: Sequence[Source]) -> None:
    """Raises CheckpointMismatchError, naming both sides, unless all are of one model and key layer."""
    for a, b in combinations(sources, 2):  # each with each: not all say by which rule they were tokenized
        _check_pair(a, b)


def _check_pair(a: Source, b: Source) -> None:
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


def _unlike(a: Source, b: Source, what: str, left: object, right: object) -> CheckpointMismatchError:
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


class Plan:
    """What the merged store lists. records: each segment once, by uuid, with its source, and what of it counts; documents: by domain.

    A segment that several stores share counts where it does in any of them. Raises ExistsError listing documents of different contents.
    """

    def __init__(self, sources: Sequence[Source], on_conflict: str | None) -> None:
        self._sources = sources
        self.records: dict[str, tuple[Source, SegmentRecord]] = {}
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

    def is_there(self) -> bool:
        """Whether the store that the others are merged into has all of it already."""
        there = {record.content.uuid: record for record in self._sources[0].records}
        return self._sources[0].kept and there == {uuid: record for uuid, (_, record) in self.records.items() if record.n_live()}

    def _losers(self, sources: Sequence[Source], on_conflict: str | None) -> dict[str, list[tuple[int, int]]]:
        """Rows of documents that another store's stand for."""
        losers: dict[str, list[tuple[int, int]]] = {}
        conflicts = []
        for (domain, document_id), found in _repeated(sources).items():
            keep = found[-1] if on_conflict == "keep-last" else found[0]
            if len({item.content_hash or f"unknown {n}" for n, item in enumerate(found)}) > 1:
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


def _repeated(sources: Sequence[Source]) -> dict[tuple[str, str], list[_Occurrence]]:
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
        for number, segment, _ in tables:
            original = _original(sources[number], segment.content.uuid)
            for domain, record in live_with_ids(segment, several):
                of_store = document_domain(original, record.first_row)
                of_key = found.setdefault((domain, record.id), {})
                item = of_key.setdefault((number, of_store), _Occurrence(number))
                item.rows.append((segment.content.uuid, record.first_row, record.first_row + record.n_entries))
                item.content_hash = record.content_hash or item.content_hash
        return {key: list(items.values()) for key, items in found.items() if len(items) > 1}


def _original(source: Source, uuid: str) -> SegmentRecord:
    return next(record for record in source.manifest.segments if record.content.uuid == uuid)


def _open_records(source: Source, stack: ExitStack) -> list[Segment]:
    segments = [
        Segment(segment.folder, record, segment.space, segment.coarse)
        for segment, record in zip(open_segments(source.store, source.manifest), source.records, strict=True)
    ]
    for segment in segments:
        stack.callback(segment.close)
    return segments
