"""Stores with a past that are damaged and repaired, and a dull reckoning of what is left of them."""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from pasts import add, content, make

import knnstore
from knnstore.repairing import RepairReport
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.manifest import Manifest

Key = tuple[str, str]  # domain and id
DOCUMENTS = {(domain, name): 0 for domain in "ab" for name in ("one", "two", "three", "four", "five")}


def make_past(path: Path) -> None:
    """Snapshots 1 to 4: ten documents in segments of 20 entries, some in two; one more; without one; one replaced. Two tags."""
    make(path, DOCUMENTS, segment_entries=20)
    knnstore.tag(path, "first")
    add(path, "c", "new")
    knnstore.delete(path, ["three"], domain="a")
    knnstore.tag(path, "paper")
    add(path, "b", "four", 1)


def manifest_of(path: Path, snapshot: int | None = None) -> Manifest:
    manifest, pin = open_snapshot(StoreFolder(path), snapshot)
    pin.release()
    return manifest


def in_segments(path: Path, uuids: Iterable[str], snapshot: int | None = None) -> set[Key]:
    """The live documents of a snapshot that have rows in some of its segments."""
    found = set()
    with knnstore.open(path, snapshot=snapshot) as store:
        for segment in store.segments:
            if segment.content.uuid not in uuids:
                continue
            for record in segment.contexts.documents():
                if not any(first <= record.first_row < stop for first, stop in segment.record.dead):
                    domain = next(name for name, _, stop in segment.record.runs if record.first_row < stop)
                    found.add((domain, record.id))
    return found


def inventory(path: Path) -> set[str]:
    """sha256 of every file's content, wherever it is; LOCK and CURRENT, which a repair writes anew, left out."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink() and file.name not in ("LOCK", "CURRENT")]
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_repaired(path: Path, report: RepairReport, held: dict[Key, list[int]]) -> None:
    """The store is whole, holds just these documents, and what the report says of it is so."""
    verified = knnstore.verify(path)
    assert verified.problems == ()
    assert [orphan for orphan in verified.orphans if not orphan.endswith(".moved")] == []  # what a link that was put aside led to
    assert content(path) == held
    manifest = manifest_of(path)
    assert (report.snapshot, report.documents, report.entries) == (manifest.snapshot, len(held), sum(map(len, held.values())))
    for item in report.moved:
        assert item.to.startswith(f"quarantine/{report.snapshot}/{item.path}")
        assert (path / item.to).exists() or (path / item.to).is_symlink()
    again = knnstore.repair(path)
    assert (again.problems, again.moved, again.snapshot, again.lossless) == ((), (), report.snapshot, True)


def copied(path: Path, target: Path) -> Path:
    return Path(shutil.copytree(path, target, symlinks=True))
