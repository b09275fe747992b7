"""documents → tokens → the first half of segments: values and text, without keys yet.

This part of a job is continued at the last segment that was finished, so that the corpus is tokenized once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import CorpusError, ExistsError
from knnstore.format import CONTEXTS_FILE
from knnstore.lm.corpus import ContentHash, CorpusFile, Document, read_documents
from knnstore.lm.drafts import DRAFT_FILE, READ_FILE, Reading, finished_drafts, load_reading
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.progress import Progress, Stage
from knnstore.storage.contexts import ContextsReader
from knnstore.storage.files import disk, replace_file
from knnstore.storage.manifest_json import canonical
from knnstore.storage.segment_writer import DocumentsWriter

__all__ = ["Known", "is_left_out_rightly", "read_corpus"]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the store has already. content_of: id → content hash of a document, None where there is none of that id.

    replace: whether one whose content changed is replaced; else it is refused. all_of: where documents that the corpus does not have
    are to go, all of the store's (id, content hash); else None.
    """

    content_of: Callable[[str], str | None] = lambda document_id: None
    replace: bool = False
    all_of: Callable[[], Iterator[tuple[str, str | None]]] | None = None


@dataclass(slots=True)
class _Cursor:
    """How far the corpus was read. documents_done: wholly written or left out; tokens_done, part: of the document after them."""

    documents_done: int = 0
    tokens_done: int = 0
    part: int = 0
    documents: int = 0
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive entries of a document: values (n,), their offsets, the text they stand in."""

    values: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    text: str
    text_start: int
    last: bool = False


def read_corpus(
    job: Path,
    files: Iterable[CorpusFile],
    *,
    tokenizer: DocumentTokenizer,
    vocab_size: int,
    prefix_tokens: int,
    segment_entries: int,
    progress: Progress,
    known: Known | None = None,
) -> Reading:
    """Reads and tokenizes a corpus into draft segments under job/segments, or takes up where a killed process left off.

    prefix_tokens: tokens that a later part of a document repeats from before it, so that its first window has its context.
    known: documents that need not be written, or that come instead of others.
    Raises CorpusError for a document that cannot be taken, ExistsError for one whose content changed, naming it.
    """
    if (job / READ_FILE).exists():
        return load_reading(job)
    reader = _Reader(
        job,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        prefix_tokens=prefix_tokens,
        segment_entries=segment_entries,
        known=known or Known(),
    )
    with closing(reader), progress.stage("reading and tokenizing", total=None, unit="tokens", done=reader.n_rows) as stage:
        for document in read_documents(files):
            reader.take(document, stage)
        reader.finish()
    return load_reading(job)


def is_left_out_rightly(job: Path, files: Iterable[CorpusFile], known: Known) -> bool:
    """Whether the store still has every document that was left out, so far, because it had it. Reads those documents again."""
    if (job / READ_FILE).exists():
        reading = load_reading(job)
        drafts = [(segment.folder, segment.n_rows) for segment in reading.segments]
        empty, n_read = [item.id for item in reading.skipped], None
    else:
        found = finished_drafts(job)
        drafts = [(job / "segments" / fields["uuid"], fields["rows"]) for fields in found]
        empty, n_read = ([item[0] for item in found[-1]["skipped"]], found[-1]["cursor"]["documents_done"]) if found else ([], 0)
    taken = set(empty)
    for folder, n_rows in drafts:
        with closing(ContextsReader(folder / CONTEXTS_FILE, n_rows=n_rows)) as contexts:
            taken.update(record.id for record in contexts.documents())
    return all(
        document.id in taken or known.content_of(document.id) == _content_hash(document)
        for document in islice(read_documents(files), n_read)
    )


def _content_hash(document: Document) -> str:
    content = ContentHash()
    for chunk in document.chunks:
        content.update(chunk)
    return content.hexdigest()


class _Reader:
    def __init__(
        self, job: Path, *, tokenizer: DocumentTokenizer, vocab_size: int, prefix_tokens: int, segment_entries: int, known: Known
    ) -> None:
        self._job, self._tokenizer, self._vocab_size, self._known = job, tokenizer, vocab_size, known
        self._replaced: dict[str, str | None] = {}
        self._prefix_tokens, self._segment_entries = prefix_tokens, segment_entries
        self._segments: list[dict[str, Any]] = []
        self._skipped: list[list[str]] = []
        self._cursor = _Cursor()
        self._resume()
        self._index = 0  # of the document being read
        self._hashes: dict[str, bytes] = {}  # some 150 bytes a document: what memory grows with
        self._draft: DocumentsWriter | None = None

    @property
    def n_rows(self) -> int:
        return sum(item["rows"] for item in self._segments)

    def _resume(self) -> None:
        """Keeps the draft segments that were finished, removes the rest."""
        folder = self._job / "segments"
        disk.make_folder(folder)
        for child in folder.iterdir():
            if not (child / DRAFT_FILE).exists():
                disk.remove_tree(child)
        for draft in finished_drafts(self._job):
            self._segments.append({"uuid": draft["uuid"], "rows": draft["rows"], "documents": draft["records"]})
            self._skipped = draft["skipped"]
            self._replaced = dict(draft["replaced"])
            self._cursor = _Cursor(**draft["cursor"])

    def take(self, document: Document, stage: Stage) -> None:
        """One document, in the corpus's order."""
        index, self._index = self._index, self._index + 1
        if document.id in self._hashes or index < self._cursor.documents_done:
            digest = bytes.fromhex(_content_hash(document))[:16]
            known = self._hashes.setdefault(document.id, digest)
            if known != digest:
                raise CorpusError(
                    f"{document.source}: a second document with the id {document.id!r} and other content. Ids are unique within a domain: "
                    "rename one of the two, or leave it out."
                )
            if index >= self._cursor.documents_done:
                self._cursor.repeated += 1
                self._done(index)
            return
        if self._is_known(document):
            self._cursor.repeated += 1
            self._done(index)
            return
        content = ContentHash()
        self._write(document, content, stage)
        self._hashes[document.id] = bytes.fromhex(content.hexdigest())[:16]
        self._done(index)
        if self._draft is not None and self._draft.n_rows == self._segment_entries:
            self._finish_draft()

    def _is_known(self, document: Document) -> bool:
        """Whether the store has a document with the same content; one with another content is noted as replaced, or refused."""
        stored = self._known.content_of(document.id)
        if stored is None:
            return False
        if _content_hash(document) == stored:
            self._hashes[document.id] = bytes.fromhex(stored)[:16]
            return True
        if not self._known.replace:
            raise ExistsError(
                f"{document.source}: the datastore has a document {document.id!r} with other content. Use --replace to put this one in its "
                "place, or give it another id."
            )
        self._replaced[document.id] = stored or None
        return False

    def _done(self, index: int) -> None:
        cursor = self._cursor
        cursor.documents_done, cursor.tokens_done, cursor.part = index + 1, 0, 0

    def _write(self, document: Document, content: ContentHash, stage: Stage) -> None:
        cursor = self._cursor
        bos = self._tokenizer.bos_id
        first_value = 0 if bos is not None else 1  # index in the document of the first entry's value
        passed = 0  # entries of this document so far
        tail = np.zeros(0, np.int32)  # the tokens before the next entry
        prefix: tuple[int, ...] = ()
        for prefix_ids, stretch in self._stretches(document, content):
            if not len(tail):
                tail = prefix_ids
            at = 0
            n_all = len(stretch.values)
            if passed < cursor.tokens_done:  # written by the process that was killed
                at = min(n_all, cursor.tokens_done - passed)
                tail = np.concatenate((tail, stretch.values[:at]))[-self._prefix_tokens :]
                passed += at
            while at < n_all:
                draft = self._open()
                if passed == cursor.tokens_done:
                    prefix = tuple(tail.tolist())
                n = min(n_all - at, self._segment_entries - draft.n_rows)
                _add(draft, stretch, at, n)
                tail = np.concatenate((tail, stretch.values[at : at + n]))[-self._prefix_tokens :]
                at, passed = at + n, passed + n
                stage.advance(n)
                if draft.n_rows == self._segment_entries and not (at == n_all and stretch.last):
                    self._end_part(document, prefix, first_value + cursor.tokens_done, None, None)
                    cursor.tokens_done, cursor.part = passed, cursor.part + 1
                    self._finish_draft()
        if not passed:
            reason = "empty" if not content.n_chars else "one token, which has nothing before it to predict it from"
            self._skipped.append([document.id, document.source, reason])
            return
        assert passed > cursor.tokens_done, "a document's last part is written with its last entries"
        self._end_part(document, prefix, first_value + cursor.tokens_done, content.hexdigest(), content.n_chars)
        cursor.documents += 1

    def _stretches(self, document: Document, content: ContentHash) -> Iterator[tuple[NDArray[np.int32], _Stretch]]:
        """The entries of a document, each stretch with the tokens before the document's first entry."""
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        prefix = np.array([] if bos is None else [bos], np.int32)
        held: _Stretch | None = None
        for piece in self._tokenizer.tokenize(content.through(document.chunks)):
            skip = 0 if len(prefix) else 1
            if skip:
                prefix = piece.ids[:1]
            text_start = 0 if held is None else held.text_start + len(held.text)
            stretch = _Stretch(piece.ids[skip:], piece.starts[skip:], piece.ends[skip:], piece.text, text_start)
            if held is not None and not (len(held.values) and len(stretch.values)):
                # A piece without an entry of its own: its text goes with the next, or the one before.
                full = stretch if len(stretch.values) else held
                held = replace(full, text=held.text + stretch.text, text_start=held.text_start)
                continue
            if held is not None:
                yield prefix, held
            held = stretch
        if held is None:
            return
        values, starts, ends = held.values, held.starts, held.ends
        if eos is not None:
            end = np.array([content.n_chars], np.int64)
            values = np.append(values, np.int32(eos))
            starts, ends = np.concatenate((starts, end)), np.concatenate((ends, end))
        if len(values):
            yield prefix, _Stretch(values, starts, ends, held.text, held.text_start, last=True)

    def _open(self) -> DocumentsWriter:
        if self._draft is None:
            uuid = uuid4().hex
            self._draft = DocumentsWriter(self._job / "segments" / uuid, uuid=uuid, vocab_size=self._vocab_size)
        return self._draft

    def _end_part(
        self, document: Document, prefix: tuple[int, ...], first_token: int, content_hash: str | None, n_chars: int | None
    ) -> None:
        assert self._draft is not None
        self._draft.end_document(
            id=document.id,
            source=document.source,
            prefix=prefix,
            metadata=dict(document.metadata),
            content_hash=content_hash,
            n_chars=n_chars,
            part=self._cursor.part,
            last=content_hash is not None,
            first_token=first_token,
        )

    def _finish_draft(self) -> None:
        """Makes the open draft durable: a kill after this loses nothing of it."""
        draft = self._draft
        if draft is None:
            return
        draft.finish()
        cursor = self._cursor
        fields = {
            "cursor": {name: getattr(cursor, name) for name in _Cursor.__slots__},
            "index": len(self._segments),
            "records": draft.n_documents,
            "replaced": list(self._replaced.items()),
            "rows": draft.n_rows,
            "skipped": self._skipped,
            "uuid": draft.uuid,
        }
        replace_file(draft.folder / DRAFT_FILE, canonical(fields))
        disk.sync_folder(draft.folder.parent)
        self._segments.append({"uuid": draft.uuid, "rows": draft.n_rows, "documents": draft.n_documents})
        self._draft = None

    def finish(self) -> None:
        """The corpus is read."""
        self._finish_draft()
        fields = {
            "documents": self._cursor.documents,
            "gone": [item for item in (self._known.all_of() if self._known.all_of else ()) if item[0] not in self._hashes],
            "repeated": self._cursor.repeated,
            "replaced": list(self._replaced.items()),
            "segments": self._segments,
            "skipped": self._skipped,
        }
        replace_file(self._job / READ_FILE, canonical(fields))

    def close(self) -> None:
        """Gives up a draft that is not finished."""
        if self._draft is not None:
            self._draft.close()


def _add(draft: DocumentsWriter, stretch: _Stretch, at: int, n: int) -> None:
    """Entries [at, at + n) of a stretch, with the text from the first of them to the one after the last."""
    stop = at + n
    text_stop = stretch.text_start + len(stretch.text)
    begin = stretch.text_start if at == 0 else min(int(stretch.starts[at]), text_stop)
    # Where tokens share a character, it belongs to both sides.
    end = text_stop if stop == len(stretch.values) else min(max(int(stretch.starts[stop]), int(stretch.ends[stop - 1])), text_stop)
    text = stretch.text[begin - stretch.text_start : end - stretch.text_start]
    draft.add(stretch.values[at:stop], starts=stretch.starts[at:stop], ends=stretch.ends[at:stop], text=text, text_start=begin)
