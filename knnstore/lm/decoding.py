"""One file of a corpus, from its bytes to decoded text: plain, gzip or zstd, read in blocks of bounded size.

Text is UTF-8, decoded strictly, without newline translation; a byte order mark at the beginning is dropped. Nothing here
knows what a document is.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import zstandard

from knnstore.errors import CorpusError, InvalidArgumentError, NotFoundError, StorageError

__all__ = ["COMPRESSIONS", "SUFFIXES", "CorpusFile", "TextChunks", "decode_text", "known_suffix", "read_blocks", "read_lines"]

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
COMPRESSIONS = (".gz", ".zst")
BOM = "\ufeff"

# Bytes asked of the operating system at a time.
BLOCK_BYTES = 1 << 20
# zstd can make 128 KiB out of every 4 bytes: feeding it 1 KiB at a time bounds one answer to 32 MiB, whatever the file holds.
ZSTD_STEP_BYTES = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFile:
    """One file of a corpus as it was found: how to open it, what to call it, and what tells whether it has changed.

    path: what is opened, None for a stream. source: the path as the user gave it, or a stream's name. id: the document's id,
    or what the ids of its lines begin with (path relative to the corpus argument, POSIX separators, suffix kept).
    size: bytes on disk. mtime_ns: last change, nanoseconds; 0 for a stream.
    stream: what standard input was spooled to; it can seek.
    """

    path: Path | None
    source: str
    id: str
    size: int
    mtime_ns: int
    stream: BinaryIO | None = field(default=None, compare=False, repr=False)

    @property
    def suffix(self) -> str:
        """One of SUFFIXES; ".txt" for a stream whose name has no known suffix."""
        return (known_suffix(self.id) or (".txt", ""))[0]

    @property
    def compression(self) -> str:
        """One of COMPRESSIONS, or "" for a plain file."""
        return (known_suffix(self.id) or (".txt", ""))[1]


def known_suffix(name: str) -> tuple[str, str] | None:
    """("suffix", "compression or empty") of a file name, letter case aside; None if it is of no kind that is read."""
    lowered = name.lower()
    compression = next((c for c in COMPRESSIONS if lowered.endswith(c)), "")
    stem = lowered.removesuffix(compression)
    suffix = next((s for s in SUFFIXES if stem.endswith(s)), None)
    return None if suffix is None else (suffix, compression)


def read_blocks(file: CorpusFile) -> Iterator[bytes]:
    """The file's decompressed bytes in order, in blocks of about 1 MiB (at most 32 MiB).

    Raises CorpusError where compressed data is damaged or cut, StorageError where the file cannot be read, NotFoundError if it
    is gone. A stream is read from its beginning.
    """
    with _named_errors(file), _opened(file) as raw:
        if file.compression == ".zst":
            yield from _zstd_blocks(raw, file.source)
        elif file.compression == ".gz":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                while block := unzipped.read(BLOCK_BYTES):
                    yield block
        else:
            while block := raw.read(BLOCK_BYTES):
                yield block


def decode_text(blocks: Iterable[bytes], source: str) -> Iterator[str]:
    """The blocks as text, character by character as UTF-8 has it, however the blocks are cut; no empty strings.

    Raises CorpusError naming the source and the offset of the first byte that is not UTF-8 (in the decompressed text).
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    at_start = True
    for block, final in _with_last(blocks):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            raise _not_utf8(source, offset - pending, error) from None
        offset += len(block)
        if at_start and text:
            text, at_start = text.removeprefix(BOM), False
        if text:
            yield text


@dataclass(frozen=True, slots=True)
class TextChunks:
    """The decoded text of a plain-text file, read anew from the disk each time it is iterated."""

    file: CorpusFile

    def __iter__(self) -> Iterator[str]:
        return decode_text(read_blocks(self.file), self.file.source)


def read_lines(file: CorpusFile) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of each line, ended by a line feed only; a line is whole in memory, the file is not.

    Raises CorpusError as decode_text does.
    """
    offset = 0
    for number, line in enumerate(_byte_lines(read_blocks(file)), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{file.source}#{number}", offset, error) from None
        offset += len(line)
        yield number, text.removeprefix(BOM) if number == 1 else text


def _byte_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of the blocks with their line feeds, in time linear in the bytes however long a line is."""
    parts: list[bytes] = []
    for block in blocks:
        begin = 0
        while (end := block.find(b"\n", begin) + 1) > 0:
            parts.append(block[begin:end])
            yield b"".join(parts)
            parts, begin = [], end
        if begin < len(block):
            parts.append(block[begin:])
    if parts:
        yield b"".join(parts)


def _with_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for block in blocks:
        yield block, False
    yield b"", True


def _zstd_blocks(raw: BinaryIO, source: str) -> Iterator[bytes]:
    # zstandard's own stream_reader takes a cut file for a whole one: it does not say whether the last frame came to its end.
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    parts: list[bytes] = []
    size = 0
    while block := raw.read(BLOCK_BYTES):
        for begin in range(0, len(block), ZSTD_STEP_BYTES):
            rest = block[begin : begin + ZSTD_STEP_BYTES]
            while rest:
                frame = frame or decompressor.decompressobj()
                parts.append(frame.decompress(rest))
                size += len(parts[-1])
                rest = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            if size >= BLOCK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
    if frame is not None:
        raise _damaged(source, "it ends in the middle of a zstd frame")
    if size:
        yield b"".join(parts)


@contextmanager
def _opened(file: CorpusFile) -> Iterator[BinaryIO]:
    if file.stream is not None:
        file.stream.seek(0)
        yield file.stream
    elif file.path is not None:
        with file.path.open("rb") as raw:
            yield raw
    else:
        raise InvalidArgumentError(f"{file.source}: neither a path nor a stream to read it from. Give one of them.")


@contextmanager
def _named_errors(file: CorpusFile) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _damaged(file.source, str(error)) from error
    except FileNotFoundError as error:
        raise NotFoundError(f"{file.source}: the file is gone. It was there when the corpus was listed; run the command again.") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{file.source}: cannot be read: {error.strerror or error}. Check its permissions and its disk.") from error


def _damaged(source: str, detail: str) -> CorpusError:
    return CorpusError(f"{source}: the compressed data is damaged: {detail}. Get or make the file again, or leave it out.")


def _not_utf8(source: str, offset: int, error: UnicodeDecodeError) -> CorpusError:
    first = error.object[error.start]
    guess = "UTF-16" if offset == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
    return CorpusError(
        f"{source}: not UTF-8: byte 0x{first:02X} at offset {offset + error.start:,} ({error.reason}). "
        f"Convert it first, for example with `iconv -f {guess} -t UTF-8` if it is {guess}."
    )
