"""merge: all documents of several stores in one, each once; files copied or linked, nothing decoded."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from effort import examples
from held import append, assert_holds, listing, newest, watched
from hypothesis import assume, given
from hypothesis import strategies as st
from living import Drawn, by_key, create, draw

import knnstore
from knnstore.errors import (
    ExistsError,
    InvalidArgumentError,
)


def renamed(drawn: Sequence[Drawn], name: str) -> list[Drawn]:
    """As a merge calls their domain."""
    return [replace(item, domain=name) if item.domain == "default" else item for item in drawn]


def merge(sources: Sequence[Path], into: Path, **arguments) -> None:
    knnstore.merge(sources, into, **arguments).close()


# Which documents


@st.composite
def stores(draw_):
    """Two to five stores: what each was made with, and what was deleted from it or changed in it later."""
    keys = st.tuples(st.sampled_from(["default", "law"]), st.sampled_from("abcd"))
    version = st.integers(0, 1)
    made = st.dictionaries(keys, version, min_size=1, max_size=4)
    return draw_(st.lists(st.tuples(made, st.dictionaries(keys, st.none() | version, max_size=2)), min_size=2, max_size=5))


@given(
    drawn=stores(), names=st.lists(st.sampled_from([None, "x", "law", "default"]), min_size=5, max_size=5),
    into=st.booleans(), on_conflict=st.sampled_from([None, "keep-first", "keep-last"]), link=st.booleans(),
)  # fmt: skip
@examples(50)
def test_a_merged_store_has_the_documents_of_all(tmp_path_factory, drawn, names, into, on_conflict, link):
    """Domains kept or renamed, the same content once, different contents refused or chosen; into a new store or the first one."""
    folder = tmp_path_factory.mktemp("merge")
    sources, held = [], []
    for number, (made, later) in enumerate(drawn):
        path = folder / f"s{number}.knn"
        oracle = by_key(draw(name, version, domain=domain, n=3 + version) for (domain, name), version in made.items())
        create(path, oracle.values(), segment_entries=7)
        for key, version in later.items():
            if version is not None:
                item = draw(key[1], version, domain=key[0], n=3 + version)
                append(path, item)
                oracle[key] = item
            elif key in oracle:
                knnstore.delete(path, key[1], domain=key[0])
                del oracle[key]
        sources.append(path)
        held.append(list(oracle.values()))
    target = sources[0] if into else folder / "all.knn"
    others = sources[1:] if into else sources
    domains = {}
    for number, path in enumerate(sources):
        if path in others and names[number] is not None and any(item.domain == "default" for item in held[number]):
            domains[str(path)] = names[number]
        held[number] = held[number] if path not in others else renamed(held[number], domains.get(str(path), f"s{number}"))
    for some in held if on_conflict else ():  # which of two documents of one store comes first, where renaming makes them one, is not said
        contents = [(item.key, item.held()) for item in some]
        assume(all(dict(contents)[key] == content for key, content in contents))
    expected, conflicts = {}, set()
    for item in (item for some in held for item in some):
        if item.key in expected and expected[item.key].held() != item.held():
            conflicts.add(item.key)
            if on_conflict == "keep-first":
                continue
        expected[item.key] = item
    before = newest(target) if into else None
    if conflicts and on_conflict is None:
        with pytest.raises(ExistsError, match=f"^{len(conflicts)} documents have different contents: "):
            merge(others, target, domains=domains)
        assert (newest(target) if into else target.exists()) == (before if into else False)
        return
    merge(others, target, domains=domains, on_conflict=on_conflict, link=link)
    if before is not None:
        changed = {key: item.held() for key, item in expected.items()} != {item.key: item.held() for item in held[0]}
        assert newest(target).snapshot - before.snapshot == changed
    assert_holds(target, expected)


def test_conflicts_are_listed_with_both_stores(tmp_path):
    """And how to choose; the first twenty by name."""
    for name, version in (("a", 0), ("b", 1)):
        create(tmp_path / f"{name}.knn", [draw(f"d{number}", version, domain="law", n=2) for number in range(23)])
    with pytest.raises(ExistsError) as caught:
        merge([tmp_path / "a.knn", tmp_path / "b.knn"], tmp_path / "all.knn")
    message = str(caught.value)
    both = f"of domain 'law' in {tmp_path / 'a.knn'} and {tmp_path / 'b.knn'}"
    assert message.startswith("23 documents have different contents: ")
    assert message.count(both) == 20
    assert message.endswith(f"{both}, and 3 more. Choose with --on-conflict keep-first or keep-last.")
    assert not (tmp_path / "all.knn").exists()


def test_a_store_and_its_own_copy_are_the_store(tmp_path):
    """They share segments: these are listed once, and what one of them deleted comes back from the other."""
    path, copy = tmp_path / "a.knn", tmp_path / "copy.knn"
    drawn = [draw("a", domain="law"), draw("b", domain="law"), draw("c", domain="med")]
    create(path, drawn)
    shutil.copytree(path, copy)
    merge([path, copy], tmp_path / "same.knn")
    assert [record.content.uuid for record in newest(tmp_path / "same.knn").segments] == [r.content.uuid for r in newest(path).segments]
    assert_holds(tmp_path / "same.knn", by_key(drawn))
    merge([copy], path)
    assert newest(path).snapshot == 1  # all is there
    knnstore.delete(path, "a")
    knnstore.delete(copy, "c")
    append(copy, draw("b", 1, domain="law"))
    for number, (choice, version) in enumerate((("keep-first", 0), ("keep-last", 1))):
        merge([path, copy], tmp_path / f"{number}.knn", on_conflict=choice)
        assert_holds(tmp_path / f"{number}.knn", by_key([draw("a", domain="law"), draw("b", version, domain="law"), drawn[2]]))
    with pytest.raises(ExistsError, match=r"^1 documents have different contents: 'b' of domain 'law'"):
        merge([copy], path)
    merge([copy], path, on_conflict="keep-first")
    assert_holds(path, by_key(drawn))
    assert newest(path).segments[0].content.uuid == newest(tmp_path / "same.knn").segments[0].content.uuid


def test_a_segment_whose_dead_rows_change_keeps_its_place(tmp_path):
    path, copy = tmp_path / "a.knn", tmp_path / "copy.knn"
    drawn = [draw(name, domain="law") for name in "abc"]
    create(path, drawn[:2])
    append(path, drawn[2])
    before = newest(path).segments
    shutil.copytree(path, copy)
    knnstore.delete(path, "a")
    merge([copy], path)
    assert newest(path).segments == before
    assert_holds(path, by_key(drawn))


def test_neighbours_of_one_domain_become_one_run(tmp_path):
    create(tmp_path / "s.knn", [draw("a"), draw("b", domain="law"), draw("c", domain="med")])
    merge([tmp_path / "s.knn"], tmp_path / "all.knn", domains={str(tmp_path / "s.knn"): "law"})
    assert [record.runs for record in newest(tmp_path / "all.knn").segments] == [(("law", 0, 12), ("med", 12, 18))]


def test_shared_segments_are_of_one_domain(tmp_path):
    path, copy = tmp_path / "a.knn", tmp_path / "copy.knn"
    create(path, [draw("a")])
    shutil.copytree(path, copy)
    with pytest.raises(
        InvalidArgumentError, match=r"a\.knn and .*copy\.knn share segment [0-9a-f]{32}, under the domains a and copy\. Give"
    ):
        merge([path, copy], tmp_path / "all.knn")
    merge([path, copy], tmp_path / "all.knn", domains={str(path): "x", str(copy): "x"})
    assert_holds(tmp_path / "all.knn", {("x", "a"): replace(draw("a"), domain="x")})


# Codes


def crowd(name: str, n: int, **fields) -> Drawn:
    return draw(name, n=n, text=False, **fields)


KINDS = {
    "raw": [{"n": 300}, {"n": 200}],
    "pq4, each its own": [{"n": 4_200, "seed": 1}, {"n": 4_300, "seed": 2}],
    "pq8 and pq4 and raw": [{"n": 10_300, "codec": "pq8"}, {"n": 4_200}, {"n": 50}],
    "lists": [{"n": 33_000}, {"n": 33_000, "seed": 5}, {"n": 4_200}],
    "kept keys": [{"n": 4_200, "keep_keys": "f32"}, {"n": 50}],
}
LARGE_KINDS = ("pq8 and pq4 and raw", "lists")


@pytest.mark.parametrize(
    ("kind", "link"),
    [pytest.param(kind, link, marks=[pytest.mark.slow] * (link and kind in LARGE_KINDS)) for link in (False, True) for kind in KINDS],
)
def test_answers_are_those_over_all(tmp_path, kind, link):
    """Of independently trained spaces, of several codecs, with lists: brute force over the union. Spaces and lists come along."""
    drawn, sources = [], []
    for number, options in enumerate(KINDS[kind]):
        options = dict(options)
        drawn += [crowd(f"d{number}", options.pop("n")), draw("small", number, domain=f"m{number}")]
        create(tmp_path / f"s{number}.knn", drawn[-2:], **options)
        drawn[-2] = replace(drawn[-2], domain=f"s{number}")
        sources.append(tmp_path / f"s{number}.knn")
    merge(sources, tmp_path / "all.knn", link=link)
    made, parts = newest(tmp_path / "all.knn"), [newest(path) for path in sources]
    assert {space.id for space in made.spaces} == {space.id for part in parts for space in part.spaces}
    assert {item.id for item in made.coarse} == {item.id for part in parts for item in part.coarse}
    assert [record.content for record in made.segments] == [record.content for part in parts for record in part.segments]
    assert_holds(tmp_path / "all.knn", by_key(drawn), k=15)
    if kind == "kept keys":
        keys = np.concatenate([item.keys[:20] for item in drawn])
        with knnstore.open(tmp_path / "all.knn") as store:
            assert not store.search(keys, k=1, exact=True).distances.any()
    for path in sources:
        shutil.rmtree(path)
    assert_holds(tmp_path / "all.knn", by_key(drawn), k=15)
    append(tmp_path / "all.knn", draw("later"))
    assert_holds(tmp_path / "all.knn", by_key([*drawn, draw("later")]), k=15)


def test_linking_opens_no_file_of_a_source_for_writing(tmp_path, monkeypatch):
    """They may be another's; their content was made durable when it was written."""
    create(tmp_path / "a.knn", [draw("a")])
    with watched(monkeypatch) as opened:
        merge([tmp_path / "a.knn"], tmp_path / "linked.knn", link=True)
        assert [path for path in opened if path.suffix in (".bin", ".lmdb")] == []
        merge([tmp_path / "a.knn"], tmp_path / "copied.knn")
    assert {"lists.bin", "contexts.lmdb"} <= {path.name for path in opened}


@pytest.mark.parametrize("link", [False, True])
def test_sources_stay_as_they_were(tmp_path, link):
    """Linked files are the same file, copied ones others; purge and gc in either store do not touch the other."""
    drawn = {"a": [draw("a"), draw("a2")], "b": [draw("b")]}
    for name, some in drawn.items():
        create(tmp_path / f"{name}.knn", some)
    sources = [tmp_path / "a.knn", tmp_path / "b.knn"]
    before = [listing(path) for path in sources]
    merge(sources, tmp_path / "all.knn", link=link)
    assert [listing(path) for path in sources] == before
    uuid = newest(sources[0]).segments[0].content.uuid
    for file in (sources[0] / "segments" / uuid).iterdir():
        assert file.samefile(tmp_path / "all.knn" / "segments" / uuid / file.name) is link
    knnstore.delete(tmp_path / "all.knn", "a", purge=True)
    knnstore.gc(tmp_path / "all.knn", keep=1)
    assert [listing(path) for path in sources] == before
    knnstore.delete(sources[0], "a2", purge=True)
    knnstore.gc(sources[0], keep=1)
    assert_holds(sources[0], by_key([draw("a")]))
    assert_holds(tmp_path / "all.knn", by_key([*renamed([draw("a2")], "a"), *renamed(drawn["b"], "b")]))


def test_spaces_that_no_document_is_left_in_do_not_come(tmp_path):
    """Of two stores with the same document the second has nothing to give."""
    for name, seed in (("a", 1), ("b", 2)):
        create(tmp_path / f"{name}.knn", [crowd("d", 4_200, domain="law")], seed=seed)
    merge([tmp_path / "a.knn", tmp_path / "b.knn"], tmp_path / "all.knn")
    assert sorted(path.name for path in (tmp_path / "all.knn" / "spaces").iterdir()) == [newest(tmp_path / "a.knn").spaces[0].id]
    assert_holds(tmp_path / "all.knn", by_key([crowd("d", 4_200, domain="law")]), k=9)


def test_stores_without_documents_can_be_merged(tmp_path):
    for name in "ab":
        create(tmp_path / f"{name}.knn", [draw(name)])
        knnstore.delete(tmp_path / f"{name}.knn", name)
    merge([tmp_path / "a.knn", tmp_path / "b.knn"], tmp_path / "all.knn")
    assert_holds(tmp_path / "all.knn", {})
    append(tmp_path / "a.knn", draw("new"))
    merge([tmp_path / "a.knn"], tmp_path / "all.knn", domains={str(tmp_path / "a.knn"): "x"})
    assert_holds(tmp_path / "all.knn", {("x", "new"): replace(draw("new"), domain="x")})
