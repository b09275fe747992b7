"""How `contexts.lmdb` is written: documents in row order, their text cut into frames."""

from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import zstandard
from numpy.typing import NDArray

from knnstore.errors import DamageError, InvalidArgumentError, StorageError
from knnstore.format import DOCUMENT_RECORD_MAX, TEXT_FRAME_MAX, TEXT_FRAME_PACKED, TEXT_FRAME_RAW
from knnstore.storage.contexts import FRAME, WIDTHS, ContextsReader, DocumentRecord, id_hash, row_key
from knnstore.storage.files import adopt
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import DEPTH_MAX, is_too_deep

__all__ = ["ContextsWriter"]

_LEVEL = 12  # zstd: 2% larger than 19 and several times faster
_MAP_STEP = 1 << 28  # bytes the map grows by when it is full (address space, not disk)
_FEED = 8_192  # tokens looked at while a frame is cut
_COMMIT_BYTES = 1 << 26  # bytes put in one transaction: bounds its dirty pages


def _narrow(numbers: NDArray[np.int64]) -> tuple[int, bytes]:
    width = next(i for i, dtype in enumerate(WIDTHS) if not len(numbers) or int(numbers.max()) < 1 << 8 * dtype.itemsize)
    return width, numbers.astype(WIDTHS[width]).tobytes()


class ContextsWriter:
    """Writes one segment's documents in row order. Not durable until `finish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map_size = _MAP_STEP
        try:
            self._env = lmdb.open(
                str(path), subdir=False, map_size=self._map_size, max_dbs=2, lock=False, sync=False, metasync=False, writemap=False
            )
            self._documents, self._text = (self._env.open_db(name) for name in (b"documents", b"text"))
        except lmdb.Error as error:
            raise StorageError(f"{path}: cannot create: {error}. Check the path and its permissions.") from error
        self._pending: list[tuple[Any, bytes, bytes]] = []
        self._pending_bytes = 0
        self._first_rows: list[int] = []
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
        self._hashes: list[int] = []
        self._ratio = 0.5  # packed size over raw size so far: the first guess for the next frame
        self._frame = _OpenFrame()

    def add_tokens(self, first_row: int, starts: NDArray[np.int64], ends: NDArray[np.int64], text: str, text_start: int) -> None:
        """The next entries of the open document: character offsets (n,) in its whole text; text begins at character text_start.

        Calls follow each other without gaps in rows and text. An entry of no character (EOS) has start = end.
        """
        n, at = len(starts), 0
        for first in range(0, n, _FEED):  # in pieces, so that the cost of cutting frames does not grow with the call
            stop = min(first + _FEED, n)
            to = len(text) if stop == n else min(max(int(starts[stop]) - text_start, at), len(text))
            self._frame.extend(first_row + first, starts[first:stop], ends[first:stop], text[at:to], text_start + at)
            at = to
            while self._frame.raw_size() >= 2 * TEXT_FRAME_RAW:
                self._put_frame()

    def end_document(self, record: DocumentRecord) -> None:
        """Ends the open document (or part): its last frames, its record. Raises InvalidArgumentError for metadata that is not JSON."""
        while self._frame.n_tokens:
            self._put_frame()
        self._frame = _OpenFrame()
        fields = {
            "chars": record.n_chars,
            "entries": record.n_entries,
            "first_token": record.first_token,
            "hash": record.content_hash,
            "id": record.id,
            "last": record.last,
            "metadata": record.metadata,
            "part": record.part,
            "prefix": list(record.prefix),
            "source": record.source,
        }
        try:
            raw = canonical(fields)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgumentError(
                f"document {record.id!r}: its metadata is not JSON: {error}. Use strings, numbers and lists."
            ) from error
        if is_too_deep(record.metadata):
            raise InvalidArgumentError(f"document {record.id!r}: its metadata is nested more than {DEPTH_MAX} deep. Make it flatter.")
        if len(raw) > DOCUMENT_RECORD_MAX:
            raise InvalidArgumentError(f"document {record.id!r}: metadata of {len(raw)} bytes; {DOCUMENT_RECORD_MAX} are the most.")
        key = row_key(record.first_row)
        self._put(self._documents, key, self._zstd.compress(raw))
        self._hashes.append(id_hash(record.id))
        self._first_rows.append(record.first_row)

    def copy_documents(self, reader: ContextsReader, first: int, stop: int, hashes: NDArray[np.uint64], to_row: int) -> None:
        """The documents of another file in the rows [first, stop), with their text, as they lie there: no record or frame holds a row.

        hashes: (m,) u64, `id_hash` of each of them. They begin at to_row here. Raises DamageError where the file has another number.
        """
        rows = []
        for row, record in reader.packed_records(first, stop):
            rows.append(to_row + row - first)
            self._put(self._documents, row_key(rows[-1]), record)
        if len(rows) != len(hashes):
            raise DamageError(f"{reader.path}: {len(rows)} documents where {len(hashes)} are expected. Run `knnstore verify`.")
        for row, frame in reader.packed_frames(first, stop):
            self._put(self._text, row_key(to_row + row - first), frame)
        self._hashes += hashes.tolist()
        self._first_rows += rows

    def id_table(self) -> NDArray[np.uint64]:
        """Hash of the id and first row of each document so far, (m, 2), sorted: the rows of `ids.bin`."""
        table = np.stack((np.array(self._hashes, np.uint64), np.array(self._first_rows, np.uint64)), axis=1)
        return table[np.argsort(table[:, 0], kind="stable")]  # first rows rise already

    def finish(self) -> None:
        """Writes what is left, closes, and makes the file durable. The file has no lock file and no free pages to speak of."""
        self._put(None, b"first_rows", np.array(self._first_rows, "<u8").tobytes())
        self._flush()
        self._env.close()
        adopt(self.path)

    def close(self) -> None:
        """Gives up an unfinished file."""
        self._env.close()

    def _put_frame(self) -> None:
        frame = self._frame
        n = frame.n_tokens
        while True:
            n = frame.fitting(n, int(TEXT_FRAME_PACKED / self._ratio))
            raw = frame.pack(n)
            packed = self._zstd.compress(raw)
            self._ratio = 0.9 * self._ratio + 0.1 * len(packed) / len(raw)
            excess = max(len(packed) / TEXT_FRAME_PACKED, len(raw) / TEXT_FRAME_RAW)
            if excess <= 1 or n == 1:
                break
            n = max(1, min(n - 1, int(n / excess)))
        if len(raw) > TEXT_FRAME_MAX:
            raise InvalidArgumentError(f"{self.path}: a token spans {len(raw)} bytes of text; {TEXT_FRAME_MAX} are the most.")
        self._put(self._text, row_key(frame.first_row), packed)
        frame.drop(n)

    def _put(self, database: Any, key: bytes, content: bytes) -> None:
        self._pending.append((database, key, content))
        self._pending_bytes += len(content) + len(key)
        if self._pending_bytes > _COMMIT_BYTES:
            self._flush()

    def _flush(self) -> None:
        pending = sorted(self._pending, key=lambda item: (id(item[0]), item[1]))
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for database, key, content in pending:
                        added = transaction.put(key, content, db=database, append=database is not None)
                        assert added, "rows rise, and no two documents begin at the same one"
                break
            except lmdb.MapFullError:
                self._map_size += max(_MAP_STEP, 2 * self._pending_bytes)
                self._env.set_mapsize(self._map_size)
            except lmdb.Error as error:
                raise StorageError(f"{self.path}: cannot write: {error}. Free some space and try again.") from error
        self._pending, self._pending_bytes = [], 0


class _OpenFrame:
    """Entries and text of the open document that are not in a frame yet."""

    def __init__(self) -> None:
        self.first_row = 0
        self.starts = np.zeros(0, np.int64)
        self.ends = np.zeros(0, np.int64)
        self.text = ""
        self.base = 0  # character index of text[0] in the document

    @property
    def n_tokens(self) -> int:
        return len(self.starts)

    def raw_size(self) -> int:
        return 2 * self.n_tokens + len(self.text)

    def extend(self, first_row: int, starts: NDArray[np.int64], ends: NDArray[np.int64], text: str, text_start: int) -> None:
        if not self.n_tokens:
            self.first_row = first_row
        if not self.n_tokens and not self.text:
            self.base = text_start
        self.starts = np.concatenate((self.starts, starts))
        self.ends = np.concatenate((self.ends, ends))
        self.text += text

    def _text_stop(self, n: int) -> int:
        """Where the text of a frame of n tokens ends: at the next token's first character, or with the text."""
        if n >= self.n_tokens:
            return self.base + len(self.text)
        return min(max(int(self.starts[n]), self.base), self.base + len(self.text))

    def fitting(self, most: int, raw_bytes: int) -> int:
        """About the most tokens, up to `most`, whose frame has raw_bytes and 4 KiB at most; not cut within a character; at least 1."""
        limit = min(raw_bytes, TEXT_FRAME_RAW) - FRAME.size
        sizes = 2 * np.arange(1, self.n_tokens + 1) + (np.append(self.starts[1:], self.base + len(self.text)) - self.base)
        n = min(most, max(1, int(np.searchsorted(np.maximum.accumulate(sizes), limit, side="right"))))
        cut = n
        while 1 < cut < self.n_tokens and self.starts[cut] < self.ends[cut - 1]:
            cut -= 1  # tokens of one character (an emoji in bytes) stay in one frame
        return cut if cut > 1 or n == 1 else n

    def pack(self, n: int) -> bytes:
        """The raw frame of the first n tokens (docs/format-v1.md, "Text frames")."""
        starts, ends = self.starts[:n], self.ends[:n]
        gaps = starts - np.concatenate(([self.base], ends[:-1]))
        gap_width, gap_bytes = _narrow((gaps << 1) ^ (gaps >> 63))  # zigzag: a gap is negative where tokens share a character
        length_width, length_bytes = _narrow(ends - starts)
        text = self.text[: self._text_stop(n) - self.base].encode()
        head = FRAME.pack(n, len(text), self.base, gap_width, length_width, 0)
        return head + gap_bytes + length_bytes + text

    def drop(self, n: int) -> None:
        stop = self._text_stop(n)
        self.text = self.text[stop - self.base :]
        self.base = stop
        self.first_row += n
        self.starts, self.ends = self.starts[n:], self.ends[n:]
