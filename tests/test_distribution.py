"""Laws of the kNN distribution and of mixing, against loops over one neighbour at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnstore.errors import InvalidArgumentError
from knnstore.lm.distribution import check_lambda, check_temperature, neighbor_weights, token_sums
from knnstore.lm.mixing import Mixed, mix_gold_tokens, mix_logits
from knnstore.lm.settings import Settings
from knnstore.neighbors import Neighbors
from knnstore.storage.calibration import Gate

VOCAB = 7
CLOSE = {"rtol": 0, "atol": 1e-6}


def by_hand(distances, values, temperature, log_weights=None) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the neighbours and probabilities of the tokens, one neighbour at a time in Python floats."""
    weights, probabilities = np.zeros(np.shape(values)), np.zeros((len(values), VOCAB))
    for i, (row, tokens) in enumerate(zip(distances, values, strict=True)):
        places = [j for j, token in enumerate(tokens) if token >= 0]
        scores = [(min(row[p] for p in places) - row[j]) / temperature for j in places]
        if log_weights is not None:
            scores = [score + float(log_weights[i][j]) for score, j in zip(scores, places, strict=True)]
        shares = [math.exp(score - max(scores)) for score in scores]
        for j, share in zip(places, shares, strict=True):
            weights[i, j] = share / sum(shares)
            probabilities[i, tokens[j]] += share / sum(shares)
    return weights, probabilities


def p_knn(distances, values, temperature, log_weights=None) -> np.ndarray:
    """(n, VOCAB), by the functions that are tested."""
    return token_sums(values, neighbor_weights(distances, values, temperature=temperature, log_weights=log_weights)).dense(VOCAB)


def as_found(distances, values) -> Neighbors:
    """As a search gives them: the nearest first, those that are none last."""
    order = np.argsort(np.where(values >= 0, distances, np.inf), axis=1, kind="stable")
    distances, values = np.take_along_axis(distances, order, 1), np.take_along_axis(values, order, 1)
    return Neighbors(distances, values, values, values.astype(np.int64), None, ())


def mixed(log_lm, neighbors, *, lmbda=0.5, temperature=10.0, gate=None) -> Mixed:
    settings = Settings(k=neighbors.k, nprobe=1, lmbda=lmbda, temperature=temperature, gate=gate)
    return mix_logits(torch.from_numpy(log_lm), neighbors, settings, dtype=torch.float64)


def random_log_probs(seed: int, n: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 5, (n, VOCAB))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@st.composite
def neighbours(draw, *, min_rows: int = 1, least: int = 0):
    """(distances, values) of up to 4 queries, 0 to 6 neighbours each, some of them missing, with ties and large distances."""
    n, k = draw(st.integers(min_rows, 4)), draw(st.integers(least, 6))
    cells = st.sampled_from([0.0, 1.0, 1e-30, 54.0, 1e6, 3e38]) | st.floats(0, 1e5, width=32)
    distances = np.array(draw(st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n)), np.float32).reshape(n, k)
    values = np.array(draw(st.lists(st.lists(st.integers(-1, VOCAB - 1), min_size=k, max_size=k), min_size=n, max_size=n)), np.int32)
    values = values.reshape(n, k)
    return np.where(values >= 0, distances, np.float32(np.inf)), values


temperatures = st.sampled_from([1e-308, 1e-9, 0.5, 30.0, 1e9, 1e308])
lambdas = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


def test_a_small_example_worked_out_on_paper():
    """Distances 0, T ln 2 and T ln 4 weigh 1, 1/2 and 1/4; two of the three have one token."""
    distances = np.array([[0.0, 10.0 * math.log(2), 10.0 * math.log(4)]], np.float32)
    values = np.array([[2, 5, 2]], np.int32)
    np.testing.assert_allclose(neighbor_weights(distances, values, temperature=10.0), [[4 / 7, 2 / 7, 1 / 7]], **CLOSE)
    np.testing.assert_allclose(p_knn(distances, values, 10.0), [[0, 0, 5 / 7, 0, 0, 2 / 7, 0]], **CLOSE)
    p = mixed(np.log(np.full((1, VOCAB), 1 / VOCAB)), as_found(distances, values), lmbda=0.25).log_p.exp().numpy()
    np.testing.assert_allclose(p[0, [0, 2, 5]], [0.75 / 7, 0.75 / 7 + 0.25 * 5 / 7, 0.75 / 7 + 0.25 * 2 / 7], **CLOSE)


@given(found=neighbours(), temperature=temperatures)
def test_weights_and_tokens_are_those_by_hand(found, temperature):
    """The formula, whatever the sizes of distance and temperature: nothing overflows, nothing is lost."""
    distances, values = found
    weights, probabilities = by_hand(distances.astype(float).tolist(), values.tolist(), temperature)
    np.testing.assert_allclose(neighbor_weights(distances, values, temperature=temperature), weights, **CLOSE)
    np.testing.assert_allclose(p_knn(distances, values, temperature), probabilities, **CLOSE)


@given(found=neighbours(), temperature=temperatures, seed=st.integers(0, 9))
def test_log_weights_multiply_the_neighbours_weights(found, temperature, seed):
    """A domain's log weight is added to the exponent, before the sum is made 1."""
    distances, values = found
    logs = np.random.default_rng(seed).normal(0, 3, values.shape).astype(np.float32)
    weights, probabilities = by_hand(distances.astype(float).tolist(), values.tolist(), temperature, logs)
    np.testing.assert_allclose(neighbor_weights(distances, values, temperature=temperature, log_weights=logs), weights, **CLOSE)
    np.testing.assert_allclose(p_knn(distances, values, temperature, logs), probabilities, **CLOSE)


@given(found=neighbours(), temperature=temperatures)
def test_each_row_sums_to_one_or_to_nothing(found, temperature):
    """p_kNN sums to 1 where a neighbour was found, to 0 where none was; so do the weights."""
    distances, values = found
    expected = (values >= 0).any(axis=1).astype(float)
    np.testing.assert_allclose(neighbor_weights(distances, values, temperature=temperature).sum(axis=1), expected, **CLOSE)
    np.testing.assert_allclose(p_knn(distances, values, temperature).sum(axis=1), expected, **CLOSE)


@given(found=neighbours(), temperature=temperatures, seed=st.integers(0, 9))
def test_the_order_of_neighbours_does_not_matter(found, temperature, seed):
    """Any permutation gives the same distribution, and the weights permuted."""
    distances, values = found
    order = np.random.default_rng(seed).permutation(values.shape[1])
    np.testing.assert_allclose(p_knn(distances, values, temperature), p_knn(distances[:, order], values[:, order], temperature), **CLOSE)
    np.testing.assert_allclose(
        neighbor_weights(distances, values, temperature=temperature)[:, order],
        neighbor_weights(distances[:, order], values[:, order], temperature=temperature),
        **CLOSE,
    )


@given(found=neighbours(), temperature=st.floats(0.1, 1e3), shift=st.floats(0, 1e3))
def test_only_differences_of_distances_matter(found, temperature, shift):
    """A constant added to all distances (a segment's distortion) changes nothing."""
    distances, values = found
    distances = np.minimum(distances, 1e4) + np.where(np.isinf(distances), np.inf, 0)
    np.testing.assert_allclose(
        neighbor_weights(distances.astype(np.float64) + shift, values, temperature=temperature),
        neighbor_weights(distances.astype(np.float64), values, temperature=temperature),
        **CLOSE,
    )


@given(found=neighbours(), temperature=temperatures)
def test_sums_say_what_the_whole_distribution_says(found, temperature):
    """One token of each query, the largest, the entropy: without a (n, vocab) matrix as with it."""
    distances, values = found
    sums = token_sums(values, neighbor_weights(distances, values, temperature=temperature))
    whole = by_hand(distances.astype(float).tolist(), values.tolist(), temperature)[1]
    for token in range(VOCAB):
        np.testing.assert_allclose(sums.of(np.full(len(values), token)), whole[:, token], **CLOSE)
    np.testing.assert_allclose(sums.largest(), whole.max(axis=1), **CLOSE)
    np.testing.assert_allclose(sums.entropy(), [-sum(p * math.log(p) for p in row if p > 0) for row in whole], **CLOSE)
    assert all((a, b) < (c, d) for (a, b), (c, d) in itertools.pairwise(zip(sums.rows.tolist(), sums.tokens.tolist(), strict=True)))


@pytest.mark.parametrize("vocab_size", [100, 50_000, 1 << 20])
@pytest.mark.parametrize("k", [1, 5, 1_000, 20_000])
def test_sums_of_many_neighbours_of_any_vocabulary(k, vocab_size):
    """Tokens and places that do not fit 32 bits together, and k that is no power of two."""
    rng = np.random.default_rng(k)
    values = rng.integers(-1, min(vocab_size, 300), (3, k)).astype(np.int32) * np.int32(max(1, vocab_size // 300))
    values = np.where(values < 0, np.int32(-1), values)
    weights = np.where(values >= 0, rng.random((3, k)), 0.0)
    sums = token_sums(values, weights)
    for row in range(3):
        wanted = np.bincount(np.maximum(values[row], 0), weights[row], minlength=vocab_size)
        np.testing.assert_allclose(sums.dense(vocab_size)[row], wanted, rtol=1e-9, atol=1e-12)


@given(found=neighbours(least=1), lmbda=lambdas, temperature=temperatures, seed=st.integers(0, 9))
def test_mixing_is_the_weighted_sum_and_p_lm_where_nothing_was_found(found, lmbda, temperature, seed):
    """p = λ p_kNN + (1 - λ) p_LM sums to 1; a query without neighbours has p = p_LM, whatever λ is."""
    distances, values = found
    log_lm = random_log_probs(seed, len(values))
    result = mixed(log_lm, as_found(distances, values), lmbda=lmbda, temperature=temperature)
    p = result.log_p.exp().numpy()
    knn = by_hand(distances.astype(float).tolist(), values.tolist(), temperature)[1]
    for i in range(len(values)):
        weight = lmbda if (values[i] >= 0).any() else 0.0
        assert result.lmbda[i] == weight
        np.testing.assert_allclose(p[i], weight * knn[i] + (1 - weight) * np.exp(log_lm[i]), **CLOSE)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, **CLOSE)


@given(found=neighbours(least=1), temperature=temperatures, lmbda=lambdas, seed=st.integers(0, 9), gated=st.booleans())
def test_the_gold_token_alone_has_the_same_probability(found, temperature, lmbda, seed, gated):
    """What is computed without a (n, vocab) matrix is its column of the gold token; each row with its own λ where there is a gate."""
    neighbors = as_found(*found)
    n = len(neighbors)
    log_lm, gold = random_log_probs(seed, n), np.random.default_rng(seed).integers(0, VOCAB, n)
    gate = Gate(kind="distance", distances=(0.0, 60.0, 1e5), lambdas=(0.9, 0.3, 0.0)) if gated else None
    settings = Settings(k=neighbors.k, nprobe=1, lmbda=lmbda, temperature=temperature, gate=gate)
    whole = mixed(log_lm, neighbors, lmbda=lmbda, temperature=temperature, gate=gate)
    alone = mix_gold_tokens(gold, np.take_along_axis(log_lm, gold[:, None], 1)[:, 0], None, neighbors, settings)
    np.testing.assert_allclose(alone.lmbda, whole.lmbda)
    np.testing.assert_allclose(np.exp(alone.log_p), np.take_along_axis(whole.log_p.exp().numpy(), gold[:, None], 1)[:, 0], **CLOSE)
    np.testing.assert_allclose(
        np.exp(alone.log_p_knn), p_knn(neighbors.distances, neighbors.values, temperature)[np.arange(n), gold], **CLOSE
    )


def test_a_missing_neighbour_is_not_the_last_token():
    """Value -1 gives no token any probability, though it is a valid index from the end."""
    distances, values = np.array([[1.0, np.inf]], np.float32), np.array([[0, -1]], np.int32)
    np.testing.assert_array_equal(p_knn(distances, values, 1.0)[0], [1, 0, 0, 0, 0, 0, 0])
    # Nor where its distance is not infinite.
    weights = neighbor_weights(np.array([[1.0, 0.0]], np.float32), values, temperature=1.0)
    np.testing.assert_array_equal(weights, [[1.0, 0.0]])


def test_equal_distances_have_equal_weights():
    """k tied neighbours have 1/k each, at any temperature, also at a distance that float16 or exp could not hold."""
    for distance in (0.0, 54.0, 1e30):
        for temperature in (1e-300, 1.0, 1e300):
            weights = neighbor_weights(np.full((1, 4), distance, np.float32), np.arange(4, dtype=np.int32)[None], temperature=temperature)
            np.testing.assert_allclose(weights, [[0.25] * 4], **CLOSE)


def test_no_queries_and_no_neighbours_are_arrays_too():
    """(0, k) and (n, 0) keep their shapes; with no neighbours p is p_LM."""
    none = np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    assert neighbor_weights(*none, temperature=1.0).shape == (0, 3)
    assert p_knn(*none, 1.0).shape == (0, VOCAB)
    assert mixed(np.zeros((0, VOCAB)), as_found(*none)).log_p.shape == (0, VOCAB)
    assert (p_knn(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int32), 1.0) == 0.0).all()


def test_large_logits_hold():
    """Logits of any size: differences are what counts, and rows sum to 1."""
    logits = np.array([[1e4, 1e4 + 1, -1e4], [-np.inf, 0.0, 0.0]], np.float32)
    nothing = as_found(np.full((2, 1), np.inf, np.float32), np.full((2, 1), -1, np.int32))
    p = mixed(logits, nothing).log_p.exp().numpy()
    np.testing.assert_allclose(p, [[1 / (1 + math.e), math.e / (1 + math.e), 0], [0, 0.5, 0.5]], **CLOSE)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, math.inf, "warm", None])
def test_temperatures_that_are_none_are_refused(temperature):
    """The value is in the message."""
    with pytest.raises(InvalidArgumentError, match=f"temperature {temperature}"):
        check_temperature(temperature)
    with pytest.raises(InvalidArgumentError, match="temperature"):
        neighbor_weights(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32), temperature=temperature)


@pytest.mark.parametrize("lmbda", [-0.01, 1.01, math.nan, math.inf, "half", None])
def test_lambdas_that_are_none_are_refused(lmbda):
    """The value is in the message."""
    with pytest.raises(InvalidArgumentError, match=f"lambda {lmbda}"):
        check_lambda(lmbda)


def test_a_token_outside_the_vocabulary_is_refused():
    """A datastore of another model is noticed, not written into a neighbour's row."""
    neighbors = as_found(np.zeros((2, 1), np.float32), np.array([[7], [0]], np.int32))
    with pytest.raises(InvalidArgumentError, match="token 7"):
        mixed(np.zeros((2, VOCAB)), neighbors)
    with pytest.raises(InvalidArgumentError, match="token 7"):
        p_knn(neighbors.distances, neighbors.values, 1.0)
