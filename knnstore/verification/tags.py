"""Tags, as `verify` looks at them."""

import contextlib
import os
from pathlib import Path

from knnstore.errors import NotFoundError
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.tags import read_tag, resolve, tag_name
from knnstore.verification.files import Findings, check_plain

__all__ = ["check_tags"]


def check_tags(store: StoreFolder, findings: Findings, folder: Path) -> set[Path]:
    """Each tag is whole, and its snapshot is there and the one that was tagged. Returns the paths of the tags' files.

    Where the manifest itself is damaged, that is the problem, and not a tag of it.
    """
    damaged = {problem.path for problem in findings.problems}
    found = set()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = tag_name(path)
        if name is None:
            continue
        found.add(path)
        before = len(findings.problems)
        with findings.of(path, "tag"), contextlib.suppress(NotFoundError):
            findings.checked(check_plain(path).st_size)
            if store.manifest(read_tag(path).snapshot).relative_to(store.path).as_posix() not in damaged:
                resolve(store, name)
        if not os.path.lexists(path):  # it was taken away meanwhile
            del findings.problems[before:]
    return found
