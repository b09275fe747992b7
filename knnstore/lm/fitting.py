"""Temperature, λ, k, domain weights and a gate, fitted on held-out text by what they make of its tokens. Pure: arrays in, arrays out.

A choice is judged on folds that it was not fitted on. A fold is a run of consecutive tokens: those beside each other are alike, and one
must not vouch for the other. What is simpler stays unless the other is better by more than WORTH.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from knnstore.lm.distribution import neighbor_weights, token_sums
from knnstore.lm.gate_fitting import best_lambdas, fit_distance, fit_logistic
from knnstore.lm.gates import FEATURES, LM_FEATURES, gate_lambdas
from knnstore.lm.mixing import LmView, features_of
from knnstore.storage.calibration import BY_DISTANCE, LOGISTIC, Gate

__all__ = ["FIXED", "GATES", "Choice", "Fitted", "HeldOut", "Surface", "fit", "gold_probabilities", "joined", "surface", "typical_nearest"]

FIXED = "fixed"
BEFORE = "before"  # the logistic gate that knows the LM alone: whether a search will pay
GATES = ("auto", FIXED, BY_DISTANCE, LOGISTIC)

TEMPERATURES = 2.0 ** np.arange(-6.0, 3.01, 0.25)  # times the typical distance of the nearest neighbour
FINER = 2.0 ** np.arange(-0.1875, 0.19, 0.0625)  # times the best of those
WIDER = 2.0 ** np.arange(-0.5, 0.51, 0.125)  # times it, once domains have weights
LAMBDAS = np.linspace(0.0, 0.95, 96)
FOLDS = 5
WORTH = 1e-3  # of the perplexity
PAYS = 0.1  # nats by which a search makes the token that comes more probable, to have been worth it
NEAR_BEST = 3  # temperatures on each side of the best that are tried, and that folds may choose from
SPARSE, LEAST_ROUGH = 8, 1_024  # one position of so many tells which temperatures to try, where it leaves this many
CELLS = 1 << 20  # (query, neighbour) cells at a time: what fits the cache
MOST_DOMAINS = 64  # with more, most have too few neighbours to weigh them by
SPREAD = 2.0  # of log weights: drawn to 0 as by one deviate of this size each

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Positions to fit on, in the order of the text.

    distances, values: (n, k) of their neighbours, float32 (ascending, inf for none) and int32 (-1 for none); gold: (n,) int64 token
    ids; log_p_lm: (n,) float64, of the gold tokens. view: of the LM; needed for logistic gates. domains: (n, k) integers, places in
    `names` of each neighbour's domain (any for none); None where there are no domains to weigh.
    """

    distances: NDArray[np.float32]
    values: NDArray[np.int32]
    gold: NDArray[np.int64]
    log_p_lm: Array
    view: LmView | None = None
    domains: NDArray[np.signedinteger] | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.gold)

    def gains(self, p_knn: Array) -> Array:
        """p_kNN / p_LM - 1 of the gold tokens; 0 where nothing was found, since p is p_LM there. p_knn: (n, ...)."""
        lm = np.exp(np.maximum(self.log_p_lm, -700.0)).reshape(-1, *[1] * (p_knn.ndim - 1))
        found = (self.values[:, 0] >= 0).reshape(lm.shape)
        gains: Array = np.where(found, p_knn / lm - 1.0, 0.0)
        return gains


@dataclass(frozen=True, slots=True)
class Surface:
    """Perplexity over temperature and a fixed λ: temperatures (m,), lambdas (l,), perplexity (m, l), all float64."""

    temperatures: Array
    lambdas: Array
    perplexity: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to mix that was tried. gate: `fixed`, `distance` or `logistic`. weights: whether domains have weights of their own.

    perplexity: on folds that it was not fitted on. kept: whether it is the one that was chosen.
    """

    k: int
    gate: str
    weights: bool
    perplexity: float
    kept: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What was chosen, and what was tried.

    lmbda: the best fixed one, also where there is a gate. mean_lambda: over the tokens it was fitted on. perplexity: {lm, knn, mixed}
    of those; knn is infinite where the neighbours of one of them do not have it. choices: in the order in which they were tried.
    """

    k: int
    temperature: float
    lmbda: float
    mean_lambda: float
    gate: Gate | None
    before: Gate | None
    weights: dict[str, float]
    perplexity: dict[str, float]
    choices: tuple[Choice, ...]
    surface: Surface


def joined(parts: Sequence[HeldOut], names: tuple[str, ...]) -> HeldOut:
    """Parts one after the other. names: of domains. Needs one part, and takes twice the memory for a while."""
    views = [part.view for part in parts if part.view is not None]
    domains = [part.domains for part in parts if part.domains is not None]
    return HeldOut(
        distances=np.concatenate([part.distances for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        gold=np.concatenate([part.gold for part in parts]),
        log_p_lm=np.concatenate([part.log_p_lm for part in parts]),
        view=LmView.joined(views) if views else None,
        domains=np.concatenate(domains) if domains else None,
        names=names,
    )


def typical_nearest(held_out: HeldOut) -> float:
    """Median distance of the nearest neighbour: what temperatures are counted in. Needs a position with a neighbour."""
    nearest, every = (part[np.isfinite(part)] for part in (held_out.distances[:, 0], held_out.distances))
    # A corpus of copies has its neighbours at distance 0, which is no scale for those further off.
    return max(float(np.median(nearest)), 1e-3 * float(np.median(every)), 1e-6)


def gold_probabilities(held_out: HeldOut, temperatures: Array, ends: Sequence[int], *, log_weights: Array | None = None) -> Array:
    """p_kNN of the gold tokens by their first `end` neighbours alone, for each temperature and end.

    temperatures: (m,). ends: ascending, each from 1 to k. log_weights: (len(names),). Returns (n, m, len(ends)) float64.
    """
    n, most = len(held_out), ends[-1]
    out = np.zeros((n, len(temperatures), len(ends)))
    starts = [0, *ends[:-1]]
    step = max(1, CELLS // most)
    for at in range(0, n, step):
        some = slice(at, at + step)
        distances = held_out.distances[some, :most].astype(np.float64)
        nearest = distances[:, :1]
        distances -= np.where(np.isfinite(nearest), nearest, 0.0)  # from the nearest, or a small temperature makes all weights 0
        rows, columns = np.nonzero(held_out.values[some, :most] == held_out.gold[some, None])  # few of all
        cells = rows * len(ends) + np.searchsorted(ends, columns, side="right")
        extra = None if log_weights is None or held_out.domains is None else log_weights[held_out.domains[some, :most]]
        for i, temperature in enumerate(temperatures.tolist()):
            scores = distances / -temperature
            if extra is not None:
                scores += extra
            weights = np.exp(scores, out=scores)
            total = np.add.reduceat(weights, starts, axis=1).cumsum(axis=1)
            of_gold = np.bincount(cells, weights[rows, columns], minlength=total.size).reshape(total.shape).cumsum(axis=1)
            np.divide(of_gold, total, out=out[some, i], where=total > 0.0)
    return out


def surface(held_out: HeldOut, temperatures: Array, lambdas: Array, *, log_weights: Array | None = None) -> Surface:
    """Perplexity for each temperature and each fixed λ."""
    gains = held_out.gains(gold_probabilities(held_out, temperatures, [held_out.values.shape[1]], log_weights=log_weights)[:, :, 0])
    base = -float(held_out.log_p_lm.mean())
    losses = [[base - float(np.log1p(lmbda * of_one).mean()) for lmbda in lambdas.tolist()] for of_one in gains.T]
    return Surface(temperatures, lambdas, np.exp(np.array(losses)))


def fit(held_out: HeldOut, *, gate: str = "auto") -> Fitted:
    """The best temperature, λ, number of neighbours, domain weights and gate. gate: one of GATES; `auto` keeps what is best unseen.

    Needs FOLDS positions, one of them with a neighbour; neighbours searched with the largest k are tried by prefixes of powers of two.
    """
    return _Fit(held_out, gate).run()


class _Fit:
    def __init__(self, held_out: HeldOut, gate: str) -> None:
        self._held_out, self._gate = held_out, gate
        self._folds = np.arange(len(held_out)) * FOLDS // len(held_out)
        self._found = held_out.values[:, 0] >= 0
        self._nearest = held_out.distances[:, 0]
        self._log_weights: Array | None = None
        self._features: dict[str, Array] = {}

    def run(self) -> Fitted:
        choices, k, temperature = self._choose_k()
        self._held_out = _prefix(self._held_out, k)
        temperature, gains = self._finer(temperature * FINER)
        kept = Choice(k=k, gate=FIXED, weights=False, perplexity=self._unseen(gains))
        choices = [kept if choice.k == k else choice for choice in choices]
        weights: dict[str, float] = {}
        if self._held_out.domains is not None and 2 <= len(self._held_out.names) <= MOST_DOMAINS:
            weighed, log_weights = self._weigh(temperature)
            choices.append(weighed)
            if _is_worth(weighed, kept):
                kept, self._log_weights = weighed, log_weights
                weights = {name: float(f"{np.exp(log):.6g}") for name, log in zip(self._held_out.names, log_weights, strict=True)}
                temperature, gains = self._finer(temperature * WIDER)
        temperature = float(f"{temperature:.6g}")
        before = gate = None
        if self._gate != FIXED:
            self._features = self._find_features(temperature)
            kinds = (BY_DISTANCE, LOGISTIC) if self._gate == "auto" else (self._gate,)
            before = self._fit_gate(BEFORE, gains, self._found)
            gated = [Choice(k=k, gate=kind, weights=bool(weights), perplexity=self._unseen(gains, kind)) for kind in kinds]
            choices += gated
            kept = gated[0] if self._gate != "auto" else _simplest([kept, *gated])
        lmbda = round(float(best_lambdas(gains)), 4)
        lambdas = np.where(self._found, lmbda, 0.0)
        if kept.gate != FIXED:
            gate = self._fit_gate(kept.gate, gains, self._found)
            lambdas = gate_lambdas(gate, self._features, self._nearest)
        log_p_lm = self._held_out.log_p_lm
        with np.errstate(divide="ignore"):
            log_p_knn = np.where(self._found, np.log1p(gains) + log_p_lm, -np.inf)
        scores = {"lm": log_p_lm, "knn": log_p_knn, "mixed": log_p_lm + np.log1p(lambdas * gains)}
        return Fitted(
            k=k,
            temperature=temperature,
            lmbda=lmbda,
            mean_lambda=float(lambdas.mean()),
            gate=gate,
            before=before,
            weights=weights,
            perplexity={name: float(np.exp(-log_p.mean())) for name, log_p in scores.items()},
            choices=tuple(replace(choice, kept=choice is kept) for choice in choices),
            surface=surface(self._held_out, typical_nearest(self._held_out) * TEMPERATURES, LAMBDAS, log_weights=self._log_weights),
        )

    def _choose_k(self) -> tuple[list[Choice], int, float]:
        """Each k with a fixed λ; the smallest that is good enough, and its temperature."""
        most = self._held_out.values.shape[1]
        ends = [*(1 << bit for bit in range((most - 1).bit_length())), most]
        temperatures = TEMPERATURES * typical_nearest(self._held_out)
        rough = _some(self._held_out, SPARSE if len(self._held_out) >= SPARSE * LEAST_ROUGH else 1)
        at = _best_temperatures(rough.gains(gold_probabilities(rough, temperatures, ends)))
        temperatures = temperatures[max(0, at.min() - NEAR_BEST) : at.max() + NEAR_BEST + 1]
        gains = self._held_out.gains(gold_probabilities(self._held_out, temperatures, ends))  # (n, m, ends)
        at = _best_temperatures(gains)  # (ends,)
        choices = []
        for i, end in enumerate(ends):
            near = slice(max(0, at[i] - NEAR_BEST), at[i] + NEAR_BEST + 1)
            choices.append(Choice(k=end, gate=FIXED, weights=False, perplexity=self._unseen(gains[:, near, i])))
        kept = _simplest(choices)
        return choices, kept.k, float(temperatures[at[choices.index(kept)]])

    def _finer(self, temperatures: Array) -> tuple[float, Array]:
        """The best of these temperatures, and the gains (n,) under it."""
        k = self._held_out.values.shape[1]
        gains = self._held_out.gains(gold_probabilities(self._held_out, temperatures, [k], log_weights=self._log_weights)[:, :, 0])
        best = int(_best_temperatures(gains))
        return float(temperatures[best]), gains[:, best]

    def _unseen(self, gains: Array, kind: str = FIXED) -> float:
        """Perplexity on each fold under what was fitted on the others. gains: (n,), or for a fixed λ (n, m) of temperatures to try."""
        total = self._held_out.log_p_lm.sum()
        for fold in range(FOLDS):
            out = self._folds == fold
            if kind == FIXED:
                columns = gains.reshape(len(gains), -1)
                best = int(_best_temperatures(columns[~out]))
                total += np.log1p(best_lambdas(columns[~out, best]) * columns[out, best]).sum()
            else:
                gate = self._fit_gate(kind, gains, ~out)
                total += np.log1p(gate_lambdas(gate, self._features, self._nearest)[out] * gains[out]).sum()
        return float(np.exp(-total / len(gains)))

    def _fit_gate(self, kind: str, gains: Array, among: NDArray[np.bool_]) -> Gate:
        rows = among & self._found
        if kind == BY_DISTANCE:
            return fit_distance(self._nearest[rows], gains[rows])
        if kind == BEFORE:
            # Not by λ: where the LM is sure, λ changes next to nothing, so its fit there tells nothing. With gains of -1 and (nearly)
            # infinity the mixture's likelihood is that of a logistic regression.
            pays = np.log1p(float(best_lambdas(gains[rows])) * gains[rows]) > PAYS
            return fit_logistic({name: self._features[name][rows] for name in LM_FEATURES}, np.where(pays, 1e9, -1.0))
        return fit_logistic({name: self._features[name][rows] for name in FEATURES}, gains[rows])

    def _find_features(self, temperature: float) -> dict[str, Array]:
        held_out = self._held_out
        assert held_out.view is not None, "asked for where there may be a gate"
        step = max(1, CELLS // held_out.values.shape[1])
        parts = []
        for at in range(0, len(held_out), step):
            some = slice(at, at + step)
            distances, values = held_out.distances[some], held_out.values[some]
            extra = None
            if self._log_weights is not None and held_out.domains is not None:
                extra = self._log_weights[held_out.domains[some]].astype(np.float32)
            weights = neighbor_weights(distances, values, temperature=temperature, log_weights=extra)
            parts.append(features_of(held_out.view[some], token_sums(values, weights), distances[:, 0], temperature))
        return {name: np.concatenate([part[name] for part in parts]) for name in FEATURES}

    def _weigh(self, temperature: float) -> tuple[Choice, Array]:
        """Domain weights with a fixed λ, at one temperature, and the log weights (names,) fitted on all."""
        held_out = self._held_out
        assert held_out.domains is not None, "said by run"
        n, d = len(held_out), len(held_out.names)
        of_gold, total = np.zeros((n, d)), np.zeros((n, d))
        step = max(1, CELLS // held_out.values.shape[1])
        for at in range(0, n, step):
            some = slice(at, at + step)
            weights = neighbor_weights(held_out.distances[some], held_out.values[some], temperature=temperature)
            cells = np.arange(len(weights))[:, None] * d + np.maximum(held_out.domains[some], 0)
            hit = held_out.values[some] == held_out.gold[some, None]
            for sums, counted in ((total, weights), (of_gold, weights * hit)):
                sums[some] = np.bincount(cells.reshape(-1), counted.reshape(-1), minlength=len(weights) * d).reshape(-1, d)
        first = int(total.sum(axis=0).argmax())
        unseen = held_out.log_p_lm.sum()
        for fold in range(FOLDS):
            out = self._folds == fold
            log_weights, lmbda = _fit_weights(of_gold[~out], total[~out], held_out.log_p_lm[~out], first)
            unseen += np.log1p(lmbda * self._gains_of(of_gold, total, log_weights)[out]).sum()
        log_weights, _ = _fit_weights(of_gold, total, held_out.log_p_lm, first)
        k = held_out.values.shape[1]
        return Choice(k=k, gate=FIXED, weights=True, perplexity=float(np.exp(-unseen / n))), log_weights

    def _gains_of(self, of_gold: Array, total: Array, log_weights: Array) -> Array:
        weights = np.exp(log_weights)
        return self._held_out.gains((of_gold @ weights) / np.where(self._found, total @ weights, 1.0))


def _fit_weights(of_gold: Array, total: Array, log_p_lm: Array, first: int) -> tuple[Array, float]:
    """Log weight of each domain, (d,), 0 for the first, and a fixed λ, by maximum likelihood.

    of_gold, total: (n, d), sums over the neighbours of a domain of exp(-distance / temperature): of the gold token, of all.
    """
    found = total.sum(axis=1) > 0.0
    hits, sums, p_lm = (torch.from_numpy(part[found]) for part in (of_gold, total, np.exp(np.maximum(log_p_lm, -700.0))))
    others = torch.tensor([i for i in range(total.shape[1]) if i != first])
    free = torch.zeros(len(others) + 1, dtype=torch.float64, requires_grad=True)  # log weights of the others, then the logit of λ
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12)

    def weights() -> torch.Tensor:
        return torch.zeros(total.shape[1], dtype=torch.float64).index_copy(0, others, free[:-1])

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        domain_weights = weights().exp()
        lmbda = torch.sigmoid(free[-1])
        p = lmbda * (hits @ domain_weights) / (sums @ domain_weights) + (1.0 - lmbda) * p_lm
        lost = -p.log().sum() + 0.5 * (free[:-1] / SPREAD).square().sum()
        lost.backward()
        return lost

    optimizer.step(loss)
    return weights().detach().numpy(), float(torch.sigmoid(free.detach()[-1]))


def _best_temperatures(gains: Array) -> NDArray[np.intp]:
    """Which temperature is best, each with its own λ. gains: (n, m, ...) for m temperatures. Returns (...)."""
    best: NDArray[np.intp] = np.log1p(best_lambdas(gains) * gains).mean(axis=0).argmax(axis=0)
    return best


def _some(held_out: HeldOut, step: int) -> HeldOut:
    """Every step-th position, for temperatures that are looked for roughly."""
    at = slice(None, None, step)
    return HeldOut(held_out.distances[at], held_out.values[at], held_out.gold[at], held_out.log_p_lm[at])


def _is_worth(other: Choice, simpler: Choice) -> bool:
    return other.perplexity < simpler.perplexity * (1.0 - WORTH)


def _simplest(choices: Sequence[Choice]) -> Choice:
    """The first of choices that none of the rest is better than by more than WORTH. choices: the simplest first."""
    best = min(choice.perplexity for choice in choices)
    return next(choice for choice in choices if choice.perplexity * (1.0 - WORTH) <= best)


def _prefix(held_out: HeldOut, k: int) -> HeldOut:
    """The same positions with their k nearest neighbours."""
    domains = None if held_out.domains is None else held_out.domains[:, :k]
    return replace(held_out, distances=held_out.distances[:, :k], values=held_out.values[:, :k], domains=domains)
