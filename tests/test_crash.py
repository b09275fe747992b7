"""Power cuts: wherever a command is cut off, and whatever the file system loses then, the store opens to the old or the new snapshot.

Every prefix of a command's calls to the disk is replayed into a file system that keeps and loses what POSIX lets it (`crash`); every
state is looked at (`cuts`). An acknowledged commit is there whatever is lost after it.
"""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from acts import STORE, a_life, coded_life, joining_life, merge_life
from crash import FileSystem, Recording, Tree, tree_of
from cuts import FULL, QUICK, Outcome, Shown, play, play_twice
from living import contents
from stores import flip

import knnstore
from knnstore.errors import DamageError

EFFORTS = [pytest.param(QUICK, id="quick"), pytest.param(FULL, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_life(fast_path, monkeypatch, tell, effort):
    """Each command once, in the life of one store."""
    play(fast_path, monkeypatch, a_life(), tell, effort)


@pytest.mark.parametrize("effort", EFFORTS)
def test_appends_that_join_segments(fast_path, monkeypatch, tell, effort):
    """An append and a compact that write small segments again as one, without their dead rows."""
    play(fast_path, monkeypatch, joining_life(), tell, effort, skip=4)


@pytest.mark.parametrize("effort", EFFORTS)
def test_raw_keys_become_codes(fast_path, monkeypatch, tell, effort):
    """An append that trains the first quantizer and encodes what is there."""
    play(fast_path, monkeypatch, coded_life(), tell, effort, skip=1)


@pytest.mark.parametrize("into", [False, True], ids=["new", "into"])
@pytest.mark.parametrize("link", [False, True], ids=["copied", "linked"])
@pytest.mark.parametrize("effort", EFFORTS)
def test_merges(fast_path, monkeypatch, tell, effort, link, into):
    """Into a new store and into one that is there; the stores that are merged stay as they were."""
    (fast_path / "root").mkdir()
    play(fast_path, monkeypatch, merge_life(fast_path / "root", link=link, into=into), tell, effort, skip=into)


@pytest.mark.parametrize(
    "times", [pytest.param(1, id="quick"), pytest.param(6, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_a_second_cut(fast_path, monkeypatch, tell, times):
    """A command that was cut off is typed again, and cut off again."""
    play_twice(fast_path, monkeypatch, a_life() if times > 1 else a_life()[:2], tell, QUICK, times=times)


def _newest(path: Path, pattern: str) -> Path:
    """The last one written of a store's files of a name."""
    return max(path.glob(pattern), key=lambda file: file.stat().st_mtime_ns)


DAMAGED: dict[str, Callable[[Path], Path]] = {
    "segment": lambda path: _newest(path, "segments/*/values.bin"),
    "manifest": lambda path: _newest(path, "manifests/*.json"),
    "current": lambda path: path / "CURRENT",
    "identity": lambda path: path / "KNNSTORE",
    "tag": lambda path: path / "tags" / "paper.json",
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("effort", EFFORTS)
def test_repairs(fast_path, monkeypatch, tell, what, effort):
    """A repair that is cut off: no byte of the store is gone, what opens is whole, and typed again it ends as it would have."""
    root, path = fast_path / "root", fast_path / "root" / STORE
    root.mkdir()
    for act in a_life()[:4]:
        act.run(path)
    flip(DAMAGED[what](path), 20)
    start = tree_of(root)
    with Recording(root).on(monkeypatch) as recording:
        report = knnstore.repair(path)
    assert report.problems
    after = Outcome.of(path, {})
    held = _held(path)
    system, rng, shown, seen, n_again = FileSystem(start), random.Random(7), Shown(fast_path / "cut"), set(), 0
    replaced = ("LOCK",) if what == "current" else ("LOCK", "CURRENT")
    kept = {content for name, content in start.items() if content is not None and Path(name).name not in replaced}
    for number, call in enumerate(recording.calls, 1):
        system.apply(call)
        for tree in effort.states(system, rng):
            name = hash(frozenset(tree.items()))
            if name in seen:
                continue
            seen.add(name)
            assert kept <= set(tree.values()), "something of the damaged store is gone"
            if number < len(recording.calls) and rng.random() > 0.5:
                continue
            n_again += 1
            shown.show(tree)
            if number == len(recording.calls):
                assert Outcome.of(shown.folder / STORE, {}).is_as(after)
            _repair_again(fast_path / "again", tree, held)
    tell(f"crash: repair of a {what}: {len(recording.calls)} calls to the disk, {len(seen)} states, {n_again} of them repaired again")


def _held(path: Path) -> dict:
    with knnstore.open(path) as store:
        return contents(store)


def _repair_again(folder: Path, tree: Tree, held: dict) -> None:
    Shown(folder).show(tree)
    path = folder / STORE
    with contextlib.suppress(DamageError):
        Outcome.of(path, {})
    knnstore.repair(path)
    assert _held(path) == held
    assert knnstore.verify(path).problems == ()
    knnstore.gc(path, keep=1, quarantine=True)
    assert _held(path) == held
    assert knnstore.verify(path).problems == ()
    shutil.rmtree(folder)
