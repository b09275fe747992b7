"""Fits of temperature, λ, k, gates and domain weights: worlds in which the rule is known, and sums by hand."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnstore.lm import fitting
from knnstore.lm.fitting import Choice, Fitted, HeldOut, fit, gold_probabilities, joined, surface
from knnstore.lm.gate_fitting import MOST_LAMBDA, best_lambdas, fit_distance, fit_logistic
from knnstore.lm.gates import FEATURES, gate_lambdas, remoteness
from knnstore.lm.mixing import LmView

TEMPERATURE, VOCAB = 15.0, 30


def world(
    seed: int,
    *,
    n: int = 4_000,
    k: int = 16,
    lmbda: Callable[[np.ndarray], np.ndarray] = lambda nearest: np.full(len(nearest), 0.4),
    useful: int | None = None,
    noise: bool = False,
) -> HeldOut:
    """Tokens drawn from λ p_kNN + (1 - λ) p_LM. lmbda: of the nearest distance. useful: the neighbours that p_kNN has; the rest is noise.

    noise: half of the neighbours, of domain `b`, are of random tokens, and the other half's p_kNN is what is drawn from.
    """
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.uniform(20.0, 160.0, (n, 1)) + rng.gamma(3.0, 8.0, (n, k)), axis=1).astype(np.float32)
    values = rng.integers(0, VOCAB, (n, k)).astype(np.int32)
    domains = rng.integers(0, 2, (n, k)).astype(np.int16)
    counted = np.ones((n, k), bool)
    if useful is not None:
        counted[:, useful:] = False
    if noise:
        counted &= domains == 0
        counted |= ~counted.any(axis=1, keepdims=True)
    weights = np.exp(-(distances - distances[:, :1]) / TEMPERATURE) * counted
    p_knn = np.zeros((n, VOCAB))
    np.add.at(p_knn, (np.arange(n)[:, None], values), weights / weights.sum(axis=1, keepdims=True))
    p_lm = rng.dirichlet(np.full(VOCAB, 0.3), n)
    p = lmbda(distances[:, 0])[:, None] * p_knn + (1.0 - lmbda(distances[:, 0]))[:, None] * p_lm
    gold = (p.cumsum(axis=1) < rng.random((n, 1)) * p.sum(axis=1, keepdims=True)).sum(axis=1)
    of_gold = np.maximum(p_lm[np.arange(n), gold], 1e-12)
    view = LmView(p_lm.argmax(axis=1), np.log(p_lm.max(axis=1)), -(p_lm * np.log(np.maximum(p_lm, 1e-300))).sum(axis=1))
    return HeldOut(distances, values, gold, np.log(of_gold), view, domains if noise else None, ("a", "b") if noise else ())


def ragged(seed: int, *, n: int = 400, k: int = 12) -> HeldOut:
    """A small world in which some positions have fewer neighbours, or none, and some tokens are among no neighbours."""
    held_out = world(seed, n=n, k=k, noise=True)
    distances, values = held_out.distances.copy(), held_out.values.copy()
    for row in range(0, n, 9):
        distances[row, row % k :], values[row, row % k :] = np.inf, -1
    return replace(held_out, distances=distances, values=values)


# --- the sums by hand


def p_knn_by_hand(
    held_out: HeldOut, row: int, temperature: float, k: int, weights: dict[str, float] | None = None
) -> dict[int, float] | None:
    """p_kNN of one position by token; None where it has no neighbour."""
    found = [i for i in range(k) if held_out.values[row, i] >= 0]
    if not found:
        return None
    sums: dict[int, float] = {}
    for i in found:
        weight = math.exp(-(float(held_out.distances[row, i]) - float(held_out.distances[row, 0])) / temperature)
        if weights:
            weight *= weights[held_out.names[int(held_out.domains[row, i])]]
        token = int(held_out.values[row, i])
        sums[token] = sums.get(token, 0.0) + weight
    total = sum(sums.values())
    return {token: weight / total for token, weight in sums.items()}


def lambda_by_hand(fitted: Fitted, held_out: HeldOut, row: int, p_knn: dict[int, float]) -> float:
    gate, nearest = fitted.gate, float(held_out.distances[row, 0])
    if gate is None:
        return fitted.lmbda
    if gate.kind == "distance":
        points = list(zip(gate.distances, gate.lambdas, strict=True))
        if nearest <= points[0][0]:
            return points[0][1]
        for (d0, l0), (d1, l1) in itertools.pairwise(points):
            if nearest <= d1:
                return l0 + (l1 - l0) * (nearest - d0) / (d1 - d0)
        return points[-1][1]
    view = held_out.view
    known = {
        "nearest": (nearest / (10.0 * fitted.temperature)) ** 3,
        "knn_entropy": -sum(p * math.log(p) for p in p_knn.values() if p > 0),
        "knn_max": max(p_knn.values()),
        "lm_max": float(view.log_max[row]),
        "lm_entropy": float(view.entropy[row]),
        "agreement": p_knn.get(int(view.top[row]), 0.0),
    }
    return 1.0 / (1.0 + math.exp(-gate.bias - sum(w * known[name] for name, w in zip(gate.features, gate.weights, strict=True))))


@pytest.mark.parametrize("gate", ["fixed", "distance", "logistic", "auto"])
@pytest.mark.parametrize("seed", range(2))
def test_the_perplexity_reported_is_that_of_what_was_fitted(gate, seed):
    """Mixed position by position with what `fit` returns, the tokens have the perplexity that it tells, and the mean λ."""
    held_out = ragged(seed)
    fitted = fit(held_out, gate=gate)
    log_p, lambdas = [], []
    for row in range(len(held_out)):
        p_lm = math.exp(held_out.log_p_lm[row])
        p_knn = p_knn_by_hand(held_out, row, fitted.temperature, fitted.k, fitted.weights)
        lambdas.append(0.0 if p_knn is None else lambda_by_hand(fitted, held_out, row, p_knn))
        p = p_lm if p_knn is None else lambdas[-1] * p_knn.get(int(held_out.gold[row]), 0.0) + (1.0 - lambdas[-1]) * p_lm
        log_p.append(math.log(p))
    np.testing.assert_allclose(fitted.perplexity["mixed"], math.exp(-sum(log_p) / len(log_p)), rtol=1e-6)
    np.testing.assert_allclose(fitted.perplexity["lm"], math.exp(-held_out.log_p_lm.mean()), rtol=1e-9)
    np.testing.assert_allclose(fitted.mean_lambda, np.mean(lambdas), rtol=1e-6)
    assert fitted.perplexity["knn"] == np.inf  # a position has no neighbour
    assert (fitted.gate is None) == (next(choice.gate for choice in fitted.choices if choice.kept) == "fixed")


def test_gold_probabilities_are_those_of_each_prefix():
    """For each temperature and number of neighbours, with domain weights and without."""
    held_out = ragged(3, n=40)
    weights = {"a": 1.0, "b": 0.25}
    for given_weights in (None, weights):
        logs = None if given_weights is None else np.log([weights[name] for name in held_out.names])
        found = gold_probabilities(held_out, np.array([3.0, 40.0]), [1, 4, 12], log_weights=logs)
        for row in range(len(held_out)):
            for i, temperature in enumerate((3.0, 40.0)):
                for j, k in enumerate((1, 4, 12)):
                    p = p_knn_by_hand(held_out, row, temperature, k, given_weights) or {}
                    np.testing.assert_allclose(found[row, i, j], p.get(int(held_out.gold[row]), 0.0), rtol=1e-9, atol=1e-300)


def test_the_surface_is_perplexity_at_each_point():
    """Each temperature with each λ, position by position; without a neighbour p is p_LM."""
    held_out = ragged(4, n=60)
    temperatures, lambdas = np.array([2.0, 20.0, 200.0]), np.array([0.0, 0.3, 0.9])
    found = surface(held_out, temperatures, lambdas).perplexity
    for i, temperature in enumerate(temperatures):
        for j, lmbda in enumerate(lambdas):
            total = 0.0
            for row in range(len(held_out)):
                p, p_lm = p_knn_by_hand(held_out, row, temperature, 12), math.exp(held_out.log_p_lm[row])
                total += math.log(p_lm if p is None else lmbda * p.get(int(held_out.gold[row]), 0.0) + (1.0 - lmbda) * p_lm)
            np.testing.assert_allclose(found[i, j], math.exp(-total / len(held_out)), rtol=1e-9)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 200), scale=st.sampled_from([0.1, 1.0, 100.0, 1e200]))
def test_the_best_lambda_is_the_best_of_a_grid(seed, n, scale):
    """No λ of a fine grid has a larger mean of log(1 + λ gain)."""
    rng = np.random.default_rng(seed)
    gains = np.maximum(-1.0, rng.standard_normal((n, 3)) * scale * rng.integers(0, 2, (n, 3)))
    found = best_lambdas(gains)
    for column, lmbda in zip(gains.T, found, strict=True):
        grid = np.linspace(0.0, MOST_LAMBDA, 1_001)
        reached = [float(np.log1p(step * column).mean()) for step in grid]
        assert 0.0 <= lmbda <= MOST_LAMBDA
        assert np.log1p(lmbda * column).mean() >= max(reached) - 1e-9


# --- what is found, and what is kept


def kept(fitted: Fitted) -> str:
    (choice,) = [choice for choice in fitted.choices if choice.kept]
    return choice.gate


def test_a_world_of_one_lambda_keeps_it_fixed():
    """No gate is worth keeping; λ and the temperature are those of the world."""
    for seed in range(5):
        fitted = fit(world(seed))
        assert kept(fitted) == "fixed"
        assert fitted.gate is None
        assert fitted.lmbda == pytest.approx(0.4, abs=0.05)
        assert fitted.temperature == pytest.approx(TEMPERATURE, rel=0.35)


def steep(nearest: np.ndarray) -> np.ndarray:
    return np.where(nearest < 70.0, 0.8, 0.05)


def test_a_rule_by_distance_is_found_and_kept():
    """Where λ falls from 0.8 to 0.05 at a distance, both gates say so, and the better one is kept with a gain on unseen folds."""
    held_out = world(1, lmbda=steep)
    fitted = fit(held_out)
    unseen = {choice.gate: choice.perplexity for choice in fitted.choices if choice.k == fitted.k}
    assert kept(fitted) == min(unseen, key=unseen.__getitem__) != "fixed"
    assert min(unseen.values()) < 0.98 * unseen["fixed"]
    gate = fit(held_out, gate="distance").gate
    near, far = gate_lambdas(gate, {}, np.array([40.0, 120.0]))
    assert near == pytest.approx(0.8, abs=0.1)
    assert far == pytest.approx(0.05, abs=0.06)


def test_a_logistic_rule_is_found():
    """Weights that gains were drawn by come back, in the units of the features."""
    rng = np.random.default_rng(0)
    n, wanted, bias = 60_000, {"nearest": -2.0, "knn_max": 3.0, "lm_entropy": 0.5}, -1.0
    features = {"nearest": rng.gamma(2.0, 0.3, n), "knn_max": rng.uniform(0.0, 1.0, n), "lm_entropy": rng.normal(3.0, 1.0, n)}
    lmbda = 1.0 / (1.0 + np.exp(-bias - sum(weight * features[name] for name, weight in wanted.items())))
    # Two outcomes: the neighbours give one of them 0.9, the LM 0.2.
    first = rng.random(n) < lmbda * 0.9 + (1.0 - lmbda) * 0.2
    gate = fit_logistic(features, np.where(first, 0.9 / 0.2, 0.1 / 0.8) - 1.0)
    assert gate.features == tuple(wanted)
    np.testing.assert_allclose(gate.weights, list(wanted.values()), atol=0.25)
    assert gate.bias == pytest.approx(bias, abs=0.25)


def test_a_gate_that_only_fits_what_it_saw_is_not_kept(monkeypatch):
    """In each fold λ follows the distance at another place: what the others teach is worse than a fixed λ, though in sight it is better."""
    far_helps = np.array([True, True, False, False, True])[np.arange(5_000) * 5 // 5_000]
    contrary = world(2, n=5_000, lmbda=lambda nearest: np.where((nearest > 90.0) == far_helps, 0.75, 0.05))
    seen = fit(contrary, gate="distance")
    fixed = next(choice for choice in seen.choices if choice.gate == "fixed" and choice.k == seen.k)
    by_distance = next(choice for choice in seen.choices if choice.gate == "distance")
    assert by_distance.perplexity > fixed.perplexity * (1.0 - fitting.WORTH)
    assert kept(seen) == "distance"  # asked for by name
    chosen = fit(contrary)
    assert kept(chosen) != "distance"


def test_unseen_perplexity_is_of_tokens_that_were_not_fitted_on():
    """Each fifth of the tokens, in a row, under what the others teach: a fixed λ, by hand over a grid, and a gate by distance."""
    held_out = _without_view(world(5, n=600, k=1))
    fitted = fit(held_out, gate="fixed")
    hit = held_out.values[:, 0] == held_out.gold  # one neighbour: p_kNN is 1 or 0 at every temperature
    p_lm, fold = np.exp(held_out.log_p_lm), np.arange(600) * 5 // 600
    total = 0.0
    for number in range(5):
        grid = np.linspace(0.0, 0.98, 981)
        of_grid = [float(np.log(lmbda * hit + (1.0 - lmbda) * p_lm)[fold != number].mean()) for lmbda in grid]
        lmbda = grid[int(np.argmax(of_grid))]
        total += float(np.log(lmbda * hit + (1.0 - lmbda) * p_lm)[fold == number].sum())
    assert fitted.choices[0].perplexity == pytest.approx(math.exp(-total / 600), rel=1e-4)
    gains, total = hit / p_lm - 1.0, 0.0
    for number in range(5):
        gate = fit_distance(held_out.distances[fold != number, 0], gains[fold != number])
        lambdas = gate_lambdas(gate, {}, held_out.distances[fold == number, 0])
        total += float(np.log(lambdas * hit[fold == number] + (1.0 - lambdas) * p_lm[fold == number]).sum())
    assert fit(world(5, n=600, k=1), gate="distance").choices[-1].perplexity == pytest.approx(math.exp(-total / 600), rel=1e-9)


def _without_view(held_out: HeldOut) -> HeldOut:
    return replace(held_out, view=None)


def test_the_smallest_k_that_does_is_kept():
    """Four neighbours tell all there is to know: k is 4, of 1, 2, 4, 8, 16 and what was searched."""
    held_out = world(6, k=24, useful=4, n=6_000)
    fitted = fit(_without_view(held_out), gate="fixed")
    assert [choice.k for choice in fitted.choices] == [1, 2, 4, 8, 16, 24]
    assert fitted.k == 4
    best = min(choice.perplexity for choice in fitted.choices)
    assert all(choice.perplexity > best * (1.0 + fitting.WORTH) for choice in fitted.choices if choice.k < 4)


def test_what_is_simpler_stays_within_a_tenth_of_a_percent():
    """Of choices in order the first that none is better than by more."""
    for best, wanted in ((9.995, 8), (9.985, 32)):
        tried = [Choice(k=k, gate="fixed", weights=False, perplexity=p) for k, p in ((4, 11.0), (8, 10.0), (16, 9.999), (32, best))]
        assert fitting._simplest(tried).k == wanted


def test_a_domain_of_noise_loses_its_weight():
    """Neighbours of random tokens get little weight, and that is kept; the domain with most of p_kNN has weight 1."""
    fitted = fit(world(7, n=6_000, noise=True), gate="fixed")
    assert sorted(fitted.weights.values())[1] == 1.0
    assert fitted.weights["b"] < 0.2 * fitted.weights["a"]
    (choice,) = [choice for choice in fitted.choices if choice.kept]
    assert choice.weights


def test_domains_that_are_alike_have_no_weights():
    """Where it does not matter which domain a neighbour is of, weights are tried and not kept."""
    held_out = world(8, n=4_000)
    domains = np.random.default_rng(0).integers(0, 2, held_out.values.shape).astype(np.int16)
    fitted = fit(replace(held_out, domains=domains, names=("a", "b")), gate="fixed")
    assert fitted.weights == {}
    assert [choice.kept for choice in fitted.choices if choice.weights] == [False]


# --- what is far must not lead


@given(seed=st.integers(0, 10_000), n=st.integers(1, 300), rising=st.booleans(), ties=st.booleans())
def test_a_larger_distance_never_raises_lambda(seed, n, rising, ties):
    """Under either gate, also where it does in what was fitted on; by distance, λ is 0 beyond all that was seen."""
    rng = np.random.default_rng(seed)
    nearest = rng.gamma(3.0, 20.0, n)
    nearest = np.round(nearest, -1) if ties else nearest
    helps = rng.random(n) < (nearest / 200.0 if rising else np.exp(-nearest / 50.0))
    gains = np.where(helps, rng.uniform(0.0, 5.0, n), rng.uniform(-1.0, 0.0, n))
    asked = np.sort(np.concatenate([rng.uniform(0.0, 1_000.0, 50), nearest[:20], [1e9]]))
    by_distance = fit_distance(nearest, gains)
    found = gate_lambdas(by_distance, {}, asked)
    assert (np.diff(found) <= 0.0).all()
    assert found[-1] == 0.0
    assert list(by_distance.distances) == sorted(set(by_distance.distances))
    other = rng.standard_normal(n)
    gate = fit_logistic({"nearest": remoteness(nearest, 15.0), "agreement": other}, gains)
    found = gate_lambdas(gate, {"nearest": remoteness(asked, 15.0), "agreement": np.zeros(len(asked))}, asked)
    assert (np.diff(found) <= 1e-12).all()


def test_text_from_elsewhere_is_left_to_the_model():
    """Fitted where the neighbours help near by, both gates give them next to nothing at distances that are two or three times as large."""
    held_out = world(9, lmbda=lambda nearest: 0.6 / (1.0 + np.exp((nearest - 110.0) / 8.0)))
    for kind in ("distance", "logistic"):
        fitted = fit(held_out, gate=kind)
        features = {name: np.full(3, 0.5) for name in FEATURES}
        asked = np.array([30.0, 300.0, 500.0])
        features["nearest"] = remoteness(asked, fitted.temperature)
        near, far, farther = gate_lambdas(fitted.gate, features, asked)
        assert near > 0.2
        assert far < 0.02
        assert farther <= far


# --- what comes at the edges


@pytest.mark.parametrize("gate", ["auto", "fixed", "distance", "logistic"])
def test_copies_at_distance_zero(gate):
    """All nearest neighbours at the same place, and right: λ is as large as it may be, and nothing is divided by 0."""
    n = 300
    gold = np.arange(n) % 7
    view = LmView(np.zeros(n, np.int64), np.full(n, -2.0), np.full(n, 2.0))
    held_out = HeldOut(np.zeros((n, 3), np.float32), np.repeat(gold[:, None], 3, 1).astype(np.int32), gold, np.full(n, -3.0), view)
    fitted = fit(held_out, gate=gate)
    assert fitted.k == 1
    assert fitted.perplexity["mixed"] < 1.1
    assert 0.0 < fitted.temperature < np.inf


@pytest.mark.parametrize("gate", ["auto", "fixed", "distance", "logistic"])
def test_neighbours_that_tell_nothing_get_no_weight(gate):
    """The gold token is never among the neighbours: λ is 0, or next to it, and the perplexity that of the LM."""
    held_out = world(10, n=500)
    held_out = replace(held_out, values=np.full_like(held_out.values, VOCAB))
    fitted = fit(held_out, gate=gate)
    assert fitted.lmbda == 0
    assert fitted.perplexity["mixed"] == pytest.approx(fitted.perplexity["lm"], rel=2e-2)
    assert gate != "auto" or fitted.gate is None


def test_before_knows_the_model_alone():
    """Whether a search will pay is told by features of the LM only: the share of positions where it made the token more probable."""
    held_out = world(11, n=6_000)
    sure = held_out.view.entropy < np.median(held_out.view.entropy)
    # Where the LM is sure, the neighbours are made useless.
    values = np.where(sure[:, None], VOCAB, held_out.values).astype(np.int32)
    before = fit(replace(held_out, values=values)).before
    assert before.features == ("lm_max", "lm_entropy")
    view = held_out.view
    shares = gate_lambdas(before, {"lm_max": view.log_max, "lm_entropy": view.entropy}, held_out.distances[:, 0])
    assert shares[sure].mean() < 0.5 * shares[~sure].mean()
    assert fit(held_out, gate="fixed").before is None


def test_parts_are_joined_in_order():
    """Parts one after the other are the whole."""
    whole = ragged(12, n=50)
    parts = [
        HeldOut(whole.distances[at], whole.values[at], whole.gold[at], whole.log_p_lm[at], whole.view[at], whole.domains[at])
        for at in (slice(0, 20), slice(20, 21), slice(21, 50))
    ]
    together = joined(parts, whole.names)
    assert together.names == whole.names
    for name in ("distances", "values", "gold", "log_p_lm", "domains"):
        np.testing.assert_array_equal(getattr(together, name), getattr(whole, name))
    for name in ("top", "log_max", "entropy"):
        np.testing.assert_array_equal(getattr(together.view, name), getattr(whole.view, name))
