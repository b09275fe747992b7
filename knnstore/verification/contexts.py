"""What `verify` checks in `contexts.lmdb`, once its sha256 is known to be right: documents, their index, and their text."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.storage.contexts import ContextsReader, DocumentRecord, id_hash
from knnstore.storage.manifest import SegmentRecord
from knnstore.storage.rows import contains
from knnstore.verification.files import FindingError

__all__ = ["DocumentRows", "OpenParts", "check_contexts"]


@dataclass(frozen=True, slots=True)
class DocumentRows:
    """The documents (or parts) of a segment, in row order.

    first_rows: (m,) int64. hashes: of the ids, (m,) u64. parts: number of the part, (m,) int64; last: whether it is its document's last
    part, (m,) bool; first_tokens: index in the document of the first entry's value, (m,) int64.
    """

    first_rows: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    parts: NDArray[np.int64]
    last: NDArray[np.bool_]
    first_tokens: NDArray[np.int64]

    def n_entries(self, n_rows: int) -> NDArray[np.int64]:
        """Entries of each, (m,); n_rows: of the segment."""
        return np.diff(np.append(self.first_rows, n_rows))

    def id_table(self) -> NDArray[np.uint64]:
        """What `ids.bin` has to hold, (m, 2)."""
        table = np.stack((self.hashes, self.first_rows.astype(np.uint64)), axis=1)
        return table[np.lexsort((table[:, 1], table[:, 0]))]


@dataclass(slots=True)
class _Text:
    """The text of a document so far."""

    sha256: Any
    n_chars: int


# What may come before a part of a document: its (domain, id, part, first token) → texts by their hash, one for each version there is.
OpenParts = dict[tuple[str, str, int, int], dict[bytes, _Text]]


def check_contexts(path: Path, segment: SegmentRecord, *, vocab_size: int, parts: OpenParts) -> DocumentRows:
    """Reads all documents and all text of a segment in one pass. parts: taken up and left for the next segment.

    Memory: 33 bytes a document, and a frame. Raises FindingError, DamageError.
    """
    content = segment.content
    reader = ContextsReader(path, n_rows=content.entries)
    try:
        first_rows = reader.first_rows
        if len(first_rows) != content.documents:
            raise FindingError("content", f"it has {len(first_rows)} documents, the manifest says {content.documents}")
        n, stops = len(first_rows), np.append(first_rows[1:], content.entries)
        rows = DocumentRows(first_rows, np.zeros(n, np.uint64), np.zeros(n, np.int64), np.zeros(n, np.bool_), np.zeros(n, np.int64))
        text = _TextWalk(reader)
        n_read = 0
        for i, record in enumerate(reader.documents()):
            if i >= len(first_rows) or record.first_row != first_rows[i] or record.n_entries != stops[i] - first_rows[i]:
                raise FindingError("content", f"the document at row {record.first_row} does not end where the next begins")
            if any(token >= vocab_size for token in record.prefix):
                raise FindingError("content", f"the document at row {record.first_row} begins with a token beyond the vocabulary")
            rows.hashes[i], rows.parts[i], rows.last[i] = id_hash(record.id), record.part, record.last
            rows.first_tokens[i] = record.first_token
            text.take(record, segment, parts)
            n_read = i + 1
        if n_read != len(first_rows):
            raise FindingError("content", f"it has {n_read} records of {len(first_rows)} documents")
        text.conclude(content.text)
    finally:
        reader.close()
    return rows


class _TextWalk:
    """The text frames of a segment, taken along with its documents."""

    def __init__(self, reader: ContextsReader) -> None:
        self._frames = reader.frames()
        self._next = next(self._frames, None)
        self._any = self._next is not None

    def take(self, record: DocumentRecord, segment: SegmentRecord, parts: OpenParts) -> None:
        """The frames of one document: they cover its rows, and its text is the one that was hashed.

        What comes before a later part may be there in several versions, where the document was replaced; its own may be there no more.
        """
        domain = next(name for name, _, stop in segment.runs if record.first_row < stop)
        known = parts.get((domain, record.id, record.part, record.first_token), {})
        before = [_Text(hashlib.sha256(), 0)] if record.part == 0 else [_Text(text.sha256.copy(), text.n_chars) for text in known.values()]
        stop = record.first_row + record.n_entries
        covered, reached, furthest, end = record.first_row, 0, 0, None if record.part else 0
        for first, starts, ends, text, at in self._until(stop):
            if first != covered or (end is not None and at != end):
                raise FindingError("content", f"the text of document {record.id!r} at row {first} does not follow what is before it")
            rise = len(starts) and starts[0] >= reached and (starts[1:] >= starts[:-1]).all() and (ends >= starts).all()
            if not rise or starts[-1] > at + len(text):
                raise FindingError("content", f"the offsets of document {record.id!r} at row {first} do not rise within their text")
            # A character that tokens of two parts share is in the text of both.
            before = [text_before for text_before in before if text_before.n_chars >= at]
            for text_before in before:
                text_before.sha256.update(text[text_before.n_chars - at :].encode())
                text_before.n_chars = at + len(text)
            covered, end, reached, furthest = first + len(starts), at + len(text), int(starts[-1]), max(furthest, int(ends.max()))
        if covered not in (record.first_row, stop):
            raise FindingError("content", f"the text of document {record.id!r} covers rows to {covered}, the document ends at {stop}")
        if furthest > (end or 0):
            raise FindingError("content", f"a token of document {record.id!r} ends at character {furthest}, after its text")
        if covered != stop:
            return
        # One version that is not replaced: it must fit.
        is_sure = record.part == 0 or (len(known) == 1 and not contains(segment.dead_ranges(), np.array([record.first_row]))[0])
        if is_sure and not before:
            raise FindingError("content", f"the text of document {record.id!r} does not follow that of its part before")
        if not record.last:
            following = parts.setdefault((domain, record.id, record.part + 1, record.first_token + record.n_entries), {})
            following.update({text_before.sha256.digest(): text_before for text_before in before})
        elif is_sure:
            _compare(record, before[0])

    def _until(self, stop: int) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], str, int]]:
        while self._next is not None and self._next[0] < stop:
            yield self._next
            self._next = next(self._frames, None)

    def conclude(self, text: bool) -> None:
        """After all documents. text: whether the manifest says there is any."""
        if self._next is not None:
            raise FindingError("content", f"it has text at row {self._next[0]}, after its last document")
        if text is not self._any:
            raise FindingError("content", f"it has {'text' if self._any else 'no text'}; the manifest says otherwise")


def _compare(record: DocumentRecord, text: _Text) -> None:
    if record.n_chars is not None and record.n_chars != text.n_chars:
        raise FindingError("content", f"document {record.id!r}: its text has {text.n_chars} characters, its record says {record.n_chars}")
    if record.content_hash is not None and text.sha256.hexdigest() != record.content_hash:
        raise FindingError("content", f"document {record.id!r}: its text does not have the hash in its record")
