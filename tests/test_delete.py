"""delete: what is named stops answering at once; purged and collected, no byte of it is left."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from held import append, assert_holds, newest
from hypothesis import given, settings
from hypothesis import strategies as st
from living import Drawn, by_key, check_answers, check_contents, create, draw
from traces import traces

import knnstore
from knnstore.errors import InvalidArgumentError, NotFoundError


def size_of(path: Path, uuid: str) -> int:
    return sum(file.stat().st_size for file in (path / "segments" / uuid).iterdir() if file.name != "segment.json")


# What is named


METADATA = [
    {"year": 2024, "author": "Dickens"},
    {"year": "2024", "open": True},
    {"year": 2024.0, "open": 1, "tags": ["a", {"b": None}]},
    {"tags": ["a", {"b": None}], "author": None},
    {},
]
CONDITIONS = [
    {"year": 2024},
    {"year": "2024"},
    {"open": True},
    {"open": 1},
    {"tags": ["a", {"b": None}]},
    {"tags": ["a", {"b": False}]},
    {"author": None},
    {"year": 2024, "author": "Dickens"},
    {"none": None},
]
EXPECTED = [(0, 2), (1,), (1,), (2,), (2, 3), (), (3,), (0,), ()]  # places in METADATA


@st.composite
def lives(draw_):
    """Documents in two domains with metadata, and deletions one after another."""
    keys = draw_(st.lists(st.tuples(st.sampled_from(["law", "med"]), st.sampled_from("abcdef")), unique=True, min_size=2, max_size=8))
    drawn = [
        draw(name, domain=domain, n=draw_(st.integers(1, 7)), text=draw_(st.booleans()), **draw_(st.sampled_from(METADATA)))
        for domain, name in keys
    ]
    deed = st.one_of(
        st.tuples(st.just("documents"), st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3), st.sampled_from([None, "law"])),
        st.tuples(st.just("domain"), st.none(), st.sampled_from(["law", "med"])),
        st.tuples(st.just("where"), st.integers(0, len(CONDITIONS) - 1), st.sampled_from([None, "med"])),
        st.tuples(st.just("append"), st.integers(0, len(keys) - 1), st.integers(1, 2)),
    )
    return drawn, draw_(st.lists(st.tuples(deed, st.booleans(), st.booleans()), max_size=5)), draw_(st.sampled_from([2, 5, 1_000]))


@given(life=lives())
@settings(max_examples=50)
def test_what_is_named_goes_and_nothing_else(tmp_path_factory, life):
    """By ids, by domain, by metadata; with and without purge; the receipt and the next snapshot say how much."""
    drawn, deeds, segment_entries = life
    path = tmp_path_factory.mktemp("delete") / "s.knn"
    create(path, drawn, segment_entries=segment_entries)
    oracle = by_key(drawn)
    for (kind, what, where), purge, dry_run in deeds:
        if kind == "append":
            old = drawn[what]
            item = draw(old.id, where, domain=old.domain, n=3, text=old.text is not None, **old.metadata)
            append(path, item)
            oracle[item.key] = item
            continue
        arguments = {"domain": where, kind: sorted(what) if kind == "documents" else CONDITIONS[what] if kind == "where" else where}
        if kind == "documents":
            named = {key for key in oracle if key[1] in what and where in (None, key[0])}
            found = [{key for key in named if key[1] == name} for name in what]
            error = next((InvalidArgumentError for keys in found if len(keys) > 1), None) or next(
                (NotFoundError for keys in found if not keys), None
            )
        else:
            conditions = {repr(METADATA[place]) for place in EXPECTED[what]} if kind == "where" else None
            of_domain = {key for key in oracle if where in (None, key[0])}
            named = {key for key in of_domain if conditions is None or repr(oracle[key].metadata) in conditions}
            error = NotFoundError if where is not None and not of_domain else None
        before = newest(path)
        if error is not None:
            with pytest.raises((NotFoundError, InvalidArgumentError)):
                knnstore.delete(path, purge=purge, dry_run=dry_run, **arguments)
            assert newest(path) == before
            continue
        receipt = knnstore.delete(path, purge=purge, dry_run=dry_run, **arguments)
        domains = [domain for domain, _ in named]
        assert receipt.documents == {domain: domains.count(domain) for domain in domains}
        assert receipt.entries == sum(len(oracle[key].values) for key in named)
        assert (receipt.bytes > 0) is bool(named)
        if dry_run or not named:
            assert newest(path) == before
        else:
            oracle = {key: item for key, item in oracle.items() if key not in named}
            assert newest(path).operation.counts == {"documents": len(named), "entries": receipt.entries}
            assert receipt.purged is purge
        assert receipt.snapshot == newest(path).snapshot
        assert_holds(path, oracle)


def test_receipts_have_the_numbers(tmp_path):
    """Whole segments by their size, others by their share of the entries; which were dropped, which written again."""
    path = tmp_path / "s.knn"
    drawn = [draw("a", n=30), draw("b", n=10), draw("c", n=20, domain="law")]
    create(path, drawn[:2])
    append(path, drawn[2])
    (mixed, alone) = (record.content.uuid for record in newest(path).segments)
    whole, part = size_of(path, alone), round(size_of(path, mixed) * 30 / 40)
    told = knnstore.delete(path, ["a", "c"], dry_run=True)
    assert (told.documents, told.entries, told.bytes, told.snapshot) == ({"default": 1, "law": 1}, 50, whole + part, 2)
    done = knnstore.delete(path, ["c", "a", "c"])
    assert done == replace(told, snapshot=3)
    assert (done.dropped, done.rewritten, done.purged) == (1, 0, False)
    assert [(record.content.uuid, record.dead) for record in newest(path).segments] == [(mixed, ((0, 30),))]
    append(path, draw("d", n=10))
    (_, new) = (record.content.uuid for record in newest(path).segments)
    purged = knnstore.delete(path, domain="default", where=None, purge=True)
    assert (purged.documents, purged.entries, purged.dropped, purged.rewritten) == ({"default": 2}, 20, 2, 0)
    assert purged.bytes == size_of(path, mixed) + size_of(path, new)
    create(tmp_path / "t.knn", drawn)
    purged = knnstore.delete(tmp_path / "t.knn", "b", purge=True)
    assert (purged.dropped, purged.rewritten, purged.purged, purged.snapshot) == (0, 1, True, 2)
    (record,) = newest(tmp_path / "t.knn").segments
    assert (record.content.entries, record.dead) == (50, ())


def test_what_is_dead_is_not_deleted_again(tmp_path):
    path = tmp_path / "s.knn"
    create(path, [draw("a", year=1), draw("b", year=1), draw("c")])
    knnstore.delete(path, "a")
    assert knnstore.delete(path, where={"year": 1}).documents == {"default": 1}
    assert_holds(path, by_key([draw("c")]))


def test_errors_name_what_is_not_there(tmp_path):
    """And what there is; nothing changes."""
    path = tmp_path / "s.knn"
    create(path, [draw("a", domain="law"), draw("a", domain="med"), draw("b")])
    for arguments, kind, message in (
        ({"documents": "none"}, NotFoundError, "document 'none': not in this datastore. `knnstore info --documents` lists them."),
        ({"documents": ["b", "none"]}, NotFoundError, "document 'none': not in this datastore."),
        ({"documents": "b", "domain": "law"}, NotFoundError, "document 'b': not in this datastore in domain 'law'."),
        ({"domain": "tax"}, NotFoundError, "domain 'tax': not in this datastore. It has default, law, med."),
        ({"where": {"x": 1}, "domain": "tax"}, NotFoundError, "domain 'tax': not in this datastore."),
        ({"documents": "a"}, InvalidArgumentError, "document 'a': in domains law, med. Say which with domain="),
        ({}, InvalidArgumentError, "nothing to delete was named. Give documents, a domain, or where."),
        ({"documents": "b", "where": {"x": 1}}, InvalidArgumentError, "documents and where: give one of them."),
        ({"documents": [], "domain": "law"}, InvalidArgumentError, "documents: empty. Name what to delete, or leave it out"),
        ({"where": {}, "domain": "law"}, InvalidArgumentError, "where: empty."),
        ({"where": {"x": {1, 2}}}, InvalidArgumentError, "where: Object of type set is not JSON serializable. Metadata is JSON"),
    ):
        with pytest.raises(kind) as caught:
            knnstore.delete(path, **arguments)
        assert message in str(caught.value)
    with pytest.raises(NotFoundError, match="no such datastore"):
        knnstore.delete(tmp_path / "none.knn", "a")
    assert newest(path).snapshot == 1


def test_the_dead_never_answer(tmp_path):
    """In segments of codes too, among many row ranges, and with lists: k beyond what lives, exact or not."""
    rng = np.random.default_rng(0)
    drawn = [draw(f"d{number}", n=int(rng.integers(5, 15)), text=False) for number in range(500)]
    path = tmp_path / "s.knn"
    create(path, drawn, keep_keys="f32")
    gone = [item for item in drawn if rng.integers(3)]
    for first in range(0, len(gone), 100):
        knnstore.delete(path, [item.id for item in gone[first : first + 100]])
    left = by_key(item for item in drawn if item not in gone)
    assert len(newest(path).segments[0].dead) > 8
    assert_holds(path, left)
    with knnstore.open(path) as store:
        keys = np.concatenate([item.keys for item in gone[:9]])
        for exact in (False, True):
            hits = store.search(keys, k=len(store) + 9, exact=exact)
            assert (hits.n_found == len(store)).all()
        ids = {hits.context(0, place, left=0, right=0).document for place in range(len(store))}
        assert ids == {name for _, name in left}
        with pytest.raises(NotFoundError, match=gone[0].id):
            store.search(keys, k=1, exclude=gone[0].id)


def test_snapshots_before_keep_what_was_deleted(tmp_path):
    """Also where it was purged, until they are collected."""
    path = tmp_path / "s.knn"
    drawn = [draw("a"), draw("b")]
    create(path, drawn)
    knnstore.delete(path, "a", purge=True)
    with knnstore.open(path, snapshot=1) as store:
        check_contents(store, by_key(drawn))
    assert_holds(path, by_key(drawn[1:]))


# No byte is left


GONE = draw("vanishing", n=40, domain="law", author="Zaphod \u00e9", note="a \u201cquoted\u201d word")
OTHERS = [draw(f"other{number}", n=25 + number, domain=("law", "default")[number % 2], author="Ford") for number in range(6)]


def many(n: int) -> list[Drawn]:
    return [replace(draw("crowd", n=n, dim=16, text=False), domain="default")]


def by_itself(path: Path, gone: Drawn, others: Sequence[Drawn]) -> list[Drawn]:
    create(path, [*others[:3], gone, *others[3:]])
    return [*others]


def in_parts(path: Path, gone: Drawn, others: Sequence[Drawn]) -> list[Drawn]:
    create(path, [*others[:3], gone, *others[3:]], segment_entries=33)
    return [*others]


def replaced_before(path: Path, gone: Drawn, others: Sequence[Drawn]) -> list[Drawn]:
    """An older version is dead in one segment, the newest lives in another."""
    create(path, [others[0], gone])
    append(path, draw(gone.id, 1, domain="law", n=30, **gone.metadata), others[1])
    append(path, *others[2:])
    return [*others]


def deleted_before(path: Path, gone: Drawn, others: Sequence[Drawn]) -> list[Drawn]:
    """It is dead in a segment where nothing else of its domain is."""
    create(path, [*(item for item in others if item.domain != gone.domain), gone])
    knnstore.delete(path, gone.id)
    append(path, *(item for item in others if item.domain == gone.domain), replace(gone, keys=gone.keys + 1))
    return [*others]


def with_leftovers(path: Path, gone: Drawn, others: Sequence[Drawn]) -> list[Drawn]:
    """A killed append left its work, with the text in it."""
    create(path, [*others, gone], keep_keys="f32")
    create(path.parent / "aside.knn", [gone])
    job = path / "staging" / ("a" * 32)
    job.mkdir()
    (path.parent / "aside.knn" / "segments").rename(job / "segments")
    return [*others]


def of_codes(codec: str) -> Callable[[Path, Drawn, Sequence[Drawn]], list[Drawn]]:
    """With enough others for a quantizer, in a key wide enough for codes to be a document's own."""

    def make(path: Path, gone: Drawn, others: Sequence[Drawn]) -> list[Drawn]:
        rest = [*others, *many(4_200 if codec == "pq4" else 10_300)]
        create(path, [*rest[:2], gone, *rest[2:]], dim=16, codec=codec, keep_keys="f16")
        return rest

    return make


MADE = {
    "by itself": by_itself,
    "in parts": in_parts,
    "replaced before": replaced_before,
    "deleted before": deleted_before,
    "leftovers": with_leftovers,
    "pq4": of_codes("pq4"),
    "pq8": of_codes("pq8"),
}
HOW = {
    "document": {"documents": GONE.id},
    "domain": {"domain": "law"},
    "where": {"where": {"author": "Zaphod \u00e9"}},
}


@pytest.mark.parametrize("made", [pytest.param(made, marks=pytest.mark.slow) if made == "pq8" else made for made in MADE])
@pytest.mark.parametrize("how", HOW)
def test_no_byte_is_left_of_what_was_purged(tmp_path, made, how):
    """In no page, frame, label, code, key, id table or manifest; before, each of these had it. The others still answer."""
    path, wide = tmp_path / "s.knn", made.startswith("pq")
    gone, *others = [replace(item, keys=draw(item.id, n=len(item.values), dim=16).keys) if wide else item for item in (GONE, *OTHERS)]
    left = MADE[made](path, gone, others)
    before = traces(path, gone)
    kept_keys = made in ("leftovers", "pq4", "pq8")
    expected = {
        "id in contexts.lmdb", "id in documents of contexts.lmdb", "metadata in contexts.lmdb", "metadata in documents of contexts.lmdb",
        "text in contexts.lmdb", "text in text of contexts.lmdb", "hash of the id in ids.bin", "tokens in values.bin", "tokens in labels",
        *(["codes in lists"] if wide else ["keys in lists.bin"]), *(["keys in keys.bin"] if kept_keys else []),
    }  # fmt: skip
    assert before - {"id in manifests", "id in text of contexts.lmdb"} >= expected
    knnstore.delete(path, purge=True, **HOW[how])
    knnstore.gc(path, keep=1)
    assert traces(path, gone) == set()
    if how == "domain":
        left = [item for item in left if item.domain != "law"]
    assert newest(path).operation.arguments == {"domain": "law" if how == "domain" else None, "purge": True}
    with knnstore.open(path) as store:
        check_contents(store, by_key(left))
        check_answers(store, by_key(left), gone.keys[:3], k=20)
    report = knnstore.verify(path, level="full")
    assert (report.problems, report.orphans) == ((), ())


def test_without_purge_the_bytes_stay_until_compaction(tmp_path):
    """So the search for them can find something; the manifest says what was named."""
    path = tmp_path / "s.knn"
    by_itself(path, GONE, OTHERS)
    knnstore.delete(path, GONE.id)
    assert newest(path).operation.arguments == {"domain": None, "documents": [GONE.id], "where": {}, "purge": False}
    knnstore.gc(path, keep=1)
    assert {"text in text of contexts.lmdb", "tokens in values.bin", "tokens in labels", "id in manifests"} <= traces(path, GONE)
    knnstore.compact(path).close()
    knnstore.gc(path, keep=1)
    assert traces(path, GONE) == set()
    assert_holds(path, by_key(OTHERS), k=20)
