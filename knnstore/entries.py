"""Entries that come from elsewhere (own extractors, other kNN-LM datastores) → a datastore, without any model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from knnstore.build import (
    DEFAULT_K,
    DEFAULT_NPROBE,
    ENCODE_ROWS,
    IndexOptions,
    StagedSegment,
    begin_store,
    commit_new_store,
    encode_runs,
    sample_rows,
    save_index,
    take_back,
    train_index,
)
from knnstore.errors import InvalidArgumentError
from knnstore.progress import SILENT, Progress
from knnstore.search import check_keys
from knnstore.storage.arrays import map_file
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.coarse import Coarse
from knnstore.storage.files import ArrayFile, disk
from knnstore.storage.jobs import run_job
from knnstore.storage.manifest import Manifest, Operation
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment
from knnstore.storage.space import Space

__all__ = ["EntryDocument", "create_from_entries"]

Keys = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryDocument:
    """A document, or the next stretch of the one before (same id and domain), in a batch of entries.

    n_entries: how many of the batch's entries are its. text: its decoded text as far as these entries go, with starts and ends
    (n_entries,) the character offsets of each value in the whole document; None without text.
    """

    id: str
    n_entries: int
    domain: str = "default"
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    starts: NDArray[np.int64] | None = None
    ends: NDArray[np.int64] | None = None


def create_from_entries(
    path: str | Path,
    batches: Iterable[tuple[Any, Any, Sequence[EntryDocument]]],
    *,
    checkpoint: Checkpoint,
    dim: int,
    vocab_size: int,
    key_layer: str = "external",
    options: IndexOptions | None = None,
    training_keys: Any | None = None,
    expected_entries: int | None = None,
    progress: Progress = SILENT,
) -> Manifest:
    """A new datastore from entries that come from elsewhere, without any model.

    batches: of keys (n, dim) numbers, values (n,) token ids, and the documents they belong to, in order. training_keys: (m, dim)
    keys to train on, with expected_entries: how many entries will come; without, all keys are spooled to the store's disk
    first (4 * dim bytes an entry, removed at the end) and a random sample of all is trained on.
    Returns the manifest of snapshot 1. Raises ExistsError, InvalidArgumentError, StorageError.
    """
    options = options or IndexOptions()
    if not 1 <= dim <= 1 << 16:
        raise InvalidArgumentError(f"dim {dim}: use 1 to {1 << 16}.")
    if (training_keys is None) != (expected_entries is None):
        raise InvalidArgumentError("training_keys and expected_entries go together: give both or none.")
    arguments = {"command": "create_from_entries", "dim": dim, "checkpoint": asdict(checkpoint), **asdict(options)}
    store, store_uuid, name = begin_store(path, arguments)
    with run_job(store, name, arguments) as job:
        take_back(store, job)
        for leftover in ("segments", "index", "keys.spool"):
            disk.remove_tree(job / leftover)  # entries cannot be asked for again: such a job begins anew
        trained = None
        if training_keys is not None and expected_entries is not None:
            trained = train_index(check_keys(training_keys, dim), expected_entries, options)
        intake = _Intake(job, dim=dim, vocab_size=vocab_size, options=options, trained=trained)
        with progress.stage("reading entries", total=expected_entries, unit="entries") as stage:
            for keys, values, documents in batches:
                stage.advance(intake.take(check_keys(keys, dim) if len(keys) else np.zeros((0, dim), np.float32), values, documents))
        intake.end()
        if not intake.n_entries:
            raise InvalidArgumentError("no entries were given; a datastore has at least one.")
        space, coarse = intake.encode_spool(progress) if trained is None else trained
        save_index(job, space, coarse)
        staged = intake.finish(space, coarse)
        return commit_new_store(
            store,
            job,
            staged,
            space,
            coarse,
            store_uuid=store_uuid,
            operation=Operation(
                name="create_from_entries",
                arguments={"codec": options.codec},
                counts={"documents": sum(intake.documents.values()), "entries": intake.n_entries},
            ),
            checkpoint=checkpoint,
            key=KeyLayer(layer=key_layer, dim=dim),
            tokens=None,
            documents=intake.documents,
            calibration=None,
            k=DEFAULT_K,
            nprobe=DEFAULT_NPROBE,
        )


@dataclass(slots=True)
class _Draft:
    """A segment whose documents are being written."""

    folder: Path
    documents: DocumentsWriter
    codes: CodesWriter | None
    runs: list[tuple[str, int, int]]
    first_key: int


class _Intake:
    """Takes batches of entries: documents go to segments at once, keys to a spool (or to codes, where there is an index already)."""

    def __init__(self, job: Path, *, dim: int, vocab_size: int, options: IndexOptions, trained: tuple[Space, Coarse | None] | None) -> None:
        self._job, self._dim, self._vocab_size, self._options, self._trained = job, dim, vocab_size, options, trained
        self._spool = ArrayFile(job / "keys.spool", row_bytes=4 * dim)
        self._drafts: list[_Draft] = []
        self._document: EntryDocument | None = None
        self._document_entries = 0  # of the open document, in this part
        self._document_tokens = 0  # of the open document, in all parts
        self._document_chars = 0
        self._part = 0
        self._seen: set[tuple[str, str]] = set()
        self.n_entries = 0
        self.documents: dict[str, int] = {}

    def take(self, keys: Keys, values: Any, documents: Sequence[EntryDocument]) -> int:
        """One batch; returns its number of entries."""
        tokens = np.asarray(values)
        if tokens.shape != (len(keys),) or tokens.dtype.kind not in "iu":
            raise InvalidArgumentError(f"values of shape {tokens.shape} and type {tokens.dtype}: {len(keys)} integers are expected.")
        if sum(document.n_entries for document in documents) != len(keys):
            raise InvalidArgumentError(f"the documents of a batch have {sum(d.n_entries for d in documents)} entries, it has {len(keys)}.")
        at = 0
        for document in documents:
            if document.n_entries < 1:
                raise InvalidArgumentError(f"document {document.id!r}: {document.n_entries} entries; leave empty documents out.")
            self._take_document(document, keys[at : at + document.n_entries], tokens[at : at + document.n_entries])
            at += document.n_entries
        return len(keys)

    def _take_document(self, document: EntryDocument, keys: Keys, values: NDArray[Any]) -> None:
        same = self._document is not None and (self._document.id, self._document.domain) == (document.id, document.domain)
        if not same:
            self._end_document()
            if (document.domain, document.id) in self._seen:
                raise InvalidArgumentError(f"document {document.id!r} of domain {document.domain!r} comes twice; ids are unique.")
            self._seen.add((document.domain, document.id))
            self._document, self._part, self._document_tokens, self._document_chars = document, 0, 0, 0
            self.documents[document.domain] = self.documents.get(document.domain, 0) + 1
        starts, ends = _offsets(document)
        at = 0
        while at < len(keys):
            draft = self._open_draft()
            n = min(len(keys) - at, self._options.segment_entries - draft.documents.n_rows)
            row = draft.documents.n_rows
            if starts is None or ends is None or document.text is None:
                draft.documents.add(values[at : at + n])
            else:
                base = self._document_chars
                stop = base + len(document.text) if at + n == len(keys) else int(starts[at + n])
                begin = base if at == 0 else int(starts[at])
                piece = document.text[begin - base : stop - base]
                draft.documents.add(values[at : at + n], starts=starts[at : at + n], ends=ends[at : at + n], text=piece, text_start=begin)
            self._put_keys(draft, row, keys[at : at + n])
            self._document_entries += n
            self._document_tokens += n
            at += n
            if draft.documents.n_rows == self._options.segment_entries and at < len(keys):
                self._end_part(last=False)
        self._document_chars += len(document.text or "")

    def _put_keys(self, draft: _Draft, row: int, keys: Keys) -> None:
        if draft.codes is None or self._trained is None:
            self._spool.put(self.n_entries, keys)
        else:
            for at in range(0, len(keys), ENCODE_ROWS):
                encode_runs(draft.codes, [row + at], [keys[at : at + ENCODE_ROWS]], *self._trained)
        self.n_entries += len(keys)

    def _open_draft(self) -> _Draft:
        if self._drafts and self._drafts[-1].documents.n_rows < self._options.segment_entries:
            return self._drafts[-1]
        self._finish_documents()
        uuid = uuid4().hex
        folder = self._job / "segments" / uuid
        documents = DocumentsWriter(folder, uuid=uuid, vocab_size=self._vocab_size)
        codes = None
        if self._trained is not None:
            codes = CodesWriter(folder, n_rows=self._options.segment_entries, space=self._trained[0], keys=self._options.keep_keys)
        self._drafts.append(_Draft(folder, documents, codes, [], self.n_entries))
        return self._drafts[-1]

    def _end_document(self) -> None:
        if self._document is not None:
            self._end_part(last=True)
            self._document = None

    def _end_part(self, *, last: bool) -> None:
        assert self._document is not None
        draft, document = self._drafts[-1], self._document
        draft.documents.end_document(
            id=document.id,
            source=document.source,
            prefix=(),
            metadata=dict(document.metadata),
            content_hash="" if last else None,
            n_chars=self._document_chars if last else None,
            part=self._part,
            last=last,
            first_token=self._document_tokens - self._document_entries,
        )
        stop = draft.documents.n_rows
        if draft.runs and draft.runs[-1][0] == document.domain:
            draft.runs[-1] = (document.domain, draft.runs[-1][1], stop)
        else:
            draft.runs.append((document.domain, stop - self._document_entries, stop))
        self._document_entries = 0
        self._part += 1

    def _finish_documents(self) -> None:
        if self._drafts:
            self._drafts[-1].documents.finish()

    def end(self) -> None:
        """No more batches."""
        self._end_document()
        self._finish_documents()

    def _spooled(self) -> Iterator[tuple[_Draft, NDArray[np.float32]]]:
        keys = map_file(self._job / "keys.spool").view("<f4").reshape(-1, self._dim)
        for draft in self._drafts:
            yield draft, keys[draft.first_key : draft.first_key + draft.documents.n_rows]

    def encode_spool(self, progress: Progress) -> tuple[Space, Coarse | None]:
        """Trains on a sample of all spooled keys, then encodes all."""
        keys = map_file(self._job / "keys.spool").view("<f4").reshape(-1, self._dim)
        sample = keys[sample_rows(self.n_entries, self._dim, self._options.seed)]
        space, coarse = train_index(sample, self.n_entries, self._options)
        with progress.stage("encoding", total=self.n_entries, unit="entries") as stage:
            for draft, of_draft in self._spooled():
                draft.codes = CodesWriter(draft.folder, n_rows=len(of_draft), space=space, keys=self._options.keep_keys)
                for at in range(0, len(of_draft), ENCODE_ROWS):
                    encode_runs(draft.codes, [at], [of_draft[at : at + ENCODE_ROWS]], space, coarse)
                    stage.advance(len(of_draft[at : at + ENCODE_ROWS]))
        return space, coarse

    def finish(self, space: Space, coarse: Coarse | None) -> list[StagedSegment]:
        """Writes the lists of every segment."""
        self._spool.close()
        staged = []
        for draft in self._drafts:
            assert draft.codes is not None
            draft.codes.trim(draft.documents.n_rows)
            draft.codes.close()
            finish_segment(
                draft.folder,
                uuid=draft.folder.name,
                n_documents=draft.documents.n_documents,
                text=draft.documents.text,
                space=space,
                coarse=coarse,
                keys=self._options.keep_keys,
                distortion=draft.codes.distortion_sum / max(1, draft.codes.distortion_count),
                dtype=None,
                windows=None,
            )
            staged.append(StagedSegment(draft.folder, tuple(draft.runs)))
        return staged


def _offsets(document: EntryDocument) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    if document.text is None:
        return None, None
    starts, ends = np.asarray(document.starts, dtype=np.int64), np.asarray(document.ends, dtype=np.int64)
    if starts.shape != (document.n_entries,) or ends.shape != starts.shape or (ends < starts).any():
        raise InvalidArgumentError(f"document {document.id!r}: text needs starts and ends of shape ({document.n_entries},), start <= end.")
    return starts, ends
