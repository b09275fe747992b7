"""`verify` on stores that contradict themselves: what is wrong has the right checksums, as a faulty writer would leave it."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from damage import files_by_role, invert
from mending import contexts_of, records, replaced, resign, rewritten, sealed, set_byte
from verified import assert_clean, make, problems_of

from knnstore.format import HEADER_SIZE, Kind, parse_header
from knnstore.storage.manifest import Manifest, SegmentContent


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("template") / "s.knn", 60, 40, keep_keys="f32")


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "s.knn"))


def test_resigning_alone_is_clean(path: Path) -> None:
    """The tests below find what they changed, not how."""
    resign(path)
    assert_clean(path)


def change_labels(path: Path, change: Callable[[np.ndarray], None]) -> None:
    """Changes the labels of the only list of a store of raw keys."""
    roles = files_by_role(path)
    directory = bytearray(roles["lists.dir"].read_bytes())
    table = np.frombuffer(directory, "<u8", offset=HEADER_SIZE).reshape(-1, 3)
    raw = bytearray(roles["lists.bin"].read_bytes())
    n, begin = int(table[0, 0]), int(table[0, 1])
    capacity = -(-n // 32) * 32
    labels = np.frombuffer(raw, "<i8", n, begin + capacity * 24)
    before = labels.copy()
    change(labels)
    assert (labels != before).any()
    table[0, 2] = xxhash.xxh3_64_intdigest(memoryview(raw)[begin : begin + capacity * 32])
    roles["lists.bin"].write_bytes(raw)
    roles["lists.dir"].write_bytes(sealed(bytes(directory)))
    resign(path)


def swap_rows(labels: np.ndarray) -> None:
    labels[[3, 4]] = labels[[4, 3]]


def repeat_row(labels: np.ndarray) -> None:
    labels[3] = labels[4]


def beyond_rows(labels: np.ndarray) -> None:
    labels[3] += 1_000 << 24


def negative(labels: np.ndarray) -> None:
    labels[3] = -1


def other_token(labels: np.ndarray) -> None:
    labels[3] ^= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap_rows, "not in row order"),
        (repeat_row, "1 of 100 rows are in no list"),
        (beyond_rows, "1 labels name no row"),
        (negative, "1 labels name no row"),
        (other_token, "1 labels carry another token"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_labels(path: Path, change: Callable[[np.ndarray], None], said: str) -> None:
    """Labels are a permutation of the rows, and carry the tokens of values.bin."""
    change_labels(path, change)
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "lists.bin")
    assert said in problem.detail
    assert not problems_of(path, "quick")  # it does not read them


def change_directory(path: Path, change: Callable[[np.ndarray], None]) -> None:
    file = files_by_role(path)["lists.dir"]
    raw = bytearray(file.read_bytes())
    change(np.frombuffer(raw, "<u8", offset=HEADER_SIZE).reshape(-1, 3))
    file.write_bytes(sealed(bytes(raw)))
    resign(path)


@pytest.mark.parametrize(
    ("cell", "number", "said"),
    [
        (0, 99, "have 99 entries"),
        (0, 1 << 63, "more than 100 entries"),
        (1, 0, "overlap"),
        (1, 65, "overlap"),
        (1, 1 << 20, "begins after"),
        (1, 1 << 63, "begins after"),
        (1, 128, "reach beyond"),
    ],
)
def test_directory(path: Path, cell: int, number: int, said: str) -> None:
    """Sizes of lists add up, and lists lie beside each other in the file."""

    def change(table: np.ndarray) -> None:
        table[0, cell] = number

    change_directory(path, change)
    for level in ("quick", "full"):
        (problem,) = problems_of(path, level)
        assert (problem.kind, Path(problem.path).name) == ("content", "lists.dir")
        assert said in problem.detail


def test_checksum_of_a_list(path: Path) -> None:
    """A checksum in the directory that is not that of the list, though both files are as recorded."""

    def change(table: np.ndarray) -> None:
        table[0, 2] ^= 1

    change_directory(path, change)
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "lists.bin")
    assert "list 0" in problem.detail


def test_lists_that_overlap(tmp_path: Path) -> None:
    """Two lists of the same bytes."""
    path = make(tmp_path / "s.knn", 33_000, text=False)
    sizes: dict[int, list[int]] = {}

    def change(table: np.ndarray) -> None:
        for number, size in enumerate(table[:, 0].tolist()):
            sizes.setdefault(size, []).append(number)
        first, second = next(numbers for numbers in sizes.values() if len(numbers) > 1)[:2]
        table[first] = table[second]

    change_directory(path, change)
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "lists.dir")


def test_tokens_are_in_the_vocabulary(path: Path) -> None:
    resign(path, lambda manifest: dataclasses.replace(manifest, checkpoint=dataclasses.replace(manifest.checkpoint, vocab_size=500)))
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "values.bin")
    assert "below the vocabulary's 500" in problem.detail


def test_block_checksums(path: Path) -> None:
    """Kept keys whose own checksums are wrong, in a file that is as recorded."""
    file = files_by_role(path)["keys.bin"]
    invert(file, HEADER_SIZE + 40)
    resign(path)
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "keys.bin")
    assert "block 0 of 64 KiB" in problem.detail


@pytest.mark.parametrize(
    ("database", "change", "said"),
    [
        ("text", set_byte(-1, ord("~")), "hash in its record"),
        ("text", set_byte(-1, 0xFF), "not UTF-8"),
        ("text", set_byte(20, 3), "do not rise"),  # the first gap: zigzag of -2
        ("text", set_byte(8, 1), "does not follow"),  # index of its first character
        ("text", set_byte(0, 59), "do not add up"),  # number of tokens
        ("text", set_byte(16, 9), "unknown width"),
        ("documents", replaced(b'"entries":60', b'"entries":61'), "does not end where the next begins"),
        ("documents", replaced(b'"prefix":[]', b'"prefix":[1000]'), "beyond the vocabulary"),
        ("documents", replaced(b'"last":true', b'"last":"no"'), "where"),
        ("documents", set_byte(0, ord("[")), "JSON"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_documents_and_text(path: Path, database: str, change: Callable[[bytearray], None], said: str) -> None:
    """Records and frames that decompress and are not what belongs there."""
    key, packed = records(files_by_role(path)["contexts.lmdb"], database)[0]
    with contexts_of(path) as (transaction, databases):
        transaction.put(key, rewritten(packed, change), db=databases[database])
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "contexts.lmdb")
    assert said in problem.detail


@pytest.mark.parametrize(("database", "at", "said"), [("text", 0, "text"), ("text", -1, "covers rows"), ("documents", 0, "document")])
def test_records_that_are_gone(tmp_path: Path, database: str, at: int, said: str) -> None:
    """A frame or a document that is not there."""
    path = make(tmp_path / "s.knn", 3_000)
    (key, _) = records(files_by_role(path)["contexts.lmdb"], database)[at]
    with contexts_of(path) as (transaction, databases):
        transaction.delete(key, db=databases[database])
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "contexts.lmdb")
    assert said in problem.detail


def test_ids_that_lead_elsewhere(path: Path) -> None:
    """A document of another id than the one it is found by; a table whose own checksums are right."""
    before = files_by_role(path)["contexts.lmdb"].read_bytes()
    key, packed = records(files_by_role(path)["contexts.lmdb"], "documents")[0]
    with contexts_of(path) as (transaction, databases):
        content = rewritten(packed, replaced(b'"id":"document 0"', b'"id":"document 9"'))
        transaction.put(key, content, db=databases["documents"])
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "ids.bin")
    files_by_role(path)["contexts.lmdb"].write_bytes(before)
    file = files_by_role(path)["ids.bin"]
    raw = bytearray(file.read_bytes())
    table = np.frombuffer(raw, "<u8", count=2 * 2, offset=HEADER_SIZE).reshape(2, 2)
    table[:] = table[::-1].copy()  # not sorted: a binary search misses what is there
    body = raw[HEADER_SIZE : HEADER_SIZE + table.nbytes]
    checks = xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
    header = parse_header(bytes(raw[:HEADER_SIZE]), "ids.bin", kind=Kind.IDS, owner=bytes.fromhex(file.parent.name))
    header = dataclasses.replace(header, check=xxhash.xxh3_64_intdigest(checks))
    file.write_bytes(header.pack() + bytes(raw[HEADER_SIZE:-8]) + checks)
    resign(path)
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "ids.bin")
    assert "documents in contexts.lmdb" in problem.detail


def test_a_frame_that_is_no_frame(path: Path) -> None:
    """What does not decompress, and what would take too much memory, is a problem and no more."""
    (key, packed) = records(files_by_role(path)["contexts.lmdb"], "text")[0]
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(1 << 26))
    for content in (packed[:-1], b"", b"\0" * 40, bomb, zstandard.compress(b"short")):
        with contexts_of(path) as (transaction, databases):
            transaction.put(key, content, db=databases["text"])
        (problem,) = problems_of(path)
        assert (problem.kind, Path(problem.path).name) == ("content", "contexts.lmdb")


def test_text_that_goes_over_segments(tmp_path: Path) -> None:
    """The hash of a document in three segments is that of all its text."""
    path = make(tmp_path / "s.knn", 250, segment_entries=100)
    files = path.glob("segments/*/contexts.lmdb")
    middle = next(file for file in files if b'"part":1' in zstandard.decompress(records(file, "documents")[0][1]))
    (key, packed) = records(middle, "text")[0]
    with contexts_of(path, middle) as (transaction, databases):
        transaction.put(key, rewritten(packed, set_byte(-1, ord("~"))), db=databases["text"])
    (problem,) = problems_of(path)
    assert "hash in its record" in problem.detail


def with_content(**changes: Any) -> Callable[[Manifest], Manifest]:
    """A manifest that says something else of its segment."""

    def change(manifest: Manifest) -> Manifest:
        (segment,) = manifest.segments
        content: SegmentContent = dataclasses.replace(segment.content, **changes)
        return dataclasses.replace(manifest, segments=(dataclasses.replace(segment, content=content),))

    return change


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (with_content(documents=3), {"segment.json", "contexts.lmdb", "ids.bin"}),
        (with_content(text=False), {"segment.json", "contexts.lmdb"}),
        (with_content(distortion=0.5), {"segment.json"}),
        (with_content(values="u32"), {"segment.json", "values.bin"}),
        (with_content(keys="f16"), {"segment.json", "keys.bin"}),
        (with_content(files=()), {"segment.json", "lists.bin", "lists.dir", "values.bin", "keys.bin", "contexts.lmdb", "ids.bin"}),
        (lambda manifest: dataclasses.replace(manifest, documents={"a": 2, "b": 1}), {"1.json"}),
        (lambda manifest: dataclasses.replace(manifest, documents={"a": 1}), {"1.json"}),
        (lambda manifest: dataclasses.replace(manifest, key=dataclasses.replace(manifest.key, dim=7)), None),
    ],
    ids=["documents", "text", "distortion", "values", "keys", "files", "counts", "domains", "dim"],
)
def test_manifest_and_files_agree(path: Path, change: Callable[[Manifest], Manifest], names: set[str] | None) -> None:
    """What the manifest says of a segment is what the segment's files say."""
    resign(path, change)
    problems = problems_of(path)
    assert problems
    assert {problem.kind for problem in problems} <= {"content", "header"}
    if names is not None:
        assert {Path(problem.path).name for problem in problems} == names


def test_domains_begin_with_documents(path: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        (segment,) = manifest.segments
        runs = (("a", 0, 50), ("b", 50, 100))
        return dataclasses.replace(manifest, segments=(dataclasses.replace(segment, runs=runs),))

    resign(path, change)
    (problem,) = problems_of(path)
    assert "within a document" in problem.detail


def test_dead_documents_are_not_counted(path: Path) -> None:
    """Rows that no longer count stay in the files, and their documents are none."""

    def change(manifest: Manifest) -> Manifest:
        (segment,) = manifest.segments
        return dataclasses.replace(manifest, segments=(dataclasses.replace(segment, dead=((0, 60),)),), documents={"b": 1})

    resign(path, change)
    assert_clean(path)
