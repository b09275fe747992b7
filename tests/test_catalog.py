"""Snapshots: what is opened, what is refused, what is kept."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid

import numpy as np
import pytest
from committed import DIM, KEYS, commit_next, entries_at, make
from stores import create_store, draw_keys, draw_values

import knnstore
from knnstore.errors import ConflictError, DamageError, ExistsError, FormatError, LockedError, NotFoundError, StorageError
from knnstore.storage import catalog, files
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.files import disk
from knnstore.storage.jobs import job_name, run_job
from knnstore.storage.manifest_json import canonical, manifest_bytes


def test_a_snapshot_stays_as_it_was(tmp_path):
    """A store opened before a commit sees nothing of it; the older snapshot can be opened after; manifests name their parents."""
    path = tmp_path / "s.knn"
    base = make(path)
    with knnstore.open(path) as before:
        second = commit_next(path, base)
        assert (len(before), int(before.search(KEYS[:1], k=100).n_found[0])) == (30, 30)
    assert entries_at(path) == 40
    raw = (path / "manifests" / "1.json").read_bytes()
    assert second.parent == (1, hashlib.sha256(raw).hexdigest())
    with knnstore.open(path, snapshot=1) as old:
        assert (old.snapshot, len(old)) == (1, 30)


def test_an_open_snapshot_is_pinned(tmp_path):
    """Who wants to remove its manifest finds it locked, until it is closed."""
    path = tmp_path / "s.knn"
    make(path)
    with (path / "manifests" / "1.json").open() as other:
        with knnstore.open(path) as first, knnstore.open(path):
            first.close()
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_manifest_removed_while_it_is_opened_is_looked_for_again(tmp_path, monkeypatch, when):
    """A reader that was about to open a snapshot which was collected meanwhile gets the newer one."""
    path = tmp_path / "s.knn"
    base = make(path)
    commit_next(path, base)
    first = path / "manifests" / "1.json"
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    stale = [(1, digest)]
    read_current = catalog.read_current
    monkeypatch.setattr(catalog, "read_current", lambda store: stale.pop() if stale else read_current(store))
    if when == "before it is opened":
        first.unlink()
    else:
        flock = fcntl.flock

        def late(fd: int, how: int) -> None:
            first.unlink(missing_ok=True)
            flock(fd, how)

        monkeypatch.setattr(catalog.fcntl, "flock", late)
    manifest, pin = open_snapshot(StoreFolder(path))
    pin.release()
    assert manifest.snapshot == 2
    assert not stale


def test_what_is_no_datastore_is_not_found(tmp_path):
    """Nothing there, an empty folder, some other folder, a creation that was not finished, a snapshot that is not there."""
    with pytest.raises(NotFoundError, match="no such datastore"):
        knnstore.open(tmp_path / "none.knn")
    (tmp_path / "other").mkdir()
    with pytest.raises(NotFoundError, match="not a datastore"):
        knnstore.open(tmp_path / "other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError, match="not a datastore"):
        knnstore.open(tmp_path / "file")
    path = tmp_path / "s.knn"
    make(path)
    with pytest.raises(NotFoundError, match="no snapshot 2; the newest is 1"):
        knnstore.open(path, snapshot=2)
    with pytest.raises(NotFoundError, match=r"no snapshot 0\. Kept: 1"):
        knnstore.open(path, snapshot=0)
    (path / "CURRENT").unlink()
    (path / "manifests" / "1.json").unlink()
    with pytest.raises(NotFoundError, match="its creation was not finished"):
        knnstore.open(path)


@pytest.mark.parametrize("content", [None, b"", b"1\n", b"1 " + b"0" * 64, b"01 " + b"0" * 64 + b"\n", b"2 " + b"0" * 64 + b"\n", "flip"])
def test_a_damaged_current_names_the_newest_sound_snapshot(tmp_path, content):
    """Nothing is opened in its stead; the snapshots are still there, by their number, and a commit is refused."""
    path = tmp_path / "s.knn"
    base = make(path)
    second = commit_next(path, base)
    current = path / "CURRENT"
    if content is None:
        current.unlink()
    elif content == "flip":
        digest = hashlib.sha256(b"another manifest").hexdigest()
        current.write_text(f"2 {digest}\n")
    else:
        current.write_bytes(content)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(DamageError, match=r"Nothing was changed; snapshot 2 verifies: open it by --at 2"):
        knnstore.open(path)
    with knnstore.open(path, snapshot=1) as store:
        assert len(store) == 30
    if content is not None:
        with pytest.raises((DamageError, NotFoundError, ConflictError)):
            commit_next(path, second)
    with pytest.raises((DamageError, ExistsError)):
        make(path)
    assert all(file.read_bytes() == raw for file, raw in before.items() if "staging" not in file.parts and file.name != "LOCK")


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "empty", "of another snapshot", "a folder"])
def test_a_damaged_manifest_names_the_newest_sound_snapshot(tmp_path, damage):
    """By name or as the newest: it is refused, and the one before is named."""
    path = tmp_path / "s.knn"
    commit_next(path, make(path))
    manifest = path / "manifests" / "2.json"
    raw = manifest.read_bytes()
    manifest.unlink()
    if damage == "a folder":
        manifest.mkdir()
    elif damage != "missing":
        other = (path / "manifests" / "1.json").read_bytes()
        manifest.write_bytes({"flipped": raw[:50] + b"?" + raw[51:], "cut": raw[:-9], "empty": b"", "of another snapshot": other}[damage])
    for snapshot in (None, 2):
        with pytest.raises(DamageError, match=r"2\.json: .*snapshot 1 verifies: open it by --at 1"):
            knnstore.open(path, snapshot=snapshot)
    assert len(knnstore.open(path, snapshot=1)) == 30


def test_manifests_above_current_never_counted(tmp_path):
    """What a commit left that was cut off is neither opened nor listed, and is removed by the next commit."""
    path = tmp_path / "s.knn"
    base = make(path)
    for number in (2, 3):
        (path / "manifests" / f"{number}.json").write_bytes(manifest_bytes(dataclasses.replace(base, snapshot=number)))
    (path / "manifests" / "2.json.tmp").write_bytes(b"half")
    with knnstore.open(path) as store:
        assert store.snapshot == 1
    with pytest.raises(NotFoundError, match="the newest is 1"):
        knnstore.open(path, snapshot=2)
    second = commit_next(path, base)
    assert second.snapshot == 2
    assert entries_at(path) == 40
    assert sorted(file.name for file in (path / "manifests").iterdir()) == ["1.json", "2.json"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, DamageError),
        (b"", DamageError),
        (b"{}", DamageError),
        (canonical({"format": 1, "magic": "other", "uuid": "00" * 16}), DamageError),
        (canonical({"format": 1, "magic": "knnstore", "uuid": "00" * 16}), DamageError),  # another store's
        (canonical({"format": 1, "magic": "knnstore", "uuid": "../.."}), DamageError),
        (canonical({"format": 2, "magic": "knnstore", "uuid": "00" * 16}), FormatError),
    ],
)
def test_an_identity_that_is_not_the_stores_is_refused(tmp_path, content, error):
    path = tmp_path / "s.knn"
    make(path)
    (path / "KNNSTORE").unlink()
    if content is not None:
        (path / "KNNSTORE").write_bytes(content)
    with pytest.raises(error):
        knnstore.open(path)


READ_ONLY = """
import os, sys
from pathlib import Path
from knnstore.errors import StorageError
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.commits import commit
from knnstore.store import open_store
os.setgid(65534)
os.setuid(65534)  # the store is another user's from here on
with open_store(sys.argv[1]) as store:
    hits = store.search([0.0] * store.dim, k=3)
    print(int(hits.n_found[0]), hits.context(0, 0).document)
    try:
        commit(StoreFolder(Path(sys.argv[1])), lambda number, parent, current: store.manifest)
    except StorageError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, for whom the files are read-only")
def test_a_store_that_may_not_be_written_is_read(tmp_path):
    """Another user's store, or one on a read-only medium: searched, contexts and all; a commit is refused by name."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    path = tmp_path / "s.knn"
    make(path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", READ_ONLY, str(path)], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[:1] == ["3 only"], done.stderr
    assert "LOCK: cannot open for writing: Permission denied" in done.stdout


def test_a_store_moved_as_a_folder_is_the_same(tmp_path):
    """Every path inside is relative: it is moved with `mv`, copied with `cp -r`."""
    make(tmp_path / "s.knn")
    shutil.copytree(tmp_path / "s.knn", tmp_path / "elsewhere" / "t.knn")
    shutil.rmtree(tmp_path / "s.knn")
    assert entries_at(tmp_path / "elsewhere" / "t.knn") == 30


def test_a_store_is_found_after_the_working_folder_changed(tmp_path, monkeypatch):
    """Opened by a relative path, used after chdir: files are opened at first use."""
    make(tmp_path / "s.knn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with knnstore.open("s.knn") as store:
        monkeypatch.chdir(tmp_path / "elsewhere")
        hits = store.search(KEYS[:1], k=3)
        assert hits.context(0, 0).document == "only"


def test_a_job_is_done_by_one_process_at_a_time(tmp_path):
    """The second is told the first one's process id. The job's folder stays after an error, and goes when it is done."""
    store = StoreFolder(tmp_path)
    arguments = {"command": "test", "n": 1}
    name = job_name(arguments)
    assert name == job_name({"n": 1, "command": "test"}) != job_name({"command": "test", "n": 2})
    locked = pytest.raises(LockedError, match=f"process {os.getpid()} is at the same job")
    with contextlib.suppress(RuntimeError), run_job(store, name, arguments) as folder:
        with locked, run_job(store, name, arguments):
            pass
        raise RuntimeError
    assert json.loads((folder / "job.json").read_text()) == arguments
    with run_job(store, name, arguments) as again:
        assert again == folder
    assert not folder.exists()


def test_what_the_disk_refuses_names_the_file(tmp_path):
    """Every call of the door to the disk: a StorageError with the path and what was tried."""
    missing = tmp_path / "none" / "file"
    for call in (
        lambda: disk.open(missing, os.O_RDWR),
        lambda: disk.rename(missing, missing),
        lambda: disk.replace(missing, missing),
        lambda: disk.link(missing, missing),
        lambda: disk.remove_folder(missing),
        lambda: disk.sync_folder(missing),
        lambda: disk.write(-1, memoryview(b"x"), missing),
        lambda: disk.pwrite(-1, memoryview(b"x"), 0, missing),
        lambda: disk.truncate(-1, 0, missing),
        lambda: disk.fsync(9_999, missing),
        lambda: files.sha256_file(missing),
    ):
        with pytest.raises(StorageError, match=str(missing)):
            call()
    disk.remove(missing)  # what is not there is removed already
    disk.remove_tree(missing)


def test_a_store_of_another_uuid_is_not_taken_for_this_one(tmp_path):
    """A manifest copied from another store, with a CURRENT that fits it."""
    make(tmp_path / "a.knn")
    make(tmp_path / "b.knn")
    for name in ("CURRENT", "manifests/1.json"):
        shutil.copy(tmp_path / "a.knn" / name, tmp_path / "b.knn" / name)
    with pytest.raises(DamageError, match="belongs to another snapshot or store"):
        knnstore.open(tmp_path / "b.knn")


def test_names_in_a_store_are_of_a_fixed_form(tmp_path):
    """Folders and files are those of the format, nothing else is left after a creation."""
    path = tmp_path / "s.knn"
    manifest = create_store(path, draw_keys(2, 5_000, DIM), draw_values(2, 5_000), keep_keys="f16", segment_entries=3_000)
    inside = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    expected = ["CURRENT", "KNNSTORE", "LOCK", "manifests/1.json"]
    expected += [f"spaces/{space.id}/{name}" for space in manifest.spaces for name in ("centroids.bin", "rotation.bin", "space.json")]
    names = ("contexts.lmdb", "ids.bin", "keys.bin", "lists.bin", "lists.dir", "segment.json", "values.bin")
    expected += [f"segments/{segment.content.uuid}/{name}" for segment in manifest.segments for name in names]
    assert inside == sorted(expected)
    assert {folder.name for folder in path.iterdir() if folder.is_dir()} == {"coarse", "manifests", "segments", "spaces", "staging", "tags"}
    assert [uuid.UUID(segment.content.uuid).version for segment in manifest.segments] == [4, 4]
    assert np.array_equal([segment.content.entries for segment in manifest.segments], [3_000, 2_000])
