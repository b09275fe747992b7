"""How a segment is written: in three phases, each of which can be continued after a kill.

The documents (`DocumentsWriter`), the codes of their rows in any order (`CodesWriter`), the lists (`finish_segment`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from knnstore.errors import InvalidArgumentError
from knnstore.format import (
    CONTEXTS_FILE,
    DIRECTORY_FILE,
    HEADER_SIZE,
    IDS_FILE,
    KEYS_FILE,
    LISTS_FILE,
    MAX_VOCABULARY,
    NUMPY_TYPES,
    ROW_BITS,
    SEGMENT_FILE,
    SLOT_BITS,
    VALUES_FILE,
    DType,
    Header,
    Kind,
    aligned,
    parse_header,
)
from knnstore.storage.arrays import MappedArray, checksums, map_file, to_bfloat16
from knnstore.storage.coarse import Coarse
from knnstore.storage.contexts import ContextsReader, DocumentRecord
from knnstore.storage.contexts_writer import ContextsWriter
from knnstore.storage.files import ArrayFile, FileWriter, disk, replace_file, sha256_file
from knnstore.storage.lists import write_lists
from knnstore.storage.manifest import FileRecord, SegmentContent, WindowRule
from knnstore.storage.manifest_json import canonical, segment_content_fields
from knnstore.storage.segment import read_segment_content
from knnstore.storage.space import Space

__all__ = ["CodesWriter", "DocumentsWriter", "finish_segment", "label_base", "tidy_segment", "written_codes"]

_KEY_TYPES = {"f16": DType.F16, "bf16": DType.BF16, "f32": DType.F32}
_CODES = "codes.tmp"
_LISTS = "assigned.tmp"
_JOURNAL = "journal"


class DocumentsWriter:
    """Phase 1: values.bin, contexts.lmdb and ids.bin, in row order."""

    def __init__(self, folder: Path, *, uuid: str, vocab_size: int) -> None:
        """Begins anew in the folder. Raises InvalidArgumentError where the vocabulary does not fit a label."""
        if not 0 < vocab_size <= MAX_VOCABULARY:
            raise InvalidArgumentError(f"vocab_size {vocab_size}: a label holds 24 bits of token, so at most {MAX_VOCABULARY}.")
        disk.remove_tree(folder)
        disk.make_folder(folder)
        self.folder, self.uuid, self.vocab_size = folder, uuid, vocab_size
        self._dtype = DType.U16 if vocab_size <= 1 << 16 else DType.U32
        self._values = FileWriter(folder / VALUES_FILE, header_size=HEADER_SIZE)
        self._contexts = ContextsWriter(folder / CONTEXTS_FILE)
        self._first_row = 0
        self.n_rows = 0
        self.n_documents = 0
        self.text = False

    def add(
        self,
        values: NDArray[Any],
        *,
        starts: NDArray[np.int64] | None = None,
        ends: NDArray[np.int64] | None = None,
        text: str = "",
        text_start: int = 0,
    ) -> None:
        """The next entries of the open document: token ids (n,), and where there is text, their character offsets in it."""
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.vocab_size:
            raise InvalidArgumentError(f"token ids {values.min()} to {values.max()}: the vocabulary has {self.vocab_size}.")
        self._values.write(np.ascontiguousarray(values, dtype=NUMPY_TYPES[self._dtype]))
        if starts is not None and ends is not None:
            self._contexts.add_tokens(self.n_rows, starts, ends, text, text_start)
            self.text = True
        self.n_rows += len(values)

    def end_document(self, **fields: Any) -> None:
        """Ends the open document; fields: those of `DocumentRecord` but first_row and n_entries."""
        record = DocumentRecord(first_row=self._first_row, n_entries=self.n_rows - self._first_row, **fields)
        assert record.n_entries > 0, "a document without entries has no place in a segment"
        self._contexts.end_document(record)
        self._first_row = self.n_rows
        self.n_documents += 1

    def copy_documents(self, values: NDArray[Any], reader: ContextsReader, first: int, stop: int, hashes: NDArray[np.uint64]) -> None:
        """The documents (or parts) of another segment in the rows [first, stop), as they are there.

        values: (stop - first,) token ids; reader: its contexts; hashes: (m,) u64, those of their ids in row order.
        """
        self._values.write(np.ascontiguousarray(values, dtype=NUMPY_TYPES[self._dtype]))
        self._contexts.copy_documents(reader, first, stop, hashes, self.n_rows)
        self.n_rows += len(values)
        self._first_row = self.n_rows
        self.n_documents += len(hashes)

    def finish(self) -> None:
        """Makes the files durable."""
        self._finish_array(self._values, self._dtype, self.n_rows, 1, Kind.VALUES)
        table = self._contexts.id_table()
        with FileWriter(self.folder / IDS_FILE, header_size=HEADER_SIZE) as ids:
            ids.write(np.ascontiguousarray(table, "<u8"))
            self._finish_array(ids, DType.U64, len(table), 2, Kind.IDS)
        self._contexts.finish()
        disk.sync_folder(self.folder)

    def _finish_array(self, writer: FileWriter, dtype: DType, rows: int, columns: int, kind: Kind) -> None:
        end = writer.position
        writer.pad_to(aligned(end))
        checks = checksums(map_file(writer.path)[HEADER_SIZE:end])
        writer.write(checks)
        owner, check = bytes.fromhex(self.uuid), xxhash.xxh3_64_intdigest(checks)
        writer.finish(Header(kind=kind, dtype=dtype, rows=rows, columns=columns, owner=owner, check=check).pack())

    def close(self) -> None:
        """Gives up what is not finished."""
        self._values.close()
        self._contexts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class CodesWriter:
    """Phase 2: codes, lists and kept keys of the rows, in any order. `save` makes durable what came before and records it."""

    def __init__(self, folder: Path, *, n_rows: int, space: Space, keys: str | None) -> None:
        """Continues where a killed process saved last: `done` (n_rows,) bool tells which rows are there."""
        self.folder, self.space, self.keys = folder, space, keys
        self.done = np.zeros(n_rows, dtype=bool)
        self.distortion_sum, self.distortion_count = 0.0, 0
        self._journal_path = folder / _JOURNAL
        self._codes = ArrayFile(folder / _CODES, row_bytes=space.code_size)
        self._lists = ArrayFile(folder / _LISTS, row_bytes=4)
        self._codes.resize(n_rows)
        self._lists.resize(n_rows)
        self._keys: ArrayFile | None = None
        if keys is not None:
            self._keys = ArrayFile(folder / KEYS_FILE, row_bytes=space.dim * NUMPY_TYPES[_KEY_TYPES[keys]].itemsize, offset=HEADER_SIZE)
            self._keys.resize(n_rows)
        self._unsaved: list[tuple[int, int]] = []
        self._replay()
        self._journal = ArrayFile(self._journal_path, row_bytes=1)
        self._journal.resize(self._journal_size)

    def _replay(self) -> None:
        """Reads the journal up to its first torn line."""
        self._journal_size = 0
        if not self._journal_path.exists():
            return
        for line in self._journal_path.read_bytes().splitlines(keepends=True):
            body = line[17:-1]
            if not line.endswith(b"\n") or line[:16] != xxhash.xxh3_64_hexdigest(body).encode():
                break
            entry = json.loads(body)
            for first, n in entry["rows"]:
                self.done[first : first + n] = True
            self.distortion_sum += entry["distortion"]
            self.distortion_count += entry["measured"]
            self._journal_size += len(line)
        self._saved_sum, self._saved_count = self.distortion_sum, self.distortion_count

    _saved_sum, _saved_count = 0.0, 0

    def put(self, first_row: int, codes: NDArray[np.uint8], lists: NDArray[np.uint32], keys: NDArray[np.float32] | None) -> None:
        """Consecutive rows: codes (n, code_size) u8, lists (n,) u32, keys (n, dim) float32 where they are kept."""
        self._codes.put(first_row, codes)
        self._lists.put(first_row, np.ascontiguousarray(lists, dtype="<u4"))
        if self._keys is not None and keys is not None:
            self._keys.put(first_row, stored_keys(keys, self.keys or ""))
        self.done[first_row : first_row + len(codes)] = True
        self._unsaved.append((first_row, len(codes)))

    def measured(self, distortion_sum: float, count: int) -> None:
        """Adds squared distances between keys and their decoded codes: their sum, and how many."""
        self.distortion_sum += distortion_sum
        self.distortion_count += count

    def trim(self, n_rows: int) -> None:
        """Cuts the files to the rows there are, where fewer came than were allowed for."""
        for file in (self._codes, self._lists, self._keys):
            if file is not None:
                file.resize(n_rows)

    def save(self) -> None:
        """Makes all rows put so far durable. A kill later loses only what comes after."""
        if not self._unsaved:
            return
        for file in (self._codes, self._lists, self._keys):
            if file is not None:
                file.sync()
        if not self._journal_size:
            disk.sync_folder(self.folder)  # their names, before the journal counts on them
        entry = {
            "distortion": self.distortion_sum - self._saved_sum,
            "measured": self.distortion_count - self._saved_count,
            "rows": _joined(self._unsaved),
        }
        body = json.dumps(entry).encode()
        line = xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"
        self._journal.put(self._journal_size, np.frombuffer(line, np.uint8))
        self._journal.sync()
        self._journal_size += len(line)
        self._saved_sum, self._saved_count = self.distortion_sum, self.distortion_count
        self._unsaved = []

    def close(self) -> None:
        for file in (self._codes, self._lists, self._keys, self._journal):
            if file is not None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _joined(runs: Sequence[tuple[int, int]]) -> list[list[int]]:
    joined: list[list[int]] = []
    for first, n in sorted(runs):
        if joined and joined[-1][0] + joined[-1][1] == first:
            joined[-1][1] += n
        else:
            joined.append([first, n])
    return joined


_LARGEST_KEY = {"f16": 65_504.0, "bf16": 255 * 2.0**120, "f32": np.inf}  # finite numbers that do not become infinity


def stored_keys(keys: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Keys as they are kept: `f16`, `bf16` or `f32`. Raises InvalidArgumentError where one is too large for that."""
    largest = float(np.abs(keys).max(initial=0))
    if largest > _LARGEST_KEY[kind]:
        raise InvalidArgumentError(
            f"a key has {largest:.6g}, more than {kind} holds ({_LARGEST_KEY[kind]:.6g}). Keep keys in a wider type."
        )
    if kind == "bf16":
        return to_bfloat16(keys)
    return np.ascontiguousarray(keys, dtype=NUMPY_TYPES[_KEY_TYPES[kind]])


def finish_segment(
    folder: Path,
    *,
    uuid: str,
    n_documents: int,
    text: bool,
    space: Space,
    coarse: Coarse | None,
    keys: str | None,
    distortion: float,
    dtype: str | None,
    windows: WindowRule | None,
    lists_record: FileRecord | None = None,
) -> SegmentContent:
    """Phase 3: the lists from the codes of all rows, then segment.json. Temporary files are removed. Continues after a kill.

    lists_record: of lists.bin, where it and lists.dir are written already (with `label_base`).
    """
    owner = bytes.fromhex(uuid)
    values, values_dtype = _finished_values(folder, owner)
    n_rows = len(values)
    nlist = 1 if coarse is None else coarse.nlist
    base = label_base(uuid, n_rows)
    if lists_record is None:
        codes = written_codes(folder, space=space, n_rows=n_rows)
        lists = None if coarse is None else _mapped(folder / _LISTS, np.dtype("<u4"))
        write_lists(folder, space=space, owner=owner, codes=codes, lists=lists, nlist=nlist, values=values, base=base)
    names = [LISTS_FILE, DIRECTORY_FILE, VALUES_FILE, CONTEXTS_FILE, IDS_FILE]
    if keys is not None:
        _finish_keys(folder / KEYS_FILE, _KEY_TYPES[keys], n_rows, space.dim, owner)
        names.append(KEYS_FILE)
    files = []
    for name in names:
        if lists_record is not None and name == LISTS_FILE:
            files.append(lists_record)
            continue
        size, sha256 = sha256_file(folder / name)
        files.append(FileRecord(name=name, size=size, sha256=sha256))
    content = SegmentContent(
        uuid=uuid,
        space=space.id,
        coarse=None if coarse is None else coarse.id,
        nlist=nlist,
        entries=n_rows,
        documents=n_documents,
        values=values_dtype.name.lower(),
        keys=keys,
        text=text,
        dtype=dtype,
        windows=windows,
        distortion=distortion,
        files=tuple(files),
        label_base=base,
    )
    disk.sync_folder(folder)  # segment.json's name must not outlast a power cut that others do not
    replace_file(folder / SEGMENT_FILE, canonical(segment_content_fields(content)))
    tidy_segment(folder)
    return content


def label_base(uuid: str, n_rows: int) -> int:
    """What the labels of a segment say row 0 is: drawn by its uuid, so that labels of several segments hardly ever meet."""
    slots = (1 << (ROW_BITS - SLOT_BITS)) - (n_rows >> SLOT_BITS) - 1
    return int(uuid[:16], 16) % max(1, slots) << SLOT_BITS


def tidy_segment(folder: Path) -> None:
    """Removes from a finished segment what only its job needed. Call it again where a kill may have come between."""
    content, _ = read_segment_content(folder)
    kept = {SEGMENT_FILE, *(file.name for file in content.files)}
    disk.sync_folder(folder)  # a kill may have come before segment.json's name was durable
    for child in folder.iterdir():
        if child.name not in kept:
            disk.remove(child)
    disk.sync_folder(folder)


def written_codes(folder: Path, *, space: Space, n_rows: int) -> NDArray[np.uint8]:
    """What a `CodesWriter` has put in a folder, (n_rows, code_size) u8, mapped."""
    return _mapped(folder / _CODES, np.dtype("u1")).reshape(n_rows, space.code_size)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return map_file(path).view(dtype)


def _finished_values(folder: Path, owner: bytes) -> tuple[NDArray[Any], DType]:
    path = folder / VALUES_FILE
    header = parse_header(map_file(path)[:HEADER_SIZE].tobytes(), str(path), kind=Kind.VALUES, owner=owner)
    array = MappedArray(path, kind=Kind.VALUES, owner=owner, n_rows=header.rows)
    return array.rows(0, header.rows)[:, 0], header.dtype


def _finish_keys(path: Path, dtype: DType, n_rows: int, dim: int, owner: bytes) -> None:
    end = HEADER_SIZE + n_rows * dim * NUMPY_TYPES[dtype].itemsize
    checks = checksums(map_file(path)[HEADER_SIZE:end])
    with ArrayFile(path, row_bytes=1) as file:
        file.resize(aligned(end) + checks.nbytes)
        file.put(aligned(end), checks.view(np.uint8))
        header = Header(kind=Kind.KEYS, dtype=dtype, rows=n_rows, columns=dim, owner=owner, check=xxhash.xxh3_64_intdigest(checks))
        file.put_header(header.pack())
        file.sync()
