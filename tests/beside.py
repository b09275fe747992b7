"""Processes that read and write one store at once. They are started by a server that has loaded everything and forks.

Imported by the processes too, so nothing here may need pytest.
"""

import json
import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread
from typing import Any

import faiss
from living import DIM, Drawn, Key, batches, check_answers, check_contents, draw

import knnstore
from knnstore.errors import ConflictError
from knnstore.store import Datastore

ANSWER_S = 100  # seconds that a process may take to end


def processes() -> BaseContext:
    """Where processes are started. They do not wait for the disk: they are killed, the machine is not."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def document(name: str, version: int, dim: int = DIM) -> Drawn:
    """One version of a document; what it is called and its metadata say how to draw it again."""
    domain, _, document_id = name.partition("/")
    is_base = domain == "base"  # large enough to train codes on
    n = 4_200 if is_base else 2 + version % 5
    return draw(document_id, version, domain=domain, n=n, dim=dim, text=not is_base, drawn=version, parity=version % 2)


def seen_oracle(store: Datastore) -> dict[Key, Drawn]:
    """What a snapshot must hold by the names and versions of its documents."""
    return {(item.domain, item.id): document(f"{item.domain}/{item.id}", item.metadata["drawn"], store.dim) for item in store.documents()}


def reported(target: Callable[..., Any], report: Path, *arguments: Any) -> None:
    """Runs in a process of its own: writes what comes of it, or how it failed, to a file."""
    os.fsync = os.fstat  # type: ignore[assignment]
    faiss.omp_set_num_threads(1)
    try:
        result = {"result": target(*arguments)}
    except BaseException:  # noqa: BLE001 - said on the other side
        result = {"error": traceback.format_exc()}
    report.write_text(json.dumps(result))


class Crew:
    """Processes that were started together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._context = folder, processes()
        self._started: list[tuple[Any, Path]] = []

    def end(self) -> None:
        """Kills those that have not ended."""
        for process, _ in self._started:
            process.kill()
            process.join()

    def start(self, target: Callable[..., Any], *arguments: Any) -> None:
        report = self.folder / f"report-{len(self._started)}.json"
        process = self._context.Process(target=reported, args=(target, report, *arguments), daemon=True)
        process.start()
        self._started.append((process, report))

    def barrier(self, n: int) -> Any:
        return self._context.Barrier(n)

    def results(self) -> list[Any]:
        """What came of each, when all have ended. A failure of one is raised here."""
        results = []
        for process, report in self._started:
            process.join(ANSWER_S)
            assert report.exists(), f"a process ended with {process.exitcode} and said nothing"
            told = json.loads(report.read_text())
            assert "error" not in told, told["error"]
            results.append(told["result"])
        return results


def read_along(path: Path, stop: Path, seed: int, n_threads: int) -> dict[str, Any]:
    """Opens the store again and again and searches, until told to stop. Returns the documents of each snapshot seen, and counts."""
    rng = random.Random(seed)
    seen: dict[int, dict[str, int]] = {}
    n_searches = n_opened = 0
    while True:
        stopping = stop.exists()
        with knnstore.open(path) as store:
            oracle = seen_oracle(store)
            check_contents(store, oracle)
            seen[store.snapshot] = {f"{domain}/{name}": drawn.metadata["drawn"] for (domain, name), drawn in oracle.items()}
            n_opened += 1
            for _ in range(rng.randrange(1, 12)):
                if n_threads == 1:
                    _search(store, oracle, rng.randrange(1 << 30))
                else:
                    _search_together(store, oracle, n_threads, rng)
                n_searches += n_threads
        stop.with_name(f"reading {seed}").touch()
        if stopping:
            return {"seen": seen, "searches": n_searches, "opened": n_opened}


def _search(store: Datastore, oracle: Mapping[Key, Drawn], seed: int) -> None:
    """One search of some kind; its answer is that of brute force over the oracle."""
    rng = random.Random(seed)
    queries = draw("queries", seed, n=3, dim=store.dim).keys
    kind, arguments = rng.randrange(4), {}
    if kind == 1 and oracle:
        domain = rng.choice(sorted(oracle))[0]
        arguments = {"domains": domain}
        oracle = {key: drawn for key, drawn in oracle.items() if key[0] == domain}
    elif kind == 2:
        arguments = {"where": {"parity": 1}}
        oracle = {key: drawn for key, drawn in oracle.items() if drawn.metadata["parity"] == 1}
    elif kind == 3 and oracle:
        _, name = rng.choice(sorted(oracle))
        arguments = {"exclude": name}
        oracle = {key: drawn for key, drawn in oracle.items() if key[1] != name}
    check_answers(store, oracle, queries, k=rng.choice([1, 5, 200]), **arguments)


def _search_together(store: Datastore, oracle: Mapping[Key, Drawn], n_threads: int, rng: random.Random) -> None:
    failures: list[str] = []

    def ask(seed: int) -> None:
        try:
            _search(store, oracle, seed)
        except BaseException:  # noqa: BLE001 - said on the other side
            failures.append(traceback.format_exc())

    threads = [Thread(target=ask, args=(rng.randrange(1 << 30),)) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def append_each(path: Path, names: list[str], version: int) -> int:
    """Appends documents one by one. Returns the number of commits."""
    for name in names:
        knnstore.append_entries(path, batches([document(name, version)]))
    return len(names)


def append_at_once(path: Path, barrier: Any, name: str, version: int) -> dict[str, Any]:
    """Appends a document when all others have begun to do so too. Returns what came of it."""

    def given() -> Any:
        barrier.wait(ANSWER_S)
        yield from batches([document(name, version)])

    try:
        return {"snapshot": knnstore.append_entries(path, given()).snapshot}
    except ConflictError as error:
        return {"conflict": str(error), "exit_code": error.exit_code}


def again_and_again(path: Path, deed: str, times: int) -> int:
    """Compacts or collects. Returns how often others were in the way."""
    n_conflicts = 0
    for _ in range(times):
        with suppress(ConflictError):
            if deed == "compact":
                knnstore.compact(path).close()
            else:
                knnstore.gc(path, keep=1)
            continue
        n_conflicts += 1
    return n_conflicts


def delete_each(path: Path, names: list[str], purge: bool) -> int:
    """Deletes documents one by one, each until it is done. Returns how often others were in the way too long."""
    n_conflicts = 0
    for name in names:
        domain, _, document_id = name.partition("/")
        while True:
            try:
                knnstore.delete(path, document_id, domain=domain, purge=purge)
                break
            except ConflictError:  # which says that nothing was changed
                n_conflicts += 1
    return n_conflicts
