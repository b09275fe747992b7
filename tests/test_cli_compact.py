"""`knnstore compact`: what it prints, and how it fails."""

from pathlib import Path

import pytest
from commands import fields_of, knnstore, well
from living import batches, create, draw

import knnstore as package
from knnstore.storage.catalog import StoreFolder, list_manifests


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two segments, with dead rows."""
    create(tmp_path / "s.knn", [draw("a", n=5), draw("b", n=7)])
    package.append_entries(tmp_path / "s.knn", batches([draw("c", n=4)]))
    package.delete(tmp_path / "s.knn", "a")
    return tmp_path / "s.knn"


def test_what_it_prints(path: Path) -> None:
    """Segments, entries and bytes before and after; then that nothing is to do."""
    done = well("compact", "--store", path)
    assert done.stdout.startswith(f"{path}: 2 segments, 11 entries, ")
    assert " → 1 segment, 11 entries, " in done.stdout
    assert done.stdout.endswith("snapshot 4; run `knnstore gc --keep 1` to give the space back\n")
    assert "rewriting: 11 entries" in done.stderr
    assert well("compact", "--store", path).stdout == f"{path}: nothing to compact; snapshot 4 stays\n"
    assert list_manifests(StoreFolder(path)) == [1, 2, 3, 4]


def test_json(path: Path) -> None:
    fields = fields_of("compact", "--store", path)
    assert fields["changed"] is True
    assert (fields["before"]["segments"], fields["segments"]) == (2, 1)
    assert (fields["before"]["snapshot"], fields["snapshot"]) == (3, 4)
    assert fields["before"]["bytes"]["total"] > fields["bytes"]["total"]
    assert fields_of("compact", "--store", path)["changed"] is False


def test_quiet(path: Path) -> None:
    assert well("compact", "--store", path, "--quiet").output == ""


def test_refusals(path: Path, tmp_path: Path) -> None:
    """Usage 2, no datastore 3."""
    assert knnstore("compact", "--store", tmp_path / "none.knn").exit_code == 3
    done = knnstore("compact", "--store", path, "--lossy")
    assert done.exit_code == 2
    assert "--retrain" in done.stderr
    assert list_manifests(StoreFolder(path)) == [1, 2, 3]


def test_retrain(path: Path) -> None:
    """Raw keys are kept: no model is needed, and the space is trained on all of them."""
    fields = fields_of("compact", "--store", path, "--retrain")
    assert (fields["changed"], fields["segments"], fields["entries"]) == (True, 1, 11)
