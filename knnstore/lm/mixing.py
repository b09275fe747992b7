"""What the LM says and what the neighbours say, mixed: for all tokens of the vocabulary, or for one token of each query.

No (n, vocab) matrix is made beside the LM's own: only the tokens that neighbours have are touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnstore.lm.distribution import TokenSums, neighbor_weights, token_sums
from knnstore.lm.gates import gate_lambdas, remoteness
from knnstore.lm.settings import Settings
from knnstore.neighbors import Neighbors
from knnstore.storage.calibration import LOGISTIC
from knnstore.threads import over_blocks

__all__ = ["LmView", "Mixed", "MixedGold", "features_of", "gold_log_probs", "mix_gold_tokens", "mix_logits", "view_of"]

Array = NDArray[np.float64]

LOGIT_CELLS = 1 << 18  # logits looked at together on a CPU: 1 MB in float32 stays in a core's cache


@dataclass(frozen=True, slots=True)
class LmView:
    """What a gate knows of p_LM. All (n,): top int64, its most probable token; log_max float64, log of that one's probability;
    entropy float64, in nats."""

    top: NDArray[np.int64]
    log_max: Array
    entropy: Array

    @classmethod
    def joined(cls, views: "Sequence[LmView]") -> "LmView":
        """One after the other; one at least."""
        return cls(*(np.concatenate([getattr(view, name) for view in views]) for name in ("top", "log_max", "entropy")))

    def __getitem__(self, at: "NDArray[np.generic] | slice") -> "LmView":
        return LmView(self.top[at], self.log_max[at], self.entropy[at])

    def __setitem__(self, at: "NDArray[np.generic] | slice", view: "LmView") -> None:
        self.top[at], self.log_max[at], self.entropy[at] = view.top, view.log_max, view.entropy


@dataclass(frozen=True, slots=True)
class Mixed:
    """log_p_lm, log_p: (n, vocab), natural logs. lmbda: (n,) float64, 0 where nothing was found. weights: (n, k) float64, each
    neighbour's share of p_kNN. sums: p_kNN."""

    log_p_lm: Tensor
    log_p: Tensor
    lmbda: Array
    weights: Array
    sums: TokenSums


@dataclass(frozen=True, slots=True)
class MixedGold:
    """Of one token for each query. All (n,) float64: log_p_knn (-inf for 0), log_p, lmbda."""

    log_p_knn: Array
    log_p: Array
    lmbda: Array


def view_of(log_p_lm: Tensor) -> LmView:
    """What a gate knows of log p_LM (n, vocab)."""
    log_max, top = log_p_lm.max(-1)
    p = log_p_lm.exp()
    entropy = -torch.linalg.vecdot(p, log_p_lm)
    if not bool(torch.isfinite(entropy).all()):  # a token of probability 0 adds nothing, but 0 times -inf is no number
        entropy = torch.special.entr(p).sum(-1)
    return LmView(top.cpu().numpy(), log_max.cpu().double().numpy(), entropy.cpu().double().numpy())


@torch.inference_mode()
def gold_log_probs(logits: Tensor, gold: NDArray[np.int64], *, views: bool) -> tuple[Array, LmView | None]:
    """log p_LM of one token for each position, (n,) float64, and what gates know of p_LM if views are wanted.

    logits: (n, vocab) of any dtype; computed in float32. Nothing as large as the logits is made again: block by block on a CPU.
    """
    n, vocab_size = logits.shape
    rows = max(1, LOGIT_CELLS // vocab_size if logits.device.type == "cpu" else n)
    wanted = torch.from_numpy(gold)[:, None].to(logits.device)
    parts, seen = [], []
    for at in range(0, max(1, n), rows):
        block = logits[at : at + rows].float()
        most, top = block.max(-1, keepdim=True)
        shifted = block - most
        p = shifted.exp()  # the one exponential: sum, gold and entropy come from it
        total = p.sum(-1)
        log_total = total.log()
        parts.append((shifted.gather(1, wanted[at : at + rows])[:, 0] - log_total).cpu().double().numpy())
        if views:
            entropy = log_total - torch.linalg.vecdot(p, shifted) / total
            if not bool(torch.isfinite(entropy).all()):  # a token of probability 0 adds nothing, but 0 times -inf is no number
                entropy = torch.special.entr(p / total[:, None]).sum(-1)
            seen.append(LmView(top[:, 0].cpu().numpy(), *(item.cpu().double().numpy() for item in (-log_total, entropy))))
    if not views:
        return np.concatenate(parts), None
    return np.concatenate(parts), LmView.joined(seen)


def mix_logits(logits: Tensor, neighbors: Neighbors, settings: Settings, *, dtype: torch.dtype = torch.float32) -> Mixed:
    """log p of every token. logits: (n, vocab), of the LM; neighbors: of the same n positions. dtype: of what is computed and returned.

    Raises InvalidArgumentError for a neighbour's token that is outside the vocabulary.
    """
    log_p_lm = torch.log_softmax(logits.to(dtype), -1)  # (n, vocab)
    weights = neighbor_weights(neighbors.distances, neighbors.values, temperature=settings.temperature, log_weights=neighbors.log_weights)
    sums = token_sums(neighbors.values, weights)
    sums.check(logits.shape[-1])
    view = view_of(log_p_lm) if settings.gate is not None and settings.gate.kind == LOGISTIC else None
    lmbda = _lambdas(view, sums, neighbors, settings)
    return Mixed(log_p_lm, _mix_sparse(log_p_lm, sums, lmbda), lmbda, weights, sums)


def mix_gold_tokens(gold: NDArray[np.int64], log_p_lm: Array, view: LmView | None, neighbors: Neighbors, settings: Settings) -> MixedGold:
    """log p of one token for each query. gold, log_p_lm: (n,). view: of the LM; needed only where the gate is logistic."""

    def of_block(at: slice) -> tuple[Array, Array, Array]:
        return _gold_block(gold[at], log_p_lm[at], None if view is None else view[at], neighbors[at], settings)

    parts = over_blocks(of_block, len(gold), width=neighbors.k)
    return MixedGold(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _gold_block(
    gold: NDArray[np.int64], log_p_lm: Array, view: LmView | None, neighbors: Neighbors, settings: Settings
) -> tuple[Array, Array, Array]:
    weights = neighbor_weights(neighbors.distances, neighbors.values, temperature=settings.temperature, log_weights=neighbors.log_weights)
    sums = token_sums(neighbors.values, weights) if settings.gate is not None and settings.gate.kind == LOGISTIC else None
    lmbda = _lambdas(view, sums, neighbors, settings)
    same = neighbors.values == gold[:, None].astype(np.int32)
    with np.errstate(divide="ignore"):
        log_p_knn = np.log(np.einsum("nk,nk->n", weights, same))
        return log_p_knn, np.logaddexp(np.log(lmbda) + log_p_knn, np.log1p(-lmbda) + log_p_lm), lmbda


def features_of(view: LmView, sums: TokenSums, nearest: NDArray[np.float32], temperature: float) -> dict[str, Array]:
    """What gates decide by, (n,) float64 each, by name (`gates.FEATURES`). nearest: (n,) squared L2 of the nearest neighbour."""
    return {
        "nearest": remoteness(nearest, temperature),
        "knn_entropy": sums.entropy(),
        "knn_max": sums.largest(),
        "lm_max": view.log_max,
        "lm_entropy": view.entropy,
        "agreement": sums.of(view.top),
    }


def _lambdas(view: LmView | None, sums: TokenSums | None, neighbors: Neighbors, settings: Settings) -> Array:
    """λ of each query, (n,); 0 where it has no neighbour."""
    gate = settings.gate
    if gate is None:
        return np.where(neighbors.values[:, 0] >= 0, settings.lmbda, 0.0)
    features: Mapping[str, Array] = {}
    if gate.kind == LOGISTIC:
        assert view is not None, "said by the callers"
        assert sums is not None, "likewise"
        features = features_of(view, sums, _nearest(neighbors), settings.temperature)
    return gate_lambdas(gate, features, _nearest(neighbors))


def _nearest(neighbors: Neighbors) -> NDArray[np.float32]:
    return neighbors.distances[:, 0]


def _mix_sparse(log_p_lm: Tensor, sums: TokenSums, lmbda: Array) -> Tensor:
    """log(λ p_kNN + (1 - λ) p_LM): one addition everywhere, and more only where p_kNN is not 0."""
    device, dtype = log_p_lm.device, log_p_lm.dtype
    with np.errstate(divide="ignore"):
        log_keep, log_knn = np.log1p(-lmbda), np.log(lmbda[sums.rows]) + np.log(sums.p)
    mixed = log_p_lm + torch.from_numpy(log_keep).to(device, dtype)[:, None]
    rows, tokens = torch.from_numpy(sums.rows).to(device), torch.from_numpy(sums.tokens).to(device)
    mixed[rows, tokens] = torch.logaddexp(mixed[rows, tokens], torch.from_numpy(log_knn).to(device, dtype))
    return mixed
