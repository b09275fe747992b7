"""From corpus arguments (folders, files, "-") to the list of files that will be read, in a fixed order."""

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

from knnstore.errors import CorpusError, InvalidArgumentError, NotFoundError, StorageError
from knnstore.lm.decoding import BLOCK_BYTES, COMPRESSIONS, SUFFIXES, CorpusFile, known_suffix

__all__ = ["STDIN", "CorpusInputs", "SkippedDocument", "list_inputs"]

STDIN = "-"
_ALLOWED = f"{' '.join(SUFFIXES)}, plain or with {' or '.join(COMPRESSIONS)}"


@dataclass(frozen=True, slots=True)
class SkippedDocument:
    """A file or document that was left out on purpose, and why: "suffix", "hidden", "loop", "broken link", "empty" …"""

    id: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class CorpusInputs:
    """The files that corpus arguments stand for, in reading order, and what lay beside them in the folders."""

    files: tuple[CorpusFile, ...]
    ignored: tuple[SkippedDocument, ...]

    def __iter__(self) -> Iterator[CorpusFile]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class _Spool(io.BufferedRandom):
    """A temporary file that lives as long as the CorpusFile that holds it, and is then closed without a warning."""

    def __del__(self) -> None:
        self.close()


def list_inputs(
    corpora: str | Path | Sequence[str | Path], *, stdin_name: str | None = None, stdin: BinaryIO | None = None
) -> CorpusInputs:
    """The files of the corpora in the order given, those of a folder sorted by their path inside it.

    A folder is searched to its depth; hidden files, files of other kinds and symbolic links that lead back up are listed as
    ignored. A file given by itself must be of a kind that is read. "-" is `stdin`, or standard input; what cannot seek is
    copied to a temporary file. `stdin_name` is its id, and the name's suffix its kind (plain text if it has none).
    Raises NotFoundError for a missing path, CorpusError for an unknown suffix or a folder without any text, StorageError for
    what may not be read, InvalidArgumentError for "-" without a name or twice.
    """
    arguments = [corpora] if isinstance(corpora, str | Path) else list(corpora)
    if not arguments:
        raise InvalidArgumentError("No corpus was given. Name at least one folder or file, or - for standard input.")
    if sum(str(a) == STDIN for a in arguments) > 1:
        raise InvalidArgumentError("Standard input (-) is given twice, but it can be read only once. Give it once.")
    files: list[CorpusFile] = []
    ignored: list[SkippedDocument] = []
    for argument in arguments:
        if str(argument) == STDIN:
            files.append(_stdin_file(stdin_name, stdin))
        elif S_ISDIR((status := _status(argument)).st_mode):
            found, beside = _folder_files(argument, status)
            files += found
            ignored += beside
        else:
            files.append(_single_file(argument, status))
    return CorpusInputs(tuple(files), tuple(ignored))


def _stdin_file(name: str | None, stream: BinaryIO | None) -> CorpusFile:
    if not name:
        raise InvalidArgumentError("Standard input (-) has no name of its own. Give it one with --name, for example --name letters.txt.")
    stream = sys.stdin.buffer if stream is None else stream
    if not stream.seekable():  # A corpus is read more than once: the sample that trains the space comes first.
        spool = _Spool(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 - closed by what holds it
        shutil.copyfileobj(stream, spool, BLOCK_BYTES)
        stream = spool
    size = stream.seek(0, os.SEEK_END)
    return CorpusFile(path=None, source=name, id=_utf8_name(name, name), size=size, mtime_ns=0, stream=stream)


def _single_file(argument: str | Path, status: os.stat_result) -> CorpusFile:
    name = Path(argument).name
    if not S_ISREG(status.st_mode):
        raise CorpusError(f"{argument}: neither a file nor a folder. Give a pipe as - with --name.")
    if known_suffix(name) is None:
        raise CorpusError(f"{argument}: suffix {Path(name).suffix or '(none)'} is of no kind that is read. Allowed: {_ALLOWED}.")
    return _corpus_file(str(argument), name, status)


def _folder_files(argument: str | Path, status: os.stat_result) -> tuple[list[CorpusFile], list[SkippedDocument]]:
    files: list[CorpusFile] = []
    ignored: list[SkippedDocument] = []
    # (path inside the corpus folder, identities of this folder and those above it)
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset([_identity(status)]))]
    while folders:
        inside, above = folders.pop()
        for name in _names(_inside(argument, inside)):
            relative = f"{inside}/{name}" if inside else name
            source = _inside(argument, relative)
            kind, entry = _kind(source, name, above)
            if kind == "folder" and entry is not None:
                folders.append((relative, above | {_identity(entry)}))
            elif kind == "file" and entry is not None:
                files.append(_corpus_file(source, relative, entry))
            else:
                ignored.append(SkippedDocument(relative, source, kind))
    if not files:
        raise CorpusError(f"{argument}: no text in this folder ({len(ignored)} other files). Files that are read: {_ALLOWED}.")
    return sorted(files, key=lambda file: file.id), sorted(ignored, key=lambda skipped: skipped.id)


def _kind(source: str, name: str, above: frozenset[tuple[int, int]]) -> tuple[str, os.stat_result | None]:
    """("folder" or "file", status), or (why it is left out, None)."""
    if name.startswith("."):
        return "hidden", None
    try:
        status = Path(source).stat()
    except FileNotFoundError:
        return "broken link", None
    except OSError as error:  # a symbolic link to itself; a folder that may be listed but not entered
        if Path(source).is_symlink():
            return "broken link", None
        raise _unreadable(source, error) from error
    if S_ISDIR(status.st_mode):
        return ("loop", None) if _identity(status) in above else ("folder", status)
    if known_suffix(name) is None:
        return "suffix", None
    return ("file", status) if S_ISREG(status.st_mode) else ("not a regular file", None)


def _corpus_file(source: str, relative: str, status: os.stat_result) -> CorpusFile:
    # Hours of work should not end at a file that could have been refused at the beginning.
    if not os.access(source, os.R_OK):
        raise StorageError(f"{source}: no permission to read it. Change its permissions, or leave it out.")
    identifier = _utf8_name(relative, source)
    return CorpusFile(path=Path(source), source=source, id=identifier, size=status.st_size, mtime_ns=status.st_mtime_ns)


def _status(argument: str | Path) -> os.stat_result:
    try:
        return Path(argument).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{argument}: no such file or folder. Check the path, which is relative to {Path.cwd()}.") from error
    except (OSError, ValueError) as error:
        raise _unreadable(str(argument), error) from error


def _names(folder: str) -> list[str]:
    try:
        return [path.name for path in Path(folder).iterdir()]
    except OSError as error:
        raise _unreadable(folder, error) from error


def _inside(folder: str | Path, relative: str) -> str:
    """The path as the user began it: Path would take a leading ./ away."""
    return f"{str(folder).rstrip('/')}/{relative}" if relative else str(folder)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _utf8_name(name: str, source: str) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise CorpusError(f"{source!r}: the file's name is not UTF-8, so it cannot be a document's id. Rename the file.") from None
    return name


def _unreadable(source: str, error: Exception) -> StorageError:
    detail = error.strerror if isinstance(error, OSError) else error
    return StorageError(f"{source}: cannot be read: {detail}. Check its permissions, or leave it out.")
