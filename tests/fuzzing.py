"""What nobody wrote, in files whose checksums are right: nasty values, and a child process of bounded memory that is asked everything.

As a script it is that child.
"""

import hashlib
import json
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from damage import Child, _answers, _command, restored, serve, text_documents
from stores import create_store, draw_keys, draw_values

import knnstore
from knnstore.errors import KnnstoreError
from knnstore.inspection import snapshot_list
from knnstore.storage.manifest_json import canonical

MORE_MEMORY = 400 << 20  # bytes of address space that the child may take besides what it has when it begins
WITHIN_S = 20.0  # for everything together, on a busy machine

Json = Any
At = tuple[str | int, ...]  # where in a JSON value: names and numbers

DEEP: Json = []
for _ in range(700):
    DEEP = [DEEP]

NASTY: list[Json] = [
    None,
    True,
    0,
    -1,
    1,
    1 << 31,
    1 << 39,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**300,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "x",
    "../../../../tmp/elsewhere",
    "/etc/passwd",
    "a/b",
    ".",
    "..",
    "a\0b",
    "\ud800",
    "\x1b[31m",
    "0" * 31,
    "0" * 32,
    "f" * 64,
    "x" * 100_000,
    [],
    [[]],
    [0, 1],
    list(range(1_000)),
    {},
    {"": {}},
    {"../x": {"sha256": "0" * 64, "size": 1}},
    {"/abs": {"sha256": "0" * 64, "size": 1}},
    {str(i): i for i in range(1_000)},
    DEEP,
]

# Raw JSON that no Python value gives.
RAW_NASTY = ["NaN", "-Infinity", "1e999", "9" * 5_000, "01", "'x'", '{"a":1,"a":2}', "[" * 100_000, '"\\u12"', "\x00", "1 2", "tru"]


def places(value: Json, at: At = ()) -> Iterator[At]:
    """Every place in a JSON value."""
    yield at
    if isinstance(value, dict):
        for name in sorted(value):
            yield from places(value[name], (*at, name))
    elif isinstance(value, list):
        for i, item in enumerate(value[:3]):
            yield from places(item, (*at, i))


def changed(value: Json, at: At, change: Callable[[Json], Json]) -> Json:
    """A copy in which what is at a place is another; ... takes it out."""
    if not at:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    new = changed(copy[at[0]], at[1:], change)
    if new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = new
    return copy


def sealed_json(fields: dict[str, Json]) -> bytes:
    """A manifest or tag with the `check` that belongs to it."""
    body = {name: value for name, value in fields.items() if name != "check"}
    return canonical({**body, "check": hashlib.sha256(canonical(body)).hexdigest()})


def put_manifest(store: Path, number: int, raw: bytes) -> None:
    """A manifest as the newest, named by CURRENT."""
    (store / "manifests" / f"{number}.json").write_bytes(raw)
    (store / "CURRENT").write_text(f"{number} {hashlib.sha256(raw).hexdigest()}\n")


@dataclass
class Bench:
    """A store to tamper with, the same one untouched, and the child that is asked."""

    pristine: Path
    store: Path
    child: Child
    tried: Counter[str]

    @classmethod
    @contextmanager
    def made(cls, folder: Path, tell: Callable[[str], None]) -> Iterator["Bench"]:
        """In a folder: a store of two snapshots, two domains, lists, kept keys, text and a tag; a document in two segments."""
        path = folder / "pristine.knn"
        create_store(
            path,
            draw_keys(1, 540, 10),
            draw_values(1, 540),
            text_documents([300, 200, 40], domains=("a", "b")),
            training_keys=draw_keys(11, 5_000, 10),
            expected_entries=40_000,
            segment_entries=400,
            keep_keys="f16",
        )
        knnstore.tag(path, "kept")
        knnstore.delete(path, ["document 2"])
        with Child(__file__) as child:
            bench = cls(path, Path(shutil.copytree(path, folder / "store.knn")), child, Counter())
            found = bench.ask("untouched", "")  # so that what refuses later does so for what was done to it
            assert not [way for way, answer in found.items() if answer.endswith("Error")]
            assert (found["verify full"], found["repair"], found["info command"]) == ("True", "True", "0")
            child.ask("limit", path, more=MORE_MEMORY)
            yield bench
        tell("fuzz: " + ", ".join(f"{n:,} {what}" for what, n in sorted(bench.tried.items())))

    def tampered(self) -> AbstractContextManager[None]:
        """In it the store may be tampered with; at its end it is as it was."""
        return restored(self.store, self.pristine)

    def ask(self, what: str, done: object) -> dict[str, str]:
        """Everything that can be asked of the store now. what: for the count; done: what was tampered with."""
        asked = self.child.ask("everything", self.store, within_s=WITHIN_S)
        self.tried[what] += 1
        assert asked.error is None, f"{what}, {str(done)[:300]}: {asked.trace[-3_000:]}"
        return dict(asked.value)

    def newest(self) -> Json:
        """The fields of the newest manifest, untouched."""
        return json.loads((self.pristine / "manifests" / "2.json").read_text())


# The child


def _limit(_store: Path, more: int) -> None:
    """From now on this process gets no more address space than it has and so many bytes."""
    has = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")).split()[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))


def _everything(store: Path) -> dict[str, str]:
    """Each way of asking a store: what came of it, or the class of the error. Raises what is no error of knnstore's, naming the way."""
    at = ["--store", str(store)]
    ways: dict[str, Callable[[], Any]] = {
        "answers": lambda: _answers(store),
        "info": lambda: _open_info(store),
        "snapshots": lambda: snapshot_list(store),
        "tags": lambda: knnstore.tags(store),
        "diff": lambda: knnstore.diff(store, 1),
        "verify quick": lambda: knnstore.verify(store, level="quick").ok,
        "verify full": lambda: knnstore.verify(store).ok,
        "repair": lambda: knnstore.repair(store, dry_run=True).lossless,
        "gc": lambda: knnstore.gc(store, keep=1, dry_run=True),
        "delete": lambda: knnstore.delete(store, ["document 0"], dry_run=True),
        "info command": lambda: _known_code(_command(["info", "--documents", *at])),
        "snapshots command": lambda: _known_code(_command(["snapshots", *at])),
        "verify command": lambda: _known_code(_command(["verify", "--quiet", *at])),
    }
    found = {}
    for name, way in ways.items():
        try:
            found[name] = str(way())[:200]
        except KnnstoreError as error:
            found[name] = type(error).__name__
            if len(str(error)) > 5_000:
                raise AssertionError(f"{name}: a message of {len(str(error))} characters") from error
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {str(error)[:300]}") from error
    return found


def _open_info(store: Path) -> Any:
    with knnstore.open(store) as opened:
        return [opened.info(), len(opened), list(opened.documents())]


def _known_code(result: dict[str, Any]) -> int:
    """1 is for what nobody thought of."""
    assert result["code"] != 1, result["err"][-2_000:]
    return int(result["code"])


if __name__ == "__main__":
    serve(everything=_everything, limit=_limit)
