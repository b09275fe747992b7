"""Jobs: work that is continued by typing the same command again. A job is a folder in `staging/`, named by what was asked for."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.files import disk, hold_lock, replace_file
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json

__all__ = ["JOB_FILE", "MOVES_FILE", "job_name", "other_jobs", "run_job"]

JOB_FILE = "job.json"
MOVES_FILE = "moves.json"  # what a commit takes out of the job, written before it does
_LOCK = "lock"


def job_name(arguments: Mapping[str, Any]) -> str:
    """32 hex digits over the arguments and inputs of a command (JSON values)."""
    return hashlib.sha256(canonical(dict(arguments))).hexdigest()[:32]


def other_jobs(store: StoreFolder, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the unfinished jobs of a store other than this one. Folders that never got arguments are not counted."""
    jobs = []
    for folder in sorted(store.staging.iterdir()) if store.staging.is_dir() else []:
        if folder.name != name and (folder / JOB_FILE).is_file():
            try:
                jobs.append((folder.name, parse_json(folder / JOB_FILE)))
            except DamageError:
                continue  # its own command will begin it anew
    return jobs


@contextmanager
def run_job(store: StoreFolder, name: str, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """The job's folder, locked while in use. It stays after an error, to be continued, and is removed after success.

    After an InvalidArgumentError it is removed too: the same arguments and inputs would fail again, and others are another job.
    Raises LockedError where another process is at the same job.
    """
    folder = store.staging / name
    disk.make_folder(folder)
    disk.sync_folder(store.staging)
    with hold_lock(folder / _LOCK, purpose="at the same job", wait=False):
        if not (folder / JOB_FILE).exists():
            replace_file(folder / JOB_FILE, canonical(dict(arguments)))
        try:
            yield folder
        except InvalidArgumentError:
            disk.remove_tree(folder)
            raise
        disk.remove_tree(folder)
