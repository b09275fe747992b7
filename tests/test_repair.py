"""`repair`: what is damaged is put aside, nothing is deleted, what is sound stays, what was lost is said; then `verify` is clean."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from broken import DOCUMENTS, Key, check_repaired, copied, in_segments, inventory, make_past, manifest_of
from damage import REPLACEMENTS, cut, grow, invert
from living import contents
from mending import write_manifest
from pasts import add, content, expected, tree
from stores import create_store, draw_keys, draw_values
from verified import make

import knnstore
from knnstore.errors import DamageError
from knnstore.storage.calibration import Calibration

FILES = ("lists.bin", "lists.dir", "values.bin", "contexts.lmdb", "ids.bin", "segment.json")
DAMAGES: dict[str, Callable[[Path], None]] = {
    "inverted": lambda path: invert(path, path.stat().st_size // 2),
    "cut": lambda path: cut(path, path.stat().st_size // 2),
    "empty": lambda path: cut(path, 0),
    "grown": lambda path: grow(path, b"\0"),
    **REPLACEMENTS,
}


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("past") / "s.knn"
    make_past(path)
    return path


@pytest.fixture
def path(past: Path, tmp_path: Path) -> Path:
    return copied(past, tmp_path / "s.knn")


def held(past: Path, without: set[Key] = frozenset(), snapshot: int | None = None) -> dict[Key, list[int]]:
    """What the past store holds, less some documents."""
    return {key: tokens for key, tokens in content(past, snapshot).items() if key not in without}


def lost(report: knnstore.RepairReport) -> set[tuple[str | None, str]]:
    return {(document.domain, document.id) for document in report.lost}


def test_a_sound_store_is_left_alone(past: Path) -> None:
    """No snapshot, no folder, no byte is written."""
    before = tree(past)
    for dry_run in (True, False):
        report = knnstore.repair(past, dry_run=dry_run)
        assert (report.problems, report.moved, report.lost, report.held, report.lossless) == ((), (), (), (), True)
        assert (report.base, report.snapshot, report.documents) == (4, 4, 10)
    assert tree(past) == before


@pytest.mark.parametrize("done", ["inverted", "cut", "removed", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_segment_leaves(past: Path, path: Path, name: str, done: str) -> None:
    """With the snapshots and tags that name it, and the other parts of documents it had a part of; the rest answers as before."""
    segments = manifest_of(past).segments
    number = (len(name) + len(done)) % len(segments)  # another one each time
    uuid = segments[number].content.uuid
    gone = in_segments(past, [uuid])
    before = inventory(path)
    DAMAGES[done](path / "segments" / uuid / name)
    damaged = inventory(path)
    report = knnstore.repair(path)
    if name == "contexts.lmdb":  # the names of those that were wholly in it cannot be read
        elsewhere = in_segments(past, [segment.content.uuid for segment in segments if segment.content.uuid != uuid])
        assert lost(report) == gone & elsewhere
        domains = [domain for domain, _ in gone - elsewhere]
        assert report.unnamed == {domain: domains.count(domain) for domain in domains}
    else:
        assert lost(report) == gone
        assert report.unnamed == {}
        assert {(item.domain, item.id): item.entries for item in report.lost} == {key: len(held(past)[key]) for key in gone}
    assert not report.lossless
    check_repaired(path, report, held(past, gone))
    assert damaged <= inventory(path)
    assert (path / "quarantine" / "5" / "segments" / uuid).is_dir()
    naming = {number for number in (1, 2, 3, 4) if uuid in [item.content.uuid for item in manifest_of(past, number).segments]}
    assert {item.path for item in report.moved if item.path.startswith("manifests/")} == {f"manifests/{number}.json" for number in naming}
    assert set(knnstore.tags(path)) == {name for name, number in (("first", 1), ("paper", 3)) if number not in naming}
    for number in {1, 2, 3} - naming:
        assert content(path, number) == content(past, number)
    assert len(before - inventory(path)) <= 1, "only the damaged file is another one"


@pytest.mark.parametrize(("status", "after"), [("fresh", "stale"), ("stale", "stale"), ("default", "default")])
def test_what_was_fitted_is_stale_without_a_segment(path: Path, status: str, after: str) -> None:
    """λ and temperature were fitted on more than is left; where nothing is lost they stay as they are."""
    calibration = Calibration(
        lmbda=0.2,
        temperature=9.0,
        k=8,
        nprobe=1,
        exact=False,
        spaces=(),
        domains=("a", "b", "c"),
        status=status,
        made_by="create",
        tokens=9,
        perplexity={},
    )
    write_manifest(path, dataclasses.replace(manifest_of(path), calibration=calibration))
    cut(path / "CURRENT", 3)
    knnstore.repair(path)
    assert manifest_of(path).calibration == calibration
    invert(path / "segments" / manifest_of(path).segments[0].content.uuid / "values.bin", 70)
    knnstore.repair(path)
    assert manifest_of(path).calibration == dataclasses.replace(calibration, status=after)


def test_documents_that_were_lost_are_appended_again(past: Path, path: Path) -> None:
    """What the report lists is all that is missing."""
    uuid = manifest_of(past).segments[1].content.uuid
    invert(path / "segments" / uuid / "values.bin", 70)
    report = knnstore.repair(path)
    versions = {**DOCUMENTS, ("c", "new"): 0, ("b", "four"): 1}
    assert report.lost
    for document in report.lost:
        add(path, document.domain, document.id, versions[document.domain, document.id])
    assert content(path) == content(past)
    assert knnstore.verify(path).ok


def test_a_dry_run_tells_what_comes(path: Path) -> None:
    """The same report, and nothing changes."""
    invert(path / "segments" / manifest_of(path).segments[0].content.uuid / "lists.bin", 100)
    invert(path / "tags" / "paper.json", 20)
    before = tree(path)
    told = knnstore.repair(path, dry_run=True)
    assert tree(path) == before
    done = knnstore.repair(path)
    assert told == dataclasses.replace(done, dry_run=True)


@pytest.mark.parametrize("done", [*DAMAGES, "other number", "lower number", "other hash"])
def test_a_damaged_current(past: Path, path: Path, done: str) -> None:
    """The newest snapshot that is whole is gone on from, whatever number CURRENT says: nothing is lost. What was there is kept."""
    current = path / "CURRENT"
    damage: dict[str, Callable[[Path], None]] = {
        **DAMAGES,
        "other number": lambda file: file.write_text("9" + file.read_text()[1:]) and None,
        "lower number": lambda file: file.write_text("2" + file.read_text()[1:]) and None,
        "other hash": lambda file: invert(file, 9, 1),
    }
    damage[done](current)
    report = knnstore.repair(path)
    assert report.base == 4
    assert (report.lost, report.unnamed) == ((), {})
    assert report.lossless is (done != "other number")  # that says of a snapshot 9, which cannot be known never to have been
    check_repaired(path, report, held(past))
    assert {item.path for item in report.moved} == ({"CURRENT"} if done not in ("removed", "other number") else set())
    assert [number for number in range(1, 12) if (path / "manifests" / f"{number}.json").exists()] == [1, 2, 3, 4, report.snapshot]
    assert dataclasses.replace(manifest_of(path), snapshot=4) == dataclasses.replace(
        manifest_of(past), parent=manifest_of(path).parent, operation=manifest_of(path).operation, time=manifest_of(path).time
    )


@pytest.mark.parametrize("done", DAMAGES)
def test_a_damaged_newest_manifest(past: Path, path: Path, done: str) -> None:
    """The one before is gone on from; what only the damaged one can have named is put aside, and its documents are named."""
    DAMAGES[done](path / "manifests" / "4.json")
    new = {item.content.uuid for item in manifest_of(past).segments} - {item.content.uuid for item in manifest_of(past, 3).segments}
    assert new
    report = knnstore.repair(path)
    assert (report.base, report.lost_snapshots, report.lossless) == (3, (4,), False)
    assert lost(report) == {(None, name) for domain, name in in_segments(past, new) if name not in {key[1] for key in content(past, 3)}}
    check_repaired(path, report, held(past, snapshot=3))
    assert {f"segments/{uuid}" for uuid in new} <= {item.path for item in report.moved}
    assert set(knnstore.tags(path)) == {"first", "paper"}


def test_new_documents_of_a_damaged_manifest_are_named(past: Path, path: Path) -> None:
    """A document that came with the snapshot whose manifest is lost; in which domain is not known."""
    add(path, "c", "newest")
    (path / "manifests" / "5.json").unlink()
    report = knnstore.repair(path)
    assert lost(report) == {(None, "newest")}
    assert report.lost[0].entries == len(expected({("c", "newest"): 0})["c", "newest"])
    check_repaired(path, report, held(past))


@pytest.mark.parametrize("done", DAMAGES)
def test_a_damaged_older_manifest(past: Path, path: Path, done: str) -> None:
    """It is put aside with its tag and with what only it named; the newest snapshot stays, and nothing is lost."""
    DAMAGES[done](path / "manifests" / "1.json")
    report = knnstore.repair(path)
    assert (report.base, report.snapshot, report.lossless) == (4, 4, True)
    gone = {"tags/first.json", "manifests/1.json"} - ({"manifests/1.json"} if done == "removed" else set())
    assert gone <= {item.path for item in report.moved}
    check_repaired(path, report, held(past))
    for number in (2, 3):
        assert content(path, number) == content(past, number)


@pytest.mark.parametrize("done", [*DAMAGES, "of another store"])
def test_a_damaged_identity(past: Path, path: Path, tmp_path: Path, done: str) -> None:
    """KNNSTORE is written again from what the manifests say; no snapshot is made."""
    if done == "of another store":
        make(tmp_path / "other.knn", 5)
        shutil.copyfile(tmp_path / "other.knn" / "KNNSTORE", path / "KNNSTORE")
    else:
        DAMAGES[done](path / "KNNSTORE")
    report = knnstore.repair(path)
    assert (report.base, report.snapshot, report.lossless) == (4, 4, True)
    assert (path / "KNNSTORE").read_bytes() == (past / "KNNSTORE").read_bytes()
    assert {item.path for item in report.moved} == ({"KNNSTORE"} if done != "removed" else set())
    check_repaired(path, report, held(past))


@pytest.mark.parametrize("done", [done for done in DAMAGES if done != "removed"])
def test_a_damaged_tag(past: Path, path: Path, done: str) -> None:
    """The tag goes, and its snapshot stays."""
    DAMAGES[done](path / "tags" / "paper.json")
    report = knnstore.repair(path)
    assert (report.snapshot, report.lossless, [item.path for item in report.moved]) == (4, True, ["tags/paper.json"])
    check_repaired(path, report, held(past))
    assert set(knnstore.tags(path)) == {"first"}
    assert content(path, 3) == content(past, 3)


@pytest.mark.parametrize("done", ["folder", "FIFO", "link", "broken link"])
def test_a_damaged_lock(past: Path, path: Path, done: str) -> None:
    """LOCK becomes a file again."""
    REPLACEMENTS[done](path / "LOCK")
    report = knnstore.repair(path)
    check_repaired(path, report, held(past))
    assert (path / "LOCK").is_file()
    assert not (path / "LOCK").is_symlink()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in two spaces, each with lists of its own."""
    folder = tmp_path_factory.mktemp("merged")
    for seed, name in enumerate(("first", "second")):
        training = draw_keys(seed + 10, 5_000, 10)
        documents = [knnstore.EntryDocument(id=f"{name} {i}", n_entries=250, domain=name) for i in range(2)]
        create_store(
            folder / f"{name}.knn",
            draw_keys(seed, 500, 10),
            draw_values(seed, 500),
            documents,
            training_keys=training,
            expected_entries=40_000,
            seed=seed,
        )
    knnstore.merge([folder / "first.knn", folder / "second.knn"], folder / "both.knn").close()
    return folder / "both.knn"


@pytest.mark.parametrize("name", ["spaces/space.json", "spaces/rotation.bin", "spaces/centroids.bin", "coarse/centroids.bin"])
def test_a_damaged_quantizer(merged: Path, tmp_path: Path, name: str) -> None:
    """All segments that need a damaged space or coarse quantizer leave with it."""
    path = copied(merged, tmp_path / "s.knn")
    kind, file = name.split("/")
    manifest = manifest_of(path)
    record = (manifest.spaces if kind == "spaces" else manifest.coarse)[0]
    invert(path / kind / record.id / file, -3)
    needing = {item.content.uuid for item in manifest.segments if record.id in (item.content.space, item.content.coarse)}
    gone = in_segments(merged, needing)
    report = knnstore.repair(path)
    assert lost(report) == gone
    assert len(gone) == 2
    assert knnstore.verify(path).ok
    after = manifest_of(path)
    assert record not in (*after.spaces, *after.coarse)
    assert len(after.spaces) == len(after.coarse) == len(after.segments) == 1
    with knnstore.open(path) as opened, knnstore.open(merged) as before:
        assert contents(opened) == {key: tokens for key, tokens in contents(before).items() if key not in gone}


def test_nothing_is_left(past: Path, tmp_path: Path) -> None:
    """Where no segment of any snapshot is whole, or no manifest, it is said and nothing is changed."""
    for pattern, said in (
        ("manifests/*.json", "no manifest is whole"),
        ("segments/*/values.bin", "no document"),
        ("spaces/*/space.json", "no document"),
    ):
        path = copied(past, tmp_path / said.replace(" ", "") / pattern[:4])
        for file in path.glob(pattern):
            invert(file, 20)
        before = tree(path)
        for dry_run in (True, False):
            with pytest.raises(DamageError, match=said):
                knnstore.repair(path, dry_run=dry_run)
        assert tree(path) == before


def test_an_older_snapshot_is_gone_on_from(past: Path, path: Path) -> None:
    """Where nothing of the newest is left, but something of one before it."""
    knnstore.delete(path, ["new"], domain="c")
    for domain, name in list(content(path)):
        knnstore.delete(path, [name], domain=domain)
    add(path, "d", "alone")
    newest = {item.content.uuid for item in manifest_of(path).segments}
    for uuid in newest:
        invert(path / "segments" / uuid / "values.bin", 70)
    whole = max(
        number
        for number in range(1, 20)
        if (path / "manifests" / f"{number}.json").exists()
        and not newest & {item.content.uuid for item in manifest_of(path, number).segments}
    )
    left = content(path, whole)
    report = knnstore.repair(path)
    assert report.base == whole
    assert lost(report) == {("d", "alone")}
    check_repaired(path, report, left)


def test_what_a_snapshot_says_wrong_of_its_documents(past: Path, path: Path) -> None:
    """Documents are counted anew; one that is dead in part, or there without one of its parts, dies."""
    manifest = manifest_of(path)
    write_manifest(path, dataclasses.replace(manifest, documents={"a": 99}))
    report = knnstore.repair(path)
    assert (report.lost, report.unnamed, report.lost_snapshots) == ((), {}, ())
    check_repaired(path, report, held(past))
    manifest = manifest_of(path)
    two = next(item for item in manifest.segments if item.content.entries > 12)
    write_manifest(
        path,
        dataclasses.replace(
            manifest,
            segments=tuple(
                item if item is not two else dataclasses.replace(two, dead=(*two.dead, (two.content.entries - 1, two.content.entries)))
                for item in manifest.segments
            ),
        ),
    )
    gone = {key for key in in_segments(past, [two.content.uuid]) if key == last_of(past, two.content.uuid)}
    report = knnstore.repair(path)
    assert lost(report) == gone
    check_repaired(path, report, held(past, gone))


def last_of(path: Path, uuid: str) -> Key:
    """The document that has the last row of a segment."""
    with knnstore.open(path) as store:
        segment = next(item for item in store.segments if item.content.uuid == uuid)
        record = list(segment.contexts.documents())[-1]
        return next(name for name, _, stop in segment.record.runs if record.first_row < stop), record.id


def test_a_document_that_is_there_twice(past: Path, path: Path) -> None:
    """The one that was added last stays."""
    manifest = manifest_of(path)
    before = manifest_of(path, 3)
    of_old = {item.content.uuid: item for item in before.segments}
    # As if the replacement of snapshot 4 had forgotten to take the old content out.
    segments = tuple(of_old.get(item.content.uuid, item) for item in manifest.segments)
    missing = tuple(item for item in before.segments if item.content.uuid not in {item.content.uuid for item in segments})
    twice = dataclasses.replace(manifest, segments=(*missing, *segments))
    assert len(in_segments(path, [item.content.uuid for item in missing], 3)) > 1
    write_manifest(path, twice)
    assert not knnstore.verify(path).ok
    report = knnstore.repair(path)
    assert report.lossless
    check_repaired(path, report, held(past))
