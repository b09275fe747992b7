"""How `verify` reads the files of a store: once each, from front to back, and never mapped.

A mapped file that is cut, or lies on a bad sector, kills the process that touches it; a read only fails.
"""

import dataclasses
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lmdb

from knnstore.errors import DamageError, FormatError
from knnstore.format import HEADER_SIZE, Codec, Header, parse_header
from knnstore.storage.manifest import FileRecord

__all__ = [
    "PIECE",
    "FileReading",
    "FindingError",
    "Findings",
    "Outcome",
    "Problem",
    "check_folder",
    "check_header",
    "check_plain",
    "check_size",
    "file_reading",
    "open_plain",
]

PIECE = 1 << 20  # bytes read at a time: hashed twice while they are in the cache; a multiple of VALUES_BLOCK
_SHOWN = 5  # damaged parts of a file that a problem names

_ADVICE = " Run `knnstore verify`."  # what other messages end in


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. kind: see `verify`. path: relative to the store, with `/`. detail: what is wrong, with the values."""

    kind: str
    path: str
    detail: str


class FindingError(Exception):
    """Something is wrong with the file in hand."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


@dataclass(slots=True)
class Outcome:
    """sound: whether a file came through without a problem."""

    sound: bool = False


class Findings:
    """The problems found so far, and how many bytes were looked at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self.checked_bytes = 0
        self.advance: Callable[[int], None] | None = None  # told of bytes, while a stage of work shows them

    def add(self, kind: str, path: Path, detail: str) -> None:
        self.problems.append(Problem(kind, path.relative_to(self.root).as_posix(), detail))

    def checked(self, n: int) -> None:
        """n more bytes were looked at."""
        self.checked_bytes += n
        if self.advance is not None:
            self.advance(n)

    def plain_detail(self, error: Exception, path: Path) -> str:
        """A storage error's message without the path, which a problem has beside it, and without the advice to do what is being done."""
        return str(error).removeprefix(f"{path}: ").replace(f"{self.root}/", "").removesuffix(_ADVICE).removesuffix(".")

    @contextmanager
    def of(self, path: Path, kind: str = "content") -> Iterator[Outcome]:
        """Around what is done with one file: what goes wrong inside becomes a problem of it, and work goes on after the block.

        kind: of what the storage layer refuses. FormatError passes through.
        """
        outcome = Outcome()
        try:
            yield outcome
        except FindingError as finding:
            self.add(finding.kind, path, finding.detail)
        except DamageError as error:
            self.add(kind, path, self.plain_detail(error, path))
        except OSError as error:
            self.add("unreadable", path, error.strerror or str(error))
        except (ValueError, OverflowError, struct.error, lmdb.Error) as error:  # of decoding what nobody wrote
            self.add(kind, path, f"it cannot be decoded: {error}")
        else:
            outcome.sound = True


def check_plain(path: Path) -> os.stat_result:
    """The status of a plain file. Raises FindingError if there is none, or something else is there: a link, FIFO, device, folder."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise FindingError("missing", "the file is not there") from error
    if not stat.S_ISREG(status.st_mode):
        raise FindingError("type", f"{_TYPES.get(stat.S_IFMT(status.st_mode), 'a device')} where a plain file belongs")
    return status


def check_folder(path: Path) -> None:
    """Raises FindingError if the path is not a folder itself (a link to one is not)."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise FindingError("missing", "the folder is not there") from error
    if not stat.S_ISDIR(status.st_mode):
        raise FindingError("type", f"{_TYPES.get(stat.S_IFMT(status.st_mode), 'a device')} where a folder belongs")


_TYPES = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFREG: "a plain file",
}


@contextmanager
def open_plain(path: Path) -> Iterator[int]:
    """A descriptor for reading a plain file; what is none is refused before it is opened. Raises FindingError, OSError."""
    check_plain(path)
    # NOFOLLOW and NONBLOCK: should something else have come there since, it is neither followed nor waited for.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


class FileReading:
    """One file while it is read from front to back. damaged: names of its parts that do not match their own checksums."""

    def __init__(self, fd: int, findings: Findings, record: FileRecord) -> None:
        self._fd, self._findings, self._record = fd, findings, record
        self._sha256 = hashlib.sha256()
        self._buffer = memoryview(bytearray(min(PIECE, max(1, record.size))))
        self.position = 0
        self.damaged: list[str] = []

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return self._record.size - self.position

    def read(self, n: int) -> memoryview:
        """The next n bytes (at most PIECE); valid until the next read."""
        piece = self._buffer[:n]
        got = 0
        while got < n:
            more = os.readv(self._fd, [piece[got:]])
            if not more:
                raise FindingError("size", f"it was cut to {self.position + got} bytes while it was read")
            got += more
        self._sha256.update(piece)
        self.position += n
        self._findings.checked(n)
        return piece

    def pieces(self, total: int) -> Iterator[memoryview]:
        """The next `total` bytes in pieces of PIECE; each valid until the next."""
        while total:
            n = min(PIECE, total)
            yield self.read(n)
            total -= n

    def whole(self) -> bytes:
        """All bytes that are left."""
        return b"".join(bytes(piece) for piece in self.pieces(self.left))

    def conclude(self) -> None:
        """Reads the rest and compares the sha256. Raises FindingError, naming damaged parts."""
        for _ in self.pieces(self.left):
            pass
        digest, parts = self._sha256.hexdigest(), _named_parts(self.damaged)
        if digest != self._record.sha256:
            where = f"; damaged: {parts}" if parts else ""
            raise FindingError("checksum", f"its sha256 is {digest[:16]}…, that recorded is {self._record.sha256[:16]}…{where}")
        if parts:
            raise FindingError("content", f"its sha256 is the one recorded, but not its own checksums: {parts}")


def _named_parts(damaged: Sequence[str]) -> str:
    more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
    return ", ".join(damaged[:_SHOWN]) + more


@contextmanager
def file_reading(findings: Findings, folder: Path, record: FileRecord) -> Iterator[FileReading]:
    """A file of a folder, to be read whole and compared with its record (size, sha256) at the end. Raises FindingError, OSError."""
    with open_plain(folder / record.name) as fd:
        check_size(os.fstat(fd).st_size, record)
        reading = FileReading(fd, findings, record)
        yield reading
        reading.conclude()


def check_size(size: int, record: FileRecord) -> None:
    """Raises FindingError unless a file has the size recorded."""
    if size != record.size:
        raise FindingError("size", f"{size} bytes, {record.size} are recorded")


def check_header(raw: bytes, path: Path, expected: Header) -> Header:
    """The header of a binary file, compared with what it should say (`check` apart). Raises FindingError."""
    try:
        header = parse_header(raw[:HEADER_SIZE], str(path), kind=expected.kind, owner=expected.owner)
    except (DamageError, FormatError) as error:
        raise FindingError("header", str(error).removeprefix(f"{path}: ").removesuffix(_ADVICE).removesuffix(".")) from error
    if dataclasses.replace(header, check=expected.check) != expected:
        raise FindingError("header", f"it says {_said(header)}; {_said(expected)} is recorded")
    return header


def _said(header: Header) -> str:
    codec = f", {header.codec.name.lower()}" if header.codec is not Codec.NONE else ""
    return f"{header.rows} x {header.columns} {header.dtype.name.lower()}{codec}"
