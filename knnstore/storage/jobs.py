"""Jobs: work that is continued by typing the same command again. A job is a folder in `staging/`, named by what was asked for."""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from knnstore.errors import (
    ConflictError,
    DamageError,
    ExistsError,
    InvalidArgumentError,
    KnnstoreError,
    LockedError,
    StorageError,
)
from knnstore.format import COARSE, MOVES_FILE, SEGMENTS, SPACES
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.files import disk, hold_lock, replace_file, unless_held
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json, parse_list, parse_mapping, parse_text

__all__ = [
    "JOB_FILE",
    "MOVES_FILE",
    "is_held",
    "job_name",
    "moved_by",
    "other_jobs",
    "read_moves",
    "remove_abandoned",
    "remove_job",
    "run_attempt",
    "run_job",
]

JOB_FILE = "job.json"
_SOURCE = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
_TARGET = re.compile(rf"({SPACES}|{COARSE}|{SEGMENTS})/[0-9a-f]{{32}}")
_LOCK = "lock"
_TRIES = 50  # to lock a job: a gc that looks at it, or removes it, is done with it sooner
_PAUSE_S = 0.01
_DOOMED = ".tmp"  # at the end of a job's name: it is being removed


def job_name(arguments: Mapping[str, Any]) -> str:
    """32 hex digits over the arguments and inputs of a command (JSON values)."""
    return hashlib.sha256(canonical(dict(arguments))).hexdigest()[:32]


def other_jobs(store: StoreFolder, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the unfinished jobs of a store other than this one. Folders that never got arguments are not counted."""
    jobs = []
    for folder in sorted(store.staging.iterdir()) if store.staging.is_dir() else []:
        if folder.name != name and folder.suffix != _DOOMED and (folder / JOB_FILE).is_file():
            try:
                jobs.append((folder.name, parse_mapping(parse_json(folder / JOB_FILE), str(folder / JOB_FILE))))
            except DamageError:
                continue  # its own command will begin it anew
    return jobs


@contextmanager
def run_job(store: StoreFolder, name: str, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """The job's folder, locked while in use. It stays after an error, to be continued, and is removed after success.

    After an InvalidArgumentError, ExistsError or ConflictError it is removed too: the same arguments and inputs would fail again, and
    others are another job.
    Raises LockedError where another process is at the same job.
    """
    folder = store.staging / name
    with _locked_job(folder):
        if not (folder / JOB_FILE).exists():
            replace_file(folder / JOB_FILE, canonical(dict(arguments)))
        try:
            yield folder
        except (InvalidArgumentError, ExistsError, ConflictError):
            _take_away(folder)
            raise
        _take_away(folder)


@contextmanager
def _locked_job(folder: Path) -> Iterator[None]:
    """Makes a job's folder and holds its lock; again where a gc looked at the lock, or removed the folder, in this moment."""
    with ExitStack() as stack:
        for attempt in range(_TRIES):
            try:
                disk.make_folder(folder)
                disk.sync_folder(folder.parent)
                stack.enter_context(hold_lock(folder / _LOCK, purpose="at the same job", wait=False))
                break
            except StorageError as error:
                if attempt == _TRIES - 1 or not isinstance(error.__cause__, FileNotFoundError | FileExistsError):
                    raise
            except LockedError:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(_PAUSE_S)
        yield


def _take_away(folder: Path) -> None:
    """Removes a job whose lock is held: whole, or not at all, since half of one could not be continued."""
    doomed = folder.with_name(f"{folder.name}-{uuid4().hex}{_DOOMED}")  # another may be removing one of the same job
    disk.rename(folder, doomed)
    disk.sync_folder(folder.parent)
    disk.remove_tree(doomed)


def remove_job(folder: Path) -> bool:
    """Removes a job that no process is at; gives False where one is."""
    try:
        with hold_lock(folder / _LOCK, purpose="at this job", wait=False):
            _take_away(folder)
    except LockedError:
        return False
    except StorageError as error:
        # It may have gone since it was listed, and another of its name may have begun: that one was made later.
        if folder.exists() and not isinstance(error.__cause__, FileNotFoundError):
            raise
    return True


@contextmanager
def run_attempt(store: StoreFolder, command: str) -> Iterator[Path]:
    """The folder of a job that cannot be continued: removed at the end in any case, as are those that killed ones left."""
    remove_abandoned(store, command)
    arguments = {"command": command, "attempt": uuid4().hex}
    try:
        with run_job(store, job_name(arguments), arguments) as job:
            yield job
    except BaseException:
        with contextlib.suppress(KnnstoreError):  # the first error is the one to tell
            remove_abandoned(store, command)
        raise


def is_held(folder: Path) -> bool:
    """Whether a process is at a job."""
    with unless_held(folder / _LOCK) as free:
        return not free


def read_moves(store: StoreFolder, folder: Path) -> list[tuple[Path, Path]]:
    """What the commit of a job may have moved: from its folder, to its place. Raises DamageError."""
    at = str(folder / MOVES_FILE)
    moves = []
    for pair in parse_list(parse_json(folder / MOVES_FILE), at):
        source, target = (parse_text(name, at) for name in parse_list(pair, at, length=2))
        # Nothing outside of the job and the store is ever moved.
        if not _SOURCE.fullmatch(source) or ".." in source.split("/") or not _TARGET.fullmatch(target):
            raise DamageError(f"{at}: {source[:80]!r} to {target[:80]!r} is no move of a commit. Remove {folder}.")
        moves.append((folder / source, store.path / target))
    return moves


def moved_by(store: StoreFolder, folder: Path) -> set[Path]:
    """Where the commit of a job that is not finished may have put what was staged."""
    try:
        return {target for _, target in read_moves(store, folder)}
    except DamageError:  # not there, or not what was written
        return set()


def remove_abandoned(store: StoreFolder, command: str) -> None:
    """Removes the jobs of a command that cannot be continued and that no process is at any more, and what kills left of any removed one."""
    jobs = dict(other_jobs(store, ""))
    for folder in sorted(path for path in store.staging.glob("*") if path.is_dir()):
        if folder.suffix == _DOOMED:
            disk.remove_tree(folder)
        elif not (folder / JOB_FILE).exists() or jobs.get(folder.name, {}).get("command") == command:
            remove_job(folder)  # one without arguments was killed before it began
