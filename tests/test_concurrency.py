"""Readers and writers of one store at once: a reader sees exactly one snapshot, commits come one after the other, nobody is in the way."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from beside import (
    Crew,
    again_and_again,
    append_at_once,
    append_each,
    delete_each,
    document,
    processes,
    read_along,
    seen_oracle,
)
from cuts import check_store
from living import DIM, batches, by_key, check_answers, check_contents, create, draw

import knnstore
from knnstore.errors import ConflictError
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.files import hold_lock

NAMES = [f"{domain}/{number}" for domain in ("default", "law", "med") for number in range(8)]


@pytest.fixture
def crew(fast_path: Path) -> Iterator[Crew]:
    """Nobody of it outlives the test."""
    made = Crew(fast_path)
    yield made
    made.end()


def _write_along(path: Path, names: list[str], dim: int, n_commits: int) -> dict[int, dict[str, int]]:
    """Appends, replaces, deletes, purges, compacts and collects. Returns the documents of each snapshot."""
    rng, held = random.Random(5), dict.fromkeys(names, 0)
    states = {1: dict(held)}
    for number in range(1, n_commits + 1):
        deed = rng.choice(["append", "append", "append", "delete", "purge", "compact", "gc"])
        if deed == "append" or len(held) < 3:
            names = rng.sample(NAMES, rng.randrange(1, 4))
            held |= dict.fromkeys(names, number)
            knnstore.append_entries(path, batches(document(name, number, dim) for name in names), replace=True)
        elif deed in ("delete", "purge"):
            name = rng.choice(sorted(held))
            domain, _, document_id = name.partition("/")
            del held[name]
            knnstore.delete(path, document_id, domain=domain, purge=deed == "purge")
        elif deed == "compact":
            knnstore.compact(path).close()
        if deed in ("gc", "compact"):
            knnstore.gc(path, keep=1)
        with knnstore.open(path) as store:
            states[store.snapshot] = dict(held)
    return states


def _read_and_write(crew: Crew, tell: Callable[[str], None], names: list[str], *, dim: int, n_readers: int, n_commits: int) -> None:
    path, stop = crew.folder / "s.knn", crew.folder / "stop"
    create(path, [document(name, 0, dim) for name in names], dim=dim)
    for number in range(n_readers):
        crew.start(read_along, path, stop, number, 3 if number % 4 == 3 else 1)
    until = time.monotonic() + 120
    while time.monotonic() < until and not all(stop.with_name(f"reading {number}").exists() for number in range(n_readers)):
        time.sleep(0.05)  # a loaded machine is slow to start them, and the writer would be done before
    states = _write_along(path, names, dim, n_commits)
    stop.touch()
    results = crew.results()
    for result in results:
        for number, documents in result["seen"].items():
            assert documents == states[int(number)], f"snapshot {number}"
    n_seen = len({number for result in results for number in result["seen"]})
    searches, opened = (sum(result[name] for result in results) for name in ("searches", "opened"))
    tell(f"readers: {n_readers} beside {len(states)} snapshots, {n_seen} of them seen; opened {opened:,} times, {searches:,} searches")
    assert n_seen > 2
    knnstore.gc(path, keep=1)
    assert knnstore.verify(path).problems == ()


def test_readers_beside_a_writer_quick(crew, tell):
    _read_and_write(crew, tell, NAMES[:6], dim=DIM, n_readers=4, n_commits=12)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_readers_beside_a_writer(crew, tell):
    """16 processes search in a loop beside over 100 commits, compactions and gcs: each answer is that of brute force on its snapshot."""
    _read_and_write(crew, tell, NAMES[:6], dim=DIM, n_readers=16, n_commits=150)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_readers_of_codes_beside_a_writer(crew, tell):
    """The same where most entries are 4-bit codes, and small segments come and go beside them."""
    _read_and_write(crew, tell, [*NAMES[:6], "base/base"], dim=8, n_readers=6, n_commits=50)


def test_a_reader_keeps_its_snapshot_through_everything(fast_path):
    """Opened before: a search, a text and a document not yet read are there after deletion, purge, compaction and gc."""
    path = fast_path / "s.knn"
    first = [document(name, 1) for name in NAMES[:5]]
    create(path, first)
    with knnstore.open(path) as reader:
        knnstore.append_entries(path, batches([document(NAMES[9], 1)]))
        knnstore.delete(path, domain="default", purge=True)
        knnstore.compact(path).close()
        knnstore.gc(path, keep=1)
        assert reader.snapshot == 1
        assert seen_oracle(reader).keys() == by_key(first).keys()
        check_contents(reader, by_key(first))
        check_answers(reader, by_key(first), draw("queries", n=4).keys, k=20)
    knnstore.gc(path, keep=1)
    with pytest.raises(knnstore.errors.NotFoundError, match="no snapshot 1"):
        knnstore.open(path, snapshot=1)


@pytest.mark.parametrize(("n_writers", "each"), [(3, 4), pytest.param(8, 12, marks=pytest.mark.slow)])
def test_writers_of_different_documents_come_one_after_the_other(fast_path, crew, n_writers, each):
    """All appends of all processes are there, though each was built on a snapshot that was not the newest any more."""
    path = fast_path / "s.knn"
    create(path, [document("default/first", 0)])
    names = [[f"default/{writer}.{number}" for number in range(each)] for writer in range(n_writers)]
    for some in names:
        crew.start(append_each, path, some, 3)
    assert sum(crew.results()) == n_writers * each
    check_store(path, by_key([document("default/first", 0), *(document(name, 3) for some in names for name in some)]))
    with knnstore.open(path) as store:
        assert store.snapshot == 1 + n_writers * each
    assert not list((path / "staging").iterdir())


def test_writers_of_the_same_document(fast_path, crew):
    """One is committed; the others are refused with exit code 5 and a message that names the document and the other commit."""
    path = fast_path / "s.knn"
    create(path, [document("default/first", 0)])
    n_writers = 3
    barrier = crew.barrier(n_writers)
    for version in range(n_writers):
        crew.start(append_at_once, path, barrier, "law/same", version)
    results = crew.results()
    won = [number for number, result in enumerate(results) if "snapshot" in result]
    assert len(won) == 1
    for result in results:
        if "conflict" in result:
            assert result["exit_code"] == 5
            assert "'same'" in result["conflict"]
            assert "snapshot 2" in result["conflict"]
    check_store(path, by_key([document("default/first", 0), document("law/same", won[0])]))


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_writers_of_all_kinds(fast_path, crew, times):
    """Appends, deletions, purges, compactions and gcs at once, and one that is killed: what was said to be done is done, and no more."""
    path = fast_path / "s.knn"
    doomed, purged, killed = ([f"{domain}/{number}" for number in range(times)] for domain in ("doomed", "purged", "killed"))
    create(path, [document(name, 2) for name in [*doomed, *purged]])
    come = [f"default/{number}" for number in range(times)]
    victim = processes().Process(target=append_each, args=(path, killed * 100, 4), daemon=True)
    victim.start()
    crew.start(append_each, path, come, 4)
    crew.start(delete_each, path, doomed, False)
    crew.start(delete_each, path, purged, True)
    crew.start(again_and_again, path, "compact", times)
    crew.start(again_and_again, path, "gc", times)
    time.sleep(0.1 * times)
    victim.kill()
    victim.join()
    crew.results()
    with knnstore.open(path) as store:
        its = sorted((item.id for item in store.documents() if item.domain == "killed"), key=int)
    assert its == [str(number) for number in range(len(its))]
    check_store(path, by_key(document(name, 4) for name in [*come, *killed[: len(its)]]))
    knnstore.gc(path, keep=1)
    assert not list((path / "staging").iterdir())
    assert knnstore.verify(path, level="quick").orphans == ()


def _hold(path: Path, held: Path) -> None:
    """Holds the store's lock and a job's until killed."""
    job = path / "staging" / "job"
    job.mkdir()
    with hold_lock(StoreFolder(path).lock, purpose="holding", wait=True), hold_lock(job / "lock", purpose="holding", wait=True):
        held.touch()
        time.sleep(1_000)


def test_a_killed_writer_leaves_no_lock(fast_path):
    """While it lives others wait; when it is killed they go on at once."""
    path, held = fast_path / "s.knn", fast_path / "held"
    create(path, [document("default/first", 0)])
    process = processes().Process(target=_hold, args=(path, held), daemon=True)
    process.start()
    while not held.exists():
        time.sleep(0.01)
    with pytest.raises(ConflictError, match=f"process {process.pid}"), hold_lock(StoreFolder(path).lock, purpose="testing", wait=False):
        pass
    process.kill()
    process.join()
    knnstore.append_entries(path, batches([document("default/second", 0)]))
    knnstore.gc(path, keep=1)
    assert not list((path / "staging").iterdir())
    check_store(path, by_key([document("default/first", 0), document("default/second", 0)]))


def test_stores_that_share_files_are_read_together(fast_path):
    """A merge by hard links, open beside what it was made of: LMDB knows files by their inode, and opens each once in a process."""
    parts = [document("default/a", 1), document("default/b", 1)]
    for part in parts:
        create(fast_path / f"{part.id}.knn", [part])
    with (
        knnstore.merge([fast_path / "a.knn", fast_path / "b.knn"], fast_path / "both.knn", link=True) as both,
        knnstore.open(fast_path / "a.knn") as alone,
    ):
        assert [item.id for item in alone.documents()] == ["a"]
        assert [item.id for item in both.documents()] == ["a", "b"]
    with knnstore.open(fast_path / "both.knn") as both:
        assert [item.id for item in both.documents()] == ["a", "b"]
