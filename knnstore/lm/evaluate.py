"""Perplexity of a text, with the datastore and without."""

from dataclasses import dataclass

import numpy as np

from knnstore.errors import InvalidArgumentError
from knnstore.lm.distribution import knn_gold_log_probs, mix_gold
from knnstore.lm.embed import keys_and_gold
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.windows import plan_windows
from knnstore.progress import SILENT, Progress

__all__ = ["Evaluation", "perplexity"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """tokens: how many were predicted. lm, mixed: perplexity of the LM alone and with the datastore. helped: share of tokens
    that became more probable."""

    tokens: int
    lm: float
    mixed: float
    helped: float


def perplexity(knnlm: KnnLM, text: str, *, progress: Progress = SILENT) -> Evaluation:
    """Predicts every token of a text from those before it, in windows as the datastore's own (its context, half of it new).

    Only the gold token's p_kNN is computed. Raises InvalidArgumentError for a text of fewer than two tokens.
    """
    ids = knnlm.encode(text)
    if len(ids) < 2:
        raise InvalidArgumentError("the text has fewer than two tokens, so there is nothing to predict. Give a longer one.")
    windows = plan_windows([len(ids) - 1], [1], context=knnlm.context, stride=max(1, knnlm.context // 2))
    lm_parts, mixed_parts = [], []
    with progress.stage("evaluating", total=len(ids) - 1, unit="tokens") as stage:
        for i in range(len(windows)):
            begin, end, n = int(windows.input_start[i]), int(windows.input_stop[i]), int(windows.n_entries[i])
            gold = ids[end - n + 1 : end + 1]
            keys, log_p_lm = keys_and_gold(knnlm.extractor, ids[begin:end], gold)
            hits = knnlm.search(keys)
            log_p_knn = knn_gold_log_probs(
                hits.distances, hits.values, gold, temperature=knnlm.settings.temperature, log_weights=hits.log_weights
            )
            lm_parts.append(log_p_lm)
            mixed_parts.append(mix_gold(log_p_lm, log_p_knn, [knnlm.settings.lmbda], found=hits.values[:, 0] >= 0)[:, 0])
            stage.advance(n)
    lm, mixed = np.concatenate(lm_parts), np.concatenate(mixed_parts)
    return Evaluation(tokens=len(lm), lm=float(np.exp(-lm.mean())), mixed=float(np.exp(-mixed.mean())), helped=float((mixed > lm).mean()))
