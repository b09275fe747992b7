"""gc: what is kept answers as before, nothing else is left, and a kill at any moment leaves a store that the next gc finishes."""

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pasts import DIM, Documents, add, content, expected, files_in, make, named_files, snapshot_number, tree
from stores import PowerCut, trained_space

import knnstore
from knnstore.build import space_record
from knnstore.errors import DamageError, FormatError, InvalidArgumentError, NotFoundError, StorageError
from knnstore.format import Codec
from knnstore.storage.catalog import StoreFolder, list_manifests, open_snapshot
from knnstore.storage.commits import commit
from knnstore.storage.manifest import Manifest, SpaceRecord
from knnstore.storage.manifest_json import manifest_bytes
from knnstore.storage.space import save_space


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four snapshots, each with a segment of its own, and what killed commands left."""
    path = tmp_path_factory.mktemp("template") / "s.knn"
    make(path, {("a", "one"): 0, ("b", "one"): 0})
    add(path, "a", "two")
    knnstore.delete(path, "one", domain="a", purge=True)
    add(path, "b", "one", 1)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "s.knn"))


def litter(path: Path) -> set[str]:
    """Leaves what killed commands leave, and gives the names that a gc is to say."""
    left = ["CURRENT.tmp", "KNNSTORE.tmp", "manifests/9.json", "manifests/9.json.tmp", "tags/x.json.tmp", "staging/file"]
    for name in left:
        (path / name).write_bytes(b"left")
    for part in ("spaces", "segments", "coarse"):
        (path / part / "ab.tmp").mkdir()
        (path / part / "ab.tmp" / "half").write_bytes(b"left")
    (path / "staging" / "cd.tmp").mkdir()
    manifest, pin = open_snapshot(StoreFolder(path))
    pin.release()
    stray = f"segments/{manifest.segments[0].content.uuid}/journal"
    (path / stray).write_bytes(b"left")
    return {*left, stray, "spaces/ab.tmp", "segments/ab.tmp", "coarse/ab.tmp", "staging/cd.tmp"}


def assert_whole(path: Path) -> None:
    """No damage, no orphans, and not a file beside those that the manifests name."""
    report = knnstore.verify(path)
    assert (report.problems, report.orphans) == ((), ())
    assert files_in(path) == named_files(path)


# What stays and what goes


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 10])
def test_the_last_snapshots_stay(path: Path, keep: int) -> None:
    """And are what they were; the others cannot be opened."""
    contents = {number: content(path, number) for number in range(1, 5)}
    wanted = list(range(1, 5))[-keep:]
    collected = knnstore.gc(path, keep=keep)
    assert [kept.snapshot for kept in collected.kept] == wanted == list_manifests(StoreFolder(path))
    assert [kept.why for kept in collected.kept] == [("recent",)] * (len(wanted) - 1) + [("current",)]
    assert collected.snapshots == tuple(number for number in range(1, 5) if number not in wanted)
    for number, before in contents.items():
        if number in wanted:
            assert content(path, number) == before
        else:
            with pytest.raises(NotFoundError, match=f"no snapshot {number}"):
                knnstore.open(path, snapshot=number)
    assert_whole(path)


def test_the_default_keeps_what_the_last_commands_did(path: Path) -> None:
    """A gc without options can be followed by a restore of what came a few commands before."""
    before = content(path, 1)
    for _ in range(8):
        knnstore.restore(path, 4)
    assert knnstore.gc(path).snapshots == (1, 2)
    assert content(path, 3) != before
    with pytest.raises(InvalidArgumentError, match="keep 0: use 1 or more"):
        knnstore.gc(path, keep=0)


def test_tags_keep_their_snapshots(path: Path) -> None:
    """Until they are taken away; a snapshot may stay for several reasons."""
    knnstore.tag(path, "paper", 1)
    knnstore.tag(path, "also", 1)
    knnstore.tag(path, "now", 4)
    before = content(path, 1)
    collected = knnstore.gc(path, keep=1)
    assert [(kept.snapshot, kept.why) for kept in collected.kept] == [(1, ("tag:also", "tag:paper")), (4, ("current", "tag:now"))]
    assert content(path, "tag:paper") == before
    assert_whole(path)
    assert collected.history_bytes > 0
    knnstore.untag(path, "paper")
    knnstore.untag(path, "also")
    collected = knnstore.gc(path, keep=1)
    assert collected.snapshots == (1,)
    assert (len(collected.segments), collected.history_bytes) == (1, 0)
    assert_whole(path)


acts = st.lists(
    st.tuples(st.sampled_from(["add", "delete", "purge", "restore", "tag", "untag", "gc"]), st.integers(0, 11)), min_size=4, max_size=10
)


@settings(max_examples=15)
@given(acts=acts, keep=st.integers(1, 3))
def test_any_history(tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int]], keep: int) -> None:
    """After any commands and a gc: what is to stay is there with the documents that a dict says, and nothing else is."""
    path = tmp_path_factory.mktemp("history") / "s.knn"
    now: Documents = {("a", "first"): 0}
    make(path, now)
    past, tags = {1: dict(now)}, dict[str, int]()
    for act, n in [*acts, ("gc", 0)]:
        key = ("ab"[n % 2], f"d{n // 4}")
        at = sorted(past)[n % len(past)]
        if act == "add":
            now = now | {key: n % 3}
            add(path, *key, n % 3)
        elif act in ("delete", "purge") and key in now:
            now = {other: version for other, version in now.items() if other != key}
            knnstore.delete(path, key[1], domain=key[0], purge=act == "purge")
        elif act == "restore":
            now = past[at]
            knnstore.restore(path, at)
        elif act == "tag":
            tags[f"t{n % 3}"] = at
            knnstore.tag(path, f"t{n % 3}", at, move=True)
        elif act == "untag" and tags:
            knnstore.untag(path, tags.popitem()[0])
        elif act == "gc":
            said = knnstore.gc(path, keep=keep, dry_run=True)
            assert files_in(path) >= named_files(path)
            collected = knnstore.gc(path, keep=keep)
            assert {**vars_of(said), "dry_run": False} == vars_of(collected)
            past = {number: documents for number, documents in past.items() if number in {*sorted(past)[-keep:], *tags.values()}}
            assert_whole(path)
        past[snapshot_number(path)] = dict(now)
    assert list_manifests(StoreFolder(path)) == sorted(past)
    for number, documents in past.items():
        assert content(path, number) == expected(documents)


def vars_of(collected: knnstore.Collected) -> dict[str, object]:
    return {name: getattr(collected, name) for name in collected.__slots__}


@pytest.mark.parametrize("keep", [1, 3])
def test_a_dry_run_says_it_and_changes_nothing(path: Path, keep: int) -> None:
    """The same list, the same bytes; not a file is made, changed or removed."""
    litter(path)
    (path / "staging" / "ef").mkdir()
    knnstore.tag(path, "paper", 1)
    before = tree(path)
    said = knnstore.gc(path, keep=keep, dry_run=True)
    assert said.dry_run
    assert tree(path) == before
    done = knnstore.gc(path, keep=keep)
    assert {**vars_of(said), "dry_run": False} == vars_of(done)
    assert done.snapshots == {1: (2, 3), 3: ()}[keep]


def test_what_killed_commands_left_goes(path: Path) -> None:
    """Temporary files, attempts that never counted, folders that nothing names, files that belong to no segment: each is named."""
    left = litter(path)
    (path / "segments" / ("ab" * 16)).mkdir()
    (path / "spaces" / ("ab" * 16)).mkdir()
    (path / "coarse" / ("ab" * 16)).write_bytes(b"not even a folder")
    collected = knnstore.gc(path, keep=4)
    assert set(collected.leftovers) == left
    assert (collected.segments, collected.spaces, collected.coarse) == (("ab" * 16,),) * 3
    assert collected.snapshots == ()
    assert_whole(path)
    assert {child.name for child in path.iterdir()} == {
        *("KNNSTORE", "CURRENT", "LOCK", "manifests", "spaces", "coarse", "segments", "tags", "staging")
    }
    again = knnstore.gc(path, keep=4)
    assert again.freed_bytes == 0
    assert (again.leftovers, again.segments, again.spaces, again.coarse) == ((),) * 4


def test_freed_bytes_are_those_of_the_files(path: Path) -> None:
    """Counted by hand before and after; a file with another name elsewhere frees nothing."""

    def size() -> int:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != "LOCK")

    before = size()
    freed = knnstore.gc(path, keep=2).freed_bytes
    assert freed == before - size() > 0
    gone = knnstore.gc(path, keep=1, dry_run=True).segments
    linked = path / "segments" / gone[0] / "values.bin"
    os.link(linked, path.parent / "elsewhere")
    before, n_linked = size(), linked.stat().st_size
    assert knnstore.gc(path, keep=1).freed_bytes == before - size() - n_linked
    assert (path.parent / "elsewhere").stat().st_size == n_linked


def test_nothing_of_a_purged_document_is_left(path: Path) -> None:
    """After delete --purge and gc --keep 1, not in a job that was killed either."""
    job = path / "staging" / ("ab" * 16)
    job.mkdir()
    (job / "spool").write_bytes(b"a text")
    knnstore.delete(path, domain="b", purge=True)
    knnstore.gc(path, keep=1)
    assert_whole(path)
    assert content(path) == expected({("a", "two"): 0})
    assert list((path / "staging").iterdir()) == []


def test_quarantine_goes_only_if_asked(path: Path) -> None:
    (path / "quarantine" / "3" / "segments").mkdir(parents=True)
    (path / "quarantine" / "3" / "segments" / "file").write_bytes(b"damaged")
    assert knnstore.gc(path, keep=4).quarantined == ()
    assert (path / "quarantine" / "3" / "segments" / "file").exists()
    assert knnstore.gc(path, keep=4, quarantine=True, dry_run=True).quarantined == ("quarantine/3",)
    assert (path / "quarantine" / "3" / "segments" / "file").exists()
    collected = knnstore.gc(path, keep=4, quarantine=True)
    assert (collected.quarantined, collected.freed_bytes) == (("quarantine/3",), 7)
    assert not (path / "quarantine").exists()


# What is refused


def flip(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:])


@pytest.mark.parametrize("number", [2, 4])
def test_nothing_goes_where_it_is_not_known_what_is_needed(path: Path, number: int) -> None:
    """A kept manifest is damaged: refused by its name, not a file is touched. One that is to go may be."""
    litter(path)
    flip(path / "manifests" / f"{number}.json")
    before = tree(path)
    with pytest.raises(DamageError, match=rf"{number}\.json: .* What snapshot {number} needs is not known"):
        knnstore.gc(path, keep=3)
    assert tree(path) == before
    if number == 2:
        assert knnstore.gc(path, keep=2).snapshots == (1, 2)
        assert_whole(path)


def test_nothing_goes_where_current_or_its_manifest_is_damaged(path: Path) -> None:
    (path / "manifests" / "4.json").rename(path / "aside")
    before = tree(path)
    with pytest.raises(DamageError, match=r"4\.json: the file is missing\. .*`knnstore restore` goes back"):
        knnstore.gc(path, keep=1)
    (path / "aside").rename(path / "manifests" / "4.json")
    (path / "CURRENT").rename(path / "aside")
    with pytest.raises(DamageError, match="CURRENT: the file is missing"):
        knnstore.gc(path, keep=1)
    (path / "aside").rename(path / "CURRENT")
    (path / "manifests" / "4.json").rename(path / "aside")
    assert tree(path) == before


def test_where_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="not a datastore"):
        knnstore.gc(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_later_version_is_left_alone(path: Path) -> None:
    """A kept snapshot with features that this version does not know: it may have files that are not known either."""
    manifest, pin = open_snapshot(StoreFolder(path), 3)
    pin.release()
    (path / "manifests" / "3.json").write_bytes(manifest_bytes(replace(manifest, writer_features=("journaled",))))
    before = tree(path)
    with pytest.raises(FormatError, match="journaled"):
        knnstore.gc(path, keep=2)
    assert tree(path) == before


@pytest.mark.parametrize("name", ["manifests", "segments", "spaces", "coarse", "tags", "staging"])
def test_nothing_is_removed_through_a_link(path: Path, tmp_path: Path, name: str) -> None:
    """A folder of the store that is a link to another place."""
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    with pytest.raises(DamageError, match=f"{name}: a symbolic link"):
        knnstore.gc(path, keep=1)
    assert tree(tmp_path / "elsewhere") == before


def test_links_inside_are_not_followed(path: Path, tmp_path: Path) -> None:
    """A segment that stays, one that goes, and a job: each replaced by a link to a folder of someone's."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_bytes(b"dear")
    manifest, pin = open_snapshot(StoreFolder(path))
    pin.release()
    kept = StoreFolder(path).segment(manifest.segments[0].content.uuid)
    shutil.rmtree(kept)
    for link in (kept, path / "segments" / "other", path / "staging" / "job"):
        link.symlink_to(mine)
    knnstore.gc(path, keep=1)
    assert kept.is_symlink()
    assert not any(os.path.lexists(link) for link in (path / "segments" / "other", path / "staging" / "job"))
    assert (mine / "letter").read_bytes() == b"dear"


# Power cuts


@pytest.mark.parametrize("names", [True, False], ids=["names-lost", "names-kept"])
def test_a_gc_that_is_cut_off(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: bool) -> None:
    """Power cut before each call: the store opens, what is to stay is sound, a commit works, and the next gc finishes."""
    litter(path)
    job = path / "staging" / ("ef" * 16)
    job.mkdir()
    (job / "job.json").write_text("{}\n")
    knnstore.tag(path, "paper", 2)
    contents = {number: content(path, number) for number in (2, 4)}

    def collect(at: Path) -> None:
        knnstore.gc(at, keep=1, quarantine=True)

    whole = PowerCut(1 << 30)
    done = Path(shutil.copytree(path, tmp_path / "done.knn"))
    with whole.on(monkeypatch):
        collect(done)
    whole.lose(names=names)
    wanted = tree(done)
    assert_whole(done)
    n_states = 0
    for at in range(whole.n_calls):
        copy = Path(shutil.copytree(path, tmp_path / f"{at}.knn"))
        cut = PowerCut(at)
        with cut.on(monkeypatch), pytest.raises(StorageError, match="the power is cut"):
            collect(copy)
        cut.lose(names=names)
        report = knnstore.verify(copy)
        assert report.problems == (), at
        assert {number: content(copy, number) for number in contents} == contents
        for number in list_manifests(StoreFolder(copy)):
            with suppress(NotFoundError):  # 9 never counted
                content(copy, number)
        collect(copy)
        assert tree(copy) == wanted
        add(copy, "c", "new")
        assert content(copy) == contents[4] | expected({("c", "new"): 0})
        n_states += 1
        shutil.rmtree(copy)
    print(f"{n_states} states")
    assert n_states > 40


class Reordered(PowerCut):
    """A file system that has written what was done inside a space, and not yet what was done to its name."""

    def lose(self, *, names: bool = True) -> None:
        self._undo = [(folder, undo) for folder, undo in self._undo if folder.name == "spaces"]
        super().lose(names=names)


@pytest.mark.parametrize(("kind", "names"), [(PowerCut, True), (PowerCut, False), (Reordered, True)])
def test_half_a_space_is_never_taken_for_the_whole(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[PowerCut], names: bool
) -> None:
    """Spaces are named by their content: one that a gc was removing when it was cut off comes again with a later commit, whole."""
    space = trained_space(Codec.PQ8, DIM)
    save_space(space, path / "spaces" / space.id)  # no snapshot names it
    base, pin = open_snapshot(StoreFolder(path))
    pin.release()
    whole = PowerCut(1 << 30)
    with whole.on(monkeypatch):
        assert knnstore.gc(Path(shutil.copytree(path, tmp_path / "done.knn")), keep=4).spaces == (space.id,)
    for at in range(whole.n_calls):
        store = StoreFolder(Path(shutil.copytree(path, tmp_path / f"{at}.knn")))
        cut = kind(at)
        with cut.on(monkeypatch), pytest.raises(StorageError, match="the power is cut"):
            knnstore.gc(store.path, keep=4)
        cut.lose(names=names)
        staged = store.staging / "job" / space.id
        save_space(space, staged)
        record = space_record(space, staged)

        def build(number: int, parent: tuple[int, str] | None, _current: Manifest | None, record: SpaceRecord = record) -> Manifest:
            return replace(base, snapshot=number, parent=parent, spaces=(*base.spaces, record))

        commit(store, build, staged=[(staged, store.space(space.id))])
        assert knnstore.verify(store.path).problems == ()
