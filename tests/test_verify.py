"""`verify` on stores that are sound, and where there is none."""

import dataclasses
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import text_documents
from hypothesis import given
from hypothesis import strategies as st
from stores import create_store, draw_keys, draw_values
from verified import Told, assert_clean, make

import knnstore
from knnstore import EntryDocument
from knnstore.errors import InvalidArgumentError, NotFoundError
from knnstore.verification.datastore import VerifyReport


@pytest.mark.parametrize("text", [True, False], ids=["text", "no text"])
@pytest.mark.parametrize(
    ("n_entries", "options"),
    [
        ([1], {}),
        ([40, 1, 300], {"keep_keys": "f32"}),
        ([5_000, 20, 3_000], {"keep_keys": "f16", "segment_entries": 3_000}),
        ([40_000], {"segment_entries": 30_000}),
        ([11_000, 500], {"codec": "pq8", "keep_keys": "bf16", "segment_entries": 6_000}),
        ([400, 500], {"vocab_size": 100_000, "segment_entries": 250}),
    ],
    ids=["one entry", "raw", "pq4 flat", "pq4 lists", "pq8", "wide values"],
)
def test_a_new_store_is_clean(tmp_path: Path, n_entries: list[int], options: dict[str, Any], text: bool) -> None:
    """Every codec, one segment and several, documents in several, two domains, with and without text and kept keys."""
    assert_clean(make(tmp_path / "s.knn", *n_entries, text=text, **options))


@given(
    n_entries=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    segment_entries=st.integers(1, 40),
    text=st.booleans(),
    domains=st.lists(st.sampled_from(["a", "b", "c"]), min_size=6, max_size=6),
)
def test_any_new_store_is_clean(
    tmp_path_factory: pytest.TempPathFactory, n_entries: list[int], segment_entries: int, text: bool, domains: list[str]
) -> None:
    """However documents fall into segments and domains."""
    path = tmp_path_factory.mktemp("any") / "s.knn"
    documents = [
        dataclasses.replace(document, domain=domain, **({} if text else {"text": None, "starts": None, "ends": None}))
        for document, domain in zip(text_documents(n_entries), domains, strict=False)
    ]
    total = sum(n_entries)
    create_store(path, draw_keys(0, total, 3), draw_values(0, total), documents, segment_entries=segment_entries)
    assert_clean(path)
    shutil.rmtree(path)


def test_full_reads_every_byte_and_says_so(tmp_path: Path) -> None:
    """checked_bytes at level full is the size of all files; progress counts the files of the snapshots, in bytes."""
    path = make(tmp_path / "s.knn", 5_000, keep_keys="f16")
    told = Told()
    report = knnstore.verify(path, progress=told)
    sizes = {file: file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != "LOCK"}
    assert report.checked_bytes == sum(sizes.values())
    assert told.units == {"bytes"}
    assert told.total == sum(size for file, size in sizes.items() if file.parent.parent.parent == path and file.name != "segment.json")
    assert told.n - told.total == sum(size for file, size in sizes.items() if file.name == "segment.json")
    assert knnstore.verify(path, level="quick").checked_bytes < report.checked_bytes / 10


def test_memory_does_not_grow_with_files(tmp_path: Path) -> None:
    """64 MB of lists and keys are read in pieces of a megabyte."""
    path = make(tmp_path / "s.knn", 4_000, dim=2_048, text=False, keep_keys="f32")
    knnstore.verify(path)
    tracemalloc.start()
    try:
        assert knnstore.verify(path).ok
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_changes_nothing(tmp_path: Path) -> None:
    """No file of the store is written, and a store that cannot be written is verified."""
    path = make(tmp_path / "s.knn", 50)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*")}
    assert_clean(path)
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.rglob("*")} == before


def test_the_store_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.knn").symlink_to(make(tmp_path / "s.knn", 50))
    assert_clean(tmp_path / "link.knn")


def test_empty_folders_may_be_missing(tmp_path: Path) -> None:
    """Some ways of copying leave empty folders out."""
    path = make(tmp_path / "s.knn", 50)
    for name in ("tags", "staging", "coarse"):
        (path / name).rmdir()
    (path / "LOCK").unlink()
    assert_clean(path)


def test_front_door() -> None:
    """The module is not called as the function is: importing it first would hide the function."""
    assert callable(knnstore.verify)
    assert {field.name for field in dataclasses.fields(VerifyReport)} == {"checked_bytes", "problems", "orphans", "samples"}


# No store


def test_no_store(tmp_path: Path) -> None:
    """Nothing there, something else there, a level that is none."""
    for path in (tmp_path / "gone.knn", tmp_path, __file__):
        with pytest.raises(NotFoundError):
            knnstore.verify(path)
    with pytest.raises(InvalidArgumentError, match="deep"):
        knnstore.verify(make(tmp_path / "s.knn", 5), level="deep")


def test_unfinished_store(tmp_path: Path) -> None:
    """A store that has no snapshot yet is not found, as when it is opened."""

    def batches() -> Iterator[Any]:
        yield draw_keys(0, 5, 3), draw_values(0, 5), [EntryDocument(id="a", n_entries=5)]
        raise KeyboardInterrupt

    checkpoint = knnstore.Checkpoint(name="none", revision=None, identity="ab" * 32, tokenizer=None, architecture="None", vocab_size=9_999)
    with pytest.raises(KeyboardInterrupt):
        knnstore.create_from_entries(tmp_path / "s.knn", batches(), checkpoint=checkpoint, dim=3, vocab_size=9_999)
    for level in ("quick", "full"):
        with pytest.raises(NotFoundError):
            knnstore.verify(tmp_path / "s.knn", level=level)
