"""Processes that are killed at random moments: the store is as before or after what they were at, and nothing of theirs is in the way."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest
from killed import State, live
from living import check_answers, check_contents, contents, draw

import knnstore
from knnstore.errors import NotFoundError
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.files import hold_lock


class Killing:
    """Rounds of a process that works on a store and is killed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        # A server that has loaded everything, and forks: a round takes no second to import.
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([killed.__name__])
        self._folder, self._rng = folder, random.Random(seed)
        self._path, self._state = folder / "0.knn", State()
        self._log = folder / "log"
        self.deeds: dict[str, list[int]] = {}  # what was cut off: how often it was as before, and as after

    def round(self, number: int) -> None:
        if number % 12 == 11:
            self._path, self._state = self._folder / f"{number}.knn", State()
        self._log.write_bytes(b"")
        arguments = (self._path, self._log, self._rng.randrange(1 << 30), self._state)
        process = self._processes.Process(target=live, args=arguments, daemon=True)
        process.start()
        deadline = time.monotonic() + 60
        while not self._log.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(self._rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, self._log.read_text()
        self._compare([json.loads(line) for line in self._log.read_bytes().splitlines()])
        if self._state.documents is None:
            return
        with hold_lock(StoreFolder(self._path).lock, purpose="looking", wait=False):  # no lock is left
            pass
        self._verify(thoroughly=number % 10 == 9)

    def _compare(self, log: list[dict[str, Any]]) -> None:
        """The store is in the last state that was done, or in the one that was begun."""
        assert not [line for line in log if line["kind"] == "error"], log[-1]
        for line in log:
            if line["kind"] == "done":
                self._state.documents, self._state.tags = line["documents"], line["tags"]
                self._state.past[line["snapshot"]] = line["documents"]
        try:
            with knnstore.open(self._path) as store:
                held, number = contents(store), store.snapshot
            tags = {name: tag.snapshot for name, tag in knnstore.tags(self._path).items()}
        except NotFoundError:
            assert self._state.documents is None, "a store that was there is gone"
            return
        ended = log[-1]["kind"] == "done"
        begun = State(log[-1]["documents"], log[-1]["tags"])
        states = [self._state] if ended else [self._state, begun]
        as_found = [state for state in states if state.documents is not None and _held(state) == held and state.tags == tags]
        assert as_found, (log[-1], sorted(held), tags, self._state.fields())
        if not ended:
            self.deeds.setdefault(log[-1]["deed"], [0, 0])[as_found[0] is begun] += 1
        self._state.documents, self._state.tags = as_found[0].documents, as_found[0].tags
        assert self._state.documents is not None
        self._state.past[number] = self._state.documents

    def _verify(self, *, thoroughly: bool) -> None:
        assert knnstore.verify(self._path, level="full" if thoroughly else "quick").problems == ()
        if not thoroughly:
            return
        oracle = self._state.oracle()
        for collect in (False, True):
            if collect:
                knnstore.gc(self._path, keep=3)
                assert not list((self._path / "staging").iterdir())
                assert knnstore.verify(self._path, level="quick").orphans == ()
            with knnstore.open(self._path) as store:
                check_contents(store, oracle)
                check_answers(store, oracle, draw("queries", n=3).keys, k=7)


def _held(state: State) -> dict[Any, Any]:
    return {key: drawn.held() for key, drawn in state.oracle().items()}


def _kill(folder: Path, monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None], *, rounds: int, seed: int) -> None:
    killing = Killing(folder, monkeypatch, seed)
    for number in range(rounds):
        killing.round(number)
    cut_off = ", ".join(f"{deed} {before}+{after}" for deed, (before, after) in sorted(killing.deeds.items()))
    tell(f"kills: {rounds} rounds; as before + as after: {cut_off}")


def test_kills_quick(fast_path, monkeypatch, tell):
    _kill(fast_path, monkeypatch, tell, rounds=20, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills(fast_path, monkeypatch, tell):
    """At least 300 processes killed while they create, append, replace, delete, purge, tag, restore, compact and gc."""
    _kill(fast_path, monkeypatch, tell, rounds=400, seed=2)
