"""`knnstore tag`, `restore`, `diff`, `gc`, and `--at` with a tag: what they print, and how they fail."""

import shutil
from pathlib import Path

import pytest
from commands import ESCAPE, cli, fields_of, knnstore, well
from pasts import add, make

from knnstore.collecting import KEEP
from knnstore.storage.catalog import StoreFolder, list_manifests


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three snapshots: a document came, and [bold]one[/] went."""
    path = tmp_path_factory.mktemp("template") / "s.knn"
    make(path, {("a", "[bold]one[/]\n"): 0, ("b", "one"): 0})
    add(path, "a", "two")
    well("delete", "[bold]one[/]\n", "--store", path, "--purge")
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "s.knn"))


def test_tag(path: Path) -> None:
    """A name is given, listed, used, moved and taken away."""
    assert well("tag", "--store", path).stdout == "no tags\n"
    assert well("tag", "paper", "--at", "1", "--store", path).stdout == f"{path}: snapshot 1 is tag:paper\n"
    assert [item["tag"] for item in fields_of("tag", "now", "--store", path)["tags"]] == ["now", "paper"]
    assert fields_of("info", "--at", "tag:paper", "--store", path)["snapshot"] == 1
    lines = well("tag", "--store", path).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["tag", "snapshot"], ["now", "3"], ["paper", "1"]]
    assert knnstore("tag", "paper", "--store", path).exit_code == 4
    well("tag", "paper", "--move", "--at", "tag:now", "--store", path)
    assert [item["tags"] for item in fields_of("snapshots", "--store", path)["snapshots"]] == [[], [], ["now", "paper"]]
    assert "current, tag:now, tag:paper" in well("snapshots", "--store", path).stdout
    well("tag", "paper", "--remove", "--store", path)
    assert fields_of("tag", "--store", path)["tags"][0]["tag"] == "now"


def test_restore(path: Path) -> None:
    fields = fields_of("restore", "1", "--store", path)
    assert (fields["snapshot"], fields["restored"], fields["documents"]) == (4, 1, 2)
    done = well("restore", "3", "--store", path)
    assert done.stdout.startswith(f"{path}: snapshot 5 is what snapshot 3 was: 2 documents, ")
    assert well("restore", "1", "--store", path, "--quiet").output == ""
    assert list_manifests(StoreFolder(path)) == [1, 2, 3, 4, 5, 6]


def test_diff(path: Path) -> None:
    """Documents with domain and entries, as they are named; the domains of both."""
    fields = fields_of("diff", "1", "--store", path)
    assert (fields["before"], fields["after"]) == (1, 3)
    assert [item["id"] for item in fields["came"]] == ["two"]
    assert [(item["domain"], item["id"]) for item in fields["went"]] == [("a", "[bold]one[/]\n")]
    assert fields["domains"]["b"]["documents"] == [1, 1]
    out = well("diff", "1", "3", "--store", path).stdout
    assert out.startswith("documents from snapshot 1 to snapshot 3: 1 came, 1 went, 0 changed\n")
    assert "[bold]one[/]⏎" in out
    assert "entries at 3" in out
    assert ESCAPE not in out
    assert "0 came, 0 went, 0 changed" in well("diff", "2", "2", "--store", path).stdout


def test_gc(path: Path) -> None:
    """What would go, what goes, what stays and why."""
    assert next(option.default for option in cli.commands["gc"].params if option.name == "keep") == KEEP
    well("tag", "paper", "--at", "1", "--store", path)
    out = well("gc", "--store", path, "--quiet", "--dry-run").stdout
    assert out.startswith(f"{path}: there is nothing to remove\n")
    assert "--keep 1 frees what has no tag or reader" in out
    out = well("gc", "--keep", "1", "--dry-run", "--store", path).stdout
    assert out.startswith(f"{path}: 1 snapshot ")
    assert " would be removed, " in out
    assert list_manifests(StoreFolder(path)) == [1, 2, 3]
    said = fields_of("gc", "--keep", "1", "--dry-run", "--store", path)
    assert fields_of("gc", "--keep", "1", "--store", path) == {**said, "dry_run": False}
    assert said["kept"] == [{"snapshot": 1, "why": ["tag:paper"]}, {"snapshot": 3, "why": ["current"]}]
    assert list_manifests(StoreFolder(path)) == [1, 3]
    assert well("gc", "--store", path, "--quiet").output == ""
    out = well("gc", "--store", path).stdout
    assert [line.split(None, 1) for line in out.splitlines()[3:5]] == [["1", "one of the last, tag:paper"], ["3", "the current one"]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tag", "--move"], 2, "a NAME is missing"),
        (["tag", "x", "--remove", "--at", "1"], 2, "--remove takes a name away"),
        (["tag", "../x"], 2, "use 1 to 100 letters"),
        (["tag", "x", "--at", "seven"], 2, "'seven' is no snapshot. Give its number, or tag:NAME."),
        (["tag", "x", "--remove"], 3, "no tag 'x'. It has none."),
        (["restore", "tag:x"], 3, "no tag 'x'"),
        (["restore", "9" * 20], 2, "is no snapshot"),
        (["restore", "9"], 3, "the newest is 3"),
        (["restore"], 2, "Missing argument"),
        (["diff", "1", "x"], 2, "'x' is no snapshot"),
        (["diff", "1", "9"], 3, "the newest is 3"),
        (["gc", "--keep", "0"], 2, "keep 0: use 1 or more"),
        (["gc", "--keep", "-1"], 2, "use 1 or more"),
        (["info", "--at", "1.5"], 2, "'1.5' is no snapshot"),
        (["info", "--at", "tag:"], 2, "use 1 to 100"),
    ],
)
def test_failures(path: Path, arguments: list[str], code: int, message: str) -> None:
    """The exit code of the error's kind, one message, nothing on stdout."""
    done = knnstore(*arguments, "--store", path)
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["tag"], ["restore", "1"], ["diff", "1", "2"], ["gc"]])
def test_where_there_is_no_store(tmp_path: Path, command: list[str]) -> None:
    assert knnstore(*command, "--store", tmp_path / "gone.knn").exit_code == 3
    assert list(tmp_path.iterdir()) == []
