"""Documents taken out of a datastore: at once by dead rows, and with `purge` by writing what is left of their segments again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnstore.build import staged_segment
from knnstore.changes import Change, Staged, commit_change
from knnstore.errors import ConflictError, InvalidArgumentError, NotFoundError
from knnstore.filters import Where, document_domain, live_documents_of, live_records, matches
from knnstore.growth import Ground, without_rows
from knnstore.joining import join_segments
from knnstore.progress import SILENT, Progress
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.coarse import is_listed
from knnstore.storage.contexts import DocumentRecord
from knnstore.storage.jobs import run_attempt
from knnstore.storage.manifest import Operation, SegmentRecord
from knnstore.storage.manifest_json import canonical
from knnstore.storage.rows import RangeSet, as_ranges, contains, count, subtract
from knnstore.storage.segment import Segment

__all__ = ["Receipt", "delete"]

_TRIES = 20  # commits of others that may come between
_NAMED = 100  # ids that a manifest keeps of a deletion
_COMMAND = "delete"


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a deletion took out.

    documents: how many of each domain. entries: their rows. bytes: of the store that were theirs (exact where whole segments went, else
    by their share of the entries). dropped, rewritten: segments. snapshot: the one that is without them (the current one of a dry run).
    """

    documents: dict[str, int]
    entries: int
    bytes: int
    dropped: int
    rewritten: int
    purged: bool
    snapshot: int


@dataclass(frozen=True, slots=True)
class _Selection:
    """Rows that go, by segment uuid, the documents they are by domain, and their ids (None: all of the domains)."""

    rows: dict[str, RangeSet]
    documents: dict[str, int]
    ids: frozenset[tuple[str, str]] | None

    def has(self, domain: str, document_id: str) -> bool:
        return domain in self.documents if self.ids is None else (domain, document_id) in self.ids


def delete(
    path: str | Path,
    documents: str | Sequence[str] | None = None,
    *,
    domain: str | None = None,
    where: Where | None = None,
    purge: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Receipt:
    """Takes documents out of a datastore, in one commit: those with these ids, or of a domain, or whose metadata has these values.

    domain: with documents or where, only those of this domain. purge: writes the touched segments again without them, so that after
    `gc(keep=1)` no byte of them is left; without, their rows are dead and stay until `compact`. Costs the manifest at once; with
    purge the touched segments. The manifest says what was named; with purge only how many, since ids and metadata are to go too.
    Raises NotFoundError for a document or domain that is not there, InvalidArgumentError where it is not said which, or an id is in
    several domains, ConflictError where others keep changing the same segments, FormatError, DamageError, StorageError.
    """
    if documents is not None:
        documents = [documents] if isinstance(documents, str) else list(documents)
    if documents is None and domain is None and where is None:
        raise InvalidArgumentError("nothing to delete was named. Give documents, a domain, or where.")
    if documents is not None and where is not None:
        raise InvalidArgumentError("documents and where: give one of them.")
    for name, given in (("documents", documents), ("where", where)):
        if given is not None and not given:  # not the same as leaving it out, which with a domain means all of it
            raise InvalidArgumentError(f"{name}: empty. Name what to delete, or leave it out to delete a whole domain.")
    try:
        canonical(dict(where or {}))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"where: {error}. Metadata is JSON; compare it with strings, numbers, lists.") from error
    store = StoreFolder(Path(path))
    for attempt in range(_TRIES):
        base, pin = open_snapshot(store)
        ground = Ground.of(store, base)
        try:
            selection = _select(ground, documents, domain, where)
            if dry_run or not selection.rows:
                return _receipt(ground, selection, rewritten=0, purged=False, snapshot=base.snapshot)
            return _Deletion(store, ground, selection, progress).commit(purge, documents, domain, where)
        except ConflictError:
            if attempt == _TRIES - 1:
                raise
        finally:
            ground.close()
            pin.release()
    raise AssertionError("the last attempt returns or raises")


def _select(ground: Ground, documents: Sequence[str] | None, domain: str | None, where: Where | None) -> _Selection:
    if domain is not None and domain not in ground.manifest.documents:
        raise NotFoundError(f"domain {domain!r}: not in this datastore. It has {', '.join(ground.manifest.domains()) or 'none'}.")
    if documents is None and where is None:
        assert domain is not None, "said by delete"
        rows = {record.content.uuid: subtract(record.domain_ranges(domain), record.dead_ranges()) for record in ground.manifest.segments}
        return _Selection({uuid: r for uuid, r in rows.items() if len(r)}, {domain: ground.manifest.documents[domain]}, None)
    found: list[tuple[Segment, str, DocumentRecord]] = []
    for document_id in documents or ():
        records = [(ground.segments[number], d, r) for number, d, r in live_records(ground.segments, document_id) if domain in (None, d)]
        domains = sorted({of_domain for _, of_domain, _ in records})
        if not records:
            at = "" if domain is None else f" in domain {domain!r}"
            raise NotFoundError(f"document {document_id!r}: not in this datastore{at}. `knnstore info --documents` lists them.")
        if len(domains) > 1:
            raise InvalidArgumentError(f"document {document_id!r}: in domains {', '.join(domains)}. Say which with domain= (--domain).")
        found += records
    for segment in ground.segments if where is not None else ():
        for of_domain, record in live_documents_of(segment):
            if domain in (None, of_domain) and matches(record.metadata, where or {}):
                found.append((segment, of_domain, record))
    pairs: dict[str, list[tuple[int, int]]] = {}
    for segment, _, record in found:
        pairs.setdefault(segment.content.uuid, []).append((record.first_row, record.first_row + record.n_entries))
    ids = frozenset((of_domain, record.id) for _, of_domain, record in found)
    return _Selection({uuid: as_ranges(some) for uuid, some in pairs.items()}, dict(Counter(of_domain for of_domain, _ in ids)), ids)


class _Deletion:
    def __init__(self, store: StoreFolder, ground: Ground, selection: _Selection, progress: Progress) -> None:
        self._store, self._ground, self._selection, self._progress = store, ground, selection, progress

    def commit(self, purge: bool, documents: Sequence[str] | None, domain: str | None, where: Where | None) -> Receipt:
        arguments: dict[str, Any] = {"domain": domain, "purge": purge}
        if not purge:  # then what was named is of the documents that no file may have after a gc
            arguments |= {"documents": list(documents or ())[:_NAMED], "where": dict(where or {})}
        selection = self._selection
        counts = {"documents": sum(selection.documents.values()), "entries": sum(map(count, selection.rows.values()))}
        operation = Operation(name=_COMMAND, arguments=arguments, counts=counts)
        if not purge:
            change = Change(operation=operation, dead=selection.rows, gone=selection.documents)
            made = commit_change(self._store, self._ground.manifest, change)
            return _receipt(self._ground, selection, rewritten=0, purged=False, snapshot=made.snapshot)
        with run_attempt(self._store, _COMMAND) as job:
            staged, replaced = self._rewrite(job)
            rewritten = {record.content.uuid for record in replaced}
            change = Change(
                operation=operation,
                segments=staged,
                replaced=replaced,
                dead={uuid: rows for uuid, rows in selection.rows.items() if uuid not in rewritten},
                gone=selection.documents,
            )
            made = commit_change(self._store, self._ground.manifest, change, job=job)
        return _receipt(self._ground, selection, rewritten=len(staged), purged=True, snapshot=made.snapshot)

    def _rewrite(self, job: Path) -> tuple[list[Staged[SegmentRecord]], list[SegmentRecord]]:
        """What is left of each touched segment, and of those that have dead rows of the same documents from before."""
        staged, replaced = [], []
        touched = [segment for segment in self._ground.segments if self._is_touched(segment)]
        left = [without_rows(segment, self._selection.rows.get(segment.content.uuid)) for segment in touched]
        total = sum(segment.record.n_live() for segment in left)
        with self._progress.stage("rewriting", total=total, unit="entries") as stage:
            for segment in left:
                n_live = segment.record.n_live()
                if not n_live:
                    continue  # it is dropped whole
                coarse = segment.coarse if is_listed(n_live, segment.coarse) else None
                keys = segment.content.keys
                joined = join_segments(job / "segments", [segment], space=segment.space, coarse=coarse, keys=keys, advance=stage.advance)
                staged.append(staged_segment(joined))
                replaced.append(next(r for r in self._ground.manifest.segments if r.content.uuid == segment.content.uuid))
        return staged, replaced

    def _is_touched(self, segment: Segment) -> bool:
        if segment.content.uuid in self._selection.rows:
            return True
        if not segment.record.dead:
            return False
        rows = segment.contexts.first_rows
        return any(
            self._selection.has(document_domain(segment.record, row), segment.contexts.document_at(row).id)
            for row in rows[contains(segment.record.dead_ranges(), rows)].tolist()
        )


def _receipt(ground: Ground, selection: _Selection, *, rewritten: int, purged: bool, snapshot: int) -> Receipt:
    n_bytes, dropped = 0.0, 0
    for record in ground.manifest.segments:
        rows = selection.rows.get(record.content.uuid)
        if rows is None:
            continue
        whole = count(rows) == record.n_live()
        size = sum(file.size for file in record.content.files)
        n_bytes += size if whole else size * count(rows) / record.content.entries
        dropped += whole
    return Receipt(
        documents=selection.documents,
        entries=sum(map(count, selection.rows.values())),
        bytes=round(n_bytes),
        dropped=dropped,
        rewritten=rewritten,
        purged=purged,
        snapshot=snapshot,
    )
