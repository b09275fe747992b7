"""Segments searched in one pass give what they give one by one."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import Document, build_segment, draw_keys, draw_values, lookup_tolerance, trained_coarse, trained_space, with_dead

from knnstore.filters import allowed_rows
from knnstore.format import ROW_BITS, SLOT_BITS, Codec
from knnstore.search import MAX_SELECTOR_RANGES, Hits, search
from knnstore.storage.segment_writer import label_base
from knnstore.storage.stack import Stack, stacks_of

DIM = 8


def build(parent: Path, codec: Codec, sizes: list[int], *, listed: int = 200, seed: int = 0) -> list:
    """Segments of one space; those of `listed` entries or more have lists."""
    space = trained_space(codec, DIM)
    segments = []
    for number, n in enumerate(sizes):
        coarse = trained_coarse(space, 6) if n >= listed and codec is not Codec.RAW else None
        keys, values = draw_keys(seed + number, n, DIM), draw_values(seed + number, n)
        half = [Document(f"{number}a", n - n // 2), Document(f"{number}b", n // 2, domain="other")][: 1 + (n > 1)]
        segments.append(build_segment(parent, keys, values, space=space, coarse=coarse, documents=half))
    return segments


def one_by_one(segments: list, allowed: list, queries, distortion: float, **breadth) -> Hits:
    """Every segment in a pass of its own."""
    stacks = [Stack([number], [segment], distortion) for number, segment in enumerate(segments)]
    return search(segments, allowed, queries, stacks=stacks, **breadth)


def assert_same(found: Hits, wanted: Hits, tolerance) -> None:
    """The same entries at the same distances, but for entries whose distances are as near as FastScan's rounding."""
    # Lookup tables are rounded anew for each pass, so that distances differ by a step.
    finite = np.isfinite(wanted.distances)
    assert np.array_equal(np.isfinite(found.distances), finite)
    differ = np.where(finite, np.abs(np.where(finite, found.distances, 0) - np.where(finite, wanted.distances, 0)), 0)
    assert (differ <= 2 * tolerance[:, None]).all()
    assert (np.diff(np.where(finite, found.distances, 3e38), axis=1) >= 0).all()
    assert np.array_equal(found.segments >= 0, finite)
    assert np.array_equal(found.rows >= 0, finite)
    for i in range(len(finite)):
        pairs = set(zip(found.segments[i].tolist(), found.rows[i].tolist(), strict=True))
        kth = wanted.distances[i][finite[i]][-1] if finite[i].any() else 0
        for segment, row, distance in zip(wanted.segments[i].tolist(), wanted.rows[i].tolist(), wanted.distances[i].tolist(), strict=True):
            if distance < kth - 4 * tolerance[i]:
                assert (segment, row) in pairs
        assert len(pairs - {(-1, -1)}) == finite[i].sum(), "no entry twice"


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.PQ4, Codec.PQ8])
@given(
    sizes=st.lists(st.sampled_from([1, 2, 31, 32, 33, 100, 250, 700]), min_size=1, max_size=7),
    k=st.sampled_from([1, 7, 64, 2_000]),
    nprobe=st.sampled_from([1, 3, 6]),
    only=st.sampled_from([None, "default", "other"]),
    n_dead=st.integers(0, 30),
    seed=st.integers(0, 5),
)
@settings(max_examples=25)
def test_a_stack_finds_what_its_segments_find(tmp_path_factory, codec, sizes, k, nprobe, only, n_dead, seed):
    """Flat and listed segments, with domains left out and few or many dead rows; values and places too."""
    segments = build(tmp_path_factory.mktemp("stack"), codec, sizes)
    rng = np.random.default_rng(seed)
    mortal = []
    for segment in segments:
        rows = rng.choice(segment.content.entries, min(n_dead, segment.content.entries // 2), replace=False)
        mortal.append(with_dead(segment, [(int(row), int(row) + 1) for row in np.sort(rows)]))
    known = {domain for segment in mortal for domain, _, _ in segment.record.runs}
    allowed = allowed_rows(mortal, weights={only: 1.0} if only in known else None)
    queries = draw_keys(seed + 100, 5, DIM)
    stacks = stacks_of(mortal)
    assert len(stacks) == 1
    found = search(mortal, allowed, queries, k=k, nprobe=nprobe, stacks=stacks)
    wanted = one_by_one(mortal, allowed, queries, stacks[0].distortion, k=k, nprobe=nprobe)
    assert_same(found, wanted, lookup_tolerance(mortal[0].space, queries))
    for segment, row, value in zip(
        found.segments.reshape(-1).tolist(), found.rows.reshape(-1).tolist(), found.values.reshape(-1).tolist(), strict=True
    ):
        assert value == (-1 if segment < 0 else mortal[segment].values.rows(row, row + 1)[0, 0])


def test_many_ranges_are_filtered_after(tmp_path):
    """More row ranges than faiss is asked about, over several members."""
    segments = build(tmp_path, Codec.PQ4, [300, 40, 40])
    mortal = [with_dead(segment, [(row, row + 1) for row in range(0, segment.content.entries, 2)]) for segment in segments]
    allowed = allowed_rows(mortal)
    assert sum(map(len, allowed)) > MAX_SELECTOR_RANGES
    found = search(mortal, allowed, draw_keys(9, 20, DIM), k=50, nprobe=6, stacks=stacks_of(mortal))
    assert (found.rows % 2 == 1).all()
    assert set(found.segments.reshape(-1).tolist()) == {0, 1, 2}


def test_segments_whose_labels_meet_are_apart(tmp_path, monkeypatch):
    """Labels of the segments of a stack tell them apart: those that share a slot are not in one."""
    monkeypatch.setattr("knnstore.storage.segment_writer.label_base", lambda uuid, n_rows: 0)
    old = build(tmp_path, Codec.PQ4, [300, 250])
    monkeypatch.undo()
    segments = [*old, *build(tmp_path, Codec.PQ4, [40, 30], seed=5), *build(tmp_path, Codec.RAW, [10, 10])]
    stacks = stacks_of(segments)
    assert [stack.numbers.tolist() for stack in stacks] == [[0, 2, 3], [1], [4, 5]]
    queries = draw_keys(3, 4, DIM)
    found = search(segments, [None] * 6, queries, k=30, nprobe=6, stacks=stacks)
    assert_same(found, one_by_one_of(stacks, segments, queries, k=30, nprobe=6), lookup_tolerance(segments[0].space, queries))


def one_by_one_of(stacks: list[Stack], segments: list, queries, **breadth) -> Hits:
    """Every segment in a pass of its own, with the distortion of its stack."""
    alone = [
        Stack([number], [member], stack.distortion)
        for stack in stacks
        for number, member in zip(stack.numbers.tolist(), stack.members, strict=True)
    ]
    return search(segments, [None] * len(segments), queries, stacks=alone, **breadth)


@given(uuid=st.uuids(), n_rows=st.integers(1, 1 << 39))
def test_a_base_leaves_room_for_its_rows(uuid, n_rows):
    """Labels stay below 2**39 rows, and bases are multiples of a slot."""
    base = label_base(uuid.hex, n_rows)
    assert base % (1 << SLOT_BITS) == 0
    assert 0 <= base <= (1 << ROW_BITS) - n_rows


def test_one_query_and_many_find_the_same(tmp_path):
    """A single query is scanned by another of faiss's loops."""
    segments = build(tmp_path, Codec.PQ4, [700, 300, 40])
    queries = draw_keys(8, 12, DIM)
    stacks = stacks_of(segments)
    for k in (1, 5, 64):
        together = search(segments, [None] * 3, queries, k=k, nprobe=3, stacks=stacks)
        for i in range(len(queries)):
            alone = search(segments, [None] * 3, queries[i : i + 1], k=k, nprobe=3, stacks=stacks)
            assert np.allclose(alone.distances[0], together.distances[i])


def test_distortion_does_not_depend_on_how_entries_are_cut(tmp_path):
    """What is added is the mean over the entries of a space."""
    segments = build(tmp_path, Codec.PQ4, [300, 100])
    (stack,) = stacks_of(segments)
    contents = [segment.content for segment in segments]
    assert stack.distortion == pytest.approx((300 * contents[0].distortion + 100 * contents[1].distortion) / 400)


def test_threads_may_make_it_together(tmp_path):
    """The index is made once."""
    segments = build(tmp_path, Codec.PQ4, [300, 100, 50])
    stacks = stacks_of(segments)
    queries = draw_keys(4, 8, DIM)
    results: list[Hits] = []
    threads = [
        threading.Thread(target=lambda: results.append(search(segments, [None] * 3, queries, k=9, nprobe=6, stacks=stacks)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for result in results[1:]:
        assert np.array_equal(result.rows, results[0].rows)
        assert np.array_equal(result.segments, results[0].segments)
