"""append_entries: what is new comes, what is there is left out, what changed is refused or replaced; the store grows into its index."""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from effort import examples
from held import append, assert_holds, listing, newest, watched
from hypothesis import given
from hypothesis import strategies as st
from living import DIM, Drawn, batches, by_key, create, draw

import knnstore
from knnstore import EntryDocument
from knnstore.errors import ExistsError, InvalidArgumentError, NotFoundError, StorageError
from knnstore.storage.files import hold_lock
from knnstore.storage.manifest_json import canonical


def big(name: str, n: int, *, scale: float = 1.0, dim: int = DIM, **fields) -> Drawn:
    """A document of many entries, without text."""
    drawn = draw(name, n=n, dim=dim, text=False, **fields)
    return replace(drawn, keys=drawn.keys * np.float32(scale))


def in_pieces(drawn: Sequence[Drawn], cuts: Sequence[int]) -> Iterator[tuple]:
    """Documents one after another in batches that are cut at any entries."""
    firsts = np.cumsum([0] + [len(item.values) for item in drawn])
    edges = sorted({0, *(cut for cut in cuts if cut < firsts[-1]), int(firsts[-1])})
    for begin, end in itertools.pairwise(edges):
        keys, values, documents = [], [], []
        for item, first in zip(drawn, firsts, strict=False):
            a, b, n = max(begin - first, 0), min(end - first, len(item.values)), len(item.values)
            if a >= b:
                continue
            fields = {}
            if item.text is not None:
                text = item.text[item.starts[a] if a else 0 : item.starts[b] if b < n else len(item.text)]
                fields = {"text": text, "starts": item.starts[a:b], "ends": item.ends[a:b]}
            documents.append(EntryDocument(id=item.id, domain=item.domain, n_entries=b - a, metadata=item.metadata, **fields))
            keys.append(item.keys[a:b])
            values.append(item.values[a:b])
        yield np.concatenate(keys), np.concatenate(values), documents


# What comes, what is left out, what is refused


@st.composite
def documents(draw_):
    """A few documents: some ids twice under different domains, some of several versions, with text or without."""
    names = draw_(st.lists(st.tuples(st.sampled_from(["default", "law"]), st.sampled_from("abc")), unique=True, max_size=4))
    return [
        draw(name, draw_(st.integers(0, 1)), domain=domain, n=draw_(st.integers(1, 9)), text=name != "c", at=name) for domain, name in names
    ]


@given(
    first=documents().filter(bool),
    more=st.lists(st.tuples(documents(), st.sets(st.integers(1, 30), max_size=4), st.booleans()), max_size=4),
    segment_entries=st.sampled_from([3, 7, 1_000]),
)
@examples(60)
def test_a_store_follows_what_is_appended(tmp_path_factory, first, more, segment_entries):
    """Documents are cut over batches and segments anywhere. The same content is left out, another is refused, or replaced if asked."""
    path = tmp_path_factory.mktemp("append") / "s.knn"
    create(path, first, segment_entries=segment_entries)
    oracle = by_key(first)
    for drawn, cuts, replaces in more:
        before = newest(path)
        fresh = [item for item in drawn if item.key not in oracle]
        changed = [item for item in drawn if item.key in oracle and item.held() != oracle[item.key].held()]
        if changed and not replaces:
            names = "|".join(repr(item.id) for item in changed)
            with pytest.raises(ExistsError, match=f"document ({names}): domain '(default|law)' has it with other content"):
                knnstore.append_entries(path, in_pieces(drawn, sorted(cuts)))
            assert newest(path) == before
        else:
            made = knnstore.append_entries(path, in_pieces(drawn, sorted(cuts)), replace=replaces)
            assert made == newest(path)
            oracle.update(by_key([*fresh, *changed]))
            if fresh or changed:
                assert made.operation.counts == {
                    "documents": len(fresh) + len(changed),
                    "entries": sum(len(item.values) for item in (*fresh, *changed)),
                    "repeated": len(drawn) - len(fresh) - len(changed),
                    "replaced": len(changed),
                }
            else:
                assert made == before
        assert_holds(path, oracle)


def test_nothing_new_makes_no_snapshot(tmp_path):
    """Documents that are all there, empty batches, no batches: the snapshot there was, and no file more or less."""
    path = tmp_path / "s.knn"
    drawn = [draw("a", n=9), draw("b", text=False)]
    made = create(path, drawn, segment_entries=4)
    before = listing(path)
    empty = [(np.zeros((0, DIM)), np.zeros(0, int), [])]
    for nothing in (batches(drawn), in_pieces(drawn, [1, 5]), empty, []):
        for replaces in (False, True):
            assert knnstore.append_entries(path, nothing, replace=replaces) == made
    assert listing(path) == before


def test_a_text_is_the_same_by_its_text_and_another_by_its_values(tmp_path):
    """With text, content is the text; without, the values. Keys do not tell: they come from the same model."""
    path = tmp_path / "s.knn"
    text, bare = draw("text"), draw("bare", text=False)
    create(path, [text, bare])
    same = [replace(item, keys=item.keys + 1) for item in (text, bare)]
    assert append(path, *same, replace=False).snapshot == 1
    for item in (replace(text, text=text.text[:-1] + "."), replace(bare, values=bare.values[::-1].copy()), replace(text, text=None)):
        with pytest.raises(ExistsError, match="has it with other content"):
            append(path, item, replace=False)
    assert_holds(path, by_key([text, bare]))


class CallersError(Exception):
    """What a test raises in the middle of an append."""


def failing(error: BaseException) -> Iterator[tuple]:
    yield from batches([draw("new", n=30)])
    raise error


ONE = [EntryDocument(id="new", n_entries=3)]
GOOD = np.zeros((3, DIM), np.float32)
FAILURES = {
    "the caller's error": (lambda: failing(CallersError()), CallersError, None),
    "Ctrl-C": (lambda: failing(KeyboardInterrupt()), KeyboardInterrupt, None),
    "no space": (lambda: failing(StorageError("no space left")), StorageError, "no space"),
    "no memory": (lambda: failing(MemoryError()), MemoryError, None),
    "dimension": (lambda: [(np.zeros((3, DIM + 1)), [1, 2, 3], ONE)], InvalidArgumentError, r"the datastore's keys are \(n, 4\)"),
    "nan": (lambda: [(GOOD * np.nan, [1, 2, 3], ONE)], InvalidArgumentError, "not finite"),
    "vocabulary": (lambda: [(GOOD, [1, 2, 1_000], ONE)], InvalidArgumentError, "token ids 1 to 1000: the vocabulary has 1000"),
    "counts": (lambda: [(GOOD, [1, 2, 3], [])], InvalidArgumentError, "the documents of a batch have 0 entries"),
    "twice": (lambda: batches([draw("x"), draw("y"), draw("x")]), InvalidArgumentError, "document 'x' of domain 'default' comes twice"),
    "changed": (lambda: batches([draw("x"), draw("a", 1), draw("y")]), ExistsError, r"document 'a': domain 'default' has it with other"),
    "changed, at the end": (lambda: batches([draw("x"), draw("a", 1)]), ExistsError, "Replace it"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_an_append_that_fails_leaves_the_store_as_it_was(tmp_path, what):
    """The error as it was raised, no snapshot, no work left behind; the next append works."""
    given_, kind, message = FAILURES[what]
    path = tmp_path / "s.knn"
    create(path, [draw("a"), draw("b")])
    before = listing(path)
    with pytest.raises(kind, match=message):
        knnstore.append_entries(path, given_())
    assert listing(path) == before
    assert not list((path / "staging").iterdir())
    append(path, draw("new"))
    assert_holds(path, by_key([draw("a"), draw("b"), draw("new")]))


def test_there_must_be_a_store(tmp_path):
    with pytest.raises(NotFoundError, match="no such datastore"):
        append(tmp_path / "none.knn", draw("a"))
    assert not (tmp_path / "none.knn").exists()


def test_what_killed_appends_left_is_removed_by_the_next(tmp_path):
    """Not what a process is still at, nor the work of other commands, which may be continued."""
    path = tmp_path / "s.knn"
    create(path, [draw("a")])
    for name, command in (("1" * 32, "append_entries"), ("2" * 32, "append_entries"), ("3" * 32, "append")):
        (path / "staging" / name / "segments").mkdir(parents=True)
        (path / "staging" / name / "job.json").write_bytes(canonical({"command": command}))
        (path / "staging" / name / "lock").touch()
    (path / "staging" / ("4" * 32)).mkdir()  # killed before it said what it was
    (path / "staging" / f"{'5' * 32}-6.tmp" / "segments").mkdir(parents=True)  # killed while it was removed
    (path / "staging" / "stray").touch()
    with hold_lock(path / "staging" / ("2" * 32) / "lock", purpose="at the same job", wait=False):
        append(path, draw("b"))
    assert sorted(job.name[0] for job in (path / "staging").iterdir()) == ["2", "3", "s"]
    append(path, draw("c"))
    assert sorted(job.name[0] for job in (path / "staging").iterdir()) == ["3", "s"]


def test_a_store_whose_empty_folders_were_lost_takes_appends(tmp_path):
    """As some ways of copying lose them."""
    path = tmp_path / "s.knn"
    create(path, [draw("a")])
    for name in ("staging", "tags", "coarse"):
        (path / name).rmdir()
    append(path, draw("b"))
    assert_holds(path, by_key([draw("a"), draw("b")]))
    for name in ("staging", "coarse"):
        shutil.rmtree(path / name, ignore_errors=True)
    append(path, big("c", 33_000))
    assert len(newest(path).coarse) == 1


# How it grows


@pytest.mark.parametrize("n", [60, *(pytest.param(n, marks=pytest.mark.slow) for n in (100, 300))])
def test_hundreds_of_appends_leave_a_handful_of_segments(tmp_path, n):
    """One document each: under 4 segments in each size of 4 times the one before, and the answers of a store made at once."""
    drawn = [draw(f"d{number}", n=10 + number % 11, domain=("default", "law")[number % 2]) for number in range(n + 1)]
    path, whole = tmp_path / "s.knn", tmp_path / "whole.knn"
    create(path, drawn[:1])
    most = 0
    for item in drawn[1:]:
        most = max(most, len(append(path, item).segments))
    knnstore.gc(path, keep=1)
    create(whole, drawn)
    n_tiers = 2 if n < 200 else 3  # under 1,024 entries, under 4,096, and beyond
    assert most <= 3 * n_tiers
    assert newest(path).snapshot == n + 1
    oracle = by_key(drawn)
    assert_holds(path, oracle, k=40)
    assert_holds(whole, oracle, k=40)


@pytest.mark.parametrize(
    ("codec", "n", "more", "keep_keys"),
    [
        *[("pq4", 1_300, 1_600, None), ("pq4", 1_300, 1_600, "f32"), ("pq8", 5_000, 5_300, "f32")],
        pytest.param("pq8", 5_000, 5_300, None, marks=pytest.mark.slow),
    ],
)
def test_a_store_that_outgrew_raw_keys_gets_codes(tmp_path, codec, n, more, keep_keys):
    """With enough entries for a quantizer one is trained on all of them, and the raw keys become codes too."""
    drawn = [big("a", n), big("b", n, domain="law"), big("c", more)]
    path = tmp_path / "s.knn"
    create(path, drawn[:1], codec=codec, keep_keys=keep_keys)
    assert [space.codec.name for space in append(path, drawn[1]).spaces] == ["RAW"]
    made = append(path, drawn[2])
    assert [space.codec.name for space in made.spaces] == [codec.upper()]
    assert {record.content.keys for record in made.segments} == {keep_keys}
    assert_holds(path, by_key(drawn), k=20)
    if keep_keys:
        with knnstore.open(path) as store:
            hits = store.search(np.concatenate([item.keys[:30] for item in drawn]), k=1, exact=True)
            assert not hits.distances.any()
            assert np.array_equal(hits.values[:, 0], np.concatenate([item.values[:30] for item in drawn]))


def test_repeated_documents_do_not_outgrow_anything(tmp_path):
    """What is left out is not counted as growth: 3,000 entries that are there already and 5 that are new."""
    path = tmp_path / "s.knn"
    drawn = [big(name, 1_000) for name in "abc"]
    create(path, drawn)
    made = append(path, *drawn, draw("new", n=5))
    assert [space.codec.name for space in made.spaces] == ["RAW"]
    assert made.operation.counts == {"documents": 1, "entries": 5, "repeated": 3, "replaced": 0}
    assert_holds(path, by_key([*drawn, draw("new", n=5)]), k=20)


def test_what_is_left_of_a_segment_says_whether_it_has_text(tmp_path):
    """The one document with text was there already."""
    path = tmp_path / "s.knn"
    drawn = [draw("a"), draw("bare", text=False)]
    create(path, drawn[:1])
    append(path, *drawn)
    assert [record.content.text for record in newest(path).segments] == [True, False]
    assert_holds(path, by_key(drawn))


def test_raw_segments_that_do_not_fit_in_one_stay_raw(tmp_path):
    path = tmp_path / "s.knn"
    drawn = [big("a", 3_000), big("b", 2_000)]
    create(path, drawn[:1], segment_entries=1_500)
    made = append(path, drawn[1])
    assert [space.codec.name for space in made.spaces] == ["RAW", "PQ4"]
    assert_holds(path, by_key(drawn), k=20)


@pytest.mark.parametrize(
    ("n", "scale", "n_spaces"), [(4_500, 30.0, 2), (4_500, 1.0, 1), (2_000, 30.0, 1)], ids=["far and many", "near", "far and few"]
)
def test_text_of_another_kind_gets_a_space_of_its_own(tmp_path, n, scale, n_spaces):
    """Where the codes there are do not serve it, and there is enough of it to train on."""
    path = tmp_path / "s.knn"
    drawn = [big("a", 4_500), big("b", n, scale=scale)]
    create(path, drawn[:1])
    made = append(path, drawn[1])
    assert len(made.spaces) == n_spaces
    assert_holds(path, by_key(drawn), k=20)
    assert len(append(path, draw("c")).spaces) == n_spaces
    assert_holds(path, by_key([*drawn, draw("c")]), k=20)


@pytest.mark.parametrize(
    ("sizes", "nlist"),
    [
        ((33_000, 33_000), [256, 512]),  # more than twice the entries that its lists were made for
        ((33_000, 32_000), [256, 256]),
        ((33_000, 4_096), [256, 256]),  # lists that are there are used for less than they would be made for
        ((33_000, 4_000), [256, 1]),
        ((20_000, 33_000), [1, 256]),
        ((10_000, 10_000, 10_000, 10_000), [256]),  # four small ones written as one, which needs lists
        ((3_000, 33_000), [256, 1]),  # raw keys become codes beside the first lists
    ],
    ids=str,
)
def test_a_store_that_outgrew_its_lists_gets_more(tmp_path, sizes, nlist):
    """New segments get lists for the whole of the store; older ones keep theirs, and all answer."""
    path = tmp_path / "s.knn"
    drawn = [big(f"d{number}", n) for number, n in enumerate(sizes)]
    create(path, drawn[:1])
    for item in drawn[1:]:
        append(path, item)
    made = newest(path)
    assert sorted(record.content.nlist for record in made.segments) == sorted(nlist)
    assert sorted(item.nlist for item in made.coarse) == sorted({n for n in nlist if n > 1})
    assert_holds(path, by_key(drawn), k=10)


@pytest.mark.parametrize(("keep_keys", "tolerance"), [("f32", 1e-6), ("f16", 2e-2)])
def test_exact_search_goes_over_all_segments(tmp_path, keep_keys, tolerance):
    """Kept keys stay kept while segments come, are joined and lose documents: brute force over all of them."""
    path = tmp_path / "s.knn"
    drawn = [big("a", 4_200), *(draw(f"d{number}", n=50 + number) for number in range(9))]
    create(path, drawn[:1], keep_keys=keep_keys)
    for item in drawn[1:]:
        append(path, item)
    changed = draw("d3", 1, n=53)
    append(path, changed, replace=True)
    oracle = [item for item in drawn if item.id != "d3"] + [changed]
    keys = np.concatenate([item.keys for item in oracle])
    values = np.concatenate([item.values for item in oracle])
    with knnstore.open(path) as store:
        assert len(store.segments) > 1
        hits = store.search(keys[::97], k=9, exact=True)
    distances = np.square(keys[::97, None].astype(np.float64) - keys).sum(axis=2)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :9]
    assert np.allclose(hits.distances, np.take_along_axis(distances, nearest, 1), atol=tolerance, rtol=tolerance)
    assert np.array_equal(hits.values[:, 0], values[nearest[:, 0]])


def test_keys_that_do_not_fit_in_memory_wait_on_the_disk(tmp_path, monkeypatch):
    """The spool is a file of the job, gone at the end."""
    monkeypatch.setattr("knnstore.intake.SPOOL_MEMORY", 64)
    path = tmp_path / "s.knn"
    with watched(monkeypatch) as opened:
        create(path, [draw("a", n=20)])
        append(path, draw("b", n=20), draw("a", n=20), draw("c", n=20))
    assert [file.name for file in opened].count("keys.spool") == 2
    assert_holds(path, by_key([draw(name, n=20) for name in "abc"]))
