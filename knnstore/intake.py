"""Batches of entries → documents in draft segments, keys in a spool → codes → segments."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from knnstore.build import ENCODE_ROWS, StagedSegment, encode_runs, sample_rows
from knnstore.changes import DocumentKey
from knnstore.errors import ExistsError, InvalidArgumentError
from knnstore.progress import Progress
from knnstore.storage.arrays import map_file
from knnstore.storage.coarse import Coarse
from knnstore.storage.files import ArrayFile
from knnstore.storage.manifest import IndexOptions
from knnstore.storage.rows import as_ranges, complement
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment
from knnstore.storage.space import Space

__all__ = ["SPOOL_FILE", "EntryDocument", "Intake"]

Keys = NDArray[np.float32]
Index = tuple[Space, Coarse | None]

SPOOL_FILE = "keys.spool"
SPOOL_MEMORY = 1 << 24  # bytes of keys that wait in memory; beyond, they go to the disk


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


@dataclass(slots=True)
class _Draft:
    """A segment whose documents are being written."""

    folder: Path
    documents: DocumentsWriter
    codes: CodesWriter | None
    runs: list[tuple[str, int, int]]
    first_key: int
    dead: list[tuple[int, int]] = field(default_factory=list)


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
        self._has_text = first.text is not None
        self._hash = hashlib.sha256() if self._has_text else hashlib.sha256(b"tokens\0")
        self.parts: list[tuple[_Draft, int, int]] = []  # rows of the parts that ended

    @property
    def content_hash(self) -> str:
        """sha256 of the text so far; without text, of `tokens`, a zero byte and the values as u32."""
        return self._hash.hexdigest()

    def stretch(self, document: EntryDocument, values: NDArray[Any]) -> _Stretch | None:
        """Its next entries' text, None where it has none. Raises InvalidArgumentError for offsets that do not fit it."""
        if (document.text is not None) != self._has_text:
            raise InvalidArgumentError(f"document {document.id!r}: text comes with all of its entries or with none.")
        if document.text is None:
            self._hash.update(values.astype("<u4"))
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
            "content_hash": self.content_hash if last else None,
            "n_chars": self._n_chars if last and self._has_text else None,
            "part": self._part,
            "last": last,
            "first_token": self._tokens_before,
        }
        self._tokens_before, self.n_entries, self._part = self._tokens_before + self.n_entries, 0, self._part + 1
        return fields


class _Spool:
    """Keys in the order they came, until they can be encoded: in memory while they are few, then in a file."""

    def __init__(self, path: Path, dim: int) -> None:
        self._path, self._dim = path, dim
        self._held: list[Keys] = []
        self._n_held = self._n_written = 0
        self._file: ArrayFile | None = None

    def put(self, keys: Keys) -> None:
        """The next keys, (n, dim) float32."""
        self._held.append(np.array(keys, dtype="<f4"))
        self._n_held += len(keys)
        if self._n_held * self._dim * 4 > SPOOL_MEMORY:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = ArrayFile(self._path, row_bytes=4 * self._dim)
        for keys in self._held:
            self._file.put(self._n_written, keys)
            self._n_written += len(keys)
        self._held, self._n_held = [], 0

    def keys(self) -> Keys:
        """All keys, (n, dim) float32; mapped where they are in the file."""
        if self._file is None:
            return np.concatenate(self._held) if self._held else np.zeros((0, self._dim), np.float32)
        self._write()
        return map_file(self._path).view("<f4").reshape(-1, self._dim)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Intake:
    """Takes batches of entries: documents go to segments at once, keys to a spool (or to codes, where there is an index already)."""

    def __init__(
        self,
        job: Path,
        *,
        dim: int,
        vocab_size: int,
        options: IndexOptions,
        trained: Index | None = None,
        known: Callable[[str, str], str | None] = lambda domain, document_id: None,
        replace: bool = False,
    ) -> None:
        """known: (domain, id) → content hash of the document that is there already, None where there is none ("" if it was not
        hashed). replace: whether one whose content is another is replaced; else it is refused."""
        self._job, self._dim, self._vocab_size, self._options, self._trained = job, dim, vocab_size, options, trained
        self._known, self._replace = known, replace
        self.removes: list[DocumentKey] = []
        self.repeated = 0
        self._spool = _Spool(job / SPOOL_FILE, dim)
        self._drafts: list[_Draft] = []
        self._document: _OpenDocument | None = None
        self._seen: set[tuple[str, str]] = set()
        self.n_entries = 0
        self.documents: dict[str, int] = {}

    @property
    def n_new(self) -> int:
        """Entries so far, without those of documents that are there already."""
        return self.n_entries - sum(stop - first for draft in self._drafts for first, stop in draft.dead)

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
            opened = self._document = _OpenDocument(document)
        stretch = opened.stretch(document, values)
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
            self._spool.put(keys)
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
        document, self._document = self._document, None
        if document is None:
            return
        content_hash, domain, document_id = document.content_hash, document.first.domain, document.first.id
        self._end_part(self._drafts[-1], document, last=True)
        known = self._known(domain, document_id)
        if known == content_hash:
            self.repeated += 1
            for draft, first, stop in document.parts:  # its content is known only now that it is written
                draft.dead.append((first, stop))
            return
        if known is not None:
            if not self._replace:
                raise ExistsError(
                    f"document {document_id!r}: domain {domain!r} has it with other content. Replace it (replace=True, --replace), or "
                    "give it another id."
                )
            self.removes.append(DocumentKey(domain, document_id, known or None))
        self.documents[domain] = self.documents.get(domain, 0) + 1

    def _end_part(self, draft: _Draft, document: _OpenDocument, *, last: bool) -> None:
        draft.documents.end_document(**document.end_part(last=last))
        domain, first, stop = document.first.domain, draft.runs[-1][2] if draft.runs else 0, draft.documents.n_rows
        document.parts.append((draft, first, stop))
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

    def encode_spool(self, choose: Callable[[Keys, int], Index], progress: Progress) -> Index:
        """Encodes all spooled keys. choose: (a sample of those that are new, how many these are) → space and coarse quantizer."""
        keys = self._spool.keys()
        space, coarse = choose(keys[self._new_rows(sample_rows(self.n_new, self._dim, self._options.seed))], self.n_new)
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

    def _new_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in the spool of entries that are new, by their numbers among these."""
        dead = [(draft.first_key + first, draft.first_key + stop) for draft in self._drafts for first, stop in draft.dead]
        new = complement(as_ranges(dead), self.n_entries)
        ends = np.cumsum(new[:, 1] - new[:, 0])
        at = np.searchsorted(ends, numbers, side="right")
        places: NDArray[np.int64] = new[at, 1] - ends[at] + numbers
        return places

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
            staged.append(StagedSegment(draft.folder, tuple(draft.runs), tuple(draft.dead)))
        return staged
