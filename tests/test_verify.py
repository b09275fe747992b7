"""`verify` on stores that are sound, that contradict themselves under right checksums, that grow and shrink meanwhile, or are none."""

import dataclasses
import fcntl
import hashlib
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash
import zstandard
from damage import files_by_role, invert, text_documents
from hypothesis import given
from hypothesis import strategies as st
from stores import create_store, draw_keys, draw_values

import knnstore
from knnstore import EntryDocument
from knnstore.errors import FormatError, InvalidArgumentError, NotFoundError
from knnstore.format import HEADER_SIZE
from knnstore.storage.catalog import StoreFolder, commit, open_snapshot
from knnstore.storage.manifest import FileRecord, Manifest, SegmentContent
from knnstore.storage.manifest_json import canonical, manifest_bytes, segment_content_fields
from knnstore.verification.datastore import Problem, VerifyReport


def make(path: Path, *n_entries: int, dim: int = 6, text: bool = True, **options: Any) -> Path:
    """A store of documents of so many entries each, in domains a and b by turns."""
    documents = text_documents(n_entries, domains=("a", "b"))
    if not text:
        documents = [dataclasses.replace(document, text=None, starts=None, ends=None) for document in documents]
    total = sum(n_entries)
    vocab_size = options.get("vocab_size", 1_000)
    create_store(path, draw_keys(1, total, dim), draw_values(1, total, vocab_size), documents, **options)
    return path


def problems_of(path: Path, level: str = "full") -> list[Problem]:
    report = knnstore.verify(path, level=level)
    assert report.ok is (not report.problems)
    assert report.checked_bytes > 0
    return list(report.problems)


def assert_clean(path: Path) -> None:
    for level in ("quick", "full"):
        report = knnstore.verify(path, level=level)
        assert (report.ok, report.problems, report.orphans) == (True, (), ()), level


# Sound stores


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
    assert {field.name for field in dataclasses.fields(VerifyReport)} == {"checked_bytes", "problems", "orphans"}


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


# Contradictions: what is wrong has the right checksums, as a faulty writer would leave it


def resign(path: Path, change: Callable[[Manifest], Manifest] | None = None) -> None:
    """Gives every checksum above the segments' files its right value again: segment.json, manifest, CURRENT."""
    store = StoreFolder(path)
    manifest, pin = open_snapshot(store)
    pin.release()
    segments = []
    for segment in manifest.segments:
        folder = store.segment(segment.content.uuid)
        files = tuple(_record(folder / file.name) for file in segment.content.files)
        content = dataclasses.replace(segment.content, files=files)
        raw = canonical(segment_content_fields(content))
        (folder / "segment.json").write_bytes(raw)
        segments.append(dataclasses.replace(segment, content=content, sha256=hashlib.sha256(raw).hexdigest()))
    write_manifest(path, (change or (lambda same: same))(dataclasses.replace(manifest, segments=tuple(segments))))


def _record(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(name=path.name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(path: Path, manifest: Manifest) -> None:
    raw = manifest_bytes(manifest)
    (path / "manifests" / f"{manifest.snapshot}.json").write_bytes(raw)
    (path / "CURRENT").write_text(f"{manifest.snapshot} {hashlib.sha256(raw).hexdigest()}\n")


def sealed(raw: bytes) -> bytes:
    """An array file with the right checks in its header: of its body, then of the header."""
    head = raw[:48] + xxhash.xxh3_64_intdigest(raw[HEADER_SIZE:]).to_bytes(8, "little")
    return head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little") + raw[HEADER_SIZE:]


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


@contextmanager
def contexts_of(path: Path, file: Path | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A write transaction on a contexts.lmdb, the first segment's if none is named, and its databases."""
    file = file or files_by_role(path)["contexts.lmdb"]
    with lmdb.open(str(file), subdir=False, lock=False, max_dbs=3, map_size=1 << 26) as environment:
        databases = {name: environment.open_db(name.encode()) for name in ("documents", "ids", "text")}
        with environment.begin(write=True) as transaction:
            yield transaction, databases
    resign(path)


def _records(file: Path, database: str) -> list[tuple[bytes, bytes]]:
    """What is in a database of a contexts.lmdb, in order."""
    with (
        lmdb.open(str(file), subdir=False, lock=False, readonly=True, max_dbs=3) as environment,
        environment.begin() as transaction,
        transaction.cursor(environment.open_db(database.encode(), transaction)) as cursor,
    ):
        return [(bytes(key), bytes(value)) for key, value in cursor]


def _rewritten(packed: bytes, change: Callable[[bytearray], None]) -> bytes:
    raw = bytearray(zstandard.decompress(packed))
    change(raw)
    return zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(bytes(raw))


def replaced(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        assert raw.count(old) == 1
        raw[:] = raw.replace(old, new)

    return change


def set_byte(at: int, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        assert raw[at] != value
        raw[at] = value

    return change


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
        ("documents", replaced(b'"id":"document 0"', b'"id":"document 9"'), "index of ids"),
        ("documents", replaced(b'"prefix":[]', b'"prefix":[1000]'), "beyond the vocabulary"),
        ("documents", replaced(b'"last":true', b'"last":"no"'), "where"),
        ("documents", set_byte(0, ord("[")), "JSON"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_documents_and_text(path: Path, database: str, change: Callable[[bytearray], None], said: str) -> None:
    """Records and frames that decompress and are not what belongs there."""
    key, packed = _records(files_by_role(path)["contexts.lmdb"], database)[0]
    with contexts_of(path) as (transaction, databases):
        transaction.put(key, _rewritten(packed, change), db=databases[database])
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "contexts.lmdb")
    assert said in problem.detail


@pytest.mark.parametrize(
    ("database", "at", "said"), [("text", 0, "text"), ("text", -1, "covers rows"), ("documents", 0, "document"), ("ids", 0, "index of ids")]
)
def test_records_that_are_gone(tmp_path: Path, database: str, at: int, said: str) -> None:
    """A frame, a document or a key of the index that is not there."""
    path = make(tmp_path / "s.knn", 3_000)
    (key, _) = _records(files_by_role(path)["contexts.lmdb"], database)[at]
    with contexts_of(path) as (transaction, databases):
        transaction.delete(key, db=databases[database])
    (problem,) = problems_of(path)
    assert (problem.kind, Path(problem.path).name) == ("content", "contexts.lmdb")
    assert said in problem.detail


def test_a_frame_that_is_no_frame(path: Path) -> None:
    """What does not decompress, and what would take too much memory, is a problem and no more."""
    (key, packed) = _records(files_by_role(path)["contexts.lmdb"], "text")[0]
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
    middle = next(file for file in files if b'"part":1' in zstandard.decompress(_records(file, "documents")[0][1]))
    (key, packed) = _records(middle, "text")[0]
    with contexts_of(path, middle) as (transaction, databases):
        transaction.put(key, _rewritten(packed, set_byte(-1, ord("~"))), db=databases["text"])
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
        (with_content(documents=3), {"segment.json", "contexts.lmdb"}),
        (with_content(text=False), {"segment.json", "contexts.lmdb"}),
        (with_content(distortion=0.5), {"segment.json"}),
        (with_content(values="u32"), {"segment.json", "values.bin"}),
        (with_content(keys="f16"), {"segment.json", "keys.bin"}),
        (with_content(files=()), {"segment.json", "lists.bin", "lists.dir", "values.bin", "keys.bin", "contexts.lmdb"}),
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


# Snapshots, other processes


class Told:
    """Progress that counts, and does something when the stage begins."""

    def __init__(self, deed: Callable[[], None] = lambda: None) -> None:
        self.deed, self.n, self.total = deed, 0, 0
        self.units: set[str] = set()
        self.notes: list[str] = []

    @contextmanager
    def stage(self, _title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator["Told"]:
        self.total += total or 0
        self.units.add(unit)
        self.deed()
        yield self

    def advance(self, n: int) -> None:
        self.n += n

    def note(self, message: str) -> None:
        self.notes.append(message)


def commit_same(path: Path, **changes: Any) -> Manifest:
    """A further snapshot of the same segments."""
    store = StoreFolder(path)
    base, pin = open_snapshot(store)
    pin.release()
    return commit(store, base, lambda number, parent: dataclasses.replace(base, snapshot=number, parent=parent, **changes), staged=[])


def commit_from(path: Path, other: Path) -> Manifest:
    """A further snapshot, of the segments of another store only."""
    store = StoreFolder(path)
    base, pin = open_snapshot(store)
    pin.release()
    manifest, pin = open_snapshot(StoreFolder(other))
    pin.release()
    for folder in ("spaces", "segments"):
        shutil.copytree(other / folder, path / folder, dirs_exist_ok=True)
    return commit(
        store, base, lambda number, parent: dataclasses.replace(manifest, uuid=base.uuid, snapshot=number, parent=parent), staged=[]
    )


@pytest.fixture
def grown(path: Path, tmp_path: Path) -> Path:
    """A store of three snapshots: the first of one segment, the others of another."""
    commit_from(path, make(tmp_path / "other.knn", 30, 20))
    commit_same(path, k=7)
    return path


def test_all_kept_snapshots_are_verified(grown: Path) -> None:
    """Damage in what only an old snapshot names is found."""
    assert_clean(grown)
    store = StoreFolder(grown)
    old, pin = open_snapshot(store, 1)
    pin.release()
    file = store.segment(old.segments[0].content.uuid) / "lists.bin"
    invert(file, 100)
    assert [problem.path for problem in problems_of(grown)] == [file.relative_to(grown).as_posix()]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_manifest_is_checked(grown: Path, number: int) -> None:
    """Each by its own hash, and by what CURRENT or its child says of it."""
    file = grown / "manifests" / f"{number}.json"
    raw = file.read_bytes()
    for at in range(number, len(raw), 50):
        invert(file, at)
        for level in ("quick", "full"):
            report = knnstore.verify(grown, level=level)
            assert file.relative_to(grown).as_posix() in [problem.path for problem in report.problems], at
            assert not report.orphans, "what a damaged manifest names is not known"
        file.write_bytes(raw)


def test_a_manifest_of_another_history(grown: Path) -> None:
    """A manifest that is whole, but is not the one its child names as parent."""
    store = StoreFolder(grown)
    manifest, pin = open_snapshot(store, 2)
    pin.release()
    (grown / "manifests" / "2.json").write_bytes(manifest_bytes(dataclasses.replace(manifest, k=5)))
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("manifest", "manifests/2.json")
    assert "snapshot 3 names" in problem.detail


def test_current_that_lies(grown: Path) -> None:
    """CURRENT is to blame where it contradicts a manifest that is whole; a number that is not there is missing."""
    current = (grown / "CURRENT").read_text()
    (grown / "CURRENT").write_text(current[:-2] + ("0" if current[-2] != "0" else "1") + "\n")
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("current", "CURRENT")
    (grown / "CURRENT").write_text("9" + current[1:])
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("missing", "manifests/9.json")


def test_identity_of_another_store(grown: Path, tmp_path: Path) -> None:
    """KNNSTORE is to blame where all snapshots contradict it, a manifest where it alone does."""
    shutil.copyfile(tmp_path / "other.knn" / "KNNSTORE", grown / "KNNSTORE")
    (problem,) = problems_of(grown, "quick")
    assert (problem.kind, problem.path) == ("identity", "KNNSTORE")


def test_manifests_that_a_gc_removed(grown: Path) -> None:
    """Snapshots need not all be there, and what only they named is an orphan then, no damage."""
    (grown / "manifests" / "1.json").unlink()
    report = knnstore.verify(grown)
    assert report.ok
    assert {Path(orphan).parent.name for orphan in report.orphans} == {"segments"}
    (grown / "manifests" / "2.json").unlink()
    assert knnstore.verify(grown).ok


def test_an_attempt_that_never_counted(path: Path) -> None:
    """A manifest above CURRENT, its segment, and other things that no snapshot names are orphans, no damage."""
    (path / "manifests" / "2.json").write_bytes(b"{}")
    (path / "manifests" / "2.json.tmp").write_bytes(b"")
    (path / "segments" / ("ab" * 16)).mkdir()
    (next((path / "segments").glob("[!a]*")) / "journal").touch()
    told = Told()
    report = knnstore.verify(path, progress=told)
    assert report.ok
    assert {Path(orphan).name for orphan in report.orphans} == {"2.json", "2.json.tmp", "ab" * 16, "journal"}
    assert len(told.notes) == 1


def test_commit_while_it_reads(grown: Path) -> None:
    """A snapshot that is committed meanwhile changes nothing: verify looks at those that were there when it began."""
    told = Told(lambda: commit_same(grown, k=9))
    report = knnstore.verify(grown, progress=told)
    assert (report.ok, report.orphans) == (True, ())


def test_manifests_are_held_while_it_reads(grown: Path) -> None:
    """As a reader does, so that no gc takes files away."""
    refused = []

    def try_locks() -> None:
        for number in (1, 2, 3):
            fd = os.open(grown / "manifests" / f"{number}.json", os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(number)
            finally:
                os.close(fd)

    assert knnstore.verify(grown, progress=Told(try_locks)).ok
    assert refused == [1, 2, 3]
    refused.clear()
    try_locks()
    assert not refused, "and given free afterwards"


def test_gc_while_it_reads(grown: Path) -> None:
    """Where a snapshot goes all the same (a file system without locks), what only it named is not missed."""
    store = StoreFolder(grown)
    old, pin = open_snapshot(store, 1)
    pin.release()

    def gc() -> None:
        (grown / "manifests" / "1.json").unlink()
        shutil.rmtree(store.segment(old.segments[0].content.uuid))

    assert knnstore.verify(grown, progress=Told(gc)).ok
    new, pin = open_snapshot(store)
    pin.release()
    shutil.rmtree(store.segment(new.segments[0].content.uuid))
    assert [problem.kind for problem in problems_of(grown)] == ["missing"], "but what is named is"


def test_beside_an_open_reader(path: Path) -> None:
    """In one process too, where LMDB opens a file once only."""
    with knnstore.open(path) as opened:
        hits = opened.search(np.zeros(6), k=3)
        before = hits.context(0, 0)
        assert_clean(path)
        assert hits.context(0, 0) == before


# A later format


def test_later_format(path: Path) -> None:
    """A store of a later format cannot be verified, and is not called damaged."""
    identity, manifest = path / "KNNSTORE", path / "manifests" / "1.json"
    identity.write_text(identity.read_text().replace('"format":1', '"format":2'))
    raw = manifest.read_bytes().replace(b'"format":1', b'"format":2')
    manifest.write_bytes(raw)
    (path / "CURRENT").write_text(f"1 {hashlib.sha256(raw).hexdigest()}\n")
    with pytest.raises(FormatError):
        knnstore.verify(path)


def test_format_number_that_is_damaged(path: Path) -> None:
    """A later format in KNNSTORE alone, or in a manifest that is not what CURRENT names, is damage."""
    for name in ("KNNSTORE", "manifests/1.json"):
        file = path / name
        content = file.read_text()
        file.write_text(content.replace('"format":1', '"format":9'))
        assert name in [problem.path for problem in problems_of(path)]
        file.write_text(content)
    assert_clean(path)
