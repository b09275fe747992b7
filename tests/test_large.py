"""What a store of a few million entries takes of memory beside one of a tenth of it: anonymous memory (RssAnon) of child processes."""

import sys
from pathlib import Path

import pytest

from benchmarks.growth import ACTS, run_act

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is read from /proc"),
]

DIM = 64
SMALL, LARGE = 300_000, 3_000_000  # in 1,024 and 2,048 lists
SLACK = 24 << 20  # bytes: what allocators keep, and 1,024 more lists with centroids and directory (0.6 MB)
SORTED = 20  # bytes an entry of a segment whose lists are written: their order, and numpy's room for sorting
SAMPLED = 4 * DIM * 65_536  # bytes of keys by which a store of this size has more to train on


@pytest.fixture(scope="module")
def created(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, float]]:
    """By number of entries: a store, and the memory that making it took."""
    folder = tmp_path_factory.mktemp("large")
    made = {}
    for n in (SMALL, LARGE):
        path = folder / f"{n}.knn"
        made[n] = path, run_act(ACTS["create"], path, n, DIM)["peak_bytes"]
    return made


def test_create_holds_no_entries(created: dict[int, tuple[Path, float]]):
    """Making a store holds its training sample and the order of one segment's entries, and no keys or codes of all."""
    (_, small), (_, large) = created[SMALL], created[LARGE]
    assert large < small + SORTED * (LARGE - SMALL) + SAMPLED + SLACK


@pytest.mark.parametrize("name", ["open", "search", "append", "verify"])
def test_memory_does_not_grow_with_the_store(created: dict[int, tuple[Path, float]], name: str):
    """Opening, 1,024 queries, an append of 1,000 entries and verify take as much of a store as of one ten times larger."""
    small, large = (run_act(ACTS[name], created[n][0], n, DIM)["peak_bytes"] for n in (SMALL, LARGE))
    assert large < small + SLACK


def test_searching_is_resident_far_under_the_size_of_the_store(created: dict[int, tuple[Path, float]]):
    """A process that has opened a store and asked has less anonymous memory than a quarter of the store's bytes."""
    path, _ = created[LARGE]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert run_act(ACTS["open"], path, LARGE, DIM)["peak_bytes"] < size / 4
