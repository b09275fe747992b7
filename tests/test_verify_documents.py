"""`verify` on what snapshots say of their documents: each there once and whole, dead or alive as a whole, and counted."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from damage import files_by_role
from hypothesis import given
from hypothesis import strategies as st
from mending import contexts_of, records, replaced, resign, rewritten, sealed, set_byte
from stores import create_store, draw_keys, draw_values
from test_verify_snapshots import commit_from, commit_same
from verified import assert_clean, make, problems_of

import knnstore
from knnstore import EntryDocument
from knnstore.format import HEADER_SIZE, TOKEN_BITS, Kind, parse_header
from knnstore.storage.contexts import id_hash
from knnstore.storage.manifest import Manifest
from knnstore.verification.datastore import Problem
from knnstore.verification.documents import LiveRecords, misfits


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of one segment, one whose first document is in three, and one of lists of 4-bit codes."""
    folder = tmp_path_factory.mktemp("templates")
    return {
        "one": make(folder / "one.knn", 60, 40),
        "parts": make(folder / "parts.knn", 250, 40, 30, segment_entries=100),
        "lists": make(folder / "lists.knn", 33_000, text=False),
    }


@pytest.fixture
def copy(templates: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(templates[name], tmp_path / f"{name}.knn"))


def the_problem(path: Path, name: str) -> Problem:
    """The one problem there is, of a file of this name."""
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", name)
    return problem


def with_dead(dead: Sequence[Sequence[tuple[int, int]]], documents: dict[str, int]) -> Callable[[Manifest], Manifest]:
    """A manifest in which rows of each segment are dead."""

    def change(manifest: Manifest) -> Manifest:
        segments = [dataclasses.replace(segment, dead=tuple(some)) for segment, some in zip(manifest.segments, dead, strict=True)]
        return dataclasses.replace(manifest, segments=tuple(segments), documents=documents)

    return change


@pytest.mark.parametrize("dead", [[(0, 59)], [(1, 60)], [(10, 20)], [(60, 61)], [(0, 60), (99, 100)]])
def test_documents_are_dead_as_a_whole(copy: Callable[[str], Path], dead: list[tuple[int, int]]) -> None:
    """Dead rows begin and end with documents."""
    path = copy("one")
    resign(path, with_dead([dead], {"a": 1, "b": 1}))
    assert "dead rows begin or end within a document" in the_problem(path, "1.json").detail


def test_parts_die_together(copy: Callable[[str], Path]) -> None:
    """A document in three segments of which one part is dead is not whole; with all three dead it is gone."""
    path = copy("parts")
    sizes = [segment.content.entries for segment in knnstore.open(path).segments]
    assert sizes == [100, 100, 100, 20]
    for dead, documents in (
        ([[(0, 100)], [], [], []], {"a": 2, "b": 1}),
        ([[], [(0, 100)], [], []], {"a": 2, "b": 1}),
        ([[], [], [(0, 50)], []], {"a": 1, "b": 1}),
    ):
        resign(path, with_dead(dead, documents))
        assert "document 'document 0' of domain 'a'" in the_problem(path, "1.json").detail
    resign(path, with_dead([[(0, 100)], [(0, 100)], [(0, 50)], []], {"a": 1, "b": 1}))
    assert_clean(path)


def test_a_segment_that_is_not_listed(copy: Callable[[str], Path]) -> None:
    """A manifest that leaves out the middle part of a document."""
    path = copy("parts")
    resign(path, lambda manifest: dataclasses.replace(manifest, segments=(manifest.segments[0], *manifest.segments[2:])))
    assert "it has 0, 2" in the_problem(path, "1.json").detail


def test_a_document_is_there_once(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """The same id twice in a domain, in one segment or in two; in two domains it may be."""
    for domains, clean in ((("a", "b"), True), (("a", "a"), False)):
        for segment_entries in (100, 20):
            path = tmp_path / f"{domains[1]}{segment_entries}.knn"
            documents = [EntryDocument(id=name, n_entries=20, domain=domain) for name, domain in zip("xy", domains, strict=True)]
            create_store(path, draw_keys(0, 40, 3), draw_values(0, 40), documents, segment_entries=segment_entries)
            file = next(
                file
                for file in path.glob("segments/*/contexts.lmdb")
                for _, packed in records(file, "documents")
                if b'"id":"y"' in zstandard.decompress(packed)
            )
            key, packed = next(item for item in records(file, "documents") if b'"id":"y"' in zstandard.decompress(item[1]))
            with contexts_of(path, file) as (transaction, databases):
                transaction.put(key, rewritten(packed, replaced(b'"id":"y"', b'"id":"x"')), db=databases["documents"])
            sort_ids(file.with_name("ids.bin"), "x")
            resign(path)
            if clean:
                assert_clean(path)
            else:
                assert "it has 0, 0" in the_problem(path, "1.json").detail


def sort_ids(file: Path, name: str) -> None:
    """An `ids.bin` in which every document has this id."""
    raw = bytearray(file.read_bytes())
    header = parse_header(bytes(raw[:HEADER_SIZE]), "ids.bin", kind=Kind.IDS, owner=bytes.fromhex(file.parent.name))
    table = np.frombuffer(raw, "<u8", count=2 * header.rows, offset=HEADER_SIZE).reshape(-1, 2)
    table[:, 0] = id_hash(name)
    table[:, 1].sort()
    checks = xxhash.xxh3_64_intdigest(table.tobytes()).to_bytes(8, "little")
    raw[-8:] = checks
    raw[:HEADER_SIZE] = dataclasses.replace(header, check=xxhash.xxh3_64_intdigest(checks)).pack()
    file.write_bytes(raw)


def test_every_snapshot_is_counted(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """A snapshot that is not the newest, and says of its documents what is not so; another that says the same is named too."""
    path = copy("one")
    commit_same(path, documents={"a": 5})
    commit_same(path, documents={"a": 5}, k=7)
    commit_from(path, make(tmp_path / "other.knn", 30, 20))
    problems = problems_of(path)
    assert {(problem.kind, problem.path) for problem in problems} == {("content", "manifests/2.json"), ("content", "manifests/3.json")}
    assert all("it counts documents {'a': 5}" in problem.detail for problem in problems)


def test_tokens_end_within_the_text(copy: Callable[[str], Path]) -> None:
    """A length that reaches beyond the document."""
    path = copy("one")
    key, packed = records(files_by_role(path)["contexts.lmdb"], "text")[0]
    n_tokens = 60
    with contexts_of(path) as (transaction, databases):  # the last gap goes back by what the last length is longer
        transaction.put(key, rewritten(packed, set_byte(20 + 2 * n_tokens - 1, 200)), db=databases["text"])
    assert "after its text" in the_problem(path, "contexts.lmdb").detail


@given(data=st.data())
def test_rows_ascend_in_a_list(templates: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Two entries of one list that changed places, codes and labels: the same entries, in no order that a reader relies on."""
    path = Path(shutil.copytree(templates["lists"], tmp_path_factory.mktemp("swap") / "s.knn"))
    roles = files_by_role(path)
    directory, raw = bytearray(roles["lists.dir"].read_bytes()), bytearray(roles["lists.bin"].read_bytes())
    table = np.frombuffer(directory, "<u8", offset=HEADER_SIZE).reshape(-1, 3)
    number = data.draw(st.sampled_from(np.flatnonzero(table[:, 0] >= 2).tolist()))
    n, begin = int(table[number, 0]), int(table[number, 1])
    capacity = -(-n // 32) * 32
    width = 3  # bytes of a code of 6 sub-quantizers, packed
    labels = np.frombuffer(raw, "<i8", n, begin + capacity * width)
    first = data.draw(st.integers(0, n - 2))
    second = data.draw(st.integers(first + 1, n - 1))
    labels[[first, second]] = labels[[second, first]]
    assert (np.diff(labels >> TOKEN_BITS) < 0).any()
    table[number, 2] = xxhash.xxh3_64_intdigest(memoryview(raw)[begin : begin + capacity * (width + 8)])
    roles["lists.bin"].write_bytes(raw)
    roles["lists.dir"].write_bytes(sealed(bytes(directory)))
    resign(path)
    assert "do not ascend" in the_problem(path, "lists.bin").detail
    shutil.rmtree(path)


@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 1),
            st.integers(0, 3),
            st.booleans(),
            st.sampled_from([5, 7]),
            st.sampled_from([0, 1, 5, 6, 10, 12]),
        ),
        max_size=12,
    ),
    same_key=st.booleans(),
)
def test_misfits_are_the_documents_that_are_not_whole(parts: list[tuple[str, int, int, bool, int, int]], same_key: bool) -> None:
    """As a dull grouping finds them; also where the hashes of all documents are one."""
    live = LiveRecords(
        names=("x", "y"),
        segments=np.zeros(len(parts), np.int32),
        rows=np.arange(len(parts)),
        keys=np.array([0 if same_key else ord(name) * 2 + domain for name, domain, *_ in parts], np.uint64),
        domains=np.array([item[1] for item in parts], np.int32),
        parts=np.array([item[2] for item in parts], np.int64),
        last=np.array([item[3] for item in parts], bool),
        first_tokens=np.array([item[5] for item in parts], np.int64),
        n_entries=np.array([item[4] for item in parts], np.int64),
    )
    expected = {}
    for key in {(item[0], item[1]) for item in parts}:
        some = sorted((item for item in parts if item[:2] == key), key=lambda item: item[2])
        token = some[0][5]
        whole = True
        for number, (_, _, part, last, n, first_token) in enumerate(some):
            whole = whole and part == number and last is (number == len(some) - 1) and first_token == token
            token += n
        if not whole:
            expected[key] = [place for place, item in enumerate(parts) if item[:2] == key]
    found = {(name, int(live.domains[places[0]])): places.tolist() for name, places in misfits(live, lambda _, row: parts[row][0])}
    assert found == expected
