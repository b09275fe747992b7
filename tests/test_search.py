"""Search over segments and spaces against brute force over what the codes stand for, and exact search against the keys."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import (
    Document,
    build_segment,
    code_distances,
    draw_keys,
    draw_values,
    lookup_tolerance,
    trained_coarse,
    trained_space,
    with_dead,
)

from knnstore import search as search_module
from knnstore.errors import InvalidArgumentError, NotFoundError
from knnstore.filters import RowRange, allowed_rows, domain_weights, log_weights
from knnstore.format import Codec
from knnstore.neighbors import Neighbors
from knnstore.search import MAX_K, MAX_SELECTOR_RANGES, check_keys, search
from knnstore.storage.rows import as_ranges

DIM = 16
ALL_LISTS = 1_000
QUERIES = draw_keys(7, 12, DIM)


def draw_documents(seed: int, n_entries: int) -> list[Document]:
    """Short documents; three domains, one after another in long runs; years and languages at random."""
    rng = np.random.default_rng(seed)
    documents, at = [], 0
    while at < n_entries:
        n = min(int(rng.integers(1, 40)), n_entries - at)
        domain = ("law", "med", "news")[3 * at // n_entries]
        metadata = {"year": int(rng.integers(2018, 2022)), "language": ("en", "de")[int(rng.integers(2))]}
        documents.append(Document(f"{seed}/{len(documents)}", n, domain, metadata))
        at += n
    return documents


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    """Three segments in two spaces: pq4 with lists, pq4 flat, and pq8 under another rotation. Some keys are in several of them."""
    folder = tmp_path_factory.mktemp("segments")
    first, second = trained_space(Codec.PQ4, DIM), trained_space(Codec.PQ8, DIM, seed=1)
    shared = draw_keys(50, 100, DIM)
    built = []
    for number, (n, space, coarse) in enumerate([(1_500, first, trained_coarse(first, 16)), (700, first, None), (900, second, None)]):
        keys = draw_keys(10 + number, n, DIM)
        keys[5:105] = shared
        keys[300:350] = shared[:50]
        documents = draw_documents(number, n)
        built.append(build_segment(folder, keys, draw_values(number, n), space=space, coarse=coarse, keep="f32", documents=documents))
    return tuple(built)


@pytest.fixture(scope="module")
def raw_segments(tmp_path_factory):
    """Two segments of raw keys, half of them the same."""
    folder = tmp_path_factory.mktemp("raw")
    space = trained_space(Codec.RAW, DIM)
    keys = draw_keys(20, 300, DIM)
    return tuple(
        build_segment(folder, keys[at : at + 200], draw_values(at, 200), space=space, documents=draw_documents(at, 200)) for at in (0, 100)
    )


def values_of(segment):
    return segment.values.rows(0, segment.content.entries)[:, 0].astype(np.int64)


def assert_sorted(hits):
    """By (distance, segment, row) in each row; nothing found comes last, as -1 and infinity."""
    for i in range(len(hits.distances)):
        triples = list(zip(hits.distances[i].tolist(), hits.segments[i].tolist(), hits.rows[i].tolist(), strict=True))
        found = [triple for triple in triples if triple[2] >= 0]
        assert found == sorted(found)
        assert triples[len(found) :] == [(math.inf, -1, -1)] * (len(triples) - len(found))
        assert len({triple[1:] for triple in found}) == len(found)
        assert (hits.values[i][len(found) :] == -1).all()


def assert_nearest(hits, segments, queries, k, counts=None):
    """The k nearest of the rows that count, by true distances to the decoded codes within the tolerance of the lookup tables.

    Rounding moves each distance by the tolerance t at most, so the i-th smallest moves by t at most too.
    """
    every = np.concatenate([code_distances(segment, queries) for segment in segments], axis=1)
    if counts is not None:
        every[:, ~np.concatenate(counts)] = np.inf
    tolerance = np.max([lookup_tolerance(segment.space, queries) for segment in segments], axis=0)[:, None]
    expected = np.full((len(queries), k), np.inf)
    n_all = min(k, every.shape[1])
    expected[:, :n_all] = np.sort(every, axis=1)[:, :n_all]
    found = np.isfinite(expected)
    assert np.array_equal(found, hits.rows >= 0)
    most = np.broadcast_to(tolerance, found.shape)[found]
    assert (np.abs(hits.distances[found] - expected[found]) <= most).all()
    firsts = np.cumsum([0] + [segment.content.entries for segment in segments])
    places = firsts[hits.segments] + hits.rows
    true = np.take_along_axis(every, np.where(found, places, 0), axis=1)
    assert (np.abs(hits.distances[found] - true[found]) <= most).all()
    values = np.concatenate([values_of(segment) for segment in segments])
    assert np.array_equal(hits.values[found], values[places[found]])
    assert_sorted(hits)


@pytest.mark.parametrize("k", [1, 30, 700, 4_000])
def test_search_over_segments_and_spaces_is_exact_search_over_decoded_codes(segments, k):
    """Three segments in two spaces, every list searched: decoded codes by brute force, distortion added. 4,000 is more than there are."""
    hits = search(segments, [None] * 3, QUERIES, k=k, nprobe=ALL_LISTS)
    assert_nearest(hits, segments, QUERIES, k)


@pytest.mark.parametrize("k", [1, 50, 500])
def test_raw_keys_are_searched_exactly_with_ties_in_order(raw_segments, k):
    """Raw lists give true distances, and entries at the same distance in the order of (segment, row)."""
    hits = search(raw_segments, [None] * 2, QUERIES, k=k, nprobe=1)
    assert_nearest(hits, raw_segments, QUERIES, k)


def test_fewer_lists_find_the_nearest_of_those_lists(segments):
    """nprobe lists of the nearest centroids are searched, and nothing else."""
    segment = segments[0]
    rotated = segment.space.rotate(QUERIES)
    for nprobe in (1, 3):
        hits = search([segment], [None], QUERIES, k=100, nprobe=nprobe)
        for i in range(len(QUERIES)):
            nearest = np.argsort(np.square(rotated[i] - segment.coarse.centroids).sum(axis=1))[:nprobe]
            rows = np.concatenate([segment.lists.entries(int(number))[1] >> 24 for number in nearest])
            counts = np.isin(np.arange(segment.content.entries), rows)
            one = search_module.Hits(*(getattr(hits, name)[i : i + 1] for name in ("distances", "values", "segments", "rows")))
            assert_nearest(one, [segment], QUERIES[i : i + 1], 100, [counts])


def exact_oracle(segments, queries, k, counts=None):
    """Brute force over the keys as kept, in float64 rounded to float32; ties by (segment, row)."""
    keys = np.concatenate([segment.exact_keys(0, segment.content.entries) for segment in segments]).astype(np.float64)
    places = [(number, row) for number, segment in enumerate(segments) for row in range(segment.content.entries)]
    out = []
    for query in queries.astype(np.float64):
        distances = np.square(keys - query).sum(axis=1).astype(np.float32)
        order = [at for at in np.lexsort((np.arange(len(keys)), distances)) if counts is None or counts[at]][:k]
        out.append([(distances[at], *places[at]) for at in order])
    return out


def found_triples(hits):
    return [
        [triple for triple in zip(hits.distances[i], hits.segments[i].tolist(), hits.rows[i].tolist(), strict=True) if triple[2] >= 0]
        for i in range(len(hits.distances))
    ]


@pytest.mark.parametrize("k", [1, 120, 5_000])
def test_exact_search_is_brute_force_over_keys(segments, raw_segments, k):
    """Also for queries that are stored keys, several times over: of equal distances the smallest (segment, row) come first and are kept."""
    everything = (*segments, *raw_segments)
    queries = np.concatenate((QUERIES, draw_keys(50, 100, DIM)[:4], draw_keys(20, 300, DIM)[150:152]))
    hits = search(everything, [None] * 5, queries, k=k, nprobe=1, exact=True)
    assert found_triples(hits) == exact_oracle(everything, queries, k)
    assert_sorted(hits)
    flat = np.concatenate([values_of(segment) for segment in everything])
    firsts = np.cumsum([0] + [segment.content.entries for segment in everything])
    found = hits.rows >= 0
    assert np.array_equal(hits.values[found], flat[firsts[hits.segments[found]] + hits.rows[found]])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equal_keys_have_equal_distances_in_exact_search(tmp_path, scale):
    """However large the keys are beside their differences: one key many times over is found in row order."""
    rng = np.random.default_rng(0)
    one = (rng.standard_normal(DIM) * scale).astype(np.float32)
    keys = np.repeat(one[None], 5_000, axis=0)
    keys[::7] = np.nextafter(keys[::7], np.float32(np.inf))
    segment = build_segment(tmp_path, keys, np.arange(5_000) % 7, space=trained_space(Codec.PQ4, DIM), keep="f32")
    hits = search([segment], [None], one[None], k=1_000, nprobe=1, exact=True)
    assert hits.rows[0].tolist() == [row for row in range(5_000) if row % 7][:1_000]
    assert not hits.distances.any()


@pytest.mark.parametrize("keep", ["f16", "bf16"])
def test_exact_search_uses_keys_as_they_are_kept(tmp_path, keep):
    keys = draw_keys(30, 400, DIM)
    segment = build_segment(tmp_path, keys, draw_values(30, 400), space=trained_space(Codec.PQ4, DIM), keep=keep)
    kept = segment.exact_keys(0, 400)
    assert 0 < np.abs(kept - keys).max() < 0.1
    hits = search([segment], [None], QUERIES, k=20, nprobe=1, exact=True)
    assert found_triples(hits) == exact_oracle([segment], QUERIES, 20)


filters = st.fixed_dictionaries(
    {
        "domains": st.none() | st.sets(st.sampled_from(["law", "med", "news"]), max_size=2),
        "where": st.none() | st.just({"year": 2020}) | st.just({"language": "de", "year": 2019}) | st.just({"missing": 1}),
        "excluded": st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=4),
        "range": st.none() | st.tuples(st.integers(0, 2), st.integers(-5, 1_600), st.integers(-5, 1_600)),
        "dead": st.sampled_from([[], [(0, 90)], [(10 * i, 10 * i + 3) for i in range(60)]]),
    }
)


def rows_that_count(segments, chosen, dead):
    """Which rows of each segment count, document by document, row by row."""
    out = []
    for number, segment in enumerate(segments):
        counts = np.zeros(segment.content.entries, bool)
        for document in segment.contexts.documents():
            domain = next(name for name, _, stop in segment.record.runs if document.first_row < stop)
            for row in range(document.first_row, document.first_row + document.n_entries):
                counts[row] = (
                    (chosen["domains"] is None or domain in chosen["domains"])
                    and all(document.metadata.get(name) == value for name, value in (chosen["where"] or {}).items())
                    and document.id not in [f"{i}/{j}" for i, j in chosen["excluded"]]
                    and not (chosen["range"] and chosen["range"][0] == number and chosen["range"][1] <= row < chosen["range"][2])
                    and not any(first <= row < stop for first, stop in dead)
                )
        out.append(counts)
    return out


@given(chosen=filters, k=st.sampled_from([1, 40, 2_000]), exact=st.booleans())
def test_filters_give_the_nearest_of_the_rows_that_count(segments, chosen, k, exact):
    """Domains, metadata, excluded documents and rows, dead rows, alone and together, in few ranges and in many."""
    alive = [with_dead(segment, chosen["dead"]) for segment in segments]
    weights = domain_weights(alive, None if chosen["domains"] is None else sorted(chosen["domains"]))
    exclude = [f"{i}/{j}" for i, j in chosen["excluded"]]
    try:
        allowed = allowed_rows(
            alive,
            weights=weights,
            where=chosen["where"],
            exclude=[*exclude, *([RowRange(*chosen["range"])] if chosen["range"] else [])],
        )
    except NotFoundError:  # every row of an excluded document is dead
        assert chosen["dead"]
        return
    counts = rows_that_count(segments, chosen, chosen["dead"])
    for rows, expected in zip(allowed, counts, strict=True):
        assert (rows is None) == expected.all()
        if rows is not None:
            assert np.array_equal(as_ranges(rows), rows)
            assert [row for first, stop in rows for row in range(first, stop)] == np.flatnonzero(expected).tolist()
    hits = search(alive, allowed, QUERIES[:5], k=k, nprobe=ALL_LISTS, exact=exact)
    if exact:
        assert found_triples(hits) == exact_oracle(alive, QUERIES[:5], k, np.concatenate(counts))
    else:
        assert_nearest(hits, alive, QUERIES[:5], k, counts)


@pytest.mark.parametrize("share", [2, 50, 1_400])
def test_many_ranges_are_filtered_after_an_over_fetch(segments, monkeypatch, share):
    """Every second row, or one in many: the answer is the same as row by row, with little memory allowed too."""
    segment = segments[0]
    rows = np.arange(0, 1_500, share) if share < 1_000 else np.arange(0, 100, 2)
    allowed = as_ranges([(int(row), int(row) + 1) for row in rows])
    assert len(allowed) > MAX_SELECTOR_RANGES
    counts = np.isin(np.arange(1_500), rows)
    hits = search([segment], [allowed], QUERIES, k=20, nprobe=ALL_LISTS)
    assert_nearest(hits, [segment], QUERIES, 20, [counts])
    monkeypatch.setattr(search_module, "RESULT_CELLS", 64)
    again = search([segment], [allowed], QUERIES, k=20, nprobe=ALL_LISTS)  # one by one: of what is tied at the k-th, any may stay
    assert np.allclose(again.distances, hits.distances)
    assert_nearest(again, [segment], QUERIES, 20, [counts])


def test_nothing_counts_and_nothing_is_asked(segments):
    nothing = search(segments, [as_ranges([])] * 3, QUERIES, k=5, nprobe=8)
    for exact in (False, True):
        empty = search(segments, [None] * 3, np.zeros((0, DIM), np.float32), k=5, nprobe=8, exact=exact)
        assert empty.distances.shape == empty.values.shape == empty.segments.shape == empty.rows.shape == (0, 5)
        nothing = search(segments, [as_ranges([])] * 3, QUERIES, k=5, nprobe=8, exact=exact)
        assert np.isinf(nothing.distances).all()
        assert (nothing.rows == -1).all()
        assert (nothing.segments == -1).all()
        assert (nothing.values == -1).all()
    none_at_all = search([], [], QUERIES, k=5, nprobe=8)
    assert none_at_all.rows.shape == (len(QUERIES), 5)


@pytest.mark.parametrize("exact", [False, True])
def test_a_batch_is_its_queries_one_by_one(segments, exact):
    """Exactly so in exact search. By codes, the last bits of the rotated query depend on the batch: within the tolerance then."""
    batch = search(segments, [None] * 3, QUERIES, k=60, nprobe=4, exact=exact)
    for i in range(len(QUERIES)):
        single = search(segments, [None] * 3, QUERIES[i : i + 1], k=60, nprobe=4, exact=exact)
        if exact:
            assert np.array_equal(single.rows[0], batch.rows[i])
            assert np.array_equal(single.distances[0], batch.distances[i])
        else:
            tolerance = max(lookup_tolerance(segment.space, QUERIES[i : i + 1])[0] for segment in segments)
            assert np.abs(single.distances[0] - batch.distances[i]).max() <= tolerance


def test_large_batches_are_searched_piece_by_piece(segments, monkeypatch):
    whole = search(segments, [None] * 3, QUERIES, k=10, nprobe=4)
    monkeypatch.setattr(search_module, "RESULT_CELLS", 100)
    monkeypatch.setattr(search_module, "EXACT_QUERIES", 5)
    monkeypatch.setattr(search_module, "EXACT_ROWS", 64)
    pieces = search(segments, [None] * 3, QUERIES, k=10, nprobe=4)
    assert pieces.distances.shape == whole.distances.shape
    tolerance = lookup_tolerance(segments[0].space, QUERIES)[:, None]
    assert (np.abs(pieces.distances - whole.distances) <= tolerance).all()
    exact = search(segments, [None] * 3, QUERIES, k=10, nprobe=4, exact=True)
    assert found_triples(exact) == exact_oracle(segments, QUERIES, 10)


@pytest.mark.parametrize(
    "keys",
    [
        np.full((2, DIM), np.nan),
        np.full(DIM, np.inf),
        np.full((1, DIM), 1e300),
        np.zeros((2, DIM + 1)),
        np.zeros((1, 2, DIM)),
        np.zeros((2, DIM), complex),
        np.zeros(()),
        [["a"] * DIM],
        [[1.0] * DIM, [2.0]],
        None,
    ],
    ids=str,
)
def test_keys_that_are_none_are_refused(keys):
    with pytest.raises(InvalidArgumentError, match="key"):
        check_keys(keys, DIM)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_keys_of_any_number_type_are_taken(dtype):
    """One key or several, of any number type, in any memory order."""
    keys = np.arange(2 * DIM).reshape(2, DIM).astype(dtype)
    for given_keys, n in ((keys, 2), (keys[0], 1), (np.asfortranarray(keys), 2), (keys.tolist(), 2), (keys[:, ::-1][:, ::-1], 2)):
        taken = check_keys(given_keys, DIM)
        assert taken.dtype == np.float32
        assert taken.flags.c_contiguous
        assert np.array_equal(taken, keys[:n])


@pytest.mark.parametrize(("k", "nprobe"), [(0, 1), (-1, 1), (MAX_K + 1, 1), (1, 0)])
def test_k_and_nprobe_out_of_range_are_refused(segments, k, nprobe):
    with pytest.raises(InvalidArgumentError, match="use 1"):
        search(segments, [None] * 3, QUERIES, k=k, nprobe=nprobe)


def test_exact_search_without_keys_is_refused(tmp_path):
    segment = build_segment(tmp_path, draw_keys(0, 50, DIM), draw_values(0, 50), space=trained_space(Codec.PQ4, DIM))
    with pytest.raises(InvalidArgumentError, match="keep-keys"):
        search([segment], [None], QUERIES, k=1, nprobe=1, exact=True)


@pytest.mark.parametrize(
    ("domains", "error"),
    [
        ("tax", NotFoundError),
        (["law", "tax"], NotFoundError),
        ({"law": -1}, InvalidArgumentError),
        ({"law": math.nan}, InvalidArgumentError),
    ],
)
def test_domains_that_are_none_are_refused(segments, domains, error):
    with pytest.raises(error, match="domain '"):
        domain_weights(segments, domains)


@pytest.mark.parametrize(
    ("exclude", "error"), [(["none such"], NotFoundError), ("none such", NotFoundError), (RowRange(3, 0, 1), InvalidArgumentError)]
)
def test_exclusions_that_are_none_are_refused(segments, exclude, error):
    with pytest.raises(error, match=r"none such|segment 3"):
        allowed_rows(segments, exclude=exclude)


def test_a_weight_is_the_factor_of_a_domains_neighbours(segments):
    """Its logarithm comes with each hit; a domain of weight 0 is not searched; weights of 1 need no array."""
    for weights in (None, {"law": 1.0, "med": 1.0, "news": 1.0}, {"law": 1.0, "med": 0.0}):
        hits = search(segments, allowed_rows(segments, weights=weights), QUERIES, k=30, nprobe=ALL_LISTS)
        assert log_weights(segments, weights, hits.segments, hits.rows) is None
    weights = domain_weights(segments, {"law": 2, "med": 0, "news": 0.5})
    hits = search(segments, allowed_rows(segments, weights=weights), QUERIES, k=2_500, nprobe=ALL_LISTS)
    logs = log_weights(segments, weights, hits.segments, hits.rows)
    seen = set()
    for i, j in itertools.product(range(len(QUERIES)), range(2_500)):
        if hits.rows[i, j] >= 0:
            domain = next(name for name, _, stop in segments[hits.segments[i, j]].record.runs if hits.rows[i, j] < stop)
            assert logs[i, j] == np.float32(math.log(weights[domain]))
            seen.add(domain)
    assert seen == {"law", "news"}


def test_neighbours_of_one_key_are_a_slice(segments):
    weights = domain_weights(segments, {"law": 2.0})
    hits = search(segments, allowed_rows(segments, weights=weights), QUERIES, k=2_000, nprobe=ALL_LISTS)
    logs = log_weights(segments, weights, hits.segments, hits.rows)
    neighbors = Neighbors(hits.distances, hits.values, hits.segments, hits.rows, logs, segments)
    n_law = sum(stop - first for segment in segments for name, first, stop in segment.record.runs if name == "law")
    assert (len(neighbors), neighbors.k, neighbors.n_found.tolist()) == (len(QUERIES), 2_000, [n_law] * len(QUERIES))
    for query in (0, 5, -1):
        one = neighbors[query]
        assert len(one) == 1
        assert np.array_equal(one.rows[0], hits.rows[query])
        assert np.array_equal(one.log_weights[0], logs[query])
    with pytest.raises(InvalidArgumentError, match=f"only {n_law} were found"):
        neighbors.context(0, n_law)
