"""Laws of the kNN distribution and of mixing, against loops over one neighbour at a time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnstore.errors import InvalidArgumentError
from knnstore.lm.distribution import (
    check_lambda,
    check_temperature,
    knn_gold_log_probs,
    knn_log_probs,
    log_softmax,
    mix,
    mix_gold,
    neighbor_weights,
)

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


@st.composite
def neighbours(draw, *, min_rows: int = 1):
    """(distances, values) of up to 4 queries, 0 to 6 neighbours each, some of them missing, with ties and large distances."""
    n, k = draw(st.integers(min_rows, 4)), draw(st.integers(0, 6))
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
    log_p = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=10.0)
    np.testing.assert_allclose(np.exp(log_p), [[0, 0, 5 / 7, 0, 0, 2 / 7, 0]], **CLOSE)
    assert np.isneginf(log_p[0, [0, 1, 3, 4, 6]]).all()
    mixed = np.exp(mix(np.log(np.full((1, VOCAB), 1 / VOCAB)), log_p, 0.25))
    np.testing.assert_allclose(mixed[0, [0, 2, 5]], [0.75 / 7, 0.75 / 7 + 0.25 * 5 / 7, 0.75 / 7 + 0.25 * 2 / 7], **CLOSE)


@given(found=neighbours(), temperature=temperatures)
def test_weights_and_tokens_are_those_by_hand(found, temperature):
    """The formula, whatever the sizes of distance and temperature: nothing overflows, nothing is lost."""
    distances, values = found
    weights, probabilities = by_hand(distances.astype(float).tolist(), values.tolist(), temperature)
    np.testing.assert_allclose(neighbor_weights(distances, values, temperature=temperature), weights, **CLOSE)
    log_p = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=temperature)
    assert log_p.shape == (len(values), VOCAB)
    assert log_p.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_p), probabilities, **CLOSE)


@given(found=neighbours(), temperature=temperatures, seed=st.integers(0, 9))
def test_log_weights_multiply_the_neighbours_weights(found, temperature, seed):
    """A domain's log weight is added to the exponent, before the sum is made 1."""
    distances, values = found
    logs = np.random.default_rng(seed).normal(0, 3, values.shape).astype(np.float32)
    weights, probabilities = by_hand(distances.astype(float).tolist(), values.tolist(), temperature, logs)
    np.testing.assert_allclose(neighbor_weights(distances, values, temperature=temperature, log_weights=logs), weights, **CLOSE)
    log_p = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=temperature, log_weights=logs)
    np.testing.assert_allclose(np.exp(log_p), probabilities, **CLOSE)


@given(found=neighbours(), temperature=temperatures)
def test_each_row_sums_to_one_or_to_nothing(found, temperature):
    """p_kNN sums to 1 where a neighbour was found, to 0 where none was; so do the weights."""
    distances, values = found
    expected = (values >= 0).any(axis=1).astype(float)
    np.testing.assert_allclose(neighbor_weights(distances, values, temperature=temperature).sum(axis=1), expected, **CLOSE)
    log_p = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=temperature)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), expected, **CLOSE)


@given(found=neighbours(), temperature=temperatures, seed=st.integers(0, 9))
def test_the_order_of_neighbours_does_not_matter(found, temperature, seed):
    """Any permutation gives the same distribution, and the weights permuted."""
    distances, values = found
    order = np.random.default_rng(seed).permutation(values.shape[1])
    first = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=temperature)
    second = knn_log_probs(distances[:, order], values[:, order], vocab_size=VOCAB, temperature=temperature)
    np.testing.assert_allclose(np.exp(first), np.exp(second), **CLOSE)
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


@given(found=neighbours(), temperature=temperatures, seed=st.integers(0, 9))
def test_the_gold_token_alone_has_the_same_probability(found, temperature, seed):
    """What is computed without a (n, vocab) matrix is its column of the gold token."""
    distances, values = found
    gold = np.random.default_rng(seed).integers(0, VOCAB, len(values))
    log_p = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=temperature)
    alone = knn_gold_log_probs(distances, values, gold, temperature=temperature)
    np.testing.assert_allclose(np.exp(alone), np.exp(np.take_along_axis(log_p, gold[:, None], 1)[:, 0]), **CLOSE)


@given(found=neighbours(), lmbda=lambdas, temperature=temperatures, seed=st.integers(0, 9))
def test_mixing_is_the_weighted_sum_and_p_lm_where_nothing_was_found(found, lmbda, temperature, seed):
    """p = λ p_kNN + (1 - λ) p_LM sums to 1; a query without neighbours has p = p_LM, whatever λ is."""
    distances, values = found
    log_lm = log_softmax(np.random.default_rng(seed).normal(0, 5, (len(values), VOCAB)))
    log_knn = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=temperature)
    mixed = np.exp(mix(log_lm, log_knn, lmbda))
    for i in range(len(values)):
        weight = lmbda if (values[i] >= 0).any() else 0.0
        np.testing.assert_allclose(mixed[i], weight * np.exp(log_knn[i]) + (1 - weight) * np.exp(log_lm[i]), **CLOSE)
    np.testing.assert_allclose(mixed.sum(axis=1), 1.0, **CLOSE)


@given(found=neighbours(), seed=st.integers(0, 9))
def test_lambda_may_differ_from_row_to_row(found, seed):
    """An array of λ mixes each row with its own."""
    distances, values = found
    rng = np.random.default_rng(seed)
    log_lm = log_softmax(rng.normal(0, 5, (len(values), VOCAB)))
    log_knn = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=10.0)
    each = rng.choice([0.0, 0.3, 1.0], len(values))
    rows = [mix(log_lm[i : i + 1], log_knn[i : i + 1], each[i]) for i in range(len(values))]
    np.testing.assert_array_equal(mix(log_lm, log_knn, each), np.concatenate(rows))


@given(found=neighbours(), temperature=temperatures, seed=st.integers(0, 9))
def test_gold_tokens_mix_alike_for_every_lambda(found, temperature, seed):
    """One column for each λ, each what `mix` gives for the gold token."""
    distances, values = found
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, VOCAB, len(values))
    log_lm = log_softmax(rng.normal(0, 5, (len(values), VOCAB)))
    log_knn = knn_log_probs(distances, values, vocab_size=VOCAB, temperature=temperature)
    several = [0.0, 0.25, 1.0]
    columns = mix_gold(
        np.take_along_axis(log_lm, gold[:, None], 1)[:, 0],
        knn_gold_log_probs(distances, values, gold, temperature=temperature),
        several,
        found=(values >= 0).any(axis=1),
    )
    for column, lmbda in zip(columns.T, several, strict=True):
        whole = np.take_along_axis(mix(log_lm, log_knn, lmbda), gold[:, None], 1)[:, 0]
        np.testing.assert_allclose(np.exp(column), np.exp(whole), **CLOSE)


def test_a_missing_neighbour_is_not_the_last_token():
    """Value -1 gives no token any probability, though it is a valid index from the end."""
    distances, values = np.array([[1.0, np.inf]], np.float32), np.array([[0, -1]], np.int32)
    np.testing.assert_array_equal(np.exp(knn_log_probs(distances, values, vocab_size=VOCAB, temperature=1.0))[0], [1, 0, 0, 0, 0, 0, 0])
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
    assert knn_log_probs(*none, vocab_size=VOCAB, temperature=1.0).shape == (0, VOCAB)
    assert mix(np.zeros((0, VOCAB)), np.zeros((0, VOCAB)), 0.5).shape == (0, VOCAB)
    empty = knn_log_probs(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int32), vocab_size=VOCAB, temperature=1.0)
    assert np.isneginf(empty).all()
    log_lm = log_softmax(np.arange(2 * VOCAB).reshape(2, VOCAB))
    np.testing.assert_allclose(mix(log_lm, empty, 1.0), log_lm)


def test_log_softmax_holds_for_large_logits():
    """Logits of any size: differences are what counts, and rows sum to 1."""
    logits = np.array([[1e4, 1e4 + 1, -1e4], [-np.inf, 0.0, 0.0]], np.float32)
    p = np.exp(log_softmax(logits))
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


@pytest.mark.parametrize("lmbda", [-0.01, 1.01, math.nan, [0.5, 1.5], [0.5, math.nan], [0.5], [0.1, 0.2, 0.3], [[0.5], [0.5]]])
def test_mixing_refuses_a_lambda_outside_or_of_another_shape(lmbda):
    """One number or one for each row, each from 0 to 1."""
    with pytest.raises(InvalidArgumentError, match="lambda"):
        mix(np.zeros((2, VOCAB)), np.zeros((2, VOCAB)), lmbda)


def test_a_token_outside_the_vocabulary_is_refused():
    """A datastore of another model is noticed, not written into a neighbour's row."""
    with pytest.raises(InvalidArgumentError, match="token 7"):
        knn_log_probs(np.zeros((2, 1), np.float32), np.array([[7], [0]], np.int32), vocab_size=VOCAB, temperature=1.0)
