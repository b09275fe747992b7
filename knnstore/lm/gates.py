"""Gates: λ for each query, from what is known of it and of its neighbours. Pure: arrays in, arrays out."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import InvalidArgumentError
from knnstore.storage.calibration import BY_DISTANCE, Gate

__all__ = ["FEATURES", "LM_FEATURES", "gate_lambdas", "logistic", "nearness"]

LM_FEATURES = ("lm_max", "lm_entropy")
"""What is known before a search: log of the largest p_LM; entropy of p_LM in nats."""

FEATURES = ("nearest", "knn_entropy", "knn_max", *LM_FEATURES, "agreement")
"""What is known after it: `nearness`; entropy of p_kNN over tokens in nats; the largest p_kNN; p_kNN of the LM's first token."""

CLOSEST = 1e-3  # of the temperature: nearer than this is the same, or the logarithm of a copy's distance would rule over all else

Array = NDArray[np.float64]


def nearness(nearest: NDArray[np.floating], temperature: float) -> Array:
    """The feature `nearest`: log of the nearest neighbour's distance over the temperature. nearest: (n,) squared L2, inf for none."""
    return np.log(np.maximum(np.asarray(nearest, np.float64) / temperature, CLOSEST))


def logistic(scores: Array) -> Array:
    """1 / (1 + exp(-score)), without overflow."""
    below = np.exp(-np.abs(scores))
    return np.where(scores >= 0.0, 1.0, below) / (1.0 + below)


def gate_lambdas(gate: Gate, features: Mapping[str, Array], nearest: NDArray[np.floating]) -> Array:
    """λ of each query, (n,) float64; 0 where it has no neighbour.

    features: (n,) each, those that the gate names. nearest: (n,) squared L2 of the nearest neighbour, inf for none.
    Raises InvalidArgumentError for a feature that is not there.
    """
    found = np.isfinite(nearest)
    if gate.kind == BY_DISTANCE:
        distances = np.where(found, nearest, gate.distances[-1]).astype(np.float64)
        return np.where(found, np.interp(distances, gate.distances, gate.lambdas), 0.0)
    unknown = [name for name in gate.features if name not in features]
    if unknown:
        raise InvalidArgumentError(f"the gate needs {', '.join(unknown)}, which is not there. Give λ with --lambda (lmbda=).")
    scores = np.full(len(nearest), gate.bias)
    with np.errstate(invalid="ignore"):  # infinite where nothing was found
        for name, weight in zip(gate.features, gate.weights, strict=True):
            scores += weight * features[name]
    return np.where(found, logistic(np.where(found, scores, 0.0)), 0.0)
