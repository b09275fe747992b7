"""The way back: what is restored is what was, also over damage; what `diff` says is what a list of both snapshots says."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pasts import Documents, add, content, expected, make, snapshot_number, tree
from stores import PowerCut

import knnstore
from knnstore.errors import DamageError, FormatError, InvalidArgumentError, NotFoundError, StorageError
from knnstore.inspection import snapshot_list
from knnstore.storage.catalog import StoreFolder, list_manifests, open_snapshot
from knnstore.storage.manifest_json import manifest_bytes


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three snapshots; the first two have segments that the third has not."""
    path = tmp_path_factory.mktemp("template") / "s.knn"
    make(path, {("a", "one"): 0, ("b", "one"): 0})
    add(path, "a", "two")
    knnstore.delete(path, "one", domain="a", purge=True)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "s.knn"))


def test_a_snapshot_is_restored(path: Path) -> None:
    """Its content is the newest again; those between stay as they were; it can be built upon and verifies."""
    contents = {number: content(path, number) for number in (1, 2, 3)}
    assert len({str(one) for one in contents.values()}) == 3
    made = knnstore.restore(path, 1)
    assert (made.snapshot, made.operation.name, made.operation.arguments) == (4, "restore", {"restored": 1})
    assert made.parent == (3, hashlib.sha256((path / "manifests" / "3.json").read_bytes()).hexdigest())
    assert {number: content(path, number) for number in (1, 2, 3)} == contents
    assert content(path) == contents[1]
    add(path, "c", "new")
    assert content(path) == contents[1] | expected({("c", "new"): 0})
    report = knnstore.verify(path)
    assert (report.ok, report.orphans) == (True, ())


def test_by_tag_and_after_gc(path: Path) -> None:
    """A tag keeps what only an old snapshot has, so that it can be restored after everything else is gone."""
    before = content(path, 1)
    knnstore.tag(path, "paper", 1)
    knnstore.gc(path, keep=1)
    assert list_manifests(StoreFolder(path)) == [1, 3]
    assert knnstore.restore(path, "tag:paper").snapshot == 4
    assert content(path) == before


def test_what_a_gc_removed_cannot_be_opened(path: Path) -> None:
    """The message has the snapshots there are, with their tags."""
    knnstore.tag(path, "paper", 1)
    knnstore.tag(path, "book", 1)
    knnstore.gc(path, keep=1)
    with pytest.raises(NotFoundError, match=r"no snapshot 2\. Kept: 1 \(tag:book, tag:paper\), 3\."):
        knnstore.open(path, snapshot=2)
    with pytest.raises(NotFoundError, match=r"no snapshot 9; the newest is 3"):
        knnstore.restore(path, 9)
    with pytest.raises(InvalidArgumentError, match="use a number, or tag:NAME"):
        knnstore.restore(path, "1")
    assert [(item["snapshot"], item["tags"], item["current"]) for item in snapshot_list(path)] == [
        (1, ["book", "paper"], False),
        (3, [], True),
    ]


def test_many_snapshots_are_not_all_listed(path: Path) -> None:
    """A message lists the last ones, and those that have a tag."""
    knnstore.tag(path, "paper", 2)
    for _ in range(11):
        knnstore.restore(path, 3)
    with pytest.raises(NotFoundError, match=r"no snapshot 0\. Kept: 14, among them 2 \(tag:paper\), 5, 6, 7, .* 13, 14\."):
        knnstore.open(path, snapshot=0)


# Over damage


def flip(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "CURRENT missing": lambda path: (path / "CURRENT").unlink(),
    "CURRENT empty": lambda path: (path / "CURRENT").write_bytes(b""),
    "CURRENT garbage": lambda path: (path / "CURRENT").write_bytes(b"\xff" * 70),
    "CURRENT lies": lambda path: (path / "CURRENT").write_text(f"3 {'0' * 64}\n"),
    "CURRENT ahead": lambda path: (path / "CURRENT").write_text(f"8 {'0' * 64}\n"),
    "CURRENT far ahead": lambda path: (path / "CURRENT").write_text(f"{10**18 - 1} {'0' * 64}\n"),
    "CURRENT a link": lambda path: ((path / "CURRENT").unlink(), (path / "CURRENT").symlink_to("nowhere")),
    "manifest flipped": lambda path: flip(path / "manifests" / "3.json"),
    "manifest missing": lambda path: (path / "manifests" / "3.json").unlink(),
    "manifest of another number": lambda path: shutil.copy(path / "manifests" / "2.json", path / "manifests" / "3.json"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_restore_over_damage(path: Path, damage: Callable[[Path], object]) -> None:
    """Where the newest snapshot cannot be opened: an earlier one is committed above all others, and not a file is removed or changed."""
    damage(path)
    with pytest.raises(DamageError, match=r"Nothing was changed; snapshot \d verifies: open it by --at \d"):
        knnstore.open(path)
    before, wanted = tree(path), content(path, 2)
    made = knnstore.restore(path, 2)
    assert made.snapshot > 3
    assert made.snapshot > max(list_manifests(StoreFolder(path))[:-1])
    assert content(path) == wanted
    after = tree(path)
    assert {name: raw for name, raw in after.items() if name in before and name != "CURRENT"} == {
        name: raw for name, raw in before.items() if name != "CURRENT"
    }
    assert after.keys() - before.keys() <= {"CURRENT", f"manifests/{made.snapshot}.json"}
    assert {problem.path for problem in knnstore.verify(path).problems} <= {"manifests/3.json"}
    add(path, "c", "new")
    assert content(path) == wanted | expected({("c", "new"): 0})
    knnstore.gc(path, keep=2)
    report = knnstore.verify(path)
    assert (report.ok, report.orphans) == (True, ())


def test_the_advice_of_the_message_works(path: Path) -> None:
    """A manifest that is whole can be opened by its number, and restored, though CURRENT gives another hash."""
    wanted = content(path)
    DAMAGE["CURRENT lies"](path)
    with pytest.raises(DamageError, match=r"open it by --at 3, or go back to it by `knnstore restore 3`"):
        knnstore.open(path)
    assert content(path, 3) == wanted
    knnstore.restore(path, 3)
    assert content(path) == wanted


def test_an_attempt_that_never_counted_is_not_offered(path: Path) -> None:
    """A manifest above CURRENT's, where CURRENT's own is damaged."""
    shutil.copy(path / "manifests" / "3.json", path / "manifests" / "4.json")
    manifest, pin = open_snapshot(StoreFolder(path), 1)
    pin.release()
    (path / "manifests" / "4.json").write_bytes(manifest_bytes(dataclasses.replace(manifest, snapshot=4)))
    flip(path / "manifests" / "3.json")
    with pytest.raises(DamageError, match="snapshot 2 verifies"):
        knnstore.open(path)
    assert knnstore.restore(path, 2).snapshot == 5


def test_one_snapshot_and_an_unfinished_job(tmp_path: Path) -> None:
    """A store that lost its CURRENT is not taken for one whose creation was not finished because another command left a job."""
    path = tmp_path / "s.knn"
    make(path, {("a", "one"): 0})
    (path / "staging" / "ab").mkdir()
    (path / "staging" / "ab" / "job.json").write_text("{}\n")
    (path / "CURRENT").unlink()
    with pytest.raises(DamageError, match="snapshot 1 verifies"):
        knnstore.open(path)
    assert knnstore.restore(path, 1).snapshot == 2
    assert content(path) == expected({("a", "one"): 0})


@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
@pytest.mark.parametrize("how", ["missing", "cut", "a link", "no segment.json"])
def test_what_is_not_whole_is_not_restored(path: Path, how: str, damaged: bool) -> None:
    """A file of the earlier snapshot is missing or has another size: refused by its name, nothing changed."""
    manifest, pin = open_snapshot(StoreFolder(path), 1)
    pin.release()
    folder = StoreFolder(path).segment(manifest.segments[0].content.uuid)
    file = folder / ("segment.json" if how == "no segment.json" else "values.bin")
    if how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.rename(path / "moved")
        if how == "a link":
            file.symlink_to(path / "moved")
    if damaged:
        DAMAGE["CURRENT garbage"](path)
    before = tree(path)
    with pytest.raises(DamageError, match=rf"{file.name}: not there, or not of the size recorded"):
        knnstore.restore(path, 1)
    assert tree(path) == before


def test_a_snapshot_of_a_later_version_is_not_restored(path: Path) -> None:
    """One that asks writers for more than this version knows."""
    manifest, pin = open_snapshot(StoreFolder(path), 1)
    pin.release()
    (path / "manifests" / "1.json").write_bytes(manifest_bytes(dataclasses.replace(manifest, writer_features=("journaled",))))
    with pytest.raises(FormatError, match="journaled"):
        knnstore.restore(path, 1)


@pytest.mark.parametrize("names", [True, False], ids=["names-lost", "names-kept"])
@pytest.mark.parametrize("damage", [None, "CURRENT garbage", "CURRENT missing", "manifest flipped"])
def test_restore_is_whole_or_not_there(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: bool, damage: str | None
) -> None:
    """Power cut before each call: the store is as before, damaged or not, or at the new snapshot; a second restore works."""
    wanted, newest = content(path, 1), content(path, 3)
    if damage:
        DAMAGE[damage](path)
    whole = PowerCut(1 << 30)
    done = Path(shutil.copytree(path, tmp_path / "done.knn"))
    with whole.on(monkeypatch):
        knnstore.restore(done, 1)
    whole.lose(names=names)
    assert content(done) == wanted
    for at in range(whole.n_calls):
        copy = Path(shutil.copytree(path, tmp_path / f"{at}.knn"))
        cut = PowerCut(at)
        with cut.on(monkeypatch), pytest.raises(StorageError, match="the power is cut"):
            knnstore.restore(copy, 1)
        cut.lose(names=names)
        try:
            assert content(copy) in (wanted, newest)
        except DamageError:
            assert damage
        assert content(copy, 2) == content(path, 2)
        knnstore.restore(copy, 1)
        assert content(copy) == wanted


# Differences


names = st.sampled_from([(domain, name) for domain in "ab" for name in ("x", "y", "z")])
states = st.dictionaries(names, st.integers(0, 1), max_size=6)


def go_to(path: Path, wanted: Documents, now: Documents, purge: bool) -> None:
    """Makes the documents of a store those that are wanted."""
    for domain, name in now.keys() - wanted.keys():
        knnstore.delete(path, name, domain=domain, purge=purge)
    for key, version in wanted.items():
        if now.get(key) != version:
            add(path, *key, version)


@settings(max_examples=15)
@given(before=states.filter(len), after=states, purge=st.booleans(), segment_entries=st.sampled_from([5, 1_000]))
def test_differences_are_those_of_two_lists(
    tmp_path_factory: pytest.TempPathFactory, before: Documents, after: Documents, purge: bool, segment_entries: int
) -> None:
    """Documents that came, went and have other content, by domain and id, whatever was joined or rewritten between; both ways."""
    path = tmp_path_factory.mktemp("diff") / "s.knn"
    make(path, before, segment_entries=segment_entries)  # documents in parts, or many in a segment
    go_to(path, after, before, purge)
    last = snapshot_number(path)
    for one, other, (first, second) in ((before, after, (1, last)), (after, before, (last, 1))):
        found = knnstore.diff(path, first, second)
        old, new = expected(one), expected(other)
        assert (found.before, found.after) == (first, second)
        assert {(item.domain, item.id) for item in found.came} == new.keys() - old.keys()
        assert {(item.domain, item.id) for item in found.went} == old.keys() - new.keys()
        assert {(item.domain, item.id) for item in found.changed} == {key for key in new.keys() & old.keys() if new[key] != old[key]}
        for item in found.came + found.changed:
            assert item.entries == len(new[item.domain, item.id])
        assert all(item.entries == len(old[item.domain, item.id]) for item in found.went)
        assert found.domains.keys() == {domain for domain, _ in old | new}
        for name, domain in found.domains.items():
            for side, documents in enumerate((old, new)):
                of_domain = [tokens for (other_name, _), tokens in documents.items() if other_name == name]
                assert (domain.documents[side], domain.entries[side]) == (len(of_domain), sum(map(len, of_domain)))


def test_shared_segments_are_not_read(path: Path) -> None:
    """Of segments that both snapshots have alike no file is opened, nor anything where they agree in all."""
    for number in (1, 3):
        manifest, pin = open_snapshot(StoreFolder(path), number)
        pin.release()
        for segment in manifest.segments:
            shutil.rmtree(StoreFolder(path).segment(segment.content.uuid), ignore_errors=True)
        found = knnstore.diff(path, number, number)
        assert (found.came, found.went, found.changed) == ((), (), ())


def test_difference_to_the_newest(path: Path) -> None:
    """By tag, and to the newest where no second is named; what is not there is not found."""
    knnstore.tag(path, "paper", 1)
    found = knnstore.diff(path, "tag:paper")
    assert (found.before, found.after) == (1, 3)
    assert [item.id for item in found.went] == ["one"]
    with pytest.raises(NotFoundError):
        knnstore.diff(path, 1, 9)
    with pytest.raises(NotFoundError):
        knnstore.diff(path, "tag:none", 1)


# Read-only media


READ_ONLY = """
import os, sys
import knnstore
from knnstore.errors import StorageError
from pasts import content
if os.geteuid() == 0:  # root writes where nobody may
    os.setgid(65534)
    os.setuid(65534)
path = sys.argv[1]
assert content(path, "tag:paper") == content(path, 1)
print([document.id for document in knnstore.diff(path, 1).went], sorted(knnstore.tags(path)))
for act in (
    lambda: knnstore.tag(path, "new", 2),
    lambda: knnstore.untag(path, "paper"),
    lambda: knnstore.restore(path, 1),
    lambda: knnstore.gc(path),
):
    try:
        act()
    except StorageError as error:
        print(error)
"""


def test_a_read_only_folder(path: Path) -> None:
    """It opens by number and tag, and is compared and listed; what would change it says that it cannot."""
    knnstore.tag(path, "paper", 1)
    before = tree(path)
    for folder in (path.parent, *path.parent.parents[:2]):
        folder.chmod(0o755)
    for file in (path, *path.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run([sys.executable, "-c", READ_ONLY, str(path)], env=environment, capture_output=True, text=True, check=False)
    finally:
        for file in (path, *path.rglob("*")):
            file.chmod(0o755 if file.is_dir() else 0o644)
    said = done.stdout.splitlines()
    assert said[0] == "['one'] ['paper']", done.stderr
    assert said[1:] == [f"{path}/LOCK: cannot open for writing: Permission denied. Check the path and its permissions."] * 4
    assert tree(path) == before
