"""SIGINT and SIGTERM to commands: an exit code that is not 0, valid JSON or none on stdout, and a store as before or after."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from living import create, draw

import knnstore

COMMAND = [sys.executable, "-c", "from knnstore_cli.main import cli; cli()"]
ANSWER_S = 100


@dataclass(frozen=True)
class Typed:
    """A command on a copy of the folder. done: exit code where it is typed again after it was done. documents: before and after."""

    arguments: tuple[str, ...]
    store: str
    documents: tuple[int, int]
    done: int = 0


TYPED = {
    "purge": Typed(("delete", "d3", "--purge", "--store", "a.knn"), "a.knn", (30, 29), done=3),
    "delete": Typed(("delete", "--domain", "default", "--store", "a.knn"), "a.knn", (30, 0), done=3),
    "merge": Typed(("merge", "a.knn", "b.knn", "--store", "both.knn"), "both.knn", (0, 31)),
    "compact": Typed(("compact", "--retrain", "--store", "a.knn"), "a.knn", (30, 30)),
    "gc": Typed(("gc", "--keep", "1", "--store", "a.knn"), "a.knn", (30, 30)),
    "verify": Typed(("verify", "--store", "a.knn"), "a.knn", (30, 30)),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 4-bit codes with 60,000 entries and two older snapshots, and a small one."""
    folder = tmp_path_factory.mktemp("stores")
    create(folder / "a.knn", [draw(f"d{number}", n=2_000, dim=8, text=False) for number in range(30)], dim=8, keep_keys="f16")
    for _ in range(2):
        knnstore.restore(folder / "a.knn", 1)
    create(folder / "b.knn", [draw("e", n=50, dim=8, text=False)], dim=8)
    return folder


def _start(typed: Typed, folder: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*COMMAND, *typed.arguments, "--json"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _n_documents(path: Path) -> int:
    try:
        with knnstore.open(path) as store:
            return len(list(store.documents()))
    except knnstore.errors.NotFoundError:
        return 0


def _interrupt(stores: Path, tmp_path: Path, tell: Callable[[str], None], name: str, rounds: int) -> None:
    typed, rng = TYPED[name], random.Random(name)
    folder = tmp_path / "undisturbed"
    shutil.copytree(stores, folder)
    begun = time.monotonic()
    process = _start(typed, folder)
    stdout, stderr = process.communicate(timeout=ANSWER_S)
    assert process.returncode == 0, stderr
    json.loads(stdout)
    took = time.monotonic() - begun
    n_stopped = n_done = 0
    for number in range(rounds):
        folder = tmp_path / str(number)
        shutil.copytree(stores, folder)
        process = _start(typed, folder)
        time.sleep(rng.uniform(0.1, 1.0) * took)
        process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
        stdout, stderr = process.communicate(timeout=ANSWER_S)
        if stdout:
            json.loads(stdout)
        documents = _n_documents(folder / typed.store)
        if process.returncode == 0:  # it had ended
            assert stdout
            assert documents == typed.documents[1]
            n_done += 1
        else:
            assert documents in typed.documents
            n_stopped += 1
        if documents:
            assert knnstore.verify(folder / typed.store, level="quick").problems == ()
        again = _start(typed, folder)
        _, stderr = again.communicate(timeout=ANSWER_S)
        assert again.returncode in ((0, typed.done) if documents == typed.documents[1] else (0,)), stderr
        assert _n_documents(folder / typed.store) == typed.documents[1]
        assert knnstore.verify(folder / typed.store).problems == ()
        shutil.rmtree(folder)
    tell(f"signals: {name}: {n_stopped} stopped, {n_done} had ended")


@pytest.mark.parametrize("name", ["purge"])
def test_a_command_that_is_interrupted_quick(stores, tmp_path, tell, name):
    _interrupt(stores, tmp_path, tell, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPED)
def test_a_command_that_is_interrupted(stores, tmp_path, tell, name):
    """At random moments of all its life, loading included; typed again it ends well."""
    _interrupt(stores, tmp_path, tell, name, 8)
