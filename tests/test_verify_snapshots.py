"""`verify` on several snapshots, beside readers, writers and a gc, and on a later format."""

import dataclasses
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import invert
from verified import Told, assert_clean, make, problems_of

import knnstore
from knnstore.errors import FormatError
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.commits import commit
from knnstore.storage.manifest import Manifest
from knnstore.storage.manifest_json import manifest_bytes


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("template") / "s.knn", 60, 40, keep_keys="f32")


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "s.knn"))


def commit_same(path: Path, **changes: Any) -> Manifest:
    """A further snapshot of the same segments."""
    store = StoreFolder(path)
    base, pin = open_snapshot(store)
    pin.release()
    return commit(store, lambda number, parent, current: dataclasses.replace(base, snapshot=number, parent=parent, **changes))


def commit_from(path: Path, other: Path) -> Manifest:
    """A further snapshot, of the segments of another store only."""
    store = StoreFolder(path)
    base, pin = open_snapshot(store)
    pin.release()
    manifest, pin = open_snapshot(StoreFolder(other))
    pin.release()
    for folder in ("spaces", "segments"):
        shutil.copytree(other / folder, path / folder, dirs_exist_ok=True)
    return commit(store, lambda number, parent, current: dataclasses.replace(manifest, uuid=base.uuid, snapshot=number, parent=parent))


@pytest.fixture
def grown(path: Path, tmp_path: Path) -> Path:
    """A store of three snapshots: the first of one segment, the others of another."""
    commit_from(path, make(tmp_path / "other.knn", 30, 20))
    commit_same(path, k=7)
    return path


def test_all_kept_snapshots_are_verified(grown: Path) -> None:
    """Damage in what only an old snapshot names is found."""
    assert_clean(grown)
    store = StoreFolder(grown)
    old, pin = open_snapshot(store, 1)
    pin.release()
    file = store.segment(old.segments[0].content.uuid) / "lists.bin"
    invert(file, 100)
    assert [problem.path for problem in problems_of(grown)] == [file.relative_to(grown).as_posix()]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_manifest_is_checked(grown: Path, number: int) -> None:
    """Each by its own hash, and by what CURRENT or its child says of it."""
    file = grown / "manifests" / f"{number}.json"
    raw = file.read_bytes()
    for at in range(number, len(raw), 50):
        invert(file, at)
        for level in ("quick", "full"):
            report = knnstore.verify(grown, level=level)
            assert file.relative_to(grown).as_posix() in [problem.path for problem in report.problems], at
            assert not report.orphans, "what a damaged manifest names is not known"
        file.write_bytes(raw)


def test_a_manifest_of_another_history(grown: Path) -> None:
    """A manifest that is whole, but is not the one its child names as parent."""
    store = StoreFolder(grown)
    manifest, pin = open_snapshot(store, 2)
    pin.release()
    (grown / "manifests" / "2.json").write_bytes(manifest_bytes(dataclasses.replace(manifest, k=5)))
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("manifest", "manifests/2.json")
    assert "snapshot 3 names" in problem.detail


def test_a_manifest_of_another_store(grown: Path, tmp_path: Path) -> None:
    """One that is whole is to blame by itself: what it says of its parent says nothing of this store's snapshots."""
    other = make(tmp_path / "another.knn", 60, 40)
    commit_same(other, k=3)
    commit_same(other, k=4)
    whole = (grown / "manifests" / "3.json").read_bytes()
    shutil.copyfile(other / "manifests" / "3.json", grown / "manifests" / "3.json")
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("manifest", "manifests/3.json")
    (grown / "manifests" / "3.json").write_bytes(whole)
    commit_same(grown, k=8)
    (grown / "manifests" / "3.json").unlink()  # by a gc, and with it what named the second one's sha256
    shutil.copyfile(other / "manifests" / "2.json", grown / "manifests" / "2.json")
    problems = problems_of(grown, "quick")  # what it names is not there either
    assert {problem.path for problem in problems if problem.kind == "manifest"} == {"manifests/2.json"}


def test_current_that_lies(grown: Path) -> None:
    """CURRENT is to blame where it contradicts a manifest that is whole; a number that is not there is missing."""
    current = (grown / "CURRENT").read_text()
    (grown / "CURRENT").write_text(current[:-2] + ("0" if current[-2] != "0" else "1") + "\n")
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("current", "CURRENT")
    (grown / "CURRENT").write_text("9" + current[1:])
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("missing", "manifests/9.json")


def test_identity_of_another_store(grown: Path, tmp_path: Path) -> None:
    """KNNSTORE is to blame where all snapshots contradict it, a manifest where it alone does."""
    shutil.copyfile(tmp_path / "other.knn" / "KNNSTORE", grown / "KNNSTORE")
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("identity", "KNNSTORE")


def test_manifests_that_a_gc_removed(grown: Path) -> None:
    """Snapshots need not all be there, and what only they named is an orphan then, no damage."""
    (grown / "manifests" / "1.json").unlink()
    report = knnstore.verify(grown)
    assert report.ok
    assert {Path(orphan).parent.name for orphan in report.orphans} == {"segments"}
    (grown / "manifests" / "2.json").unlink()
    assert knnstore.verify(grown).ok


def test_an_attempt_that_never_counted(path: Path) -> None:
    """A manifest above CURRENT, its segment, and other things that no snapshot names are orphans, no damage."""
    (path / "manifests" / "2.json").write_bytes(b"{}")
    (path / "manifests" / "2.json.tmp").write_bytes(b"")
    (next((path / "segments").iterdir()) / "journal").touch()
    (path / "segments" / ("ab" * 16)).mkdir()
    told = Told()
    report = knnstore.verify(path, progress=told)
    assert report.ok
    assert {Path(orphan).name for orphan in report.orphans} == {"2.json", "2.json.tmp", "ab" * 16, "journal"}
    assert len(told.notes) == 1


def test_commit_while_it_reads(grown: Path) -> None:
    """A snapshot that is committed meanwhile changes nothing: verify looks at those that were there when it began."""
    told = Told(lambda: commit_same(grown, k=9))
    report = knnstore.verify(grown, progress=told)
    assert (report.ok, report.orphans) == (True, ())


def test_manifests_are_held_while_it_reads(grown: Path) -> None:
    """As a reader does, so that no gc takes files away."""
    refused = []

    def try_locks() -> None:
        for number in (1, 2, 3):
            fd = os.open(grown / "manifests" / f"{number}.json", os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(number)
            finally:
                os.close(fd)

    assert knnstore.verify(grown, progress=Told(try_locks)).ok
    assert refused == [1, 2, 3]
    refused.clear()
    try_locks()
    assert not refused, "and given free afterwards"


def test_gc_while_it_reads(grown: Path) -> None:
    """Where a snapshot goes all the same (a file system without locks), what only it named is not missed."""
    store = StoreFolder(grown)
    old, pin = open_snapshot(store, 1)
    pin.release()

    def gc() -> None:
        (grown / "manifests" / "1.json").unlink()
        shutil.rmtree(store.segment(old.segments[0].content.uuid))

    assert knnstore.verify(grown, progress=Told(gc)).ok
    new, pin = open_snapshot(store)
    pin.release()
    shutil.rmtree(store.segment(new.segments[0].content.uuid))
    assert [problem.kind for problem in problems_of(grown)] == ["missing"], "but what is named is"


def test_beside_an_open_reader(path: Path) -> None:
    """In one process too, where LMDB opens a file once only."""
    with knnstore.open(path) as opened:
        hits = opened.search(np.zeros(6), k=3)
        before = hits.context(0, 0)
        assert_clean(path)
        assert hits.context(0, 0) == before


# A later format


def test_later_format(path: Path) -> None:
    """A store of a later format cannot be verified, and is not called damaged."""
    identity, manifest = path / "KNNSTORE", path / "manifests" / "1.json"
    identity.write_text(identity.read_text().replace('"format":1', '"format":2'))
    raw = manifest.read_bytes().replace(b'"format":1', b'"format":2')
    manifest.write_bytes(raw)
    (path / "CURRENT").write_text(f"1 {hashlib.sha256(raw).hexdigest()}\n")
    with pytest.raises(FormatError):
        knnstore.verify(path)


def test_format_number_that_is_damaged(path: Path) -> None:
    """A later format in KNNSTORE alone, or in a manifest that is not what CURRENT names, is damage."""
    for name in ("KNNSTORE", "manifests/1.json"):
        file = path / name
        content = file.read_text()
        file.write_text(content.replace('"format":1', '"format":9'))
        assert name in [problem.path for problem in problems_of(path)]
        file.write_text(content)
    assert_clean(path)
