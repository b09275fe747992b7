"""What the tests of append, delete and merge share: a store against its oracle, its newest snapshot, its files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from living import Drawn, Key, batches, check_answers, check_contents, draw

import knnstore
from knnstore.storage import files
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.commits import commit
from knnstore.storage.manifest import Manifest, Operation

QUERIES = draw("queries", n=3).keys
EVERYWHERE = 1 << 16  # nprobe: all lists


def assert_holds(path: Path, oracle: Mapping[Key, Drawn], *, k: int | None = None, orphans: bool = False) -> None:
    """Documents, counts and answers are the oracle's, also where more is asked for than there is; every file is whole; no work is left.

    orphans: whether there may be files that no kept snapshot needs.
    """
    with knnstore.open(path) as store:
        check_contents(store, oracle)
        check_answers(store, oracle, QUERIES, k=k or len(store) + 3, nprobe=EVERYWHERE)
    report = knnstore.verify(path, level="full")
    assert report.problems == ()
    assert orphans or report.orphans == ()
    assert not list((path / "staging").iterdir())


def newest(path: Path) -> Manifest:
    """The newest snapshot's manifest."""
    manifest, pin = open_snapshot(StoreFolder(path))
    pin.release()
    return manifest


def append(path: Path, *drawn: Drawn, replace: bool = True, meanwhile: Callable[[], object] | None = None) -> Manifest:
    """Appends documents; meanwhile: what others do before the last of them comes."""

    def given() -> Iterator[Any]:
        *some, last = batches(drawn)
        yield from some
        if meanwhile is not None:
            meanwhile()
        yield last

    return knnstore.append_entries(path, given(), replace=replace)


def put(path: Path, **fields: Any) -> Manifest:
    """Commits the newest snapshot once more, with other fields."""
    operation = Operation(name="test", arguments={}, counts={})
    return commit(StoreFolder(path), lambda n, parent, now: replace(now, snapshot=n, parent=parent, operation=operation, **fields))


def listing(path: Path) -> dict[str, bytes]:
    """What is in a store, but for the lock that a command leaves its number in."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "LOCK"}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that are opened for writing while it lasts."""
    opened: list[Path] = []

    class Watched(files.Disk):
        def open(self, path: Path, flags: int) -> int:
            opened.append(path)
            return super().open(path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(files.disk, "__class__", Watched)
        yield opened
