"""Commands on a store, one after another, and the documents that each leaves: what is cut off, failed and killed in tests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from living import Drawn, Key, batches, by_key, create, draw

import knnstore
from knnstore.errors import ExistsError, KnnstoreError, NotFoundError

STORE = "s.knn"  # the store that commands are about; others may lie beside it


@dataclass(frozen=True)
class Act:
    """A command. run: on the store at a path. oracle: documents after it. again: what the same command may answer once it was done."""

    name: str
    run: Callable[[Path], object]
    oracle: Mapping[Key, Drawn]
    again: tuple[type[KnnstoreError], ...] = ()


class Life:
    """Commands one after another."""

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self.oracle: dict[Key, Drawn] = {}

    def add(self, name: str, run: Callable[[Path], object], oracle: Mapping[Key, Drawn], *again: type[KnnstoreError]) -> None:
        self.oracle = dict(oracle)
        self.acts.append(Act(name, run, self.oracle, again))


FIRST = [draw("a", n=5), draw("b", n=7, domain="law"), draw("c", n=4)]
MORE = [draw("d", n=6), draw("e", n=3, domain="law")]
CHANGED = [draw("a", 1, n=6), draw("f", n=2)]


def a_life() -> list[Act]:
    """Each command on one store, from its creation to its gc. Segments are small, so that documents have parts."""
    life = Life()
    life.add("create", lambda path: create(path, FIRST, segment_entries=8), by_key(FIRST), ExistsError)
    life.add("append", lambda path: knnstore.append_entries(path, batches(MORE)), life.oracle | by_key(MORE))
    again = [*CHANGED, FIRST[2]]
    life.add("append --replace", lambda path: knnstore.append_entries(path, batches(again), replace=True), life.oracle | by_key(CHANGED))
    life.add("tag", lambda path: knnstore.tag(path, "paper"), life.oracle, ExistsError)
    life.add("delete", lambda path: knnstore.delete(path, "d"), _without(life.oracle, ("default", "d")), NotFoundError)
    left = {key: drawn for key, drawn in life.oracle.items() if key[0] != "law"}
    life.add("delete --purge", lambda path: knnstore.delete(path, domain="law", purge=True), left, NotFoundError)
    life.add("tag --move", lambda path: knnstore.tag(path, "paper", 2, move=True), life.oracle)
    life.add("restore", lambda path: knnstore.restore(path, "tag:paper"), by_key([*FIRST, *MORE]))
    life.add("gc", lambda path: knnstore.gc(path, keep=1), life.oracle)
    life.add("tag --remove", lambda path: knnstore.untag(path, "paper"), life.oracle, NotFoundError)
    return life.acts


def _without(oracle: Mapping[Key, Drawn], *keys: Key) -> dict[Key, Drawn]:
    return {key: drawn for key, drawn in oracle.items() if key not in keys}


def joining_life() -> list[Act]:
    """Small segments until an append joins them; some of their rows are dead by then."""
    life = Life()
    parts = [[draw(f"{n}", n=3 + n), draw(f"also {n}", n=2, domain="law")] for n in range(4)]
    life.add("create", lambda path: create(path, parts[0], keep_keys="f16"), by_key(parts[0]), ExistsError)
    life.add("append", lambda path: knnstore.append_entries(path, batches(parts[1])), life.oracle | by_key(parts[1]))
    life.add("delete", lambda path: knnstore.delete(path, "1"), _without(life.oracle, ("default", "1")), NotFoundError)
    life.add("append", lambda path: knnstore.append_entries(path, batches(parts[2])), life.oracle | by_key(parts[2]))
    life.add("append, joining", lambda path: knnstore.append_entries(path, batches(parts[3])), life.oracle | by_key(parts[3]))
    life.add("append", lambda path: knnstore.append_entries(path, batches(CHANGED)), life.oracle | by_key(CHANGED))
    life.add("compact", lambda path: knnstore.compact(path).close(), life.oracle)
    return life.acts


def coded_life() -> list[Act]:
    """A store of raw keys that outgrows them: 4-bit codes are trained, and what was raw is encoded."""
    life = Life()
    before, more = [draw("a", n=2_000, dim=8), draw("b", n=60, dim=8, text=False)], [draw("c", n=2_200, dim=8), draw("d", n=50, dim=8)]
    life.add("create", lambda path: create(path, before, dim=8, keep_keys="bf16"), by_key(before), ExistsError)
    life.add("append, training codes", lambda path: knnstore.append_entries(path, batches(more)), life.oracle | by_key(more))
    life.add(
        "delete --purge, codes", lambda path: knnstore.delete(path, "d", purge=True), _without(life.oracle, ("default", "d")), NotFoundError
    )
    life.add("compact --retrain", lambda path: knnstore.compact(path, retrain=True).close(), life.oracle)
    return life.acts


def merge_life(root: Path, *, link: bool, into: bool) -> list[Act]:
    """Two stores made in a folder, merged into a new one, or into one that is there. They have a document in common."""
    create(root / "x.knn", FIRST)
    create(root / "y.knn", [*MORE, FIRST[1]])
    named = [draw_in(drawn, {"default": "x"}) for drawn in FIRST] + [draw_in(drawn, {"default": "y"}) for drawn in MORE]
    life = Life()
    if into:
        there = [draw("z", n=4), FIRST[1]]
        life.add("create", lambda path: create(path, there), by_key(there), ExistsError)
    name = f"merge{' --link' if link else ''}{' into a store' if into else ''}"

    def merge(path: Path) -> None:
        knnstore.merge([path.parent / "x.knn", path.parent / "y.knn"], path, link=link).close()

    life.add(name, merge, life.oracle | by_key(named))
    return life.acts


def draw_in(drawn: Drawn, names: Mapping[str, str]) -> Drawn:
    """The same document under the name that its domain gets."""
    return Drawn(
        names.get(drawn.domain, drawn.domain), drawn.id, drawn.keys, drawn.values, drawn.text, drawn.starts, drawn.ends, drawn.metadata
    )
