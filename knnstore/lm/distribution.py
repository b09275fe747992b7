"""Neighbours → distribution. Pure: arrays in, arrays out; no files, no model.

p_kNN(v) = sum over neighbours with value v of softmax(-distance / temperature + log weight); p = λ p_kNN + (1 - λ) p_LM
(Khandelwal et al. 2020, section 2). Sums are taken in float64. A neighbour with value -1 is none.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knnstore.errors import InvalidArgumentError

__all__ = ["TokenSums", "check_lambda", "check_temperature", "neighbor_weights", "token_sums"]

Array = NDArray[np.float64]


def check_temperature(temperature: float) -> float:
    """A temperature as a float. Raises InvalidArgumentError unless it is finite and over 0."""
    value = _number(temperature)
    if not (np.isfinite(value) and value > 0):
        raise InvalidArgumentError(f"temperature {temperature}: use a number over 0, in units of squared distance.")
    return value


def check_lambda(lmbda: float) -> float:
    """λ as a float. Raises InvalidArgumentError unless it is from 0 to 1."""
    value = _number(lmbda)
    if not 0.0 <= value <= 1.0:
        raise InvalidArgumentError(f"lambda {lmbda}: use a number from 0 (the LM alone) to 1 (the neighbours alone).")
    return value


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # what is no number is refused by the caller
    except (TypeError, ValueError):
        return np.nan


def neighbor_weights(
    distances: NDArray[np.float32], values: NDArray[np.int32], *, temperature: float, log_weights: NDArray[np.float32] | None = None
) -> Array:
    """softmax of -distance / temperature (+ log weight) over the neighbours of each query.

    All (n, k): distances float32, squared L2; values int32, -1 where fewer than k were found; log_weights float32 or None.
    Returns (n, k) float64; rows sum to 1, or to 0 where nothing was found.
    """
    temperature = check_temperature(temperature)
    known = np.where(values >= 0, distances, np.float32(np.inf))
    nearest = known.min(axis=1, keepdims=True, initial=np.inf)
    # Counted from the nearest, since a small temperature may make all of them infinite.
    scores = np.subtract(np.where(np.isfinite(nearest), nearest, np.float32(0.0)), known, dtype=np.float64)  # (n, k)
    with np.errstate(over="ignore"):
        scores /= temperature
    if log_weights is not None:
        scores += log_weights
        top = scores.max(axis=1, keepdims=True, initial=-np.inf)
        scores -= np.where(np.isfinite(top), top, 0.0)
    weights: Array = np.exp(scores, out=scores)
    total = weights.sum(axis=1, keepdims=True)
    weights /= np.where(total > 0.0, total, 1.0)
    return weights


@dataclass(frozen=True, slots=True)
class TokenSums:
    """p_kNN of n queries, for the tokens that their neighbours have.

    rows: (m,) int64, the query; tokens: (m,) int64; p: (m,) float64, over 0. Sorted by (row, token), each pair once.
    """

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    p: Array
    n: int

    def of(self, tokens: ArrayLike) -> Array:
        """p_kNN of one token for each query: (n,)."""
        hits = self.tokens == np.asarray(tokens, np.int64)[self.rows]
        out = np.zeros(self.n)
        out[self.rows[hits]] = self.p[hits]
        return out

    def entropy(self) -> Array:
        """Entropy of each query's p_kNN in nats: (n,), 0 where nothing was found."""
        return np.maximum(-np.bincount(self.rows, self.p * np.log(self.p), minlength=self.n), 0.0)

    def largest(self) -> Array:
        """The largest p_kNN of each query: (n,), 0 where nothing was found."""
        out = np.zeros(self.n)
        starts = np.flatnonzero(np.diff(self.rows, prepend=-1))
        if len(starts):
            out[self.rows[starts]] = np.maximum.reduceat(self.p, starts)
        return out

    def check(self, vocab_size: int) -> None:
        """Raises InvalidArgumentError for a token that is outside the vocabulary."""
        if len(self.tokens) and int(self.tokens.max()) >= vocab_size:
            raise InvalidArgumentError(
                f"token {int(self.tokens.max())}: the vocabulary has {vocab_size}. The model is not the datastore's."
            )

    def dense(self, vocab_size: int) -> Array:
        """(n, vocab_size), 0 for a token that no neighbour has. Raises InvalidArgumentError for one that is outside the vocabulary."""
        self.check(vocab_size)
        out = np.zeros((self.n, vocab_size))
        out[self.rows, self.tokens] = self.p
        return out


def token_sums(values: NDArray[np.int32], weights: Array) -> TokenSums:
    """Weights of neighbours summed by value.

    values: (n, k) int32, -1 for none. weights: (n, k) float64, as of `neighbor_weights`. A token whose weights are all 0 is left out.
    """
    n, k = values.shape
    if not values.size:
        return TokenSums(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), n)
    bits = max(1, (k - 1).bit_length())
    # One sort of whole numbers, token above place, is several times faster than a stable sort of tokens with their places.
    kind = np.int32 if int(values.max(initial=0)) >> (31 - bits) == 0 else np.int64
    order = np.sort((values.astype(kind) << bits) | np.arange(k, dtype=kind), axis=1).reshape(-1)
    tokens = order >> bits
    begins = np.ones(n * k, bool)
    np.not_equal(tokens[1:], tokens[:-1], out=begins[1:])
    begins[::k] = True
    starts = np.flatnonzero(begins)
    places = (order & ((1 << bits) - 1)) + np.repeat(np.arange(n) * k, k)
    sums = np.add.reduceat(weights.reshape(-1)[places], starts)
    kept = sums > 0.0  # a value of -1 has weight 0
    starts = starts[kept]
    return TokenSums(starts // k, tokens[starts].astype(np.int64), sums[kept], n)
