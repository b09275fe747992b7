"""The only door to the disk for writes. Every byte, name and sync of a datastore goes through `disk`, which tests replace.

A failed fsync is final: it is raised, never retried (the kernel may have dropped the data it could not write).
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from knnstore.errors import LockedError, StorageError

__all__ = ["ArrayFile", "Disk", "FileWriter", "adopt", "disk", "hold_lock", "replace_file", "sha256_file", "unless_held", "write_file"]

_CHUNK = 1 << 22  # bytes read or written at a time
_COPIED = 1 << 30  # bytes the kernel copies at a time
_WRITTEN_BACK = 1 << 24  # bytes of a long file that the disk begins with while more are made
_FICLONE = 0x40049409  # Linux: let two files share blocks until one is written to


@contextmanager
def _named(path: Path, deed: str) -> Iterator[None]:
    """Turns what the operating system refuses into a StorageError that names the file."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        advice = "Free some space and try again." if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Check the path and its permissions."
        raise StorageError(f"{path}: cannot {deed}: {os.strerror(error.errno or errno.EIO)}. {advice}") from error


class Disk:
    """The system calls that change a datastore. A test's subclass records them, fails them or stops after any."""

    def open(self, path: Path, flags: int) -> int:
        with _named(path, "open for writing"):
            return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview, path: Path) -> None:
        with _named(path, "write"):
            while data:
                data = data[os.write(fd, data[:_CHUNK]) :]

    def pwrite(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        with _named(path, "write"):
            while data:
                n = os.pwrite(fd, data[:_CHUNK], offset)
                data, offset = data[n:], offset + n

    def truncate(self, fd: int, size: int, path: Path) -> None:
        with _named(path, "resize"):
            os.ftruncate(fd, size)

    def fsync(self, fd: int, path: Path) -> None:
        with _named(path, "sync to the disk"):
            if sys.platform == "darwin":
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # plain fsync leaves the data in the drive's cache there
            else:
                os.fsync(fd)

    def write_back(self, fd: int, offset: int, size: int) -> None:
        """Lets the disk begin with what was written there, without waiting: the fsync that makes it durable then has less to do."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)  # pages not on the disk yet stay in the cache

    def make_folder(self, path: Path) -> None:
        with _named(path, "make the folder"):
            path.mkdir(parents=True, exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        with _named(target, "rename into place"):
            source.rename(target)

    def replace(self, source: Path, target: Path) -> None:
        with _named(target, "replace"):
            source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        with _named(target, "link"):
            os.link(source, target)

    def copy(self, source: Path, target: Path) -> None:
        """A new file with the content of another: sharing its blocks where the file system can, else copied by the kernel."""
        with _named(target, "copy"), source.open("rb", buffering=0) as taken, target.open("xb", buffering=0) as made:
            if sys.platform != "linux":
                shutil.copyfileobj(taken, made, _CHUNK)
                return
            with contextlib.suppress(OSError):
                fcntl.ioctl(made.fileno(), _FICLONE, taken.fileno())
                return
            with contextlib.suppress(OSError):  # between some file systems it cannot; what is left is then read and written
                while os.copy_file_range(taken.fileno(), made.fileno(), _COPIED):
                    pass
            shutil.copyfileobj(taken, made, _CHUNK)

    def remove(self, path: Path) -> None:
        with _named(path, "remove"):
            path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        with _named(path, "remove"):
            path.rmdir()

    def sync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable."""
        with _named(path, "sync the folder"):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(fd, path)
        finally:
            os.close(fd)

    def remove_tree(self, path: Path) -> None:
        """Removes a folder and all in it; nothing if it is not there, or another process removes it meanwhile."""
        if path.is_symlink() or not path.is_dir():
            self.remove(path)
            return
        try:
            with _named(path, "remove"):
                children = sorted(path.iterdir())
            for child in children:
                self.remove_tree(child)
            self.remove_folder(path)
        except StorageError:
            if os.path.lexists(path):
                raise


disk = Disk()


class FileWriter:
    """One new file, written from front to back, hashed on the way, synced once when closed without an error.

    `header_size` bytes are left for a header that is known only at the end (`finish`).
    """

    def __init__(self, path: Path, *, header_size: int = 0) -> None:
        self.path = path
        self.position = self._written_back = 0
        self._fd = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if header_size:
            self.write(b"\0" * header_size)

    def write(self, data: "bytes | memoryview | np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> None:
        """Appends the bytes of data (an array must be C-contiguous)."""
        view = memoryview(data).cast("B") if not isinstance(data, np.ndarray) else _array_bytes(data)
        disk.write(self._fd, view, self.path)
        self.position += view.nbytes

    def write_back(self) -> None:
        """Lets the disk begin with what was written, once there is enough of it. Only for files that are not read again soon."""
        if self.position - self._written_back >= _WRITTEN_BACK:
            disk.write_back(self._fd, self._written_back, self.position - self._written_back)
            self._written_back = self.position

    def pad_to(self, position: int) -> None:
        """Appends zeros up to a position."""
        self.write(b"\0" * (position - self.position))

    def finish(self, header: bytes = b"") -> None:
        """Writes the header in front, syncs and closes."""
        if header:
            disk.pwrite(self._fd, memoryview(header), 0, self.path)
        disk.fsync(self._fd, self.path)
        self.close()

    def close(self) -> None:
        """Closes without syncing; what was written counts for nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _array_bytes(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> memoryview:
    if array.size == 0:
        return memoryview(b"")
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


class ArrayFile:
    """A file of rows of equal size that are written in any order, synced when asked. offset: bytes before row 0."""

    def __init__(self, path: Path, *, row_bytes: int, offset: int = 0) -> None:
        self.path, self.row_bytes, self.offset = path, row_bytes, offset
        self._fd = disk.open(path, os.O_RDWR | os.O_CREAT)

    def resize(self, n_rows: int) -> None:
        """Gives the file its final size; rows not written yet are zeros."""
        disk.truncate(self._fd, self.offset + n_rows * self.row_bytes, self.path)

    def put(self, first_row: int, rows: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> None:
        """Writes consecutive rows at first_row."""
        disk.pwrite(self._fd, _array_bytes(rows), self.offset + first_row * self.row_bytes, self.path)

    def put_header(self, header: bytes) -> None:
        """Writes the bytes in front of row 0."""
        disk.pwrite(self._fd, memoryview(header), 0, self.path)

    def sync(self) -> None:
        """Makes all rows written so far durable."""
        disk.fsync(self._fd, self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_file(path: Path, content: bytes) -> None:
    """Writes a whole small file and syncs it (its name is durable only after the folder is synced)."""
    with FileWriter(path) as writer:
        writer.write(content)
        writer.finish()


def replace_file(path: Path, content: bytes) -> None:
    """Puts a small file in place: whole, or as it was before. Syncs it and its folder."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_file(temporary, content)
    disk.replace(temporary, path)
    disk.sync_folder(path.parent)


def sha256_file(path: Path, seen: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Size in bytes and sha256 of a file as it is on disk. seen: called with the number of bytes of each piece read."""
    digest, size = hashlib.sha256(), 0
    with _named(path, "read"), path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
            if seen is not None:
                seen(len(piece))
    return size, digest.hexdigest()


def adopt(path: Path) -> None:
    """Takes over a file that another library wrote and closed (LMDB): makes its bytes durable."""
    fd = disk.open(path, os.O_RDWR)
    try:
        disk.fsync(fd, path)
    finally:
        os.close(fd)


@contextmanager
def hold_lock(path: Path, *, purpose: str, wait: bool) -> Iterator[None]:
    """Holds the exclusive flock of a lock file, which carries the holder's process id. flock leaves nothing behind after a kill.

    Raises LockedError, naming that process, where another holds it and wait is False.
    """
    fd = _locked(path, purpose, wait)
    try:
        holder = f"{os.getpid()}\n".encode()
        disk.pwrite(fd, memoryview(holder), 0, path)  # first: over what is there it needs no space, which a full disk does not have
        disk.truncate(fd, len(holder), path)
        yield
    finally:
        os.close(fd)


@contextmanager
def unless_held(path: Path) -> Iterator[bool]:
    """Gives whether nobody holds a lock of a file; if so, nobody can take one before the end. The file is not written to or made."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise StorageError(f"{path}: cannot read: {error.strerror}. Check the path and its permissions.") from error
        yield True  # not there, or no plain file: nobody can hold it
        return
    try:
        free = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(fd)


def _locked(path: Path, purpose: str, wait: bool) -> int:
    """A descriptor of the file of this name, locked: of one that was removed or moved between opening and locking it is opened again."""
    while True:
        fd = disk.open(path, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").partition("\n")[0] or "unknown"
                raise LockedError(f"{path}: process {holder} is {purpose}. Wait until it ends, or stop it.") from error
            except OSError as error:
                raise StorageError(f"{path}: this file system refuses locks: {error.strerror}. Use a local disk.") from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    locked, fd = fd, -1
                    return locked
        finally:
            if fd >= 0:
                os.close(fd)
