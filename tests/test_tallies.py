"""`tallies`: sums over tokens, however they are cut into pieces, against loops; buckets and bins at their edges."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnstore.lm.tallies import GAIN_EDGES, OfDomains, Tally, frequency_buckets, perplexity_of

DOMAINS = {"law": 10, "poems": 20}

# p_LM, p_kNN of two domains (None: no neighbour in it), the first one's share of the weight, λ, token
tokens = st.tuples(
    st.floats(1e-6, 1.0),
    st.one_of(st.none(), st.just(0.0), st.floats(1e-6, 1.0)),
    st.one_of(st.none(), st.just(0.0), st.floats(1e-6, 1.0)),
    st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
    st.one_of(st.just(0.0), st.floats(1e-6, 0.99)),
    st.integers(0, 3),
)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def perplexity(values: Sequence[float]) -> float:
    return math.exp(-mean([math.log(p) for p in values])) if values and min(values) > 0 else math.inf if values else math.nan


@given(drawn=st.lists(tokens, max_size=30), cuts=st.lists(st.integers(0, 30), max_size=3))
def test_a_tally_is_a_loop_over_its_tokens(drawn, cuts):
    """All that is reported, with tokens of p_kNN 0, without neighbours in a domain or at all, added in any pieces."""
    rows = []
    for p_lm, *own, weight, lmbda, token in drawn:
        found = [p is not None for p in own]
        share = [weight, 1 - weight] if all(found) else [float(is_found) for is_found in found]
        p_knn = sum(s * (p or 0.0) for s, p in zip(share, own, strict=True))
        mixed = [lmbda * (p or 0.0) + (1 - lmbda) * p_lm if p is not None else p_lm for p in own]
        lmbda = lmbda if any(found) else 0.0
        rows.append((token, p_lm, p_knn, lmbda * p_knn + (1 - lmbda) * p_lm, lmbda, share, [p or 0.0 for p in own], found, mixed))
    tally = Tally(np.array([0, 1, 5, 7]), DOMAINS)
    for first, stop in pairwise([0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]):
        some = rows[first:stop]
        with np.errstate(divide="ignore"):
            logs = [np.log(np.array([row[i] for row in some], np.float64)) for i in (1, 2, 3)]
        of_domains = OfDomains(
            *(np.array([row[i] for row in some], kind).reshape(-1, 2) for i, kind in ((5, float), (6, float), (7, bool)))
        )
        tally.add(np.array([row[0] for row in some], np.int64), *logs, np.array([row[4] for row in some], np.float64), of_domains)

    def near(value: float) -> object:
        return pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True)

    n = len(rows)
    assert tally.tokens == n
    assert tally.zero == sum(row[2] == 0 for row in rows)
    assert tally.lmbda == near(mean([row[4] for row in rows]))
    assert tally.perplexity == {name: near(perplexity([row[i] for row in rows])) for i, name in ((1, "lm"), (2, "knn"), (3, "mixed"))}
    covered = [row for row in rows if row[2] > 0]
    assert tally.covered == {name: near(perplexity([row[i] for row in covered])) for i, name in ((1, "lm"), (2, "knn"))}
    bits = [math.log2(row[3]) - math.log2(row[1]) for row in rows]
    clear = all(
        abs(b) > 1e-12 or row[3] == row[1] for b, row in zip(bits, rows, strict=True)
    )  # rounding may make a gain of nothing, or nothing of it
    if clear:
        for name, sign in (("helped", 1), ("hurt", -1)):
            changed = [b for b in bits if sign * b > 0]
            assert tally.changed(name) == (near(len(changed) / n if n else 0.0), near(mean(changed)))
    histogram = tally.histogram()
    assert sum(item.tokens for item in histogram) == n
    assert sum(item.bits for item in histogram) == near(mean(bits))
    for item, bucket in zip(tally.frequency(), range(8), strict=True):
        inside = [row for row in rows if [0, 1, 5, 7][row[0]] == bucket]
        assert (item.tokens, item.lm, item.mixed) == (
            len(inside), near(perplexity([row[1] for row in inside])), near(perplexity([row[3] for row in inside])),
        )  # fmt: skip
    some = [row for row in rows if any(row[7])]
    for place, (name, part) in enumerate(tally.domains().items()):
        assert part.entries == DOMAINS[name]
        assert part.share == near(mean([row[5][place] for row in some]))
        assert part.zero == near(mean([float(row[6][place] == 0) for row in rows]))
        assert part.knn == near(perplexity([row[6][place] for row in rows]))
        assert part.mixed == near(perplexity([row[8][place] for row in rows]))


def one_token(p_lm: float, p: float) -> Tally:
    tally = Tally(np.zeros(1, np.int64), {})
    with np.errstate(divide="ignore"):
        tally.add(np.zeros(1, np.int64), np.log([p_lm]), np.log([p]), np.log([p]), np.ones(1), OfDomains.of_none(1))
    return tally


@pytest.mark.parametrize("edge", GAIN_EDGES)
def test_a_bin_begins_at_its_edge(edge):
    """A hair more than an edge falls into the bin above it, a hair less into the one below."""
    for factor, beside in ((1.0 + 1e-9, lambda item: item.low), (1.0 - 1e-9, lambda item: item.high)):
        (full,) = (item for item in one_token(2.0**-10, 2.0 ** (edge - 10) * factor).histogram() if item.tokens)
        assert beside(full) == edge


@pytest.mark.parametrize("edge", [1.0, 2.0, 4.0, 8.0])
def test_a_bin_has_its_lower_edge(edge):
    """Where log p can be written so that the gain is the edge itself, it falls into the bin above."""
    tally, zero = Tally(np.zeros(1, np.int64), {}), np.zeros(1)
    tally.add(np.zeros(1, np.int64), np.array([-edge * math.log(2.0)]), zero, zero, np.ones(1), OfDomains.of_none(1))
    (full,) = (item for item in tally.histogram() if item.tokens)
    assert full.low == full.bits == edge


def test_no_change_is_no_help():
    """p = p_LM, also where both are 0, is neither; what falls to 0 is infinitely hurt, and in the lowest bin."""
    for p in (0.5, 0.0):
        same = one_token(p, p)
        assert same.changed("helped") == same.changed("hurt") == (0.0, 0.0)
        (full,) = (item for item in same.histogram() if item.tokens)
        assert (full.low, full.high) == (-0.01, 0.01)
    lost = one_token(0.5, 0.0)
    assert lost.changed("hurt") == (1.0, -math.inf)
    assert lost.histogram()[0].tokens == 1
    assert lost.perplexity == {"lm": 2.0, "knn": math.inf, "mixed": math.inf}


def test_buckets_by_hand():
    """Of a million entries, exactly 1, 10, 100 … occurrences begin a bucket; what never occurs has its own; of none all are never."""
    counts = [0, 1, 9, 10, 99, 100, 999, 1_000, 9_999, 10_000, 99_999, 100_000]
    counts.append(1_000_000 - sum(counts))
    assert frequency_buckets(np.array(counts)).tolist() == [0, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert frequency_buckets(np.array([1, 10_000_000 - 1])).tolist() == [1, 7]  # 0.1 in a million
    assert frequency_buckets(np.zeros(3, np.int64)).tolist() == [0, 0, 0]
    huge = np.array([1 << 40, 3])  # more than any store
    assert frequency_buckets(huge).tolist() == [7, 1]


def test_perplexity_of_what_is_too_small_to_write():
    """No overflow: inf; without tokens NaN."""
    assert perplexity_of(-1e6, 1) == math.inf
    assert math.isnan(perplexity_of(0.0, 0))
    assert perplexity_of(-math.log(8.0) * 3, 3) == pytest.approx(8.0)


def test_a_domain_that_is_far_away_still_says_what_it_would_say():
    """Its neighbours' weights beside a near domain are 0 in float64; among themselves they are not."""
    distances = np.array([[1.0, 5_000.0, 5_001.0, np.inf]], np.float32)
    numbers = np.array([[0, 2, 2, 0]])
    weights = np.array([[1.0, 0.0, 0.0, 0.0]])
    found = OfDomains.of(numbers, distances, weights, np.array([[False, True, False, True]]), temperature=1.0, m=3)
    assert found.share.tolist() == [[1.0, 0.0, 0.0]]
    assert found.found.tolist() == [[True, False, True]]
    np.testing.assert_allclose(found.p, [[0.0, 0.0, 1 / (1 + math.exp(-1))]])


@given(seed=st.integers(0, 1 << 30))
def test_domains_are_loops_over_neighbours(seed):
    """Shares and p_kNN of each domain, with some queries that found less than k, or nothing."""
    rng = np.random.default_rng(seed)
    n, k, m, temperature = 4, 7, 3, 2.0
    distances = np.sort(rng.uniform(0, 20, (n, k)).astype(np.float32), axis=1)
    distances[np.arange(k) >= rng.integers(0, k + 1, n)[:, None]] = np.inf
    numbers, is_gold, weights = rng.integers(0, m, (n, k)), rng.random((n, k)) < 0.4, rng.random((n, k))
    weights[np.isinf(distances)] = 0.0
    found = OfDomains.of(numbers, distances, weights, is_gold, temperature=temperature, m=m)
    for i in range(n):
        for domain in range(m):
            own = [j for j in range(k) if numbers[i, j] == domain and np.isfinite(distances[i, j])]
            scores = [math.exp(-distances[i, j] / temperature) for j in own]
            gold = sum(score for score, j in zip(scores, own, strict=True) if is_gold[i, j])
            assert found.share[i, domain] == pytest.approx(sum(weights[i, j] for j in own))
            assert found.p[i, domain] == pytest.approx(gold / sum(scores) if own else 0.0)
            assert found.found[i, domain] == bool(own)
