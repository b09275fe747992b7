"""What `verify` checks in a segment's folder: its files one by one, and that lists and values tell the same entries."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from knnstore.format import (
    ALIGNMENT,
    BLOCK_ENTRIES,
    CONTEXTS_FILE,
    DIRECTORY_FILE,
    HEADER_SIZE,
    IDS_FILE,
    KEYS_FILE,
    LISTS_FILE,
    MANIFEST_MAX,
    NUMPY_TYPES,
    SEGMENT_FILE,
    VALUES_BLOCK,
    VALUES_FILE,
    Codec,
    DType,
    Header,
    Kind,
    aligned,
)
from knnstore.storage.arrays import blocked_size
from knnstore.storage.blocks import block_bytes
from knnstore.storage.manifest import FileRecord, SegmentRecord
from knnstore.storage.manifest_json import parse_segment_content
from knnstore.storage.parse import parse_json_bytes
from knnstore.verification.contexts import DocumentRows, OpenParts, check_contexts
from knnstore.verification.files import (
    FindingError,
    Findings,
    check_header,
    check_plain,
    check_size,
    file_reading,
    open_plain,
)
from knnstore.verification.lists import Extents, ListsWalk

__all__ = ["ExpectedSegment", "SegmentCheck"]

_KEY_TYPES = {"f16": DType.F16, "bf16": DType.BF16, "f32": DType.F32}
_VALUE_TYPES = {"u16": DType.U16, "u32": DType.U32}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedSegment:
    """What a manifest says of a segment, its space and its vocabulary."""

    record: SegmentRecord
    codec: Codec
    n_sub: int
    dim: int
    vocab_size: int

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry's code as it lies in a list."""
        if self.codec is Codec.PQ4:
            return block_bytes(self.n_sub) // BLOCK_ENTRIES
        return 4 * self.dim if self.codec is Codec.RAW else self.n_sub


class SegmentCheck:
    """Checks one segment. Memory: 8 bytes an entry (its values, and the tokens of its labels) and a list directory."""

    def __init__(self, findings: Findings, folder: Path, expected: ExpectedSegment, parts: OpenParts, *, full: bool) -> None:
        self._findings, self._folder, self._expected, self._parts, self._full = findings, folder, expected, parts, full
        self._content = expected.record.content
        self._owner = bytes.fromhex(self._content.uuid)
        self._records = {record.name: record for record in self._content.files}

    def run(self) -> DocumentRows | None:
        """Where its documents are, if `contexts.lmdb` was read (level full) and is sound."""
        self._check_record()
        values = self._check_values()
        self._check_lists(self._check_directory(), values)
        del values
        self._check_keys()
        ids = self._check_ids()
        documents = self._check_contexts()
        if documents is not None and ids is not None:
            with self._findings.of(self._folder / IDS_FILE):
                if not np.array_equal(ids, documents.id_table()):
                    raise FindingError("content", "it does not lead to the documents in contexts.lmdb")
        return documents

    def _record(self, name: str) -> FileRecord:
        record = self._records.get(name)
        if record is None:
            raise FindingError("content", "the manifest does not name this file among those of the segment")
        return record

    def _check_record(self) -> None:
        """segment.json says what the manifest says."""
        path = self._folder / SEGMENT_FILE
        with self._findings.of(path):
            size = check_plain(path).st_size
            if size > MANIFEST_MAX:
                raise FindingError("size", f"{size} bytes, {MANIFEST_MAX} are the most such a file may have")
            record = FileRecord(name=SEGMENT_FILE, size=size, sha256=self._expected.record.sha256)
            with file_reading(self._findings, self._folder, record) as file:
                raw = file.whole()
            if parse_segment_content(parse_json_bytes(raw, str(path)), str(path)) != self._content:
                raise FindingError("content", "it does not say of the segment what the manifest says")

    def _check_blocked(
        self,
        name: str,
        *,
        kind: Kind,
        dtype: DType,
        columns: int,
        n_rows: int | None = None,
        take: Callable[[int, memoryview], None] | None = None,
    ) -> bool:
        """A long array: header, rows, zeros, a checksum for each block of rows. n_rows: None for one an entry. take: given the place and
        bytes of each piece.

        Returns whether all of it is sound (at level quick: header and checksums).
        """
        path, n_rows = self._folder / name, self._content.entries if n_rows is None else n_rows
        row_bytes = columns * NUMPY_TYPES[dtype].itemsize
        body, checks = n_rows * row_bytes, 8 * -(-n_rows * row_bytes // VALUES_BLOCK)
        with self._findings.of(path) as outcome:
            record = self._record(name)
            if record.size != blocked_size(n_rows, row_bytes):
                raise FindingError("content", f"{record.size} bytes are recorded, {n_rows} rows take {blocked_size(n_rows, row_bytes)}")
            expected = Header(kind=kind, owner=self._owner, dtype=dtype, rows=n_rows, columns=columns)
            if not self._full:
                with open_plain(path) as fd:
                    raw, table = self._ends(fd, record, HEADER_SIZE, checks)
                if xxhash.xxh3_64_intdigest(table) != check_header(raw, path, expected).check:
                    raise FindingError("checksum", "its table of checksums is damaged")
                return True
            with file_reading(self._findings, self._folder, record) as file:
                header = check_header(bytes(file.read(HEADER_SIZE)), path, expected)
                found: list[int] = []
                at = 0
                for piece in file.pieces(body):
                    found += [xxhash.xxh3_64_intdigest(piece[i : i + VALUES_BLOCK]) for i in range(0, len(piece), VALUES_BLOCK)]
                    if take is not None:
                        take(at, piece)
                    at += len(piece)
                padding = bytes(file.read(aligned(HEADER_SIZE + body) - HEADER_SIZE - body))
                table = file.whole()
                if xxhash.xxh3_64_intdigest(table) != header.check:
                    file.damaged.append("its table of checksums")
                else:
                    differ = np.array(found, np.uint64) != np.frombuffer(table, "<u8")
                    file.damaged += [f"block {block} of 64 KiB" for block in np.flatnonzero(differ).tolist()]
                if any(padding):
                    file.damaged.append("the zeros after its rows")
        return outcome.sound

    def _ends(self, fd: int, record: FileRecord, head: int, tail: int) -> tuple[bytes, bytes]:
        """First and last bytes of a file of the size recorded."""
        check_size(os.fstat(fd).st_size, record)
        pieces = os.pread(fd, head, 0), os.pread(fd, tail, record.size - tail)
        if (len(pieces[0]), len(pieces[1])) != (head, tail):
            raise FindingError("size", "it was cut while it was read")
        self._findings.checked(head + tail)
        return pieces

    def _check_values(self) -> NDArray[np.generic] | None:
        """The values (n,), where they are sound and were read."""
        dtype = _VALUE_TYPES[self._content.values]
        path = self._folder / VALUES_FILE
        raw: NDArray[np.uint8] | None = None

        def take(at: int, piece: memoryview) -> None:
            nonlocal raw
            if raw is None:  # only now is it known that the file has the size recorded
                raw = np.empty(self._content.entries * NUMPY_TYPES[dtype].itemsize, np.uint8)
            raw[at : at + len(piece)] = np.frombuffer(piece, np.uint8)

        sound = self._check_blocked(VALUES_FILE, kind=Kind.VALUES, dtype=dtype, columns=1, take=take)
        if not sound or raw is None:
            return None
        values = raw.view(NUMPY_TYPES[dtype])
        with self._findings.of(path):
            beyond = int(np.count_nonzero(values >= self._expected.vocab_size))
            if beyond:
                raise FindingError("content", f"{beyond} token ids are not below the vocabulary's {self._expected.vocab_size}")
        return values

    def _check_ids(self) -> NDArray[np.uint64] | None:
        """The table of `ids.bin`, (m, 2) u64, where it is sound and was read."""
        pieces: list[bytes] = []
        n_rows = self._content.documents
        sound = self._check_blocked(
            IDS_FILE, kind=Kind.IDS, dtype=DType.U64, columns=2, n_rows=n_rows, take=lambda _, piece: pieces.append(bytes(piece))
        )
        return np.frombuffer(b"".join(pieces), "<u8").reshape(-1, 2) if sound and self._full else None

    def _check_keys(self) -> None:
        if self._content.keys is not None:
            self._check_blocked(KEYS_FILE, kind=Kind.KEYS, dtype=_KEY_TYPES[self._content.keys], columns=self._expected.dim)

    def _check_directory(self) -> NDArray[np.uint64] | None:
        """The list directory, (nlist, 3) u64: entries, offset, checksum; None where it is damaged. Read at both levels."""
        path, nlist = self._folder / DIRECTORY_FILE, self._content.nlist
        directory: NDArray[np.uint64] | None = None
        with self._findings.of(path) as outcome:
            record = self._record(DIRECTORY_FILE)
            if record.size != HEADER_SIZE + 24 * nlist:
                raise FindingError("content", f"{record.size} bytes are recorded, {nlist} lists take {HEADER_SIZE + 24 * nlist}")
            with file_reading(self._findings, self._folder, record) as file:
                raw = file.whole()
                expected = Header(
                    kind=Kind.DIRECTORY, owner=self._owner, dtype=DType.U64, rows=nlist, columns=3, codec=self._expected.codec
                )
                header = check_header(raw, path, expected)
                if xxhash.xxh3_64_intdigest(raw[HEADER_SIZE:]) != header.check:
                    file.damaged.append("its table")
            directory = np.frombuffer(raw, "<u8", offset=HEADER_SIZE).reshape(nlist, 3)
            self._check_extents(directory)
        return directory if outcome.sound else None

    def _check_extents(self, directory: NDArray[np.uint64]) -> None:
        """Lists add up to the entries, and lie in `lists.bin` one beside the other."""
        n_entries, size = self._content.entries, self._record(LISTS_FILE).size
        sizes, offsets = directory[:, 0], directory[:, 1]
        if (sizes > n_entries).any() or (offsets > size).any():
            raise FindingError("content", f"a list has more than {n_entries} entries, or begins after the {size} bytes of lists.bin")
        if int(sizes.sum()) != n_entries:
            raise FindingError("content", f"its lists have {int(sizes.sum())} entries, the segment has {n_entries}")
        extents = Extents(directory, self._expected.entry_bytes)
        bounds = np.concatenate(([HEADER_SIZE], extents.ends))
        if (extents.offsets % ALIGNMENT).any() or (extents.offsets < bounds[:-1]).any() or bounds[-1] > size:
            raise FindingError("content", "its lists overlap, are not at multiples of 64, or reach beyond the end of lists.bin")

    def _check_lists(self, directory: NDArray[np.uint64] | None, values: NDArray[np.generic] | None) -> None:
        path, codec, width, n_entries = self._folder / LISTS_FILE, self._expected.codec, self._expected.entry_bytes, self._content.entries
        expected = Header(kind=Kind.LISTS, owner=self._owner, dtype=DType.U8, codec=codec, rows=n_entries, columns=width)
        with self._findings.of(path):
            record = self._record(LISTS_FILE)
            if not self._full:
                with open_plain(path) as fd:
                    check_header(self._ends(fd, record, HEADER_SIZE, 0)[0], path, expected)
                return
            with file_reading(self._findings, self._folder, record) as file:
                check_header(bytes(file.read(HEADER_SIZE)), path, expected)
                if directory is None:
                    return
                walk = ListsWalk(directory, width, n_entries, base=self._content.label_base, in_row_order=codec is Codec.RAW)
                for piece in file.pieces(file.left):
                    walk.take(file.position - len(piece), piece)
                file.damaged += walk.damaged
            walk.conclude(values)

    def _check_contexts(self) -> DocumentRows | None:
        path = self._folder / CONTEXTS_FILE
        with self._findings.of(path) as outcome:
            record = self._record(CONTEXTS_FILE)
            if not self._full:
                check_size(check_plain(path).st_size, record)
                return None
            with file_reading(self._findings, self._folder, record):
                pass
        if not outcome.sound:  # a damaged page of LMDB can end the process
            return None
        rows: DocumentRows | None = None
        with self._findings.of(path) as outcome:
            rows = check_contexts(path, self._expected.record, vocab_size=self._expected.vocab_size, parts=self._parts)
        return rows if outcome.sound else None
