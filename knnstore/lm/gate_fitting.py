"""Gates fitted by what they make of held-out tokens: λ by distance, and a logistic regression. Pure: arrays in, arrays out.

A token with neighbours has a gain, p_kNN / p_LM - 1: with λ its probability is p_LM (1 + λ gain), so that the mean of log(1 + λ gain) is
what a gate is to make large. A larger distance of the nearest neighbour never raises λ: text that is far from everything a datastore has
must not be led by it.
"""

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from knnstore.lm.gates import logistic
from knnstore.storage.calibration import BY_DISTANCE, LOGISTIC, Gate

__all__ = ["best_lambdas", "fit_distance", "fit_logistic"]

MOST_LAMBDA = 0.99  # a λ of 1 would make tokens impossible that no neighbour has
BUCKETS = 16
HALVINGS = 4  # of the last bucket, each time of its farther half: λ has to fall where little was seen
PRIOR = 1.0  # weights of standardized features are drawn to 0 as by one normal deviate each: little, beside thousands of tokens
STEPS = 100
MOST_DAMPING = 1e12  # where a step is of no size any more
NEAREST = "nearest"

Array = NDArray[np.float64]


def best_lambdas(gains: Array) -> Array:
    """The λ from 0 to MOST_LAMBDA under which the mean of log(1 + λ gain) is largest. gains: (n, ...); returns (...)."""
    columns = gains.reshape(len(gains), -1)
    # The function is concave: its slope at the ends tells where the best λ is one of them.
    ends = [(columns / (1.0 + end * columns)).mean(axis=0) for end in (0.0, MOST_LAMBDA)]
    found = np.where(ends[0] <= 0.0, 0.0, MOST_LAMBDA)
    inside = np.flatnonzero((ends[0] > 0.0) & (ends[1] < 0.0))
    columns = columns[:, inside]
    low, high, at = np.zeros(len(inside)), np.full(len(inside), MOST_LAMBDA), np.full(len(inside), 0.25)
    for _ in range(60):
        share = columns / (1.0 + at * columns)
        slope, bend = share.mean(axis=0), np.square(share).mean(axis=0)  # the second derivative is -bend
        low, high = np.where(slope > 0.0, at, low), np.where(slope > 0.0, high, at)
        step = at + slope / bend
        before, at = at, np.where((step > low) & (step < high), step, (low + high) / 2.0)
        if not len(at) or np.abs(at - before).max() < 1e-8:
            break
    found[inside] = at
    return found.reshape(gains.shape[1:])


def fit_distance(nearest: NDArray[np.floating], gains: Array) -> Gate:
    """λ by the distance of the nearest neighbour (Drozdov et al. 2022): the best of each quantile bucket, never rising, 0 beyond all.

    nearest, gains: (n,) of tokens with neighbours, n >= 1. Between the medians of two buckets λ is interpolated; from the farthest
    distance that was seen it falls to 0 over as much again as it is away from the last median.
    """
    order = np.argsort(nearest, kind="stable")
    distances, gains = nearest[order].astype(np.float64), gains[order]
    blocks: list[tuple[int, int, float]] = []  # first, stop, λ
    shares = [*np.arange(BUCKETS) / BUCKETS, *(1.0 - 1.0 / BUCKETS / 2.0 ** np.arange(1, HALVINGS + 1)), 1.0]
    bounds = sorted({round(share * len(order)) for share in shares})
    for first, stop in itertools.pairwise(bounds):
        block = (first, stop, float(best_lambdas(gains[first:stop])))
        while blocks and blocks[-1][2] <= block[2]:  # pooled, so that λ never rises: with a concave function that is the best such
            begin = blocks.pop()[0]
            block = (begin, stop, float(best_lambdas(gains[begin:stop])))
        blocks.append(block)
    points: dict[float, float] = {}
    for first, stop, lmbda in blocks:
        middle = float(np.median(distances[first:stop]))
        points[middle] = min(lmbda, points.get(middle, 1.0))
    last, far = max(points), float(distances[-1])
    points[far] = points[last]
    points[far + max(far - last, 0.1 * far, 1e-6)] = 0.0
    return Gate(kind=BY_DISTANCE, distances=tuple(map(_short, points)), lambdas=tuple(map(_short, points.values())))


def fit_logistic(features: Mapping[str, Array], gains: Array) -> Gate:
    """λ = sigmoid(bias + weights * features), by maximum likelihood of the mixture.

    features: (n,) each, finite; gains: (n,), of tokens with neighbours, n >= 1. The weight of `nearest` is 0 at most.
    """
    names = tuple(features)
    table = np.stack([features[name] for name in names], axis=1)  # (n, p)
    mean, spread = table.mean(axis=0), table.std(axis=0)
    spread = np.where(spread > 1e-9, spread, 1.0)
    inputs = np.concatenate([np.ones((len(table), 1)), (table - mean) / spread], axis=1)  # (n, 1 + p)
    free = np.ones(inputs.shape[1], bool)
    weights = _maximize(inputs, gains)
    if NEAREST in names and weights[1 + names.index(NEAREST)] > 0.0:
        free[1 + names.index(NEAREST)] = False
        weights = np.zeros(inputs.shape[1])
        weights[free] = _maximize(inputs[:, free], gains)
    slopes = weights[1:] / spread
    return Gate(kind=LOGISTIC, features=names, weights=tuple(map(_short, slopes)), bias=_short(weights[0] - slopes @ mean))


def _maximize(inputs: Array, gains: Array) -> Array:
    """Weights (p,) of inputs (n, p), of which the first is 1, by Newton's method with damping."""
    penalty = np.full(inputs.shape[1], PRIOR)
    penalty[0] = 1e-6

    def value(weights: Array) -> float:
        with np.errstate(divide="ignore"):  # λ = 1 and a token that no neighbour has: as bad as can be, and so not taken
            return float(np.log1p(logistic(inputs @ weights) * gains).sum() - 0.5 * penalty @ np.square(weights))

    start = float(np.clip(best_lambdas(gains), 1e-3, 1.0 - 1e-3))
    weights = np.zeros(inputs.shape[1])
    weights[0] = np.log(start / (1.0 - start))
    best, damping = value(weights), 1.0
    for _ in range(STEPS):
        lmbda = logistic(inputs @ weights)
        posterior = lmbda * (1.0 + gains) / (1.0 + lmbda * gains)  # that a token came from the neighbours
        slope = inputs.T @ (posterior - lmbda) - penalty * weights
        # The likelihood of a mixture is not concave everywhere: where it is not, the damping grows until the step climbs.
        curve = lmbda * (1.0 - lmbda) - posterior * (1.0 - posterior)
        bend = (inputs * curve[:, None]).T @ inputs + np.diag(penalty)
        reached, tried = -np.inf, weights
        while reached < best and damping < MOST_DAMPING:
            damped = bend + damping * np.eye(len(bend))
            try:
                np.linalg.cholesky(damped)  # which fails where it is not positive definite
                tried = weights + np.linalg.solve(damped, slope)
                reached = value(tried)
            except np.linalg.LinAlgError:
                pass
            damping *= 4.0
        if reached < best:
            return weights
        gained, weights, best, damping = reached - best, tried, reached, max(damping / 40.0, 1e-9)
        if gained < 1e-9 * max(1.0, abs(best)):
            return weights
    return weights


def _short(number: float) -> float:
    """Nine digits: what is kept in a manifest."""
    return float(f"{number:.9g}")
