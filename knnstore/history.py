"""A datastore's past: names for snapshots, the way back to one, and what came and went between two."""

import hashlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from knnstore.errors import DamageError
from knnstore.filters import document_domain
from knnstore.format import SEGMENT_FILE
from knnstore.inspection import domain_counts
from knnstore.storage.catalog import StoreFolder, folders_of, now, open_snapshot, read_identity
from knnstore.storage.commits import check_features, commit, commit_over_damage
from knnstore.storage.manifest import Manifest, Operation, SegmentRecord
from knnstore.storage.parse import read_small
from knnstore.storage.rows import RangeSet, as_ranges, complement, contains, intersect, subtract
from knnstore.storage.segment import Segment
from knnstore.storage.space import raw_space
from knnstore.storage.tags import Tag, check_name, list_tags, remove_tag, write_tag

__all__ = ["Difference", "DocumentDifference", "DomainDifference", "diff", "restore", "tag", "tags", "untag"]

_COMMAND = "restore"


def tag(path: str | Path, name: str, snapshot: int | str | None = None, *, move: bool = False) -> Tag:
    """Gives a snapshot (None: the newest) a name, by which it is opened (`tag:NAME`) and which no gc takes away.

    name: 1 to 100 letters, digits, dots, underscores and hyphens, no dot at the beginning. move: also where another snapshot has it.
    Raises ExistsError where it is taken, NotFoundError, InvalidArgumentError, DamageError, StorageError.
    """
    check_name(name)
    store = StoreFolder(Path(path))
    manifest, pin = open_snapshot(store, snapshot)
    try:
        made = Tag(snapshot=manifest.snapshot, sha256=_sha256(store, manifest.snapshot), time=now())
        write_tag(store, name, made, move=move)
    finally:
        pin.release()
    return made


def untag(path: str | Path, name: str) -> None:
    """Takes a tag away, also a damaged one; its snapshot stays until a gc. Raises NotFoundError, InvalidArgumentError, StorageError."""
    check_name(name)
    store = StoreFolder(Path(path))
    read_identity(store)
    remove_tag(store, name)


def tags(path: str | Path) -> dict[str, Tag]:
    """The tags of a datastore by name: snapshot, sha256 of its manifest, time. Raises NotFoundError, DamageError naming a damaged one."""
    store = StoreFolder(Path(path))
    read_identity(store)
    return list_tags(store)


def restore(path: str | Path, snapshot: int | str) -> Manifest:
    """Commits a new snapshot with the content of an earlier one; those between stay. No file is copied or read.

    snapshot: a number, or `tag:NAME`. Also where CURRENT or the newest manifest is damaged: then the new number is above all others, and
    nothing is removed. Raises DamageError where a file of the earlier snapshot is missing or has another size, NotFoundError, FormatError,
    StorageError.
    """
    store = StoreFolder(Path(path))
    earlier, pin = open_snapshot(store, snapshot)
    try:
        check_features(store, earlier)
        _check_files(store, earlier)

        def build(number: int, parent: tuple[int, str] | None, current: Manifest | None) -> Manifest:
            counts = {"documents": sum(earlier.documents.values()), "entries": sum(record.n_live() for record in earlier.segments)}
            operation = Operation(name=_COMMAND, arguments={"restored": earlier.snapshot}, counts=counts)
            return replace(earlier, snapshot=number, parent=parent, time=now(), operation=operation)

        try:
            return commit(store, build)
        except DamageError:
            return commit_over_damage(store, build, (earlier.snapshot, _sha256(store, earlier.snapshot)))
    finally:
        pin.release()


def _sha256(store: StoreFolder, number: int) -> str:
    """sha256 of a manifest that is held."""
    return hashlib.sha256(read_small(store.manifest(number))).hexdigest()


def _check_files(store: StoreFolder, manifest: Manifest) -> None:
    """Raises DamageError for the first file of a snapshot that is missing or has another size."""
    for folder, files in folders_of(store, manifest):
        for file in files:
            if _plain_size(folder / file.name) != file.size:
                raise _missing(store, manifest, folder / file.name)
    for record in manifest.segments:
        at = store.segment(record.content.uuid) / SEGMENT_FILE
        if _plain_size(at) is None:
            raise _missing(store, manifest, at)


def _missing(store: StoreFolder, manifest: Manifest, path: Path) -> DamageError:
    return DamageError(
        f"{path}: not there, or not of the size recorded: snapshot {manifest.snapshot} cannot be restored. Nothing was changed; "
        "`knnstore verify` says what is whole."
    )


def _plain_size(path: Path) -> int | None:
    """Bytes of a plain file, None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentDifference:
    """A document that came, went or has other content. entries: in the snapshot it came to, or went from, or has the other content in."""

    id: str
    domain: str
    entries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainDifference:
    """What a domain has in the one snapshot and in the other: (before, after)."""

    documents: tuple[int, int]
    entries: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Between two snapshots. before, after: their numbers. came, went, changed: documents by domain and id. domains: all of either."""

    before: int
    after: int
    came: tuple[DocumentDifference, ...]
    went: tuple[DocumentDifference, ...]
    changed: tuple[DocumentDifference, ...]
    domains: dict[str, DomainDifference]


def diff(path: str | Path, before: int | str, after: int | str | None = None) -> Difference:
    """The documents that came, went or changed from one snapshot to another (None: the newest). Snapshots: numbers or `tag:NAME`.

    A document is the same where its domain, id and content are: how its entries are stored does not matter. Of segments that both have
    only the documents that died, or went to another domain, are read. Memory: some hundred bytes for each document that is read.
    Raises NotFoundError, DamageError, InvalidArgumentError.
    """
    store = StoreFolder(Path(path))
    first, first_pin = open_snapshot(store, before)
    try:
        second, second_pin = open_snapshot(store, after)
        try:
            return _difference(store, first, second)
        finally:
            second_pin.release()
    finally:
        first_pin.release()


_Key = tuple[str, str]  # domain and id
_Content = tuple[str | None, int]  # hash and entries


def _difference(store: StoreFolder, before: Manifest, after: Manifest) -> Difference:
    old, new = _contents(store, before, after), _contents(store, after, before)

    def listed(keys: Iterable[_Key], of: Mapping[_Key, _Content]) -> tuple[DocumentDifference, ...]:
        return tuple(DocumentDifference(id=name, domain=domain, entries=of[domain, name][1]) for domain, name in sorted(keys))

    entries = [domain_counts(manifest.segments) for manifest in (before, after)]
    return Difference(
        before=before.snapshot,
        after=after.snapshot,
        came=listed(new.keys() - old.keys(), new),
        went=listed(old.keys() - new.keys(), old),
        changed=listed((key for key in new.keys() & old.keys() if old[key] != new[key]), new),
        domains={
            domain: DomainDifference(
                documents=(before.documents.get(domain, 0), after.documents.get(domain, 0)),
                entries=(entries[0].get(domain, 0), entries[1].get(domain, 0)),
            )
            for domain in sorted({*before.documents, *after.documents})
        },
    )


def _contents(store: StoreFolder, manifest: Manifest, other: Manifest) -> dict[_Key, _Content]:
    """Live documents of a snapshot, without the rows that the other has too, alive and in the same domain.

    What is left of a document in parts is the same on both sides unless the document changed.
    """
    of_other = {record.content.uuid: record for record in other.segments}
    space = raw_space(manifest.key.dim)  # any: only documents are read
    found: dict[_Key, _Content] = {}
    for record in manifest.segments:
        rows = _own_rows(record, of_other.get(record.content.uuid))
        if not len(rows):
            continue
        segment = Segment(store.segment(record.content.uuid), record, space, None)
        try:
            first_rows = segment.contexts.first_rows
            for row in first_rows[contains(rows, first_rows)].tolist():
                document = segment.contexts.document_at(row)
                key = document_domain(record, row), document.id
                content_hash, entries = found.get(key, (None, 0))
                found[key] = (document.content_hash or content_hash, entries + document.n_entries)
        finally:
            segment.close()
    return found


def _own_rows(record: SegmentRecord, other: SegmentRecord | None) -> RangeSet:
    """Live rows of a segment that are not alive, or are in another domain, in the other snapshot."""
    live = complement(record.dead_ranges(), record.content.entries)
    if other is None:
        return live
    others = complement(other.dead_ranges(), record.content.entries)
    domains = {domain for domain, _, _ in record.runs}
    own = [subtract(intersect(live, record.domain_ranges(name)), intersect(others, other.domain_ranges(name))) for name in domains]
    return as_ranges(np.concatenate(own))
