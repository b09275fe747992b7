"""What a datastore does to the tokens of a text, added up piece by piece: sums and counts, never an array of all tokens. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GAIN_EDGES",
    "PER_MILLION",
    "DomainPart",
    "FrequencyBucket",
    "GainBin",
    "OfDomains",
    "Tally",
    "frequency_buckets",
    "perplexity_of",
]

GAIN_EDGES = (-4.0, -2.0, -1.0, -0.5, -0.25, -0.1, -0.01, 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Where the bins of log2(p / p_LM) meet. Finest around 0: most tokens lose a little, a few gain much."""

PER_MILLION = (0, 1, 10, 100, 1_000, 10_000, 100_000)
"""Where the buckets of a token's frequency meet, in occurrences per million entries. What never occurs is a bucket by itself."""

Array = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GainBin:
    """Tokens whose log2(p / p_LM) is from `low` to under `high`. bits: what they add to the mean gain of all tokens, in bits a token."""

    low: float
    high: float
    tokens: int
    bits: float


@dataclass(frozen=True, slots=True)
class FrequencyBucket:
    """Tokens that occur from `low` to under `high` times among a million entries; 0 and 0: never. lm, mixed: their perplexity."""

    low: float
    high: float
    tokens: int
    lm: float
    mixed: float


@dataclass(frozen=True, slots=True)
class DomainPart:
    """What one domain does. entries: of it that are searched. share: of the neighbours' weight, where a token has any.

    zero: share of tokens that none of its neighbours has. knn, mixed: perplexity if only its neighbours of those found counted, at
    the same λ; where it has none, p is p_LM.
    """

    entries: int
    share: float
    zero: float
    knn: float
    mixed: float


@dataclass(frozen=True, slots=True)
class OfDomains:
    """What the neighbours of each of m domains say of n tokens. All (n, m).

    share: float64, of the neighbours' weight; a row sums to 1, or to 0 where nothing was found. p: float64, of the token, if only this
    domain's neighbours counted. found: bool, whether it has any.
    """

    share: Array
    p: Array
    found: NDArray[np.bool_]

    @classmethod
    def of_none(cls, n: int) -> "OfDomains":
        """Where no domain is searched."""
        return cls(np.zeros((n, 0)), np.zeros((n, 0)), np.zeros((n, 0), np.bool_))

    @classmethod
    def of_one(cls, found: NDArray[np.bool_], log_p_knn: Array) -> "OfDomains":
        """Where all entries are of one domain. found: (n,) whether there is a neighbour; log_p_knn: (n,)."""
        return cls(found[:, None].astype(np.float64), np.exp(log_p_knn)[:, None], found[:, None])

    @classmethod
    def of(
        cls, numbers: Ids, distances: NDArray[np.float32], weights: Array, is_gold: NDArray[np.bool_], *, temperature: float, m: int
    ) -> "OfDomains":
        """All (n, k). numbers: each neighbour's domain, any number under m where there is none. distances: ascending, inf where there
        is none. weights: each neighbour's share of p_kNN. is_gold: whether it has the token."""
        n = len(numbers)
        cells = (np.arange(n)[:, None] * m + numbers).reshape(-1)
        flat = distances.reshape(-1).astype(np.float64)
        nearest = np.full(n * m, np.inf)
        nearest[cells[::-1]] = flat[::-1]  # of those that share a cell, the one written last stays: the nearest
        there = np.isfinite(flat)
        # Counted from the domain's own nearest: beside a nearer domain, the weights of a far one may all be 0.
        with np.errstate(invalid="ignore"):  # inf - inf where there is none
            own = np.where(there, np.exp((nearest[cells] - flat) / temperature), 0.0)
        total = np.bincount(cells, own, n * m)
        gold = np.bincount(cells, np.where(is_gold.reshape(-1), own, 0.0), n * m)
        share = np.asarray(np.bincount(cells, weights.reshape(-1), n * m), np.float64)
        found = total > 0.0
        p = gold / np.where(found, total, 1.0)
        return cls(share.reshape(n, m), p.reshape(n, m), found.reshape(n, m))


def frequency_buckets(counts: Ids) -> Ids:
    """The bucket of each token: 0 for what never occurs, i + 1 from PER_MILLION[i] on. counts: (vocab,) occurrences among all entries."""
    million = 1_000_000
    buckets: Ids = np.searchsorted(np.array(PER_MILLION) * max(1, int(counts.sum())), counts * million, side="right")
    return np.where(counts > 0, buckets, 0)


def perplexity_of(log_p: float, tokens: int) -> float:
    """exp of the mean of -log p. log_p: sum over tokens. NaN without tokens; inf where a token has p = 0."""
    if not tokens:
        return math.nan
    try:
        return math.exp(-log_p / tokens)
    except OverflowError:
        return math.inf


class Tally:
    """Adds up tokens.

    buckets: (vocab,) int64, of each token, as of `frequency_buckets`. domains: name → its entries, in the order of `OfDomains`' columns.
    tokens: how many so far. log_p: sums of log p in nats, of `lm`, `knn` and `mixed`. zero: tokens that no neighbour has.
    """

    def __init__(self, buckets: Ids, domains: Mapping[str, int]) -> None:
        self._buckets, self._domains = buckets, dict(domains)
        self.tokens = 0
        self.log_p = {"lm": 0.0, "knn": 0.0, "mixed": 0.0}
        self.zero = 0
        self._lmbda = 0.0
        self._found = 0  # tokens with a neighbour
        self._covered = {"lm": 0.0, "knn": 0.0}  # log p of tokens that a neighbour has
        self._changed = {"helped": [0.0, 0.0], "hurt": [0.0, 0.0]}  # tokens and bits
        self._gains = np.zeros((2, len(GAIN_EDGES) + 1))  # tokens and bits
        self._of_frequency = np.zeros((3, len(PER_MILLION) + 1))  # tokens, log p_LM, log p
        self._of_domain = np.zeros((4, len(domains)))  # weight, tokens with p_kNN 0, log p_kNN, log p

    def add(self, gold: Ids, log_p_lm: Array, log_p_knn: Array, log_p: Array, lmbda: Array, of_domains: OfDomains) -> None:
        """n more tokens. All (n,), natural logs; lmbda: 0 where nothing was found."""
        self.tokens += len(gold)
        self._lmbda += float(lmbda.sum())
        covered = log_p_knn > -np.inf
        self.zero += int(np.count_nonzero(~covered))
        for name, values in (("lm", log_p_lm), ("knn", log_p_knn), ("mixed", log_p)):
            self.log_p[name] += float(values.sum())
        for name, values in (("lm", log_p_lm), ("knn", log_p_knn)):
            self._covered[name] += float(values[covered].sum())
        bits = _gain_bits(log_p, log_p_lm)
        for name, changed in (("helped", bits > 0.0), ("hurt", bits < 0.0)):
            self._changed[name][0] += np.count_nonzero(changed)
            self._changed[name][1] += float(bits[changed].sum())
        _add_sums(self._gains, np.searchsorted(GAIN_EDGES, bits, side="right"), bits)
        _add_sums(self._of_frequency, self._buckets[gold], log_p_lm, log_p)
        self._found += int(np.count_nonzero(of_domains.found.any(axis=1)))
        with np.errstate(divide="ignore"):
            knn = np.log(of_domains.p)  # (n, m)
            mixed = np.logaddexp(np.log(lmbda)[:, None] + knn, (np.log1p(-lmbda) + log_p_lm)[:, None])
        mixed = np.where(of_domains.found, mixed, log_p_lm[:, None])
        self._of_domain += [of_domains.share.sum(axis=0), np.isneginf(knn).sum(axis=0), knn.sum(axis=0), mixed.sum(axis=0)]

    @property
    def perplexity(self) -> dict[str, float]:
        """Of `lm`, `knn` and `mixed`."""
        return {name: perplexity_of(total, self.tokens) for name, total in self.log_p.items()}

    @property
    def covered(self) -> dict[str, float]:
        """Perplexity of `lm` and `knn` over the tokens that a neighbour has."""
        return {name: perplexity_of(total, self.tokens - self.zero) for name, total in self._covered.items()}

    @property
    def lmbda(self) -> float:
        """Mean λ."""
        return _mean(self._lmbda, self.tokens)

    def changed(self, name: str) -> tuple[float, float]:
        """Share of tokens that were `helped` or `hurt`, and by how much on average, in bits."""
        n, bits = self._changed[name]
        return _mean(n, self.tokens), _mean(bits, n)

    def histogram(self) -> tuple[GainBin, ...]:
        """All bins, lowest first."""
        edges = pairwise((-math.inf, *GAIN_EDGES, math.inf))
        columns = zip(edges, self._gains.T.tolist(), strict=True)
        return tuple(GainBin(low, high, int(n), _mean(bits, self.tokens)) for (low, high), (n, bits) in columns)

    def frequency(self) -> tuple[FrequencyBucket, ...]:
        """All buckets, rarest first."""
        edges = ((0.0, 0.0), *pairwise((*map(float, PER_MILLION), math.inf)))
        columns = zip(edges, self._of_frequency.T.tolist(), strict=True)
        return tuple(
            FrequencyBucket(low, high, int(n), perplexity_of(lm, int(n)), perplexity_of(mixed, int(n)))
            for (low, high), (n, lm, mixed) in columns
        )

    def domains(self) -> dict[str, DomainPart]:
        """Each domain by name."""
        n = self.tokens
        return {
            name: DomainPart(entries, _mean(weight, self._found), _mean(zero, n), perplexity_of(knn, n), perplexity_of(mixed, n))
            for (name, entries), (weight, zero, knn, mixed) in zip(self._domains.items(), self._of_domain.T.tolist(), strict=True)
        }


def _gain_bits(log_p: Array, log_p_lm: Array) -> Array:
    """log2(p / p_LM), 0 where they are the same, also where both are 0."""
    with np.errstate(invalid="ignore"):
        return np.where(log_p == log_p_lm, 0.0, (log_p - log_p_lm) / math.log(2.0))


def _add_sums(table: Array, columns: Ids, *values: Array) -> None:
    """Adds to a table (1 + values, columns): to its first row how many there are of each column, to the others their values."""
    table[0] += np.bincount(columns, minlength=table.shape[1])
    for row, of_row in zip(table[1:], values, strict=True):
        row += np.bincount(columns, of_row, table.shape[1])


def _mean(total: float, n: float) -> float:
    """0 for none."""
    return total / n if n else 0.0
