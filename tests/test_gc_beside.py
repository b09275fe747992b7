"""gc beside others: what a reader has open stays, in any process; jobs that a process is at stay, and none loses its folder."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from pasts import add, content, expected, files_in, make, named_files

import knnstore
from knnstore.errors import LockedError
from knnstore.storage import jobs as jobs_module
from knnstore.storage.catalog import StoreFolder, list_manifests, open_snapshot
from knnstore.storage.files import Disk, disk, hold_lock
from knnstore.storage.jobs import job_name, remove_job, run_job

ANSWER_S = 60


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three snapshots; each has a segment that the next has not."""
    path = tmp_path_factory.mktemp("template") / "s.knn"
    make(path, {("a", "one"): 0, ("b", "one"): 0})
    add(path, "a", "one", 1)
    knnstore.delete(path, domain="b", purge=True)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "s.knn"))


class Child:
    """A process of its own, told to go on by a line."""

    def __init__(self, code: str, *arguments: object) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> str:
        """Its next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> int:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait(ANSWER_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def kill(self) -> None:
        self._process.kill()
        self.end()


@contextmanager
def child(code: str, *arguments: object) -> Iterator[Child]:
    started = Child(code, *arguments)
    try:
        yield started
    finally:
        started.kill()


# Readers


READER = """
import sys
import knnstore
from pasts import content
path, snapshot = sys.argv[1], int(sys.argv[2])
with knnstore.open(path, snapshot=snapshot) as store:  # its files are opened only after the gc
    print("open", flush=True)
    sys.stdin.readline()
    found = content(path, snapshot)
    assert len(store.search([[0.0] * store.dim], k=100).context(0, 0).document)
    print(sorted((domain, name, *tokens) for (domain, name), tokens in found.items()), flush=True)
    sys.stdin.readline()
print("closed", flush=True)
sys.stdin.readline()
"""


def test_a_reader_in_another_process_keeps_its_snapshot(path: Path) -> None:
    """Until it closes it: all of its files are there, though it opens them only now. Then the next gc removes them."""
    wanted = content(path, 1)
    with child(READER, path, 1) as reader:
        assert reader.says() == "open"
        collected = knnstore.gc(path, keep=1)
        assert collected.snapshots == (2,)
        assert [(kept.snapshot, kept.why) for kept in collected.kept] == [(1, ("reader",)), (3, ("current",))]
        assert files_in(path) == named_files(path)
        reader.go_on()
        assert reader.says() == str(sorted((domain, name, *tokens) for (domain, name), tokens in wanted.items()))
        assert knnstore.gc(path, keep=1).snapshots == ()
        reader.go_on()
        assert reader.says() == "closed"
        assert knnstore.gc(path, keep=1).snapshots == (1,)
        assert files_in(path) == named_files(path)


def test_a_reader_that_is_killed_holds_nothing(path: Path) -> None:
    with child(READER, path, 1) as reader:
        assert reader.says() == "open"
        reader.kill()
        assert knnstore.gc(path, keep=1).snapshots == (1, 2)


def test_a_reader_in_this_process_keeps_its_snapshot(path: Path) -> None:
    with knnstore.open(path, snapshot=2) as store, knnstore.open(path, snapshot=2) as again:
        again.close()
        assert knnstore.gc(path, keep=1).snapshots == (1,)
        assert len(store.search([[0.0] * store.dim], k=100).values)
    assert knnstore.gc(path, keep=1).snapshots == (2,)


FORK = """
import os, sys
import knnstore
store = knnstore.open(sys.argv[1], snapshot=1)
if os.fork() == 0:
    try:
        store.search([[0.0] * store.dim], k=1)
    except knnstore.errors.InvalidArgumentError as error:
        assert "Open it again after a fork" in str(error)
        store.close()
        os._exit(7)
    os._exit(8)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
print(knnstore.gc(sys.argv[1], keep=1).kept, flush=True)
store.search([[0.0] * store.dim], k=1)
told, tell = os.pipe()
if os.fork() == 0:
    os.close(tell)
    os.read(told, 1)  # until the parent closes its end
    os._exit(0)
store.close()
print(knnstore.gc(sys.argv[1], keep=1).snapshots, flush=True)
os.close(tell)
os.wait()
print(knnstore.gc(sys.argv[1], keep=1).snapshots, flush=True)
"""


def test_after_a_fork(path: Path) -> None:
    """A child that closes what it inherited takes nothing from its parent; the snapshot is free when neither has it any more."""
    with child(FORK, path) as parent:
        assert "reader" in parent.says()
        assert parent.says() == "()", "the second child is alive, and has not closed it"
        assert parent.says() == "(1,)"
        assert parent.end() == 0


def test_a_reader_that_comes_while_a_gc_is_at_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshot 1 is opened after it was decided that it goes, before its turn: it stays, with all of its files."""
    from knnstore import collecting

    wanted = content(path, 1)
    opened = []
    drop = collecting._Collection._drop_leftovers

    def late(collection: collecting._Collection, current: int) -> list[str]:
        opened.append(knnstore.open(path, snapshot=1))
        return drop(collection, current)

    monkeypatch.setattr(collecting._Collection, "_drop_leftovers", late)
    collected = knnstore.gc(path, keep=1)
    assert collected.snapshots == (2,)
    assert [(kept.snapshot, kept.why) for kept in collected.kept] == [(1, ("reader",)), (3, ("current",))]
    assert content(path, 1) == wanted
    assert len(opened[0].search([[0.0] * opened[0].dim], k=100).values)
    opened[0].close()


LOOP = """
import sys
import knnstore
from knnstore.errors import NotFoundError
from pasts import content, expected
path, n = sys.argv[1], 0
print("open", flush=True)
while True:
    with knnstore.open(path) as store:
        # Snapshot n has version n - 1 of the one document, and the files of that only.
        ((tokens),) = content(path, store.snapshot).values()
        assert tokens == expected({("a", "one"): store.snapshot - 1})["a", "one"], store.snapshot
        assert len(store.search([[0.0] * store.dim], k=50).context(0, 0).document)
        n += 1
    if store.snapshot >= int(sys.argv[2]):
        break
print(n, flush=True)
"""


def test_readers_beside_commits_and_gcs(tmp_path: Path) -> None:
    """Three processes that open the newest snapshot in a loop, through 25 replaced documents with a gc after each."""
    path, last = tmp_path / "s.knn", 25
    make(path, {("a", "one"): 0})
    with child(LOOP, path, last) as first, child(LOOP, path, last) as second, child(LOOP, path, last) as third:
        readers = (first, second, third)
        assert [reader.says() for reader in readers] == ["open"] * 3
        for version in range(1, last):
            add(path, "a", "one", version)
            knnstore.gc(path, keep=1)
        counts = [int(reader.says()) for reader in readers]
        assert min(counts) > 0
        assert sum(counts) > 6
        assert [reader.end() for reader in readers] == [0, 0, 0]
    knnstore.gc(path, keep=1)
    assert list_manifests(StoreFolder(path)) == [last]
    assert files_in(path) == named_files(path)


# Jobs


ARGUMENTS = {"command": "test"}
JOB = job_name(ARGUMENTS)

WORKER = """
import sys
from pathlib import Path
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.jobs import job_name, remove_job, run_job
arguments = {"command": "test"}
with run_job(StoreFolder(Path(sys.argv[1])), job_name(arguments), arguments) as job:
    (job / "work").write_text("done so far")
    print("at work", flush=True)
    sys.stdin.readline()
    assert (job / "work").read_text() == "done so far"
print("done", flush=True)
"""


def test_a_job_that_a_process_is_at_stays(path: Path) -> None:
    """And what it staged; one that was killed goes, unless it is to be kept."""
    with child(WORKER, path) as worker:
        assert worker.says() == "at work"
        for dry_run in (True, False):
            collected = knnstore.gc(path, keep=1, dry_run=dry_run)
            assert (collected.jobs, collected.kept_jobs) == ((), (JOB,))
        worker.go_on()
        assert worker.says() == "done"
        assert worker.end() == 0
    assert list((path / "staging").iterdir()) == []
    with child(WORKER, path) as worker:
        assert worker.says() == "at work"
        worker.kill()
    collected = knnstore.gc(path, keep=1, keep_jobs=True)
    assert (collected.jobs, collected.kept_jobs) == ((), (JOB,))
    collected = knnstore.gc(path, keep=1)
    assert (collected.jobs, collected.kept_jobs) == ((JOB,), ())
    assert collected.freed_bytes >= len("done so far")
    assert list((path / "staging").iterdir()) == []


def test_what_a_job_has_put_in_place_stays_with_it(path: Path) -> None:
    """A commit that failed after it moved its segments: while the job can be continued, they wait in `segments/`."""
    moved = path / "segments" / ("ab" * 16)
    moved.mkdir()
    job = path / "staging" / JOB
    job.mkdir()
    (job / "moves.json").write_text(f'[["segments/x","segments/{"ab" * 16}"]]\n')
    knnstore.gc(path, keep=1, keep_jobs=True)
    assert moved.exists()
    for content_of_moves in ("{}", "[1]", "no JSON"):
        (job / "moves.json").write_text(content_of_moves)
        knnstore.gc(path, keep=3, keep_jobs=True, dry_run=True)
    assert knnstore.gc(path, keep=1).segments == ("ab" * 16,)
    assert not job.exists()


@pytest.mark.parametrize("moment", ["before its lock is made", "before its lock is taken"])
def test_a_job_whose_folder_a_gc_removes_begins_again(path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The folder is there and nobody holds it: a gc may take it. The job makes it anew, and holds what is really there."""
    store = StoreFolder(path)
    removed = []

    def collect() -> None:
        if not removed:
            removed.append(None)
            assert knnstore.gc(path, keep=3).jobs == (JOB,)

    class Late(Disk):
        def open(self, file: Path, flags: int) -> int:
            if file == store.staging / JOB / "lock" and moment == "before its lock is made":
                collect()
            fd = super().open(file, flags)
            if file == store.staging / JOB / "lock":
                collect()
            return fd

    monkeypatch.setattr(disk, "__class__", Late)
    with run_job(store, JOB, ARGUMENTS) as job:
        assert removed
        assert (job / "job.json").exists()
        assert jobs_module.is_held(job)
        assert knnstore.gc(path, keep=3).kept_jobs == (JOB,)
        with pytest.raises(LockedError), run_job(store, JOB, ARGUMENTS):
            pass
    assert list(store.staging.iterdir()) == []


def test_a_job_that_ends_and_begins_again_while_a_gc_lists_what_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is gone when the gc looks what it is, and there again, held, when the gc removes what does not belong."""
    store = StoreFolder(path)
    folder = store.staging / JOB
    with ExitStack() as held:
        ended = ExitStack()
        ended.enter_context(run_job(store, JOB, ARGUMENTS))
        look, moments = Path.stat, []

        def look_late(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            if self == folder and not moments:
                moments.append("gone")
                ended.close()
            try:
                return look(self, follow_symlinks=follow_symlinks)
            finally:
                if moments == ["gone"] and self == folder:
                    moments.append("again")
                    held.enter_context(run_job(store, JOB, ARGUMENTS))

        monkeypatch.setattr(Path, "stat", look_late)
        knnstore.gc(path, keep=3)
        monkeypatch.undo()
        assert moments == ["gone", "again"]
        assert (folder / "job.json").exists()


def test_a_job_that_went_and_came_again_is_not_in_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after a gc has listed it, and another of its name begins while the gc is refused its lock: nothing is left to remove."""
    folder = StoreFolder(path).staging / "gone"
    folder.mkdir(parents=True)

    @contextmanager
    def hold_late(lock: Path, *, purpose: str, wait: bool) -> Iterator[None]:
        shutil.rmtree(lock.parent)
        try:
            with hold_lock(lock, purpose=purpose, wait=wait):
                yield
        finally:
            lock.parent.mkdir()

    monkeypatch.setattr("knnstore.storage.jobs.hold_lock", hold_late)
    assert remove_job(folder)
    assert folder.exists()


def test_jobs_and_gcs_side_by_side(path: Path) -> None:
    """Threads that begin and end the same jobs while gcs run: none loses its folder while it is at it, none fails."""
    store, stop = StoreFolder(path), threading.Event()
    failures: list[BaseException] = []
    n_done = [0, 0]

    def work(number: int) -> None:
        while not stop.is_set():
            try:
                with suppress(LockedError), run_job(store, JOB, ARGUMENTS) as job:
                    (job / "work").write_text("x")
                    assert (job / "work").read_text() == "x"
                    n_done[number] += 1
            except BaseException as error:  # noqa: BLE001 - shown below, in the test's own thread
                failures.append(error)
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(150):
            knnstore.gc(path, keep=3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(n_done) > 5
    assert content(path) == expected({("a", "one"): 1})


def test_a_gc_and_a_commit_wait_for_each_other(path: Path) -> None:
    """A document that is appended while gcs run is there after them, whole."""
    failures: list[BaseException] = []

    def collect() -> None:
        try:
            for _ in range(20):
                knnstore.gc(path, keep=1)
        except BaseException as error:  # noqa: BLE001 - shown below, in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    for version in range(8):
        add(path, "c", "new", version)
        manifest, pin = open_snapshot(StoreFolder(path))
        pin.release()
        assert manifest.documents["c"] == 1
    thread.join()
    assert failures == []
    assert content(path) == expected({("a", "one"): 1, ("c", "new"): 7})
    assert knnstore.verify(path).ok
