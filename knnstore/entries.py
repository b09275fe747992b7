"""Entries that come from elsewhere (own extractors, other kNN-LM datastores) → a datastore, without any model."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from knnstore.build import (
    ENCODE_ROWS,
    StagedSegment,
    begin_store,
    blank_manifest,
    choose_codec,
    encode_runs,
    index_staged,
    sample_rows,
    save_index,
    staged_segment,
    take_back,
    train_index,
)
from knnstore.changes import Change, commit_change
from knnstore.errors import InvalidArgumentError
from knnstore.progress import SILENT, Progress
from knnstore.search import check_keys
from knnstore.storage.arrays import map_file
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.coarse import Coarse
from knnstore.storage.files import ArrayFile, disk
from knnstore.storage.jobs import run_job
from knnstore.storage.manifest import IndexOptions, Manifest, Operation
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment
from knnstore.storage.space import MIN_TRAINING, Space

__all__ = ["EntryDocument", "create_from_entries"]

Keys = NDArray[np.float32]

_SPOOL = "keys.spool"


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryDocument:
    """A document, or the next stretch of the one before (same id and domain), in a batch of entries.

    n_entries: how many of the batch's entries are its. text: its decoded text as far as these entries go, with starts and ends
    (n_entries,) the character offsets of each value in the whole document, rising; None without text.
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
    if vocab_size != checkpoint.vocab_size:
        raise InvalidArgumentError(f"vocab_size {vocab_size}: the checkpoint has {checkpoint.vocab_size}.")
    if (training_keys is None) != (expected_entries is None):
        raise InvalidArgumentError("training_keys and expected_entries go together: give both or none.")
    arguments = {"command": "create_from_entries", "dim": dim, "checkpoint": asdict(checkpoint), **asdict(options)}
    store, store_uuid, name = begin_store(path, arguments)
    with run_job(store, name, arguments) as job:
        take_back(store, job)
        for leftover in ("segments", "index", _SPOOL):
            disk.remove_tree(job / leftover)  # entries cannot be asked for again: such a job begins anew
        trained = None
        if training_keys is not None and expected_entries is not None:
            trained = train_index(_training_keys(training_keys, dim, expected_entries, options), expected_entries, options)
        with _Intake(job, dim=dim, vocab_size=vocab_size, options=options, trained=trained) as intake:
            with progress.stage("reading entries", total=expected_entries, unit="entries") as stage:
                for keys, values, documents in batches:
                    stage.advance(intake.take(check_keys(keys, dim) if len(keys) else np.zeros((0, dim), np.float32), values, documents))
            intake.end()
            if not intake.n_entries:
                raise InvalidArgumentError("no entries were given; a datastore has at least one.")
            space, coarse = intake.encode_spool(progress) if trained is None else trained
            save_index(job, space, coarse)
            staged = intake.finish(space, coarse)
        start = blank_manifest(
            store_uuid, checkpoint=checkpoint, key=KeyLayer(layer=key_layer, dim=dim), tokens=None, index=options
        )
        change = Change(
            operation=Operation(
                name="create_from_entries",
                arguments={"codec": options.codec},
                counts={"documents": sum(intake.documents.values()), "entries": intake.n_entries},
            ),
            **index_staged(job, space, coarse),
            segments=[staged_segment(segment) for segment in staged],
            documents=intake.documents,
        )
        return commit_change(store, start, change, job=job)


def _training_keys(training_keys: Any, dim: int, expected_entries: int, options: IndexOptions) -> Keys:
    keys = check_keys(training_keys, dim)
    least = MIN_TRAINING[choose_codec(expected_entries, options)]
    if len(keys) < least:
        raise InvalidArgumentError(f"training_keys: {len(keys)} keys; {options.codec} needs {least}. Give more, or none.")
    return keys


@dataclass(slots=True)
class _Draft:
    """A segment whose documents are being written."""

    folder: Path
    documents: DocumentsWriter
    codes: CodesWriter | None
    runs: list[tuple[str, int, int]]
    first_key: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The text of a document's entries in one batch. base: index of its first character in the document."""

    text: str
    base: int
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def cut(self, at: int, stop: int) -> dict[str, Any]:
        """What belongs to the entries [at, stop): text from the first of them to the one after the last."""
        begin = 0 if at == 0 else self._within(int(self.starts[at]))
        # Where tokens share a character, it belongs to both sides.
        end = len(self.text) if stop == len(self.starts) else self._within(max(int(self.starts[stop]), int(self.ends[stop - 1])))
        text = self.text[begin:end]
        return {"starts": self.starts[at:stop], "ends": self.ends[at:stop], "text": text, "text_start": self.base + begin}

    def _within(self, character: int) -> int:
        return min(max(character - self.base, 0), len(self.text))


class _OpenDocument:
    """A document whose entries are coming in. n_entries: those of the open part."""

    def __init__(self, first: EntryDocument) -> None:
        self.first = first
        self.n_entries = 0
        self._tokens_before = 0  # in the parts before
        self._part = 0
        self._n_chars = 0
        self._hash = None if first.text is None else hashlib.sha256()

    def stretch(self, document: EntryDocument) -> _Stretch | None:
        """Its next entries' text, None where it has none. Raises InvalidArgumentError for offsets that do not fit it."""
        if (document.text is None) != (self._hash is None):
            raise InvalidArgumentError(f"document {document.id!r}: text comes with all of its entries or with none.")
        if document.text is None or self._hash is None:
            return None
        base, n = self._n_chars, document.n_entries
        try:
            self._hash.update(document.text.encode())
            starts, ends = np.asarray(document.starts, dtype=np.int64), np.asarray(document.ends, dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"document {document.id!r}: its text or offsets cannot be taken: {error}.") from error
        self._n_chars += len(document.text)
        if starts.shape != (n,) or ends.shape != (n,):
            raise InvalidArgumentError(f"document {document.id!r}: text needs starts and ends of shape ({n},).")
        rise = (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all() and (starts <= ends).all()
        if not (rise and starts[0] >= 0 and ends[-1] <= self._n_chars):
            raise InvalidArgumentError(
                f"document {document.id!r}: offsets must rise, start <= end, from 0 to the {self._n_chars} characters so far."
            )
        return _Stretch(document.text, base, starts, ends)

    def end_part(self, *, last: bool) -> dict[str, Any]:
        """The fields of the open part's record; the next part begins."""
        fields = {
            "id": self.first.id,
            "source": self.first.source,
            "prefix": (),
            "metadata": dict(self.first.metadata),
            "content_hash": self._hash.hexdigest() if last and self._hash else None,
            "n_chars": self._n_chars if last and self._hash else None,
            "part": self._part,
            "last": last,
            "first_token": self._tokens_before,
        }
        self._tokens_before, self.n_entries, self._part = self._tokens_before + self.n_entries, 0, self._part + 1
        return fields


class _Intake:
    """Takes batches of entries: documents go to segments at once, keys to a spool (or to codes, where there is an index already)."""

    def __init__(self, job: Path, *, dim: int, vocab_size: int, options: IndexOptions, trained: tuple[Space, Coarse | None] | None) -> None:
        self._job, self._dim, self._vocab_size, self._options, self._trained = job, dim, vocab_size, options, trained
        self._spool = ArrayFile(job / _SPOOL, row_bytes=4 * dim)
        self._drafts: list[_Draft] = []
        self._document: _OpenDocument | None = None
        self._seen: set[tuple[str, str]] = set()
        self.n_entries = 0
        self.documents: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._spool.close()
        for draft in self._drafts:
            draft.documents.close()
            if draft.codes is not None:
                draft.codes.close()

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
            stop = at + document.n_entries
            self._take_document(document, keys[at:stop], tokens[at:stop])
            at = stop
        return len(keys)

    def _take_document(self, document: EntryDocument, keys: Keys, values: NDArray[Any]) -> None:
        opened = self._document
        if opened is None or (opened.first.id, opened.first.domain) != (document.id, document.domain):
            self._end_document()
            if (document.domain, document.id) in self._seen:
                raise InvalidArgumentError(f"document {document.id!r} of domain {document.domain!r} comes twice; ids are unique.")
            self._seen.add((document.domain, document.id))
            self.documents[document.domain] = self.documents.get(document.domain, 0) + 1
            opened = self._document = _OpenDocument(document)
        stretch = opened.stretch(document)
        at = 0
        while at < len(keys):
            draft = self._open_draft()
            n = min(len(keys) - at, self._options.segment_entries - draft.documents.n_rows)
            self._put_keys(draft, keys[at : at + n])
            draft.documents.add(values[at : at + n], **({} if stretch is None else stretch.cut(at, at + n)))
            opened.n_entries += n
            at += n

    def _put_keys(self, draft: _Draft, keys: Keys) -> None:
        if draft.codes is None or self._trained is None:
            self._spool.put(self.n_entries, keys)
        else:
            for at in range(0, len(keys), ENCODE_ROWS):
                encode_runs(draft.codes, [draft.documents.n_rows + at], [keys[at : at + ENCODE_ROWS]], *self._trained)
        self.n_entries += len(keys)

    def _open_draft(self) -> _Draft:
        if self._drafts and self._drafts[-1].documents.n_rows < self._options.segment_entries:
            return self._drafts[-1]
        if self._document is not None and self._document.n_entries:
            self._end_part(self._drafts[-1], self._document, last=False)
        self._end_draft()
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
            self._end_part(self._drafts[-1], self._document, last=True)
            self._document = None

    def _end_part(self, draft: _Draft, document: _OpenDocument, *, last: bool) -> None:
        draft.documents.end_document(**document.end_part(last=last))
        domain, first, stop = document.first.domain, draft.runs[-1][2] if draft.runs else 0, draft.documents.n_rows
        if draft.runs and draft.runs[-1][0] == domain:
            first = draft.runs.pop()[1]
        draft.runs.append((domain, first, stop))

    def _end_draft(self) -> None:
        if self._drafts:
            draft = self._drafts[-1]
            draft.documents.finish()
            if draft.codes is not None:
                draft.codes.trim(draft.documents.n_rows)
                draft.codes.close()

    def end(self) -> None:
        """No more batches."""
        self._end_document()
        self._end_draft()
        self._spool.close()

    def encode_spool(self, progress: Progress) -> tuple[Space, Coarse | None]:
        """Trains on a sample of all spooled keys, then encodes all."""
        keys = map_file(self._job / _SPOOL).view("<f4").reshape(-1, self._dim)
        sample = keys[sample_rows(self.n_entries, self._dim, self._options.seed)]
        space, coarse = train_index(sample, self.n_entries, self._options)
        with progress.stage("encoding", total=self.n_entries, unit="entries") as stage:
            for draft in self._drafts:
                n_rows = draft.documents.n_rows
                draft.codes = CodesWriter(draft.folder, n_rows=n_rows, space=space, keys=self._options.keep_keys)
                for at in range(0, n_rows, ENCODE_ROWS):
                    n = min(ENCODE_ROWS, n_rows - at)
                    begin = draft.first_key + at
                    encode_runs(draft.codes, [at], [keys[begin : begin + n]], space, coarse)
                    stage.advance(n)
                draft.codes.close()
        return space, coarse

    def finish(self, space: Space, coarse: Coarse | None) -> list[StagedSegment]:
        """Writes the lists of every segment."""
        staged = []
        for draft in self._drafts:
            assert draft.codes is not None
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
