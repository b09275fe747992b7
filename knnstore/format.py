"""Format 1: names, numbers and limits of what is on disk. `docs/format-v1.md` says the same in words; a test compares them.

Everything is little-endian. A binary file begins with a 64-byte header, and its content at a multiple of 64.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

from knnstore.errors import DamageError, FormatError

FORMAT_VERSION = 1
LABEL_BASE = "label-base"  # labels of some segment count rows from a number of its own
READER_FEATURES: frozenset[str] = frozenset({LABEL_BASE})  # features a reader must understand to open a store
WRITER_FEATURES: frozenset[str] = frozenset()  # features a writer must understand to change a store

STORE_FILE = "KNNSTORE"
CURRENT_FILE = "CURRENT"
LOCK_FILE = "LOCK"
MANIFESTS = "manifests"
SPACES = "spaces"
COARSE = "coarse"
SEGMENTS = "segments"
TAGS = "tags"
STAGING = "staging"
QUARANTINE = "quarantine"  # what repair took out of use
MOVES_FILE = "moves.json"  # in a job: what its commit takes out of it, written before it does
LISTS_FILE = "lists.bin"
DIRECTORY_FILE = "lists.dir"
VALUES_FILE = "values.bin"
CONTEXTS_FILE = "contexts.lmdb"
IDS_FILE = "ids.bin"
KEYS_FILE = "keys.bin"
SEGMENT_FILE = "segment.json"
SPACE_FILE = "space.json"
ROTATION_FILE = "rotation.bin"
CENTROIDS_FILE = "centroids.bin"

MAGIC = b"\x89KNNS\r\n\x1a"  # a high bit, a DOS line end and ^Z: text-mode copies are noticed
HEADER_SIZE = 64  # bytes: one cache line, and what follows is aligned to one
ALIGNMENT = 64  # bytes: where each list begins
HEADER_VERSION = 1

TOKEN_BITS = 24  # bits of a label that hold the token: the largest vocabulary in use has 18
ROW_BITS = 39  # bits that hold the row, counted from the segment's base; bit 63 stays 0 because faiss reserves negative ids
SLOT_BITS = 19  # bases are multiples of 2**19 rows: a table of 2**20 slots says whose a label is
MAX_VOCABULARY = 1 << TOKEN_BITS
BLOCK_ENTRIES = 32  # entries in one packed block of 4-bit codes, and what each list is padded to
VALUES_BLOCK = 65_536  # bytes of values, keys or ids under one checksum: read at once, 0.01% of checksums
TEXT_FRAME_RAW = 4_096  # bytes: a decompressed text frame has at most this (one hit decompresses one or two)
TEXT_FRAME_PACKED = 2_012  # bytes: two such records fill one 4 KiB page of LMDB; larger ones would take a page each
TEXT_FRAME_MAX = 1 << 22  # bytes: a reader refuses to decompress more (one token may span much text)
DOCUMENT_RECORD_MAX = 1 << 22  # bytes of one decompressed document record that a reader accepts: as JSON it takes 25 times as much
SEGMENT_ENTRIES = 1 << 23  # entries in one segment at most: bounds the memory of writing its lists, 4 bytes an entry
MANIFEST_MAX = 1 << 26  # bytes of a manifest that a reader accepts: two million dead ranges


class Kind(IntEnum):
    """What a binary file holds."""

    LISTS = 1
    DIRECTORY = 2
    VALUES = 3
    KEYS = 4
    ROTATION = 5
    CENTROIDS = 6
    COARSE = 7
    IDS = 8


class Codec(IntEnum):
    """What a code is. RAW: the key itself. PQ4: packed for FastScan. PQ8: one byte a sub-quantizer."""

    NONE = 0
    RAW = 1
    PQ4 = 2
    PQ8 = 3


class DType(IntEnum):
    """The type of a file's elements."""

    U8 = 1
    U16 = 2
    U32 = 3
    U64 = 4
    F16 = 5
    BF16 = 6
    F32 = 7


NUMPY_TYPES: dict[DType, np.dtype[np.generic]] = {
    DType.U8: np.dtype("u1"),
    DType.U16: np.dtype("<u2"),
    DType.U32: np.dtype("<u4"),
    DType.U64: np.dtype("<u8"),
    DType.F16: np.dtype("<f2"),
    DType.BF16: np.dtype("<u2"),  # numpy has no bfloat16: the upper half of a float32
    DType.F32: np.dtype("<f4"),
}

ROTATIONS = ("random", "opq", "none")
CODEC_NAMES = {Codec.RAW: "raw", Codec.PQ4: "pq4", Codec.PQ8: "pq8"}
CODECS_BY_NAME = {name: codec for codec, name in CODEC_NAMES.items()}

# offset, size, name, meaning: the rows of the header table in docs/format-v1.md
HEADER_FIELDS: tuple[tuple[int, int, str, str], ...] = (
    (0, 8, "magic", "89 4B 4E 4E 53 0D 0A 1A"),
    (8, 2, "version", "u16, 1"),
    (10, 1, "kind", "u8, what the file holds"),
    (11, 1, "codec", "u8, what a code is"),
    (12, 1, "codec_version", "u8, 1"),
    (13, 1, "dtype", "u8, type of the elements"),
    (14, 2, "reserved", "u16, 0"),
    (16, 8, "rows", "u64"),
    (24, 8, "columns", "u64"),
    (32, 16, "owner", "segment uuid, or the first 16 bytes of the space's or coarse quantizer's hash"),
    (48, 8, "check", "u64, xxh3-64 as the kind says (0 where none)"),
    (56, 8, "header_check", "u64, xxh3-64 of bytes 0 to 55"),
)
_HEADER = struct.Struct("<8sHBBBBHQQ16sQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The first 64 bytes of a binary file. rows, columns: shape of what follows; owner: 16 bytes; check: see the kind."""

    kind: Kind
    codec: Codec = Codec.NONE
    dtype: DType
    rows: int
    columns: int
    owner: bytes
    check: int = 0

    def pack(self) -> bytes:
        """The 64 bytes as they stand in the file."""
        body = _HEADER.pack(MAGIC, HEADER_VERSION, self.kind, self.codec, 1, self.dtype, 0, self.rows, self.columns, self.owner, self.check)
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def parse_header(raw: bytes, at: str, *, kind: Kind, owner: bytes) -> Header:
    """The header of a file of the kind and owner expected.

    Raises DamageError if the bytes are not such a header, FormatError if it is of a later version. at: the file, for messages.
    """
    if len(raw) < HEADER_SIZE:
        raise DamageError(f"{at}: {len(raw)} bytes, shorter than its {HEADER_SIZE}-byte header. Run `knnstore verify`.")
    body = raw[: _HEADER.size]
    magic, version, kind_number, codec, codec_version, dtype, reserved, rows, columns, file_owner, check = _HEADER.unpack(body)
    if magic != MAGIC or struct.unpack("<Q", raw[56:64])[0] != xxhash.xxh3_64_intdigest(body):
        raise DamageError(f"{at}: its header is damaged. Run `knnstore verify`.")
    if version > HEADER_VERSION or codec_version > 1 or reserved:
        raise FormatError(f"{at}: written in a later format (header version {version}). Install a newer knnstore to read it.")
    if kind_number != kind or file_owner != owner:
        raise DamageError(f"{at}: it belongs elsewhere (kind {kind_number}, owner {file_owner.hex()}). Run `knnstore verify`.")
    try:
        return Header(kind=kind, codec=Codec(codec), dtype=DType(dtype), rows=rows, columns=columns, owner=file_owner, check=check)
    except ValueError as error:
        raise FormatError(f"{at}: {error}; written in a later format. Install a newer knnstore to read it.") from error


def aligned(offset: int) -> int:
    """The next multiple of 64 at or after offset."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
