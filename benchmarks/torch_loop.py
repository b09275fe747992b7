"""Neighbours → p beside the usual torch loop, which scatters them into a matrix of the vocabulary."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measuring import in_turn, ratio
from benchmarks.workloads import Queries
from knnstore.lm.mixing import mix_gold_tokens, mix_logits
from knnstore.lm.settings import Settings
from knnstore.store import Datastore

__all__ = ["mixed_rates"]

REPEATED = 32  # queries of a round at least
LAMBDA = 0.3

FieldSearch = Callable[..., tuple[Any, ...]]


def mixed_rates(rounds: int, store: Datastore, field_search: FieldSearch, queries: Queries, *, k: int, nprobe: int) -> dict[str, Any]:
    """Rates over those of the usual loop: log p of all tokens, of one token, and of all with the search before it."""
    n, vocab_size = len(queries), store.manifest.checkpoint.vocab_size
    calibration = store.manifest.calibration
    settings = Settings(k=k, nprobe=nprobe, lmbda=LAMBDA, temperature=10.0 if calibration is None else calibration.temperature)
    logits = torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(0))
    gold = torch.from_numpy(queries.gold)[:, None]
    log_p_lm = torch.log_softmax(logits, -1).gather(1, gold)[:, 0].double().numpy()
    found = store.search(queries.keys, k=k, nprobe=nprobe, places=False)
    theirs = partial(_scattered, logits, settings)
    if not torch.allclose(theirs(found.distances, found.values), mix_logits(logits, found, settings).log_p, atol=1e-3):
        raise SystemExit("not the same distribution as the usual loop's.")

    def search_and_mix() -> object:
        return mix_logits(logits, store.search(queries.keys, k=k, nprobe=nprobe, places=False), settings)

    works: tuple[Callable[[], object], ...] = (
        lambda: mix_logits(logits, found, settings),
        lambda: theirs(found.distances, found.values),
        lambda: mix_gold_tokens(queries.gold, log_p_lm, None, found, settings),
        lambda: theirs(found.distances, found.values).gather(1, gold),
        search_and_mix,
        lambda: theirs(*field_search(queries.keys, k=k, nprobe=nprobe)[:2]),
    )
    times = max(1, REPEATED // n)
    every, every_torch, one, one_torch, whole, whole_torch = in_turn(rounds, *(partial(_again, times, work) for work in works))
    return {
        "n": n,
        "vocab": vocab_size,
        "all_tokens": ratio(every_torch, every),
        "gold_tokens": ratio(one_torch, one),
        "with_search": ratio(whole_torch, whole),
        "ms": 1e3 * statistics.median(every) / times,
    }


def _again(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


def _scattered(logits: torch.Tensor, settings: Settings, distances: NDArray[np.float32], values: NDArray[np.int32]) -> torch.Tensor:
    """log p as the usual loop makes it: neighbours scattered into a matrix of the vocabulary."""
    weights = torch.softmax(torch.from_numpy(-distances) / settings.temperature, -1)
    p_knn = torch.zeros_like(logits).scatter_add_(1, torch.from_numpy(values).long(), weights)
    log_p_lm = torch.log_softmax(logits, -1)
    return torch.logaddexp(p_knn.log() + math.log(settings.lmbda), log_p_lm + math.log1p(-settings.lmbda))
