"""`contexts.lmdb`: the documents of a segment and their text, written once (`contexts_writer`), then read without a lock.

Two databases. `documents`: first row → the document's record. `text`: first row of a frame → where each token of the frame stands,
and the text from its first token to the next frame. Rows are u64 big-endian, so that they sort. In the main database,
`first_rows` holds the first rows of all documents as one u64 array. Documents are found by id in `ids.bin` (`id_hash`).
"""

import hashlib
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lmdb
import numpy as np
import zstandard
from numpy.typing import NDArray

from knnstore.errors import DamageError
from knnstore.format import DOCUMENT_RECORD_MAX, TEXT_FRAME_MAX
from knnstore.storage.parse import parse_flag, parse_free, parse_hex, parse_json_bytes, parse_list, parse_object, parse_size, parse_text

__all__ = ["FRAME", "WIDTHS", "ContextsReader", "DocumentRecord", "Span", "id_hash", "row_key"]

_CHARACTERS_MAX = 1 << 48  # of a document: what is added to it stays far from the end of 64 bits
_ROW = struct.Struct(">Q")
FRAME = struct.Struct("<IIQBBH")  # tokens, bytes of text, index of its first character, widths of gaps and lengths, 0
WIDTHS: tuple[np.dtype[Any], ...] = (np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u8"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRecord:
    """A document, or one part of a document that is larger than a segment.

    first_row: its first entry in the segment. n_entries: entries of this part. prefix: the token ids before the first entry
    (BOS, or the first token, or what a later part needs to see). part: 0 for the first; last: whether it is the last part.
    first_token: index in the document of the part's first entry's value. content_hash: sha256 of the decoded text, 64 hex digits,
    and n_chars: its characters; both on the last part only, None before it and where there is no text.
    """

    id: str
    source: str
    first_row: int
    n_entries: int
    prefix: tuple[int, ...]
    metadata: dict[str, Any]
    content_hash: str | None
    n_chars: int | None
    part: int = 0
    last: bool = True
    first_token: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Text around consecutive entries. text: decoded; base: its first character's index in the document; starts, ends: (n,) int64."""

    text: str
    base: int
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def cut(self, begin: int, end: int) -> str:
        """Characters [begin, end) of the document, as far as they are here."""
        return self.text[max(begin - self.base, 0) : max(end - self.base, 0)]


def id_hash(document_id: str) -> int:
    """64 bits by which a document is found: the first 8 bytes of the sha256 of its id as UTF-8, little-endian."""
    return int.from_bytes(hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def row_key(row: int) -> bytes:
    """8 bytes that sort as rows do."""
    return _ROW.pack(row)


@dataclass(slots=True)
class _SharedEnvironment:
    """An LMDB environment and how many readers of this process use it: LMDB does not allow a second one on the same file."""

    key: tuple[int, int, int]
    environment: Any
    databases: tuple[Any, Any]
    n_users: int


_shared: dict[tuple[int, int, int], _SharedEnvironment] = {}
_shared_lock = threading.Lock()


def _borrow(path: Path) -> _SharedEnvironment:
    """The environment on a file, opened by its first user in this process. Raises DamageError where LMDB refuses the file."""
    try:
        status = path.stat()
    except OSError as error:
        raise DamageError(f"{path}: LMDB cannot open it: {error.strerror}. Run `knnstore verify`.") from error
    # An environment does not survive a fork. A merge may have linked one file into several stores: a file is known by its inode.
    key = (os.getpid(), status.st_dev, status.st_ino)
    with _shared_lock:
        if key not in _shared:
            try:
                environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False, max_dbs=2, create=False)
                documents, text = (environment.open_db(name, create=False) for name in (b"documents", b"text"))
            except lmdb.Error as error:
                raise DamageError(f"{path}: LMDB cannot open it: {error}. Run `knnstore verify`.") from error
            _shared[key] = _SharedEnvironment(key, environment, (documents, text), 0)
        _shared[key].n_users += 1
        return _shared[key]


def _give_back(shared: _SharedEnvironment) -> None:
    """Closes the environment with its last user."""
    with _shared_lock:
        shared.n_users -= 1
        if not shared.n_users and shared.key[0] == os.getpid():
            del _shared[shared.key]
            shared.environment.close()


_of_thread = threading.local()  # a decompressor's memory is not for two threads at once


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_of_thread, "zstd"):
        _of_thread.zstd = zstandard.ZstdDecompressor()
    return cast(zstandard.ZstdDecompressor, _of_thread.zstd)


class ContextsReader:
    """Reads one segment's documents and text. The environment is opened at first use, in the process that uses it."""

    def __init__(self, path: Path, *, n_rows: int) -> None:
        self.path, self.n_rows = path, n_rows
        self._shared = _borrow(path)
        self._release = weakref.finalize(self, _give_back, self._shared)
        self._env = self._shared.environment
        self._documents, self._text = self._shared.databases
        self.first_rows = self._read_first_rows()

    @contextmanager
    def _reading(self, *, buffers: bool = False) -> Iterator[Any]:
        """A transaction. Raises DamageError for what LMDB finds wrong, and for keys that are no rows."""
        try:
            with self._env.begin(buffers=buffers) as transaction:
                yield transaction
        except (lmdb.Error, struct.error) as error:
            raise DamageError(f"{self.path}: its pages are damaged: {error}. Run `knnstore verify`.") from error

    def _read_first_rows(self) -> NDArray[np.int64]:
        with self._reading() as transaction:
            raw = transaction.get(b"first_rows")
        if raw is None or len(raw) % 8:
            raise DamageError(f"{self.path}: its list of documents is missing. Run `knnstore verify`.")
        rows = np.frombuffer(raw, "<u8").astype(np.int64)
        if not len(rows) or rows[0] != 0 or (np.diff(rows) <= 0).any() or rows[-1] >= self.n_rows:
            raise DamageError(f"{self.path}: its documents' first rows do not rise from 0 to {self.n_rows}. Run `knnstore verify`.")
        return rows

    def close(self) -> None:
        """Gives the file free."""
        self._release()

    def first_row_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first row of the document each row is in; any shape."""
        return self.first_rows[np.searchsorted(self.first_rows, rows, side="right") - 1]

    def document_at(self, first_row: int) -> DocumentRecord:
        """The record of the document that begins at first_row."""
        with self._reading(buffers=True) as transaction:
            packed = transaction.get(_ROW.pack(first_row), db=self._documents)
            if packed is None:
                raise DamageError(f"{self.path}: no document begins at row {first_row}. Run `knnstore verify`.")
            raw = self._decompress(packed, DOCUMENT_RECORD_MAX)
        return self._parse(raw, first_row)

    def _parse(self, raw: bytes, first_row: int) -> DocumentRecord:
        record = _parse_document(raw, first_row, str(self.path))
        at = int(np.searchsorted(self.first_rows, first_row, side="right"))
        stop = self.n_rows if at == len(self.first_rows) else int(self.first_rows[at])
        if self.first_rows[at - 1] != first_row or first_row + record.n_entries != stop:
            raise DamageError(f"{self.path}: the document at row {first_row} does not end where the next begins. Run `knnstore verify`.")
        return record

    def documents(self) -> Iterator[DocumentRecord]:
        """All records in row order."""
        with self._reading(buffers=True) as transaction, transaction.cursor(db=self._documents) as cursor:
            for key, packed in cursor:
                yield self._parse(self._decompress(packed, DOCUMENT_RECORD_MAX), _ROW.unpack(bytes(key))[0])

    def packed_records(self, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """First row and record, as it lies there, of each document that begins in the rows [first, stop)."""
        return self._packed(self._documents, first, stop)

    def packed_frames(self, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """First row and bytes, as they lie there, of each text frame that begins in the rows [first, stop)."""
        return self._packed(self._text, first, stop)

    def _packed(self, database: Any, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
        with self._reading() as transaction, transaction.cursor(db=database) as cursor:
            found = cursor.set_range(_ROW.pack(first))
            while found and (row := _ROW.unpack(cursor.key())[0]) < stop:
                yield row, cursor.value()
                found = cursor.next()

    def span(self, first: int, stop: int) -> Span | None:
        """Text and character offsets of the rows [first, stop) of one document; None where the segment has no text."""
        parts: list[tuple[int, NDArray[np.int64], NDArray[np.int64], str, int]] = []
        with self._reading(buffers=True) as transaction, transaction.cursor(db=self._text) as cursor:
            found = cursor.set_range(_ROW.pack(first))
            if not found or _ROW.unpack(bytes(cursor.key()))[0] > first:
                found = cursor.prev() if found else cursor.last()
            while found and (row := _ROW.unpack(bytes(cursor.key()))[0]) < stop:
                parts.append((row, *self._unpack_frame(self._decompress(cursor.value(), TEXT_FRAME_MAX))))
                found = cursor.next()
        if not parts or parts[0][0] + len(parts[0][1]) <= first:
            return None
        row = parts[0][0]
        if any(a[0] + len(a[1]) != b[0] for a, b in pairwise(parts)):
            raise DamageError(f"{self.path}: its text has gaps between rows {row} and {stop}. Run `knnstore verify`.")
        starts = np.concatenate([part[1] for part in parts])
        ends = np.concatenate([part[2] for part in parts])
        if len(starts) < stop - row:
            raise DamageError(f"{self.path}: its text ends before row {stop}. Run `knnstore verify`.")
        return Span("".join(part[3] for part in parts), parts[0][4], starts[first - row : stop - row], ends[first - row : stop - row])

    def frames(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], str, int]]:
        """Every frame in order: first row, starts, ends, text, index of the text's first character."""
        with self._reading(buffers=True) as transaction, transaction.cursor(db=self._text) as cursor:
            for key, packed in cursor:
                yield (_ROW.unpack(bytes(key))[0], *self._unpack_frame(self._decompress(packed, TEXT_FRAME_MAX)))

    def _decompress(self, packed: Any, most: int) -> bytes:
        try:
            size = zstandard.frame_content_size(packed)  # 0 of a frame that is to be skipped, which may claim any size
            if not 0 < size <= most:
                raise DamageError(f"{self.path}: a frame of {size} bytes, {most} are the most. Run `knnstore verify`.")
            return _decompressor().decompress(packed, max_output_size=most)
        except zstandard.ZstdError as error:
            raise DamageError(f"{self.path}: a frame does not decompress: {error}. Run `knnstore verify`.") from error

    def _unpack_frame(self, raw: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64], str, int]:
        if len(raw) < FRAME.size:
            raise DamageError(f"{self.path}: a text frame of {len(raw)} bytes. Run `knnstore verify`.")
        n, text_bytes, base, gap_width, length_width, _ = FRAME.unpack(raw[: FRAME.size])
        if base > _CHARACTERS_MAX:
            raise DamageError(f"{self.path}: a text frame that begins at character {base}. Run `knnstore verify`.")
        if max(gap_width, length_width) >= len(WIDTHS):
            raise DamageError(f"{self.path}: a text frame with integers of unknown width. Run `knnstore verify`.")
        gap_type, length_type = WIDTHS[gap_width], WIDTHS[length_width]
        at = FRAME.size + n * gap_type.itemsize
        stop = at + n * length_type.itemsize
        if len(raw) != stop + text_bytes:
            raise DamageError(f"{self.path}: a text frame whose sizes do not add up. Run `knnstore verify`.")
        zigzag = np.frombuffer(raw, gap_type, n, FRAME.size).astype(np.int64)
        lengths = np.frombuffer(raw, length_type, n, at).astype(np.int64)
        gaps = (zigzag >> 1) ^ -(zigzag & 1)
        ends = base + np.cumsum(gaps + lengths)
        try:
            text = raw[stop:].decode()
        except UnicodeDecodeError as error:
            raise DamageError(f"{self.path}: a text frame that is not UTF-8: {error}. Run `knnstore verify`.") from error
        starts = ends - lengths
        if n and (starts[0] < 0 or (ends < starts).any() or (np.diff(starts) < 0).any()):
            raise DamageError(f"{self.path}: the offsets of a text frame do not rise. Run `knnstore verify`.")
        return starts, ends, text, base


def _parse_document(raw: bytes, first_row: int, at: str) -> DocumentRecord:
    names = ("chars", "entries", "first_token", "hash", "id", "last", "metadata", "part", "prefix", "source")
    at = f"{at}: document at row {first_row}"
    fields = parse_object(parse_json_bytes(raw, at), at, required=names)
    prefix = tuple(parse_size(token, f"{at}.prefix") for token in parse_list(fields["prefix"], f"{at}.prefix"))
    return DocumentRecord(
        id=parse_text(fields["id"], f"{at}.id"),
        source=parse_text(fields["source"], f"{at}.source"),
        first_row=first_row,
        n_entries=parse_size(fields["entries"], f"{at}.entries"),
        prefix=prefix,
        metadata=parse_free(fields["metadata"], f"{at}.metadata"),
        content_hash=None if fields["hash"] is None else parse_hex(fields["hash"], f"{at}.hash", 64),
        n_chars=None if fields["chars"] is None else parse_size(fields["chars"], f"{at}.chars"),
        part=parse_size(fields["part"], f"{at}.part"),
        last=parse_flag(fields["last"], f"{at}.last"),
        first_token=parse_size(fields["first_token"], f"{at}.first_token"),
    )
