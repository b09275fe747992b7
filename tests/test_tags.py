"""Tags: names for snapshots that open, that stay, and that are never taken for another."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import invert
from hypothesis import given
from hypothesis import strategies as st
from pasts import add, content, make, tree
from stores import PowerCut

import knnstore
from knnstore.errors import DamageError, ExistsError, InvalidArgumentError, KnnstoreError, NotFoundError, StorageError
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.tags import Tag, check_name, list_tags, resolve

LETTERS = string.ascii_letters + string.digits + "._-"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three snapshots with one, two and three documents."""
    path = tmp_path_factory.mktemp("template") / "s.knn"
    make(path, {("a", "one"): 0})
    add(path, "a", "two")
    add(path, "b", "three")
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "s.knn"))


def test_a_tag_opens_its_snapshot(path: Path) -> None:
    """Whatever is committed after; the newest where none is named; by Python and by --at."""
    knnstore.tag(path, "paper", 2)
    made = knnstore.tag(path, "newest")
    assert made.snapshot == 3
    add(path, "b", "four")
    assert {name: tag.snapshot for name, tag in knnstore.tags(path).items()} == {"newest": 3, "paper": 2}
    assert knnstore.tags(path)["newest"] == made
    assert content(path, "tag:paper") == content(path, 2)
    assert content(path, "tag:newest") == content(path, 3) != content(path)
    manifest, pin = open_snapshot(StoreFolder(path), "tag:paper")
    pin.release()
    assert manifest.snapshot == 2
    knnstore.tag(path, "again", "tag:paper")
    assert knnstore.tags(path)["again"].snapshot == 2


def test_a_tag_is_moved_only_if_asked(path: Path) -> None:
    """A name that is taken is refused, and nothing changes; with move it goes, taken or not."""
    knnstore.tag(path, "paper", 1)
    before = tree(path)
    with pytest.raises(ExistsError, match="'paper' is there already"):
        knnstore.tag(path, "paper", 2)
    assert tree(path) == before
    knnstore.tag(path, "paper", 2, move=True)
    knnstore.tag(path, "other", 3, move=True)
    assert [tag.snapshot for tag in knnstore.tags(path).values()] == [3, 2]


def test_a_tag_is_taken_away(path: Path) -> None:
    """Its snapshot stays; the name is free again."""
    knnstore.tag(path, "paper", 1)
    knnstore.untag(path, "paper")
    assert knnstore.tags(path) == {}
    with pytest.raises(NotFoundError, match=r"no tag 'paper'\. It has none"):
        knnstore.untag(path, "paper")
    assert content(path, 1)
    knnstore.tag(path, "paper", 2)
    with pytest.raises(NotFoundError, match=r"no tag 'pap'\. It has paper"):
        knnstore.open(path, snapshot="tag:pap")


@given(name=st.text(LETTERS, min_size=1, max_size=100))
def test_names_that_are_allowed(name: str) -> None:
    """Letters of ASCII, digits, dots, underscores, hyphens, up to a hundred; a dot is not the first."""
    if name[0] == ".":
        with pytest.raises(InvalidArgumentError, match="no dot at the beginning"):
            check_name(name)
    else:
        check_name(name)


@given(name=st.one_of(st.text(max_size=5), st.text(LETTERS, min_size=101, max_size=120)))
def test_names_that_are_not(name: str) -> None:
    """Everything else, among them whatever would lead out of the folder."""
    if not (0 < len(name) <= 100 and set(name) <= set(LETTERS)):
        with pytest.raises(InvalidArgumentError, match="use 1 to 100"):
            check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\n", "é", "a" * 101, "a:b"])
def test_bad_names_are_refused_everywhere(path: Path, name: str) -> None:
    before = tree(path)
    for act in (
        lambda: knnstore.tag(path, name),
        lambda: knnstore.untag(path, name),
        lambda: knnstore.open(path, snapshot=f"tag:{name}"),
    ):
        with pytest.raises(InvalidArgumentError, match="use 1 to 100"):
            act()
    assert tree(path) == before


def test_names_of_any_allowed_kind_can_be_used(path: Path) -> None:
    """Also those that look like files of our own."""
    for name in ("a" * 100, "x.json", "x.json.tmp", "-", "_", "0", "CURRENT", "A.b-C_d"):
        knnstore.tag(path, name, 1)
        assert content(path, f"tag:{name}") == content(path, 1)
    assert len(knnstore.tags(path)) == 8
    assert knnstore.verify(path).orphans == ()
    assert knnstore.verify(path).ok


@pytest.mark.parametrize("snapshot", ["2", "", "newest", "Tag:paper", 0, -1, 4, "tag:none"])
def test_what_is_no_snapshot_cannot_be_tagged(path: Path, snapshot: int | str) -> None:
    before = tree(path)
    with pytest.raises((InvalidArgumentError, NotFoundError)):
        knnstore.tag(path, "paper", snapshot)
    assert tree(path) == before


def test_where_there_is_no_store(tmp_path: Path) -> None:
    """Nothing is made in a folder that is no datastore."""
    for act in (lambda: knnstore.tag(tmp_path, "x"), lambda: knnstore.untag(tmp_path, "x"), lambda: knnstore.tags(tmp_path)):
        with pytest.raises(NotFoundError, match="not a datastore"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_tags_that_was_lost(path: Path) -> None:
    """Some ways of copying drop empty folders: it is made again."""
    (path / "tags").rmdir()
    assert knnstore.tags(path) == {}
    knnstore.tag(path, "paper", 1)
    assert content(path, "tag:paper") == content(path, 1)


# Damage


def test_the_file_is_as_documented(path: Path) -> None:
    """Canonical JSON of five names, of which `check` is the hash of the rest."""
    made = knnstore.tag(path, "paper", 2)
    raw = (path / "tags" / "paper.json").read_bytes()
    fields = json.loads(raw)
    assert sorted(fields) == ["check", "name", "sha256", "snapshot", "time"]
    assert (fields["name"], fields["snapshot"], fields["sha256"], fields["time"]) == ("paper", 2, made.sha256, made.time)


def assert_refused(path: Path, match: str) -> None:
    """The tag is not opened, and verify says so."""
    with pytest.raises(DamageError, match=match):
        knnstore.open(path, snapshot="tag:paper")
    for level in ("quick", "full"):
        (problem,) = knnstore.verify(path, level=level).problems
        assert problem.path == "tags/paper.json"
    with pytest.raises(DamageError):
        knnstore.gc(path, keep=1)


def test_every_byte_of_a_tag_is_checked(path: Path) -> None:
    """One that is not what was written is refused by its name; it can be taken away, or moved."""
    knnstore.tag(path, "paper", 1)
    file = path / "tags" / "paper.json"
    raw = file.read_bytes()
    for at in range(len(raw)):
        invert(file, at, 1)
        with pytest.raises(DamageError, match=r"tags/paper\.json"):
            resolve(StoreFolder(path), "paper")
        with pytest.raises(DamageError, match=r"tags/paper\.json"):
            list_tags(StoreFolder(path))
        file.write_bytes(raw)
    invert(file, 9)
    assert_refused(path, r"tags/paper\.json")
    knnstore.tag(path, "paper", 2, move=True)
    assert content(path, "tag:paper") == content(path, 2)
    invert(file, 9)
    knnstore.untag(path, "paper")
    assert knnstore.verify(path).ok


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda file: file.write_bytes(b""), "not the JSON"),
        (lambda file: file.write_bytes(b"[" * 4_000), "not the JSON"),
        (lambda file: file.write_bytes(b" " * 5_000), "larger than"),
        (lambda file: (file.unlink(), file.mkdir()), "not a plain file"),
        (lambda file: (file.unlink(), file.symlink_to("nowhere")), "missing or not a plain file"),
    ],
)
def test_a_tag_that_is_no_tag(path: Path, damage: Callable[[Path], object], match: str) -> None:
    knnstore.tag(path, "paper", 1)
    damage(path / "tags" / "paper.json")
    assert_refused(path, match)
    knnstore.untag(path, "paper")
    assert knnstore.verify(path).ok


def test_a_tag_in_the_place_of_another(path: Path) -> None:
    """It would name another snapshot: it is known by the name in it."""
    knnstore.tag(path, "paper", 1)
    knnstore.tag(path, "other", 2)
    shutil.copy(path / "tags" / "other.json", path / "tags" / "paper.json")
    assert_refused(path, "it is the tag 'other'")


def test_a_tag_of_another_store(path: Path, tmp_path: Path) -> None:
    """Its snapshot has another manifest."""
    make(tmp_path / "t.knn", {("x", "y"): 0})
    knnstore.tag(tmp_path / "t.knn", "paper", 1)
    shutil.copy(tmp_path / "t.knn" / "tags" / "paper.json", path / "tags")
    assert_refused(path, "snapshot 1 is not the one that was tagged")


def test_a_tag_whose_snapshot_is_gone(path: Path) -> None:
    """No gc does that: it is damage."""
    knnstore.tag(path, "paper", 1)
    (path / "manifests" / "1.json").unlink()
    assert_refused(path, "snapshot 1, which it names, is not there")


def test_a_damaged_manifest_is_not_blamed_on_its_tag(path: Path) -> None:
    knnstore.tag(path, "paper", 1)
    invert(path / "manifests" / "1.json", 50)
    assert [problem.path for problem in knnstore.verify(path).problems] == ["manifests/1.json"]
    with pytest.raises(DamageError, match="not the one that was tagged"):
        knnstore.open(path, snapshot="tag:paper")


def test_what_a_killed_command_left_is_no_tag(path: Path) -> None:
    """A temporary file is listed as an orphan, and is no damage; the next tag of this name is made over it."""
    (path / "tags" / "paper.json.tmp").write_bytes(b"half")
    assert knnstore.tags(path) == {}
    report = knnstore.verify(path)
    assert (report.ok, report.orphans) == (True, ("tags/paper.json.tmp",))
    knnstore.tag(path, "paper", 1)
    assert [file.name for file in (path / "tags").iterdir()] == ["paper.json"]


def test_a_tag_that_is_moved_while_it_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, then moved and its old snapshot collected, then opened: the new snapshot is opened."""
    knnstore.tag(path, "paper", 1)
    from knnstore.storage import tags as module

    read = module.read_tag

    def late(file: Path) -> Tag:
        monkeypatch.setattr(module, "read_tag", read)
        tag = read(file)
        knnstore.tag(path, "paper", 2, move=True)
        knnstore.gc(path, keep=1)
        return tag

    monkeypatch.setattr(module, "read_tag", late)
    with knnstore.open(path, snapshot="tag:paper") as store:
        assert store.snapshot == 2


# Power cuts


@pytest.mark.parametrize("names", [True, False], ids=["names-lost", "names-kept"])
@pytest.mark.parametrize(
    ("act", "after"),
    [
        (lambda path: knnstore.tag(path, "new", 2), {"paper": 1, "new": 2}),
        (lambda path: knnstore.tag(path, "paper", 2, move=True), {"paper": 2}),
        (lambda path: knnstore.untag(path, "paper"), {}),
    ],
    ids=["new", "move", "remove"],
)
def test_tags_are_whole_or_not_there(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: bool, act: Callable[[Path], None], after: dict[str, int]
) -> None:
    """Power cut before each call: as before, or as after; what was said to be done stays done."""
    knnstore.tag(path, "paper", 1)

    def tagged(at: Path) -> dict[str, int]:
        assert knnstore.verify(at, level="quick").ok
        return {name: tag.snapshot for name, tag in knnstore.tags(at).items()}

    whole = PowerCut(1 << 30)
    done = Path(shutil.copytree(path, tmp_path / "done.knn"))
    with whole.on(monkeypatch):
        act(done)
    whole.lose(names=names)
    assert tagged(done) == after
    assert whole.n_calls >= 4
    for at in range(whole.n_calls):
        copy = Path(shutil.copytree(path, tmp_path / f"{at}.knn"))
        cut = PowerCut(at)
        with cut.on(monkeypatch), pytest.raises(StorageError, match="the power is cut"):
            act(copy)
        cut.lose(names=names)
        assert tagged(copy) in ({"paper": 1}, after)
        try:
            act(copy)
        except KnnstoreError:
            assert tagged(copy) == after
        assert tagged(copy) == after
