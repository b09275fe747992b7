"""Disks and memory that fail: the command says so, the store is as before, and the same command goes through afterwards.

Where the disk fails after CURRENT has its new content, the command fails as well and the store is as after: nobody was told otherwise.
"""

import errno
import itertools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from acts import STORE, Act, a_life, coded_life, joining_life, merge_life
from cuts import Outcome, check_store

import knnstore
from knnstore.errors import StorageError
from knnstore.storage.space import Space

SPACE_TAKING = ("write", "pwrite", "ftruncate", "open", "mkdir", "link", "rename", "replace")


class Faults:
    """Calls of the operating system that fail from one of them on, or once. n_calls: how many there were."""

    def __init__(self, at: int, error: BaseException, *, once: bool) -> None:
        self._at, self._error, self._once = at, error, once
        self.n_calls = 0
        self.current_replaced = False  # before the call that failed

    @contextmanager
    def on(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator["Faults"]:
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, self._failing(name, getattr(os, name)))
            if "replace" not in names:
                patch.setattr(os, "replace", self._watched(os.replace))
            yield self

    def _watched(self, replace: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Path, target: Path) -> None:
            replace(source, target)
            self.current_replaced |= Path(target).name == "CURRENT" and self.n_calls <= self._at

        return call

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self.n_calls += 1
            if self.n_calls == self._at + 1 or (self.n_calls > self._at and not self._once):
                if name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)  # the kernel drops what it could not write
                raise self._error
            result = real(*arguments, **options)
            self.current_replaced |= name == "replace" and Path(arguments[1]).name == "CURRENT"
            return result

        return call


class Rehearsal:
    """Commands played once, with a copy of all stores from before each."""

    def __init__(self, folder: Path, acts: list[Act]) -> None:
        self.folder, self.acts = folder, acts
        root = folder / "root"
        root.mkdir(exist_ok=True)
        self.outcomes = [Outcome.of(root / STORE, {})]
        for number, act in enumerate(acts):
            shutil.copytree(root, folder / f"before-{number}")
            act.run(root / STORE)
            self.outcomes.append(Outcome.of(root / STORE, act.oracle))

    @contextmanager
    def before(self, number: int) -> Iterator[Path]:
        """The store as it was before an act, to be spoilt."""
        again = self.folder / "again"
        shutil.copytree(self.folder / f"before-{number}", again)
        yield again / STORE
        shutil.rmtree(again)


def fail_everywhere(
    rehearsal: Rehearsal,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    error: BaseException,
    *,
    step: int = 1,
    once: bool = False,
) -> int:
    """Every `step`th call of each act fails. Returns how many were tried."""
    tried = 0
    for number, (act, (before, after)) in enumerate(zip(rehearsal.acts, itertools.pairwise(rehearsal.outcomes), strict=True)):
        with rehearsal.before(number) as path, Faults(1 << 30, error, once=once).on(monkeypatch, *names) as faults:
            act.run(path)
        for at in range(number % step, faults.n_calls, step):
            with rehearsal.before(number) as path:
                with Faults(at, error, once=once).on(monkeypatch, *names) as here, pytest.raises(_expected(error)):
                    act.run(path)
                found = Outcome.of(path, {})
                is_done = not found.is_as(before)
                if is_done:  # the new one, whole
                    assert here.current_replaced or act.name.startswith("tag")
                    assert (_number(found), found.tags.keys()) == (_number(after), after.tags.keys())
                    check_store(path, act.oracle)
                try:
                    act.run(path)
                except act.again:
                    assert is_done
                if tried % 8 == 0:
                    check_store(path, act.oracle)
                tried += 1
    return tried


def _number(outcome: Outcome) -> int:
    return outcome.manifest.snapshot if outcome.manifest is not None else 0


def _expected(error: BaseException) -> type[BaseException]:
    return StorageError if isinstance(error, OSError) else type(error)


def lives(folder: Path) -> Iterator[Rehearsal]:
    """All commands that write."""
    for name, acts in (("life", a_life), ("joining", joining_life), ("coded", coded_life)):
        (folder / name).mkdir()
        yield Rehearsal(folder / name, acts())
    for link, into in itertools.product((False, True), repeat=2):
        at = folder / f"merge-{link}-{into}"
        (at / "root").mkdir(parents=True)
        yield Rehearsal(at, merge_life(at / "root", link=link, into=into))


def test_any_failed_fsync_is_final_quick(fast_path, monkeypatch, tell):
    """EIO from each fsync of one life: no commit, also where the next fsync would succeed; what was not synced is lost."""
    tried = fail_everywhere(Rehearsal(fast_path, a_life()), monkeypatch, ("fsync",), OSError(errno.EIO, "EIO"), once=True)
    tell(f"faults: {tried} failed syncs")


@pytest.mark.slow
def test_any_failed_fsync_is_final(fast_path, monkeypatch, tell):
    """EIO from each fsync of every command, once and for good."""
    error = OSError(errno.EIO, "EIO")
    tried = sum(fail_everywhere(life, monkeypatch, ("fsync",), error, once=once) for life in lives(fast_path) for once in (True, False))
    tell(f"faults: {tried} failed syncs")


def test_a_full_disk_quick(fast_path, monkeypatch, tell):
    """ENOSPC from every ninth call that takes space."""
    tried = fail_everywhere(Rehearsal(fast_path, a_life()), monkeypatch, SPACE_TAKING, OSError(errno.ENOSPC, "ENOSPC"), step=9)
    tell(f"faults: {tried} times no space")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_full_disk(fast_path, monkeypatch, tell):
    """ENOSPC from each call that takes space, of every command; of every third, from then on."""
    error = OSError(errno.ENOSPC, "ENOSPC")
    tried = 0
    for life in lives(fast_path):
        tried += fail_everywhere(life, monkeypatch, SPACE_TAKING, error, once=True)
        tried += fail_everywhere(life, monkeypatch, SPACE_TAKING, error, step=3)
    tell(f"faults: {tried} times no space")


def test_no_space_for_copies(fast_path, monkeypatch):
    """A merge whose copies do not fit: nothing was committed, and the stores that were to be merged are as they were."""
    (fast_path / "root").mkdir()
    rehearsal = Rehearsal(fast_path, merge_life(fast_path / "root", link=False, into=True))

    def full(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "ENOSPC")

    with rehearsal.before(1) as path:
        with monkeypatch.context() as patch:
            patch.setattr(os, "copy_file_range", full)
            patch.setattr(shutil, "copyfileobj", full)
            with pytest.raises(StorageError, match="Free some space"):
                rehearsal.acts[1].run(path)
        assert Outcome.of(path, {}).is_as(rehearsal.outcomes[1])
        for name in ("x.knn", "y.knn"):
            assert knnstore.verify(path.parent / name).problems == ()
        rehearsal.acts[1].run(path)
        check_store(path, rehearsal.acts[1].oracle)


@pytest.mark.parametrize("most", [1, 7, 512])
def test_short_writes(fast_path, monkeypatch, most):
    """A system that takes a few bytes at a time: the same files are written as by one that takes all."""
    real_write, real_pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:most]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_pwrite(fd, data[:most], offset))
    (fast_path / "root").mkdir()
    for act in a_life() if most > 1 else a_life()[:2]:
        act.run(fast_path / "root" / STORE)
        check_store(fast_path / "root" / STORE, act.oracle)


def test_no_memory_while_writing(fast_path, monkeypatch, tell):
    """MemoryError at every eleventh write: it is passed on, and nothing was committed."""
    tried = fail_everywhere(Rehearsal(fast_path, a_life()), monkeypatch, ("write", "pwrite"), MemoryError(), step=11, once=True)
    tell(f"faults: {tried} times no memory")


@pytest.mark.parametrize("name", ["encode", "rotate"])
def test_no_memory_while_encoding(fast_path, monkeypatch, name):
    """MemoryError from the first computation on keys, of every command that makes segments."""
    rehearsal = Rehearsal(fast_path, coded_life())

    def fails(*_arguments: Any) -> None:
        raise MemoryError

    for number in (0, 1):
        with rehearsal.before(number) as path:
            with monkeypatch.context() as patch:
                patch.setattr(Space, name, fails)
                with pytest.raises(MemoryError):
                    rehearsal.acts[number].run(path)
            assert Outcome.of(path, {}).is_as(rehearsal.outcomes[number])
            rehearsal.acts[number].run(path)
            check_store(path, rehearsal.acts[number].oracle)


SMALL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from acts import STORE
from cuts import check_store
from living import batches, by_key, create, draw
import knnstore
from knnstore.errors import StorageError

path = Path({folder!r}) / STORE
drawn = [draw("first", n=20)]
create(path, drawn)
failed = 0
for number in range(2_000):
    more = [draw(f"{{number}}", n=40 + number)]
    try:
        knnstore.append_entries(path, batches(more))
        drawn += more
    except StorageError as error:
        assert "space" in str(error), error
        failed += 1
        check_store(path, by_key(drawn))
        if failed == 3:
            break
assert failed == 3, "the disk was never full"
knnstore.gc(path, keep=1)
more = [draw("last", n=3)]
knnstore.append_entries(path, batches(more))
check_store(path, by_key(drawn + more))
knnstore.gc(path, keep=1)
print(len(drawn), "documents")
"""


def test_a_small_disk(tmp_path, tell):
    """A real file system of 3 MB: it gets full, LMDB's files included; the store stays as it was, and after a gc goes on."""
    folder = tmp_path / "small"
    folder.mkdir()
    code = SMALL_DISK.format(tests=str(Path(__file__).parent), folder=str(folder))
    mount = f'mount -t tmpfs -o size=3m tmpfs "{folder}" || exit 77; exec "{sys.executable}" -W error -c "$0"'
    ran = subprocess.run(["unshare", "-Urm", "sh", "-c", mount, code], capture_output=True, text=True, timeout=200, check=False)
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip(f"no file system can be mounted here: {ran.stderr.strip()}")
    assert ran.returncode == 0, ran.stderr
    tell(f"faults: a disk of 3 MB was full at {ran.stdout.strip()}")
