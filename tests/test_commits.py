"""A commit is there or not, whatever happens on the way."""

import dataclasses
import hashlib
import os
import shutil
import threading
from pathlib import Path

import pytest
from committed import commit_next, entries_at, make
from stores import PowerCut

import knnstore
from knnstore.errors import ConflictError, ExistsError, FormatError, KnnstoreError, NotFoundError, StorageError
from knnstore.storage.catalog import StoreFolder, list_manifests
from knnstore.storage.files import hold_lock
from knnstore.storage.manifest import Manifest
from knnstore.storage.manifest_json import manifest_bytes


@pytest.mark.parametrize("names", [True, False], ids=["names-lost", "names-kept"])
def test_creation_is_whole_or_not_there_wherever_the_power_is_cut(tmp_path, monkeypatch, names):
    """Cut before each call to the disk, with what was not synced lost: the store is not there, or all of it is.

    The same command makes it then, unless it was done.
    """
    whole = PowerCut(1 << 30)
    path = tmp_path / "whole" / "s.knn"
    path.parent.mkdir()
    with whole.on(monkeypatch):
        make(path)
    whole.lose(names=names)
    assert entries_at(path) == 30  # it had said that it was done
    outcomes = set()
    for at in range(whole.n_calls):
        path = tmp_path / str(at) / "s.knn"
        path.parent.mkdir()
        cut = PowerCut(at)
        with cut.on(monkeypatch), pytest.raises(StorageError, match="the power is cut"):
            make(path)
        cut.lose(names=names)
        try:
            assert entries_at(path) == 30
            outcomes.add("after")
            with pytest.raises(ExistsError):
                make(path)
        except NotFoundError:
            outcomes.add("before")
            with PowerCut(1 << 30).on(monkeypatch):
                make(path)
            assert entries_at(path) == 30
    assert outcomes == {"before", "after"}


@pytest.mark.parametrize("names", [True, False], ids=["names-lost", "names-kept"])
def test_a_commit_is_whole_or_not_there_wherever_the_power_is_cut(tmp_path, monkeypatch, names):
    """The store is at snapshot 1 or at snapshot 2, with all entries of that snapshot; the next commit works either way."""
    first = tmp_path / "first.knn"
    base = make(first)
    whole = PowerCut(1 << 30)
    with whole.on(monkeypatch):
        path = Path(shutil.copytree(first, tmp_path / "whole.knn"))
        commit_next(path, base)
    whole.lose(names=names)
    assert entries_at(path) == 40
    outcomes = set()
    for at in range(whole.n_calls):
        path = Path(shutil.copytree(first, tmp_path / f"{at}.knn"))
        cut = PowerCut(at)
        with cut.on(monkeypatch), pytest.raises(StorageError, match="the power is cut"):
            commit_next(path, base)
        cut.lose(names=names)
        n_entries = entries_at(path)
        outcomes.add(n_entries)
        with knnstore.open(path) as store:
            assert store.snapshot == {30: 1, 40: 2}[n_entries]
            next_manifest = commit_next(path, store.manifest, name="again")
        assert next_manifest.snapshot == {30: 2, 40: 3}[n_entries]
        assert list_manifests(StoreFolder(path)) == list(range(1, next_manifest.snapshot + 1))
        assert entries_at(path) == n_entries + 10
    # The last call is the sync that makes CURRENT's new name last: cut before it, the name may be lost or not.
    assert outcomes == ({30} if names else {30, 40})


def test_what_refuses_to_be_built_changes_nothing(tmp_path):
    """Under LOCK, by looking at the newest snapshot; what may go through is in test_changes.py."""
    path = tmp_path / "s.knn"
    base = make(path)
    commit_next(path, base, name="delete")
    with pytest.raises(ConflictError, match="built on snapshot 1"):
        commit_next(path, base)
    assert entries_at(path) == 40
    assert list_manifests(StoreFolder(path)) == [1, 2]


def test_commits_wait_for_each_other(tmp_path):
    """LOCK is held while one is made: another waits, and then finds the store as the first left it."""
    path = tmp_path / "s.knn"
    base = make(path)
    outcome: list[object] = []

    def second() -> None:
        try:
            outcome.append(commit_next(path, base))
        except KnnstoreError as error:
            outcome.append(error)

    with hold_lock(path / "LOCK", purpose="testing", wait=False):
        assert (path / "LOCK").read_text() == f"{os.getpid()}\n"
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    assert isinstance(outcome[0], Manifest)


def test_a_commit_on_unknown_features_is_refused(tmp_path):
    """A snapshot that asks writers for more than this version knows can be read, and not built on."""
    path = tmp_path / "s.knn"
    base = make(path)
    later = dataclasses.replace(base, snapshot=2, writer_features=("journaled",))
    raw = manifest_bytes(later)
    (path / "manifests" / "2.json").write_bytes(raw)
    (path / "CURRENT").write_text(f"2 {hashlib.sha256(raw).hexdigest()}\n")
    with knnstore.open(path) as store:
        assert len(store) == 30
        with pytest.raises(FormatError, match="needs journaled"):
            commit_next(path, store.manifest)
