"""A process that works on a store without end, to be killed. What it does it writes down before and after: the expected state.

It is imported by the process too, so nothing here may need pytest.
"""

import json
import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from living import Drawn, Key, batches, by_key, create, draw

import knnstore
from knnstore.storage.catalog import StoreFolder, list_manifests, read_current

NAMES = [f"{domain}/{number}" for domain in ("default", "law") for number in range(5)]


@dataclass
class State:
    """What a store must hold: versions of its documents, by `domain/id`, and its tags; None before it was created.

    past: documents of each snapshot that can be gone back to.
    """

    documents: dict[str, int] | None = None
    tags: dict[str, int] = field(default_factory=dict)
    past: dict[int, dict[str, int]] = field(default_factory=dict)

    def oracle(self) -> dict[Key, Drawn]:
        return by_key(document(name, version) for name, version in (self.documents or {}).items())

    def fields(self) -> dict[str, Any]:
        return {"documents": self.documents, "tags": self.tags}


def document(name: str, version: int) -> Drawn:
    """One version of a document."""
    domain, _, document_id = name.partition("/")
    return draw(document_id, version, domain=domain, n=2 + int(document_id), even=version % 2 == 0)


def live(path: Path, log_path: Path, seed: int, state: State) -> None:
    """Does one thing after another, until killed. An unexpected error is written down too."""
    os.fsync = os.fstat  # type: ignore[assignment]  # a killed process loses nothing that it wrote
    rng = random.Random(seed)
    with log_path.open("ab", buffering=0) as log:

        def note(kind: str, **fields: Any) -> None:
            log.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")

        try:
            while True:
                deed, run, after = _choose(path, state, rng)
                note("begin", deed=deed, **after)
                run()
                state.documents, state.tags = after["documents"], after["tags"]
                state.past[_newest(path)] = dict(state.documents)
                note("done", snapshot=_newest(path), **after)
        except Exception:
            note("error", traceback=traceback.format_exc())
            raise


def _newest(path: Path) -> int:
    """The newest snapshot that counts: a process that was killed may have left the manifest of another."""
    return read_current(StoreFolder(path))[0]


def _choose(path: Path, state: State, rng: random.Random) -> tuple[str, Callable[[], object], dict[str, Any]]:
    """The next thing to do: its name, how, and documents and tags after it."""
    if state.documents is None:
        names = rng.sample(NAMES, 3)
        some = {name: rng.randrange(1_000) for name in names}
        return "create", lambda: create(path, _drawn(some), segment_entries=20), {"documents": some, "tags": {}}
    documents, tags = dict(state.documents), dict(state.tags)
    deed = rng.choice(["append", "append", "replace", "delete", "purge", "domain", "where", "tag", "untag", "restore", "compact", "gc"])
    absent = [name for name in NAMES if name not in documents]
    if deed in ("append", "replace"):
        some = {
            name: rng.randrange(1_000) for name in rng.sample(absent if deed == "append" else NAMES, min(len(absent), 1 + rng.randrange(3)))
        }
        if some:
            after = {"documents": documents | some, "tags": tags}
            return deed, lambda: knnstore.append_entries(path, batches(_drawn(some)), replace=deed == "replace"), after
    if deed in ("delete", "purge") and documents:
        name = rng.choice(sorted(documents))
        domain, _, document_id = name.partition("/")
        del documents[name]
        after = {"documents": documents, "tags": tags}
        return deed, lambda: knnstore.delete(path, document_id, domain=domain, purge=deed == "purge"), after
    if deed in ("domain", "where") and documents:
        domain = rng.choice(sorted(documents)).partition("/")[0]
        left = {name: version for name, version in documents.items() if not name.startswith(domain)}
        if deed == "domain":
            return deed, lambda: knnstore.delete(path, domain=domain), {"documents": left, "tags": tags}
        left = {name: version for name, version in documents.items() if version % 2}
        return deed, lambda: knnstore.delete(path, where={"even": True}), {"documents": left, "tags": tags}
    if deed == "tag":
        number = _newest(path)
        name = rng.choice(["a", "b"])
        return deed, lambda: knnstore.tag(path, name, number, move=True), {"documents": documents, "tags": tags | {name: number}}
    if deed == "untag" and tags:
        name = rng.choice(sorted(tags))
        left = {other: number for other, number in tags.items() if other != name}
        return deed, lambda: knnstore.untag(path, name), {"documents": documents, "tags": left}
    if deed == "restore":
        number = rng.choice([number for number in list_manifests(StoreFolder(path)) if number in state.past])
        return deed, lambda: knnstore.restore(path, number), {"documents": state.past[number], "tags": tags}
    if deed == "compact":
        return deed, lambda: knnstore.compact(path), {"documents": documents, "tags": tags}
    return "gc", lambda: knnstore.gc(path, keep=3), {"documents": documents, "tags": tags}


def _drawn(versions: dict[str, int]) -> list[Drawn]:
    return [document(name, version) for name, version in versions.items()]
