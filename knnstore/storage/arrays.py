"""Arrays on disk: small ones that are read whole (`write_array`, `read_array`), long ones that are mapped (`MappedArray`).

A long one carries a checksum for each block of 64 KiB, looked at when a process first touches that block.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from knnstore.errors import DamageError, StorageError
from knnstore.format import HEADER_SIZE, NUMPY_TYPES, VALUES_BLOCK, Codec, DType, Header, Kind, aligned, parse_header
from knnstore.storage.files import FileWriter
from knnstore.storage.parse import NOT_PLAIN

__all__ = ["MappedArray", "checksums", "map_file", "read_array", "to_bfloat16", "to_float32", "write_array"]

Array = NDArray[Any]

_TYPES: dict[Kind, tuple[DType, ...]] = {  # of the elements of each kind of array
    Kind.DIRECTORY: (DType.U64,),
    Kind.VALUES: (DType.U16, DType.U32),
    Kind.KEYS: (DType.F16, DType.BF16, DType.F32),
    Kind.ROTATION: (DType.F32,),
    Kind.CENTROIDS: (DType.F32,),
    Kind.COARSE: (DType.F32,),
    Kind.IDS: (DType.U64,),
}


def to_bfloat16(keys: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to nearest even bfloat16, as the upper 16 bits. Finite input only."""
    bits = np.ascontiguousarray(keys, dtype="<f4").view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def to_float32(stored: Array, dtype: DType) -> NDArray[np.float32]:
    """Stored elements (F16, BF16 or F32) as float32."""
    if dtype is DType.BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(stored, dtype=np.float32)


def map_file(path: Path, size: int | None = None) -> NDArray[np.uint8]:
    """A file's bytes, mapped read-only; (size,) u8. A file of another size than expected is refused before it is mapped.

    Raises DamageError if it is missing, not a plain file, or not of that size.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise DamageError(f"{path}: the file is missing. Run `knnstore verify`.") from error
    except OSError as error:
        if error.errno in NOT_PLAIN:
            raise DamageError(f"{path}: not a plain file. Run `knnstore verify`.") from error
        raise StorageError(f"{path}: cannot read: {error.strerror}. Check the path and its permissions.") from error
    try:
        status = os.fstat(fd)
        if not os.path.isfile(path):  # noqa: PTH113 - one system call on a name already opened
            raise DamageError(f"{path}: not a plain file. Run `knnstore verify`.")
        if size is not None and status.st_size != size:
            raise DamageError(f"{path}: {status.st_size} bytes where the manifest says {size}. Run `knnstore verify`.")
        if status.st_size == 0:
            return np.zeros(0, np.uint8)
        return np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    finally:
        os.close(fd)


def write_array(path: Path, array: Array, *, kind: Kind, dtype: DType, owner: bytes, codec: Codec = Codec.NONE) -> None:
    """Writes a two-dimensional array whole: header (check: xxh3-64 of the data), then the data."""
    stored = np.ascontiguousarray(array, dtype=NUMPY_TYPES[dtype])
    header = Header(
        kind=kind,
        codec=codec,
        dtype=dtype,
        rows=stored.shape[0],
        columns=stored.shape[1],
        owner=owner,
        check=xxhash.xxh3_64_intdigest(stored),
    )
    with FileWriter(path, header_size=HEADER_SIZE) as writer:
        writer.write(stored)
        writer.finish(header.pack())


def read_array(path: Path, *, kind: Kind, owner: bytes, shape: tuple[int, int], size: int | None = None) -> Array:
    """An array written by `write_array`, checked against its checksum and the shape expected. Mapped, read-only.

    Raises DamageError where anything differs.
    """
    raw = map_file(path, size)
    header = parse_header(raw[:HEADER_SIZE].tobytes(), str(path), kind=kind, owner=owner)
    dtype = _element_type(header, path)
    body = raw[HEADER_SIZE:]
    if (header.rows, header.columns) != shape or body.nbytes != shape[0] * shape[1] * dtype.itemsize:
        raise DamageError(f"{path}: it holds {header.rows} x {header.columns}, expected {shape[0]} x {shape[1]}. Run `knnstore verify`.")
    if xxhash.xxh3_64_intdigest(body) != header.check:
        raise DamageError(f"{path}: its checksum does not match. Run `knnstore verify`.")
    return body.view(dtype).reshape(shape)


def _element_type(header: Header, path: Path, expected: DType | None = None) -> np.dtype[Any]:
    if header.dtype not in _TYPES[header.kind] or expected not in (None, header.dtype):
        raise DamageError(f"{path}: its elements are {header.dtype.name.lower()}, which this file does not hold. Run `knnstore verify`.")
    return NUMPY_TYPES[header.dtype]


def checksums(body: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """xxh3-64 of each block of 64 KiB of body; (n_blocks,) u64."""
    starts = range(0, body.nbytes, VALUES_BLOCK)
    return np.fromiter((xxhash.xxh3_64_intdigest(body[at : at + VALUES_BLOCK]) for at in starts), np.uint64, len(starts))


def blocked_size(n_rows: int, row_bytes: int) -> int:
    """Size in bytes of a long array's file: header, data, zeros to a multiple of 64, checksums."""
    n_blocks = -(-n_rows * row_bytes // VALUES_BLOCK)
    return aligned(HEADER_SIZE + n_rows * row_bytes) + 8 * n_blocks


class MappedArray:
    """A long array on disk: header (check: xxh3-64 of the checksums), rows, zeros to 64, one u64 checksum per 64 KiB of rows."""

    def __init__(
        self,
        path: Path,
        *,
        kind: Kind,
        owner: bytes,
        n_rows: int,
        columns: int = 1,
        dtype: DType | None = None,
        size: int | None = None,
    ) -> None:
        """dtype: None for any that such a file may hold. Raises DamageError if the file is not such an array of this shape, or its table
        of checksums is damaged.
        """
        raw = map_file(path, size)
        self.path = path
        self.header = parse_header(raw[:HEADER_SIZE].tobytes(), str(path), kind=kind, owner=owner)
        self.dtype = _element_type(self.header, path, dtype)
        self._row_bytes = self.header.columns * self.dtype.itemsize
        if (self.header.rows, self.header.columns) != (n_rows, columns) or raw.nbytes != blocked_size(n_rows, self._row_bytes):
            raise DamageError(
                f"{path}: it holds {self.header.rows} rows of {self.header.columns} in {raw.nbytes} bytes, expected {n_rows} of {columns}. "
                "Run `knnstore verify`."
            )
        self._body = raw[HEADER_SIZE : HEADER_SIZE + n_rows * self._row_bytes]
        self._checks = raw[aligned(HEADER_SIZE + n_rows * self._row_bytes) :].view("<u8")
        if xxhash.xxh3_64_intdigest(self._checks) != self.header.check:
            raise DamageError(f"{path}: its table of checksums is damaged. Run `knnstore verify`.")
        self._seen = np.zeros(len(self._checks), dtype=bool)

    def __len__(self) -> int:
        return self.header.rows

    def rows(self, first: int, stop: int) -> Array:
        """Rows [first, stop) as stored, (stop - first, columns), a view. Raises DamageError if a block touched is damaged."""
        begin, end = first * self._row_bytes, stop * self._row_bytes
        if end > begin:
            blocks = slice(begin // VALUES_BLOCK, -(-end // VALUES_BLOCK))
            for block in np.flatnonzero(~self._seen[blocks]) + blocks.start:
                self._check(int(block))
        view = self._body[begin:end].view(self.dtype)
        return view.reshape(stop - first, self.header.columns)

    def _check(self, block: int) -> None:
        piece = self._body[block * VALUES_BLOCK : (block + 1) * VALUES_BLOCK]
        if xxhash.xxh3_64_intdigest(piece) != self._checks[block]:
            raise DamageError(f"{self.path}: block {block} of 64 KiB does not match its checksum. Run `knnstore verify`.")
        self._seen[block] = True
