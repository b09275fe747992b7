"""Damage done to stores, and a child process that asks them: what it answers, what it raises, and whether it lives.

As a script it is that child: a line of JSON in, a line of JSON out.
"""

import contextlib
import hashlib
import io
import json
import os
import queue
import shutil
import signal
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

import knnstore
from knnstore import EntryDocument
from knnstore.errors import KnnstoreError

ANSWER_S = 60  # seconds within which the child must answer: far more than it takes on a busy machine
QUERIES = 4
K = 40


# Stores


def text_documents(n_entries: Sequence[int], *, domains: Sequence[str] = ("default",)) -> list[EntryDocument]:
    """Documents with text: tokens of one to three characters, among them pairs that share one character."""
    documents = []
    for number, n in enumerate(n_entries):
        lengths = np.random.default_rng(number).integers(1, 4, n)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if n > 3:  # tokens 1 and 2 are one character, as an emoji in bytes is
            starts[1:3], ends[1:3] = starts[1], ends[2]
        text = ("The quick brown föx, and the 🦊 " * (int(ends[-1]) // 31 + 1))[: int(ends[-1])]
        documents.append(
            EntryDocument(
                id=f"document {number}",
                n_entries=n,
                domain=domains[number % len(domains)],
                source=f"books/{number}.txt",
                metadata={"number": number},
                text=text,
                starts=starts,
                ends=ends,
            )
        )
    return documents


def files_by_role(store: Path) -> dict[str, Path]:
    """The kinds of files of a store: one of each, the first segment's."""
    folders = {name: sorted((store / name).iterdir()) for name in ("spaces", "coarse", "segments")}
    roles = {
        "KNNSTORE": store / "KNNSTORE",
        "CURRENT": store / "CURRENT",
        "manifest": store / "manifests" / "1.json",
        "tag": store / "tags" / "kept.json",
    }
    for name in ("space.json", "rotation.bin", "centroids.bin"):
        roles[f"space {name}"] = folders["spaces"][0] / name
    if folders["coarse"]:
        roles["coarse centroids.bin"] = folders["coarse"][0] / "centroids.bin"
    for name in ("lists.bin", "lists.dir", "values.bin", "contexts.lmdb", "ids.bin", "keys.bin", "segment.json"):
        roles[name] = folders["segments"][0] / name
    return {role: path for role, path in roles.items() if path.exists()}


# Damages


def overwrite(path: Path, content: bytes) -> None:
    """Other content in the same file."""
    before = path.read_bytes()
    assert content != before, "damage always does something"
    with path.open("r+b") as file:
        file.truncate(len(content))
        file.write(content)


def invert(path: Path, at: int, mask: int = 0xFF) -> None:
    """Inverts bits of one byte; `at` may count from the end."""
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    overwrite(path, bytes(content))


def cut(path: Path, size: int) -> None:
    overwrite(path, path.read_bytes()[:size])


def grow(path: Path, more: bytes) -> None:
    overwrite(path, path.read_bytes() + more)


def remove(path: Path) -> None:
    path.unlink()


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_link(path: Path) -> None:
    """A link to the same content under another name."""
    path.rename(path.with_name(f"{path.name}.moved"))
    path.symlink_to(f"{path.name}.moved")


def to_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def to_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


REPLACEMENTS: dict[str, Callable[[Path], None]] = {
    "removed": remove,
    "folder": to_folder,
    "FIFO": to_fifo,
    "link": to_link,
    "broken link": to_broken_link,
    "loop": to_loop,
}


@contextlib.contextmanager
def restored(store: Path, pristine: Path) -> Iterator[None]:
    """After the block the store is again as the pristine one. What was not touched is not copied."""
    try:
        yield
    finally:
        _restore(store, pristine)


def _restore(store: Path, pristine: Path) -> None:
    wanted = {path.relative_to(pristine): path for path in pristine.rglob("*")}
    for path in sorted(store.rglob("*"), reverse=True):
        source = wanted.get(path.relative_to(store))
        if source is None or stat.S_IFMT(path.lstat().st_mode) != stat.S_IFMT(source.lstat().st_mode):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for name, source in sorted(wanted.items()):
        target = store / name
        if source.is_dir():
            target.mkdir(exist_ok=True)
        elif not target.exists() or target.stat().st_size != source.stat().st_size or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)


# The child


@dataclass(frozen=True)
class Answer:
    """What the child said. value: what it returned; error: the class of what it raised; trace: with it."""

    value: Any = None
    error: str | None = None
    trace: str = ""


class Child:
    """A process that is asked one thing after another. It must never die, and never be silent for long."""

    def __init__(self, script: str = __file__) -> None:
        self._process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, deed: str, store: Path, *, within_s: float = ANSWER_S, **arguments: Any) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"deed": deed, "store": str(store), **arguments}) + "\n")
        self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=within_s)
        except queue.Empty:
            self._process.kill()
            raise AssertionError(f"{deed}: no answer within {within_s} s") from None
        if not line:
            code = self._process.wait()
            raise AssertionError(f"{deed}: the child died, {signal.Signals(-code).name if code < 0 else code}")
        return Answer(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(ANSWER_S)
        self._listener.join()
        self._process.stdout.close()


def queries(dim: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).standard_normal((QUERIES, dim)).astype(np.float32)


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]


def _search(store: Path, *, exact: bool = False, snapshot: str | None = None) -> str:
    with knnstore.open(store, snapshot=snapshot) as opened:
        hits = opened.search(queries(opened.dim), k=K, nprobe=1 << 20, exact=exact)  # every list is read
        return _digest(hits.distances, hits.values, hits.segments, hits.rows)


def _contexts(store: Path) -> str:
    """Every document, and a context in the middle of each block of values and at both ends of every segment."""
    from knnstore.neighbors import read_context

    with knnstore.open(store) as opened:
        parts: list[Any] = [sorted(map(repr, opened.documents()))]
        for segment in opened.segments:
            n = segment.content.entries
            parts += [read_context(segment, row) for row in {0, 1, n // 2, n - 1, *range(0, n, 8_192)}]
        return _digest(*parts)


def _find(store: Path) -> str:
    """Where each document is by its id, and that one is nowhere."""
    with knnstore.open(store) as opened:
        return _digest(*([segment.find(f"document {number}") for number in range(4)] for segment in opened.segments))


def _verify(store: Path, level: str) -> dict[str, Any]:
    report = knnstore.verify(store, level=level)
    return {
        "ok": report.ok,
        "problems": [[problem.kind, problem.path, problem.detail] for problem in report.problems],
        "orphans": list(report.orphans),
    }


def _repair(store: Path) -> dict[str, Any]:
    """What a repair says it did."""
    report = knnstore.repair(store)
    return {
        "lost": sorted([document.domain, document.id] for document in report.lost),
        "unnamed": report.unnamed,
        "base": report.base,
        "snapshot": report.snapshot,
        "lossless": report.lossless,
        "moved": [item.path for item in report.moved],
    }


def _holdings(store: Path, snapshot: int | None, without: Sequence[str]) -> dict[str, Any]:
    """All documents but some, and every entry but theirs as searches of codes and of keys find it: space, value and distance, sorted.

    Distances are those to what codes stand for: what is added for a space depends on which of its segments there are.
    """
    with knnstore.open(store, snapshot=snapshot) as opened:
        known = list(opened.documents())
        kept = [document for document in known if document.id not in without]
        exclude = [document.id for document in known if document.id in without] or None
        n = sum(document.entries for document in kept)
        contents = [segment.content for segment in opened.segments]
        spaces = sorted({content.space for content in contents})
        of = np.array([spaces.index(content.space) for content in contents])
        entries, distortions = (np.array([getattr(content, name) for content in contents]) for name in ("entries", "distortion"))
        added = np.bincount(of, entries * distortions) / np.bincount(of, entries)
        names = np.array([int(space[:8], 16) for space in spaces])
        found: dict[str, Any] = {"documents": sorted(map(repr, kept)), "entries": n}
        for exact in (False, True):
            hits = opened.search(queries(opened.dim), k=max(n, 1), nprobe=1 << 20, exact=exact, exclude=exclude)
            assert (hits.n_found == n).all()
            of_hits = of[hits.segments]
            distances = hits.distances - (0 if exact else added[of_hits])
            table = np.stack((names[of_hits], hits.values, distances), axis=2)  # (q, n, 3)
            found["exact" if exact else "search"] = [sorted(map(tuple, rows)) for rows in table.tolist()]
        found["contexts"] = sorted(repr(hits.context(0, i)) for i in range(n))
        return found


def same_holdings(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two stores hold the same, up to the rounding of float32."""
    plain = ("documents", "entries", "contexts")
    return all(a[name] == b[name] for name in plain) and all(
        np.allclose(np.array(a[name]), np.array(b[name]), rtol=1e-5, atol=1e-4) for name in ("search", "exact")
    )


def _command(arguments: Sequence[str]) -> dict[str, Any]:
    """The command line: its exit code and what it says."""
    from knnstore_cli.main import cli

    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(list(arguments), prog_name="knnstore")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def _answers(store: Path) -> dict[str, str]:
    """For each way of asking: the digest of the answer, or the class of the error."""
    ways: dict[str, Callable[[], Any]] = {
        "open": lambda: knnstore.open(store).close(),
        "search": lambda: _search(store),
        "tagged": lambda: _search(store, snapshot="tag:kept"),
        "contexts": lambda: _contexts(store),
        "exact": lambda: _search(store, exact=True),
        "find": lambda: _find(store),
    }
    found = {}
    for name, way in ways.items():
        try:
            found[name] = str(way())
        except KnnstoreError as error:
            found[name] = type(error).__name__
    return found


def _each_byte(store: Path, path: Path, places: Sequence[int], mask: int, levels: Sequence[str], ask: bool = True) -> list[Any]:
    """Inverts bits of one byte after the other. Returns for each place: the levels that did not see it, and the answers if asked."""
    pristine = path.read_bytes()
    seen = []
    for at in places:
        invert(path, at, mask)
        name = path.relative_to(store).as_posix()
        missed = [level for level in levels if name not in [problem[1] for problem in _verify(store, level)["problems"]]]
        seen.append([at, missed, _answers(store) if ask else {}])
        overwrite(path, pristine)
    return seen


def serve(**more: Callable[..., Any]) -> None:
    """The child: does what it is told, one line after another. more: deeds besides those below, of a store and arguments."""
    deeds: dict[str, Callable[..., Any]] = {
        "verify": _verify,
        "answers": _answers,
        "repair": _repair,
        "holdings": _holdings,
        "each byte": lambda store, path, **arguments: _each_byte(store, Path(path), **arguments),
        "command": lambda _, arguments: _command(arguments),
        **more,
    }
    out = os.fdopen(os.dup(1), "w")  # nothing else may print between the answers
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        deed, store = order.pop("deed"), Path(order.pop("store"))
        try:
            answer: dict[str, Any] = {"value": deeds[deed](store, **order)}
        except Exception as error:  # noqa: BLE001 - the parent says which are allowed
            answer = {"error": type(error).__name__, "trace": traceback.format_exc()}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    serve()
