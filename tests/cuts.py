"""Commands cut off everywhere: each state that a power cut may leave is opened, compared with what was and what comes, and worked on."""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from acts import STORE, Act
from crash import Call, FileSystem, Recording, Tree, tree_of
from living import Drawn, Key, batches, check_answers, check_contents, draw

import knnstore
from knnstore.errors import NotFoundError
from knnstore.storage.catalog import StoreFolder, list_manifests, open_snapshot
from knnstore.storage.manifest import Manifest
from knnstore.storage.manifest_json import parse_manifest
from knnstore.storage.tags import Tag, list_tags


@dataclass(frozen=True)
class Effort:
    """share: of the states, how many are searched, verified and worked on. n_single, n_random: as `FileSystem.states` takes them.

    staging: whether states that differ in nothing but `staging/` count as different.
    """

    share: float
    n_single: int
    n_random: int
    staging: bool

    def states(self, system: FileSystem, rng: random.Random) -> Iterator[Tree]:
        return system.states(rng, n_single=self.n_single, n_random=self.n_random)


QUICK = Effort(share=0.05, n_single=2, n_random=3, staging=False)
FULL = Effort(share=0.02, n_single=8, n_random=16, staging=True)


@dataclass(frozen=True)
class Outcome:
    """A store as a command left it. snapshots: those that can be opened. oracle: its documents."""

    manifest: Manifest | None
    tags: Mapping[str, Tag]
    snapshots: frozenset[int]
    oracle: Mapping[Key, Drawn] = field(compare=False)

    @classmethod
    def of(cls, path: Path, oracle: Mapping[Key, Drawn]) -> "Outcome":
        """What opens at a path; no manifest where there is no store yet. What is neither is raised."""
        store = StoreFolder(path)
        try:
            manifest, pin = open_snapshot(store)
        except NotFoundError:
            return cls(None, {}, frozenset(), oracle)
        pin.release()
        return cls(manifest, list_tags(store), frozenset(n for n in list_manifests(store) if n <= manifest.snapshot), oracle)

    def is_as(self, other: "Outcome") -> bool:
        """Whether the newest snapshot and the tags are the same."""
        return (self.manifest, self.tags) == (other.manifest, other.tags)


class Shown:
    """A folder that is made to look like one tree after another; only what differs is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tree: Tree = {}
        folder.mkdir()

    def show(self, tree: Tree) -> None:
        for path in sorted(self._tree.keys() - tree.keys(), reverse=True):
            at = self.folder / path
            at.rmdir() if self._tree[path] is None else at.unlink()
        for path in sorted(tree):
            content = tree[path]
            if path in self._tree and self._tree[path] is content:
                continue
            at = self.folder / path
            if content is None:
                at.mkdir(exist_ok=True)
                continue
            at.unlink(missing_ok=True)  # never written in place: a reader may still have the old one mapped
            at.write_bytes(content)
        self._tree = dict(tree)


class Cuts:
    """Checks every state that a cut may leave of one command."""

    def __init__(self, folder: Path, before: Outcome, after: Outcome, act: Act, effort: Effort) -> None:
        self._before, self._after, self._act, self._effort = before, after, act, effort
        self._shown, self._again = Shown(folder / "cut"), folder / "again"
        self._rng = random.Random(20)
        self._seen: set[int] = set()
        self._hashes: dict[bytes, str] = {}
        self._manifests: dict[bytes, Manifest] = {}
        self.n_states = self.n_worked_on = 0
        self.found: set[str] = set()

    def check(self, system: FileSystem, *, done: bool) -> None:
        """All states that a cut at this moment may leave. done: the command had returned."""
        before, after = self._before, self._after
        for tree in self._effort.states(system, self._rng):
            if not self._is_new(tree, done):
                continue
            self._shown.show(tree)
            found = Outcome.of(self._shown.folder / STORE, {})
            is_new = found.is_as(after)
            assert is_new or (not done and found.is_as(before)), (
                f"{self._act.name}: {found.manifest and found.manifest.snapshot}, tags {list(found.tags)}, kept {set(found.snapshots)}"
            )
            is_first = ("new" if is_new else "old") not in self.found
            self.found.add("new" if is_new else "old")
            assert found.snapshots >= before.snapshots & after.snapshots
            for number in found.snapshots:
                self._check_whole(tree, number)
            if self._rng.random() < self._effort.share or is_first:
                self._work_on(tree, after if is_new else before)

    def _is_new(self, tree: Tree, done: bool) -> bool:
        prefix = f"{STORE}/staging/"
        items = tree.items() if self._effort.staging else [item for item in tree.items() if not item[0].startswith(prefix)]
        name = hash((frozenset(items), done))
        if name in self._seen:
            return False
        self._seen.add(name)
        self.n_states += 1
        return True

    def _check_whole(self, tree: Tree, number: int) -> None:
        """Every file that a snapshot names is there with its size and sha256."""
        raw = tree[f"{STORE}/manifests/{number}.json"]
        assert raw is not None
        if raw not in self._manifests:
            self._manifests[raw] = parse_manifest(raw, "manifest")
        manifest = self._manifests[raw]
        folders = [(f"spaces/{record.id}", record.files) for record in manifest.spaces]
        folders += [(f"coarse/{record.id}", record.files) for record in manifest.coarse]
        folders += [(f"segments/{record.content.uuid}", record.content.files) for record in manifest.segments]
        for folder, records in folders:
            for record in records:
                content = tree.get(f"{STORE}/{folder}/{record.name}")
                assert content is not None, f"snapshot {number}: {folder}/{record.name} is missing"
                assert (len(content), self._sha256(content)) == (record.size, record.sha256), f"{folder}/{record.name}"
        for record in manifest.segments:
            content = tree.get(f"{STORE}/segments/{record.content.uuid}/segment.json")
            assert content is not None
            assert self._sha256(content) == record.sha256

    def _sha256(self, content: bytes) -> str:
        if content not in self._hashes:
            self._hashes[content] = hashlib.sha256(content).hexdigest()
        return self._hashes[content]

    def _work_on(self, tree: Tree, here: Outcome) -> None:
        """The state is searched and verified; the same command goes through, then another; a gc leaves nothing behind."""
        self.n_worked_on += 1
        Shown(self._again).show(tree)
        path = self._again / STORE
        if here.manifest is not None:
            check_store(path, here.oracle)
        try:
            self._act.run(path)
        except self._act.again:
            assert here is self._after
        check_store(path, self._after.oracle)
        extra = draw("afterwards", n=3, dim=dim_of(self._after))
        knnstore.append_entries(path, batches([extra]))
        oracle = {**self._after.oracle, extra.key: extra}
        check_store(path, oracle)
        knnstore.gc(path, keep=1)
        check_store(path, oracle)
        assert not list((path / "staging").iterdir())
        assert knnstore.verify(path, level="quick").orphans == ()
        shutil.rmtree(self._again)


def dim_of(outcome: Outcome) -> int:
    assert outcome.manifest is not None
    return outcome.manifest.key.dim


def check_store(path: Path, oracle: Mapping[Key, Drawn]) -> None:
    """Documents and answers are the oracle's, and nothing is damaged."""
    with knnstore.open(path) as store:
        check_contents(store, oracle)
        check_answers(store, oracle, draw("queries", n=5, dim=store.dim).keys, k=9)
    assert knnstore.verify(path, level="full").problems == ()


@dataclass(frozen=True)
class Played:
    """A command that was recorded, the tree that it began on, and what was before and after it."""

    act: Act
    start: Tree
    calls: list[Call]
    before: Outcome
    after: Outcome


def record(root: Path, acts: list[Act], monkeypatch: pytest.MonkeyPatch) -> list[Played]:
    """Records commands one after another on the store in a folder."""
    played, before = [], Outcome.of(root / STORE, {})
    for act in acts:
        start = tree_of(root)
        with Recording(root).on(monkeypatch) as recording:
            act.run(root / STORE)
        after = Outcome.of(root / STORE, act.oracle)
        check_store(root / STORE, act.oracle)
        played.append(Played(act, start, recording.calls, before, after))
        before = after
    return played


def cut_off(folder: Path, played: Played, system: FileSystem, effort: Effort) -> Cuts:
    """Replays a command and looks at every state that a cut may leave."""
    folder.mkdir()
    cuts = Cuts(folder, played.before, played.after, played.act, effort)
    for number, call in enumerate(played.calls, 1):
        system.apply(call)
        cuts.check(system, done=number == len(played.calls))
    shutil.rmtree(folder)
    assert cuts.found == {"old", "new"} or played.before.is_as(played.after)
    return cuts


def play(
    folder: Path, monkeypatch: pytest.MonkeyPatch, acts: list[Act], tell: Callable[[str], None], effort: Effort, *, skip: int = 0
) -> None:
    """Records commands one after another, then cuts each but the first `skip` off everywhere.

    `root` in the folder may have stores already; those beside the one that the commands are about must stay as they are.
    """
    root = folder / "root"
    root.mkdir(exist_ok=True)
    others = {path: content for path, content in tree_of(root).items() if not path.startswith(STORE)}
    played = record(root, acts, monkeypatch)
    system = FileSystem(played[0].start)
    for number, one in enumerate(played):
        if number < skip:
            for call in one.calls:
                system.apply(call)
            continue
        cuts = cut_off(folder / "cuts", one, system, effort)
        tell(f"crash: {one.act.name}: {len(one.calls)} calls to the disk, {cuts.n_states:,} states, {cuts.n_worked_on} of them worked on")
    kept = system.kept()
    assert {path: kept.get(path) for path in others} == others


def play_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, acts: list[Act], tell: Callable[[str], None], effort: Effort, *, times: int
) -> None:
    """Cuts each command off at `times` random moments; the same command, typed again on what is left, is then cut off everywhere."""
    root = folder / "root"
    root.mkdir(exist_ok=True)
    rng = random.Random(3)
    for one in record(root, acts, monkeypatch):
        n_states = 0
        for number in range(times):
            system = FileSystem(one.start)
            for call in one.calls[: rng.randrange(len(one.calls))]:
                system.apply(call)
            again = folder / f"again-{number}"
            Shown(again).show(system.random_state(rng))
            if not Outcome.of(again / STORE, {}).is_as(one.before):
                shutil.rmtree(again)
                continue
            (second,) = record(again, [one.act], monkeypatch)
            second = replace(second, before=one.before)
            n_states += cut_off(folder / "cuts", second, FileSystem(second.start), effort).n_states
            shutil.rmtree(again)
        tell(f"crash: {one.act.name}, cut off twice: {n_states:,} states")
