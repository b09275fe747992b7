"""`compact`: fewer segments, no dead rows, lists and spaces as the entries need them; the same documents and answers."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from living import DIM, Drawn, Key, batches, by_key, check_answers, check_contents, create, draw
from stores import decoded_keys
from verified import Told, assert_clean

import knnstore
from knnstore.errors import ConflictError, InvalidArgumentError
from knnstore.format import Codec
from knnstore.storage import coarse
from knnstore.storage.catalog import StoreFolder

QUERIES = (np.random.default_rng(0).standard_normal((5, DIM)) * 3).astype(np.float32)


def append(path: Path, *drawn: Drawn) -> None:
    knnstore.append_entries(path, batches(drawn))


def compacted(path: Path, **options: Any) -> int:
    """Compacts, and looks whether it left anything behind. Returns the snapshot."""
    with knnstore.compact(path, **options) as store:
        assert list(StoreFolder(path).staging.iterdir()) == []
        return store.snapshot


def check(path: Path, oracle: dict[Key, Drawn], *, segments: int | None = None, answers: bool = True) -> None:
    """The store holds what the oracle has, answers as brute force does, and is whole."""
    with knnstore.open(path) as store:
        check_contents(store, oracle)
        if answers and oracle:
            check_answers(store, oracle, QUERIES, k=20, nprobe=1 << 20)
        if segments is not None:
            assert len(store.segments) == segments
    assert_clean(path)


def documents(prefix: str, n: int, size: int, **options: Any) -> list[Drawn]:
    return [draw(f"{prefix}{number}", n=size, domain="ab"[number % 2], **options) for number in range(n)]


@pytest.fixture
def small_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists from 500 entries on."""
    monkeypatch.setattr(coarse, "FLAT_ENTRIES", 500)


def test_small_segments_become_one(tmp_path):
    """Three segments and their dead rows become one; once more changes nothing."""
    path = tmp_path / "s.knn"
    drawn = documents("d", 6, 7)
    create(path, drawn[:2])
    append(path, *drawn[2:4])
    append(path, *drawn[4:])
    knnstore.delete(path, "d1")
    oracle = by_key(item for item in drawn if item.id != "d1")
    check(path, oracle, segments=3)
    assert compacted(path) == 5
    check(path, oracle, segments=1)
    with knnstore.open(path) as store:
        (segment,) = store.segments
        assert segment.content.entries == len(store) == 35
        assert store.manifest.operation.name == "compact"
        assert store.manifest.operation.counts == {"replaced": 3, "segments": 1, "entries": 35, "dropped": 7}
        assert not segment.find("d1")
        assert [record.id for record in segment.contexts.documents()] == ["d0", "d2", "d3", "d4", "d5"]
    assert compacted(path) == 5, "nothing is left to be done"


def test_segments_that_are_whole_stay(tmp_path):
    """Files of full segments are not touched, and what is written stands where it stood: documents and their parts keep their order."""
    path = tmp_path / "s.knn"
    drawn = [draw("long", n=250), *documents("d", 3, 20)]
    create(path, drawn, segment_entries=100)
    with knnstore.open(path) as store:
        before = [segment.content.uuid for segment in store.segments]
        assert [segment.content.entries for segment in store.segments] == [100, 100, 100, 10]
    knnstore.delete(path, "d1")
    compacted(path)
    check(path, by_key(item for item in drawn if item.id != "d1"))
    with knnstore.open(path) as store:
        after = [segment.content.uuid for segment in store.segments]
        assert after[:2] == before[:2]
        assert after[2] not in before
        assert [segment.content.entries for segment in store.segments] == [100, 100, 90]
        assert [item.id for item in store.documents()] == ["long", "d0", "d2"]


def test_order_is_kept_around_segments_that_stay(tmp_path):
    """What is written again in front of others stays in front of them."""
    path = tmp_path / "s.knn"
    drawn = [draw("a", n=60), draw("b", n=40), draw("long", n=180), draw("c", n=20)]
    create(path, drawn, segment_entries=100)
    knnstore.delete(path, "a")
    compacted(path)
    check(path, by_key(drawn[1:]))
    with knnstore.open(path) as store:
        assert [segment.content.entries for segment in store.segments] == [40, 100, 100]
        records = [record for segment in store.segments for record in segment.contexts.documents()]
        assert [(record.id, record.part) for record in records] == [("b", 0), ("long", 0), ("long", 1), ("c", 0)]


def test_kinds_are_not_mixed(tmp_path):
    """With and without text, kept keys and none, each for themselves: nothing of a segment's nature is lost."""
    plain, kept = tmp_path / "plain.knn", tmp_path / "kept.knn"
    create(plain, documents("p", 2, 9))
    append(plain, *documents("q", 2, 9, text=False))
    create(kept, documents("k", 2, 9), keep_keys="f32")
    append(kept, *documents("l", 2, 9))
    knnstore.merge([plain, kept], tmp_path / "s.knn").close()
    compacted(tmp_path / "s.knn")
    oracle = by_key([*documents("p", 2, 9), *documents("q", 2, 9, text=False), *documents("k", 2, 9), *documents("l", 2, 9)])
    check(tmp_path / "s.knn", oracle, segments=3)
    with knnstore.open(tmp_path / "s.knn") as store:
        assert {(segment.content.text, segment.content.keys) for segment in store.segments} == {(True, None), (False, None), (True, "f32")}


@pytest.mark.parametrize("codec", ["pq4", "pq8"])
def test_raw_keys_are_encoded_where_there_are_enough(tmp_path, codec):
    """Stores too small for codes, merged: together they are large enough. Then a smaller one comes into the space there is."""
    n = {"pq4": 2_100, "pq8": 5_200}[codec]
    drawn = [draw(name, n=n) for name in "ab"]
    for item in drawn:
        create(tmp_path / f"{item.id}.knn", [replace(item, domain=item.id)], codec=codec)
    path = tmp_path / "s.knn"
    knnstore.merge([tmp_path / "a.knn", tmp_path / "b.knn"], path).close()
    oracle = by_key(replace(item, domain=item.id) for item in drawn)
    with knnstore.open(path) as store:
        assert {segment.space.codec for segment in store.segments} == {Codec.RAW}
    compacted(path)
    check(path, oracle, segments=1)
    with knnstore.open(path) as store:
        (segment,) = store.segments
        assert segment.space.codec is {"pq4": Codec.PQ4, "pq8": Codec.PQ8}[codec]
        assert len(store.manifest.spaces) == 1
    create(tmp_path / "more.knn", [draw("c", n=50, domain="c")], codec=codec)
    knnstore.merge([tmp_path / "more.knn"], path).close()
    compacted(path)
    check(path, oracle | by_key([draw("c", n=50, domain="c")]), segments=1)


def test_raw_keys_stay_where_they_are_few(tmp_path):
    path = tmp_path / "s.knn"
    create(path, documents("d", 2, 30))
    append(path, *documents("e", 2, 30))
    compacted(path)
    check(path, by_key([*documents("d", 2, 30), *documents("e", 2, 30)]), segments=1)
    with knnstore.open(path) as store:
        assert store.segments[0].space.codec is Codec.RAW


@pytest.mark.usefixtures("small_lists")
def test_lists_are_renewed_where_the_store_has_outgrown_them(tmp_path, monkeypatch):
    """More lists in all large segments; codes are the same, whole segments too are listed anew, and then nothing more is due."""
    path = tmp_path / "s.knn"
    monkeypatch.setattr(coarse, "choose_nlist", lambda n: 8)
    drawn = documents("d", 12, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knnstore.build.choose_nlist", lambda n: 8)
        create(path, drawn, segment_entries=3_000)
    with knnstore.open(path) as store:
        assert [segment.content.nlist for segment in store.segments] == [8, 8]
        before = [decoded_keys(segment) for segment in store.segments]
        known = {item.id for item in store.manifest.coarse}
    compacted(path)
    check(path, by_key(drawn), segments=2)
    with knnstore.open(path) as store:
        assert [segment.content.nlist for segment in store.segments] == [128, 128]
        assert len(store.manifest.coarse) == 1
        assert known.isdisjoint(item.id for item in store.manifest.coarse)
        assert all(np.array_equal(decoded_keys(segment), keys) for segment, keys in zip(store.segments, before, strict=True))
        snapshot = store.snapshot
    assert compacted(path) == snapshot


@pytest.mark.usefixtures("small_lists")
def test_new_lists_are_made_of_living_entries(tmp_path):
    """What was deleted has no part in the centroids."""
    path = tmp_path / "s.knn"
    far = replace(draw("far", n=2_000), keys=np.full((2_000, DIM), 1e3, np.float32) + draw("far", n=2_000).keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knnstore.build.choose_nlist", lambda n: 1)
        create(path, [far, *documents("d", 6, 500)])
    knnstore.delete(path, "far")
    compacted(path)
    check(path, by_key(documents("d", 6, 500)), segments=1, answers=False)
    with knnstore.open(path) as store:
        assert store.segments[0].content.nlist == 64
        assert np.abs(store.segments[0].coarse.centroids).max() < 500


def stores_of_two_spaces(folder: Path, **options: Any) -> tuple[Path, dict[Key, Drawn]]:
    """Two stores that were trained by themselves, merged."""
    drawn = []
    for name, seed in (("x", 1), ("y", 2)):
        drawn += [draw(f"{name}{number}", n=1_100, domain=name) for number in range(4)]
        create(folder / f"{name}.knn", drawn[-4:], seed=seed, **options)
    knnstore.merge([folder / "x.knn", folder / "y.knn"], folder / "s.knn").close()
    return folder / "s.knn", by_key(drawn)


def test_retrain_from_kept_keys(tmp_path):
    """One space and one segment of two; the keys are kept as they were, the distortion is that of the new codes, the fit is stale."""
    path, oracle = stores_of_two_spaces(tmp_path, keep_keys="f32")
    compacted(path)
    check(path, oracle, segments=2)
    knnstore.delete(path, "x1")
    del oracle["x", "x1"]
    compacted(path, retrain=True)
    check(path, oracle, segments=1)
    with knnstore.open(path) as store:
        (segment,) = store.segments
        assert len(store.manifest.spaces) == 1
        keys = np.concatenate([oracle[key].keys for key in oracle])
        assert segment.content.keys == "f32"
        assert np.array_equal(segment.exact_keys(0, len(keys)), keys)
        rotated = segment.space.rotate(keys)
        error = np.square(rotated - segment.space.decode(segment.space.encode(rotated))).sum(axis=1).mean()
        assert segment.content.distortion == pytest.approx(error, rel=0.05)  # of a sample


def test_retrain_without_keys(tmp_path):
    """Refused, with the store as it was, unless codes may be decoded; then the documents stay and the distortion grows."""
    path, oracle = stores_of_two_spaces(tmp_path)
    with knnstore.open(path) as store:
        before = {segment.content.uuid: segment.content.distortion for segment in store.segments}
        snapshot = store.snapshot
    with pytest.raises(InvalidArgumentError, match=r"were not kept.*--lossy"):
        knnstore.compact(path, retrain=True)
    with pytest.raises(InvalidArgumentError, match="goes with retrain"):
        knnstore.compact(path, lossy=True)
    assert list(StoreFolder(path).staging.iterdir()) == []
    with knnstore.open(path) as store:
        assert store.snapshot == snapshot
    compacted(path, retrain=True, lossy=True)
    check(path, oracle, segments=1, answers=False)
    with knnstore.open(path) as store:
        (segment,) = store.segments
        assert segment.content.distortion > np.mean(list(before.values()))
        keys = np.concatenate([oracle[key].keys for key in oracle])
        decoded = decoded_keys(segment) @ segment.space.rotation
        error = np.square(keys - decoded).sum(axis=1).mean()
        assert error == pytest.approx(segment.content.distortion, rel=0.2)


def during(deed: Callable[[], None], title: str) -> Any:
    """Progress that does something once, when a stage begins."""
    done: list[bool] = []

    class During(Told):
        def stage(self, name: str, **fields: Any) -> Any:
            if name == title and not done:
                done.append(True)
                deed()
            return super().stage(name, **fields)

    return During()


def test_what_others_commit_meanwhile(tmp_path):
    """A document that is added or deleted while it runs is there, or gone, after; a segment that was rewritten is a conflict."""
    path = tmp_path / "s.knn"
    drawn = [*documents("d", 4, 10), *documents("e", 4, 10)]
    create(path, drawn[:4])
    append(path, *drawn[4:])
    knnstore.delete(path, "d0")

    def live() -> None:
        append(path, draw("new", n=5))
        knnstore.delete(path, ["d2", "e0"])
        knnstore.delete(path, "e3")

    compacted(path, progress=during(live, "rewriting"))
    oracle = by_key([*(item for item in drawn if item.id not in ("d0", "d2", "e0", "e3")), draw("new", n=5)])
    check(path, oracle, segments=2)
    compacted(path)
    check(path, oracle, segments=1)
    knnstore.delete(path, "e1")
    with pytest.raises(ConflictError, match="delete"):
        knnstore.compact(path, progress=during(lambda: knnstore.delete(path, "e2", purge=True), "rewriting"))
    assert list(StoreFolder(path).staging.iterdir()) == []
    del oracle["b", "e1"], oracle["a", "e2"]
    check(path, oracle)


def test_all_is_deleted_meanwhile(tmp_path):
    """A segment whose last document goes while it is written again does not come back."""
    path = tmp_path / "s.knn"
    create(path, documents("d", 4, 10))
    knnstore.delete(path, "d0")
    compacted(path, progress=during(lambda: knnstore.delete(path, ["d1", "d2", "d3"]), "rewriting"))
    check(path, {})


def test_rows_that_came_back_are_not_lost(tmp_path):
    """A restore that brings back what compaction leaves out is a conflict, not a loss."""
    path = tmp_path / "s.knn"
    create(path, documents("d", 4, 10))
    knnstore.delete(path, "d0")
    with pytest.raises(ConflictError, match="restore"):
        knnstore.compact(path, progress=during(lambda: knnstore.restore(path, 1), "rewriting"))
    check(path, by_key(documents("d", 4, 10)))


def test_an_interrupted_compaction_leaves_the_store_as_it_was(tmp_path):
    """Whatever stage it is stopped in; the next one begins anew and takes away what is left."""
    path, oracle = stores_of_two_spaces(tmp_path, keep_keys="f16")

    def stop() -> None:
        raise KeyboardInterrupt

    for title in ("training the index", "rewriting"):
        with pytest.raises(KeyboardInterrupt):
            knnstore.compact(path, retrain=True, progress=during(stop, title))
        check(path, oracle, segments=2)
    compacted(path, retrain=True)
    check(path, oracle, segments=1, answers=False)


@given(
    deeds=st.lists(st.tuples(st.sampled_from(["append", "delete", "replace", "compact"]), st.integers(0, 9)), min_size=1, max_size=10),
    segment_entries=st.sampled_from([6, 20, 1_000]),
    keep=st.sampled_from([None, "f16"]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_life(tmp_path_factory, deeds: Sequence[tuple[str, int]], segment_entries: int, keep: str | None):
    """After any appends, deletions and compactions: the documents of the oracle, and after the last no more segments than are needed."""
    path = tmp_path_factory.mktemp("life") / "s.knn"
    oracle = by_key([draw("first", n=5)])
    create(path, oracle.values(), segment_entries=segment_entries, keep_keys=keep)
    version = 0
    for deed, number in [*deeds, ("compact", 0)]:
        name, version = f"d{number}", version + 1
        key = ("default", name)
        if deed == "compact":
            compacted(path)
        elif deed == "delete" and key in oracle:
            knnstore.delete(path, name)
            del oracle[key]
        elif deed in ("append", "replace") and (deed == "replace" or key not in oracle):
            oracle[key] = draw(name, version, n=1 + 3 * number)
            knnstore.append_entries(path, batches([oracle[key]]), replace=True)
    check(path, oracle)
    with knnstore.open(path) as store:
        sizes = [segment.content.entries for segment in store.segments]
        assert not any(segment.record.dead for segment in store.segments)
        assert all(size <= segment_entries for size in sizes)
        assert all(a + b > segment_entries for a, b in pairwise(sizes))


def test_no_model_is_loaded(tmp_path):
    """Neither torch nor transformers, also for a new space from kept keys."""
    path, _ = stores_of_two_spaces(tmp_path, keep_keys="f16")
    script = (
        "import sys, knnstore\n"
        f"knnstore.compact({str(path)!r}).close(); knnstore.compact({str(path)!r}, retrain=True).close()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
