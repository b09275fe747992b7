"""Gates: λ for each query, from what is known of it and of its neighbours. Pure: arrays in, arrays out."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import InvalidArgumentError
from knnstore.storage.calibration import BY_DISTANCE, Gate

__all__ = ["FEATURES", "LM_FEATURES", "gate_lambdas", "logistic", "remoteness"]

LM_FEATURES = ("lm_max", "lm_entropy")
"""What is known before a search: log of the largest p_LM; entropy of p_LM in nats."""

FEATURES = ("nearest", "knn_entropy", "knn_max", *LM_FEATURES, "agreement")
"""What is known after it: `remoteness`; entropy of p_kNN over tokens in nats; the largest p_kNN; p_kNN of the LM's first token."""

FAR = 10.0  # temperatures: a unit of distance in which the feature `nearest` is around 1

Array = NDArray[np.float64]


def remoteness(nearest: NDArray[np.floating], temperature: float) -> Array:
    """The feature `nearest`: cube of the nearest neighbour's distance in units of FAR temperatures. nearest: (n,) squared L2, inf for none.

    A cube, since λ has to fall steeply beyond what is usual: there is little of that in text that a gate is fitted on, and much in text of
    another kind. Of a store of Leviathan with a gate fitted on its last tenth, Oliver Twist has 4.0% more perplexity if this is the log
    of the distance, 1.9% if the distance, 1.0% if its square, 0.7% if its cube; Leviathan itself gains 14.4 to 14.5% under each.
    """
    cube: Array = (np.asarray(nearest, np.float64) / (FAR * temperature)) ** 3
    return cube


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
