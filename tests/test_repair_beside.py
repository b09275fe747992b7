"""`repair` beside readers and writers, where things are that are not the store's, after kills, and on the command line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken import DOCUMENTS, Key, check_repaired, copied, in_segments, inventory, make_past, manifest_of
from click.testing import CliRunner
from damage import invert
from knnstore_cli.main import cli
from pasts import add, content, make, tree
from stores import PowerCut
from verified import Told

import knnstore
from knnstore.errors import DamageError, NotFoundError, StorageError
from knnstore.storage.manifest_json import canonical


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("past") / "s.knn"
    make_past(path)
    return path


@pytest.fixture
def path(past: Path, tmp_path: Path) -> Path:
    return copied(past, tmp_path / "s.knn")


def held(past: Path, without: set[Key] = frozenset()) -> dict[Key, list[int]]:
    """What the past store holds, less some documents."""
    return {key: tokens for key, tokens in content(past).items() if key not in without}


def test_a_snapshot_that_a_reader_has_open_stays(past: Path, path: Path) -> None:
    """It and all it names keep their places until the reader ends; then a repair puts them aside."""
    uuid = manifest_of(past).segments[0].content.uuid
    with knnstore.open(path) as reader:
        invert(path / "segments" / uuid / "lists.bin", -1)
        report = knnstore.repair(path)
        assert report.held == (4,)
        assert report.snapshot == 5
        assert (path / "segments" / uuid).is_dir()
        assert "manifests/3.json" in {item.path for item in report.moved}
        assert sum(1 for _ in reader.documents()) == len(held(past))
        assert not knnstore.verify(path).ok
    again = knnstore.repair(path)
    assert again.held == ()
    assert {f"segments/{uuid}", "manifests/4.json"} <= {item.path for item in again.moved}
    check_repaired(path, again, held(past, in_segments(past, [uuid])))


def test_a_commit_that_comes_first(path: Path) -> None:
    """Between the look at the store and its repair another command may commit: what it added is not lost."""
    uuid = manifest_of(path).segments[0].content.uuid
    invert(path / "segments" / uuid / "lists.bin", -1)
    before = content_but(path, uuid)
    stages: list[int] = []

    def commit() -> None:
        stages.append(1)
        if len(stages) == 1:
            add(path, "d", "between")

    report = knnstore.repair(path, progress=Told(commit))
    assert report.base == 5
    assert set(content(path)) == before | {("d", "between")}
    assert knnstore.verify(path).ok


def content_but(path: Path, uuid: str) -> set[Key]:
    manifest = manifest_of(path)
    every = in_segments(path, [item.content.uuid for item in manifest.segments])
    return every - in_segments(path, [uuid])


def test_an_attempt_that_never_counted_does_not_count_afterwards(past: Path, path: Path) -> None:
    """A manifest above CURRENT's goes, since a newer one would make it count."""
    shutil.copyfile(path / "manifests" / "4.json", path / "manifests" / "5.json")
    uuid = manifest_of(past).segments[0].content.uuid
    invert(path / "segments" / uuid / "lists.bin", -1)
    report = knnstore.repair(path)
    assert "manifests/5.json" in {item.path for item in report.moved}
    check_repaired(path, report, held(past, in_segments(past, [uuid])))


@pytest.mark.parametrize("name", ["segments", "manifests", "tags"])
def test_a_link_in_place_of_a_folder(past: Path, path: Path, tmp_path: Path, name: str) -> None:
    """What is behind it may be sound: that is not decided here."""
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    before = tree(path)
    with pytest.raises(DamageError, match="symbolic link"):
        knnstore.repair(path)
    assert tree(path) == before


@pytest.mark.parametrize("name", ["tags", "staging", "coarse"])
@pytest.mark.parametrize("done", ["file", "FIFO", "broken link"])
def test_something_else_in_place_of_a_folder(past: Path, path: Path, name: str, done: str) -> None:
    """It is put aside; a tag that was in it is lost with it, which no snapshot is."""
    shutil.rmtree(path / name)
    {"file": Path.touch, "FIFO": os.mkfifo, "broken link": lambda at: at.symlink_to("nowhere")}[done](path / name)
    report = knnstore.repair(path)
    check_repaired(path, report, held(past))
    assert (path / name).is_dir()


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files"), OSError(5, "Input/output error")]
)
def test_files_that_cannot_be_read(past: Path, path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """A file that we may not read, or not now, is not damaged; a bad sector is."""
    uuid = manifest_of(past).segments[0].content.uuid
    real = os.readv

    def readv(fd: int, buffers: Any) -> int:
        if str(Path(f"/proc/self/fd/{fd}").readlink()).endswith(f"{uuid}/values.bin"):
            raise error
        return real(fd, buffers)

    monkeypatch.setattr(os, "readv", readv)
    before = tree(path)
    if error.errno == 5:
        report = knnstore.repair(path)
        check_repaired(path, report, held(past, in_segments(past, [uuid])))
    else:
        with pytest.raises(StorageError, match=error.strerror):
            knnstore.repair(path)
        assert tree(path) == before


def test_no_store(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.knn", tmp_path):
        with pytest.raises(NotFoundError):
            knnstore.repair(path)
    assert not list(tmp_path.iterdir())


def _damage_segment(path: Path) -> None:
    invert(path / "segments" / manifest_of(path).segments[1].content.uuid / "values.bin", 70)


def _damage_contexts(path: Path) -> None:
    invert(path / "segments" / manifest_of(path).segments[1].content.uuid / "contexts.lmdb", 4_100)


def _damage_much(path: Path) -> None:
    _damage_segment(path)
    for name in ("CURRENT", "KNNSTORE", "tags/paper.json", "manifests/2.json"):
        invert(path / name, 20)


def _add_and_lose(path: Path) -> None:
    add(path, "c", "newest")
    (path / "manifests" / "5.json").unlink()


def _beside_a_job(path: Path) -> None:
    """A first snapshot whose `create` was killed after its commit: its job is still there. Without CURRENT it is taken for unfinished."""
    shutil.rmtree(path)
    make(path, DOCUMENTS, segment_entries=20)
    job = path / "staging" / ("ab" * 16)
    job.mkdir(parents=True)
    pairs = [[name, name] for name in (f"segments/{item.content.uuid}" for item in manifest_of(path).segments)]
    (job / "moves.json").write_bytes(canonical(pairs))
    invert(path / "CURRENT", 3)


KILLED: dict[str, Callable[[Path], None]] = {
    "segment": _damage_segment,
    "contexts": _damage_contexts,
    "much": _damage_much,
    "newest manifest": _add_and_lose,
    "current": lambda path: invert(path / "CURRENT", 3),
    "current beside a job": _beside_a_job,
}


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
@pytest.mark.parametrize("what", KILLED)
def test_a_repair_that_is_cut_off(
    past: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None], what: str, step: int
) -> None:
    """Wherever the power goes off: nothing of the store is gone, and typing it again ends as it would have, with the same losses told."""
    damaged = copied(past, tmp_path / "damaged.knn")
    KILLED[what](damaged)
    whole = copied(damaged, tmp_path / "whole.knn")
    disk = PowerCut(10_000)
    with disk.on(monkeypatch):
        report = knnstore.repair(whole)
    left, kept = content(whole), inventory(damaged)
    n_calls = disk.n_calls
    cuts = sorted({*range(0, n_calls, step), n_calls - 1})
    for at in cuts:
        path = copied(damaged, tmp_path / "cut.knn")
        disk = PowerCut(at)
        with pytest.raises(StorageError, match="power is cut"), disk.on(monkeypatch):
            knnstore.repair(path)
        disk.lose(names=at % 2 == 0)
        assert kept <= inventory(path), at
        again = knnstore.repair(path)
        assert content(path) == left, at
        verified = knnstore.verify(path)
        assert verified.problems == (), at
        assert [orphan for orphan in verified.orphans if not orphan.endswith(".tmp")] == [], at
        if report.lossless or at < n_calls - 1:  # cut after all was done, the losses are in the file
            assert (set(again.lost), again.unnamed, again.lost_snapshots) == (set(report.lost), report.unnamed, report.lost_snapshots), at
        assert told(path) == told(whole), at
        assert knnstore.repair(path).lossless, at
        assert kept <= inventory(path), at
        shutil.rmtree(path)
    tell(f"repair cut off, {what}: at {len(cuts)} of {n_calls} calls to the disk, each repaired again")


def told(path: Path) -> set[str]:
    """What repairs wrote down as lost."""
    return {line for file in path.glob("quarantine/*/lost.jsonl") for line in file.read_text().splitlines()}


# The command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments)


def test_command(past: Path, path: Path) -> None:
    """It says what was damaged, where it went, what was lost and what to do; 8 where something was."""
    result = run("repair", "--store", str(path))
    assert (result.exit_code, result.stdout) == (0, f"{path}: no damage; nothing to repair\n")
    _damage_segment(path)
    uuid = manifest_of(past).segments[1].content.uuid
    gone = in_segments(past, [uuid])
    told = run("repair", "--store", str(path), "--dry-run")
    assert told.exit_code == 8
    assert "would go to quarantine/5/" in told.stdout
    assert knnstore.open(path).snapshot == 4
    done = run("repair", "--store", str(path), "--quiet")
    assert done.exit_code == 8
    assert f"segments/{uuid}  damaged" in done.stdout
    assert f"{len(gone)} documents lost" in done.stdout
    assert all(name in done.stdout for _, name in gone)
    assert "append them again" in done.stdout
    assert "snapshot 5 was committed, from what is sound of snapshot 4" in done.stdout
    assert run("verify", "--store", str(path)).exit_code == 0


def test_command_without_loss(path: Path) -> None:
    """0 where nothing was lost."""
    invert(path / "tags" / "paper.json", 20)
    result = run("repair", "--store", str(path), "--json")
    fields = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (fields["lossless"], fields["snapshot"], fields["lost"]) == (True, 4, [])
    assert [item["path"] for item in fields["moved"]] == ["tags/paper.json"]


def test_command_beside_a_reader(past: Path, path: Path) -> None:
    """8 while damage has to stay."""
    with knnstore.open(path, snapshot=1):
        for segment in manifest_of(past, 1).segments:
            if segment.content.uuid not in {item.content.uuid for item in manifest_of(past).segments}:
                invert(path / "segments" / segment.content.uuid / "values.bin", 70)
                break
        else:
            pytest.skip("every segment of the first snapshot is in the newest")
        result = run("repair", "--store", str(path))
    assert result.exit_code == 8
    assert "snapshot 1 names what is damaged, and a process has it open" in result.stdout


def test_command_that_lists_many(past: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first twenty documents, and where the others are named."""
    monkeypatch.setattr("knnstore_cli.repair_report._SHOWN", 1)
    _damage_segment(path)
    gone = in_segments(past, [manifest_of(past).segments[1].content.uuid])
    result = run("repair", "--store", str(path))
    assert f"and {len(gone) - 1} more: all are in quarantine/5/lost.jsonl" in result.stdout
    lines = [json.loads(line) for line in (path / "quarantine" / "5" / "lost.jsonl").read_text().splitlines()]
    assert {(line["domain"], line["id"]) for line in lines} == gone


def test_command_where_nothing_is_left(path: Path) -> None:
    for file in path.glob("manifests/*.json"):
        invert(file, 20)
    result = run("repair", "--store", str(path))
    assert (result.exit_code, result.stdout) == (8, "")
    assert "no manifest is whole" in result.stderr
