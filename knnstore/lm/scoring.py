"""texts → windows → keys and log p_LM of every token that really came, thousands of positions at a time.

The logits of a batch are let go with the batch: no (n, vocab) matrix outlives it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnstore.lm.embed import TOKENS_PER_BATCH, right_padded
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.mixing import LmView, gold_log_probs
from knnstore.lm.windows import Windows, batches, plan_windows

__all__ = ["Positions", "score_documents"]

CHUNK_POSITIONS = 4_096  # scored together at least, and searched together: each list is then read once for many queries
LOGITS_BYTES = 1 << 28  # of one batch's logits in float32: what limits a batch where the vocabulary is large

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Positions:
    """Tokens that were predicted, in order of (document, index).

    document: (n,) int64, number of the document in the order given. index: (n,) int64, of the token in its ids. window: (n,) int64, number
    of the window it was predicted in. gold: (n,) int64, the token itself. before: (n,) int64, the token before it. keys: (n, dim) float32.
    log_p_lm: (n,) float64, natural log. view: of p_LM, None where it was not asked for.
    """

    document: Ids
    index: Ids
    window: Ids
    gold: Ids
    before: Ids
    keys: NDArray[np.float32]
    log_p_lm: NDArray[np.float64]
    view: LmView | None

    def __len__(self) -> int:
        return len(self.gold)


def score_documents(
    extractor: KeyExtractor,
    documents: Iterable[Ids],
    *,
    vocab_size: int,
    context: int,
    stride: int,
    views: bool,
    chunk: int = CHUNK_POSITIONS,
) -> Iterator[Positions]:
    """Predicts each token of each document, but for its first, once, from those before it in its window.

    documents: token ids as the model sees them. context, stride: of the windows. views: whether what gates know of p_LM is wanted.
    Gives pieces of at least `chunk` positions (the last may be shorter), each of whole windows; one document is in memory at a time.
    """
    waiting: list[tuple[int, Ids, int]] = []  # (number, ids, first window) of documents whose windows were not run
    planned: list[Windows] = []
    n_waiting = n_windows = 0
    for number, ids in enumerate(documents):
        if len(ids) < 2:
            continue
        windows = plan_windows([len(ids) - 1], [1], context=context, stride=stride)
        ends, at = np.cumsum(windows.n_entries), 0
        while at < len(windows):
            done = int(ends[at - 1]) if at else 0
            stop = min(len(windows), int(np.searchsorted(ends, done + chunk - n_waiting)) + 1)
            some = _some(windows, at, stop)
            waiting.append((number, ids, n_windows))
            planned.append(some)
            n_waiting += int(some.n_entries.sum())
            n_windows += len(some)
            at = stop
            if n_waiting >= chunk:
                yield _score(extractor, waiting, planned, vocab_size, views)
                waiting, planned, n_waiting = [], [], 0
    if n_waiting:
        yield _score(extractor, waiting, planned, vocab_size, views)


def _some(windows: Windows, first: int, stop: int) -> Windows:
    at = slice(first, stop)
    return Windows(
        document=windows.document[at],
        first_entry=windows.first_entry[at],
        n_entries=windows.n_entries[at],
        input_start=windows.input_start[at],
        input_stop=windows.input_stop[at],
    )


def _score(extractor: KeyExtractor, waiting: list[tuple[int, Ids, int]], planned: list[Windows], vocab_size: int, views: bool) -> Positions:
    starts, stops, counts = (
        np.concatenate([getattr(windows, name) for windows in planned]) for name in ("input_start", "input_stop", "n_entries")
    )
    source = np.repeat(np.arange(len(planned)), [len(windows) for windows in planned])
    number = np.concatenate([first + np.arange(len(windows)) for (_, _, first), windows in zip(waiting, planned, strict=True)])
    ends = np.cumsum(counts)
    n = int(ends[-1])
    window = np.repeat(np.arange(len(counts)), counts)
    index = (stops - counts + 1)[window] + np.arange(n) - (ends - counts)[window]  # of the token that is predicted
    gold, before = (
        np.concatenate([waiting[s][1][stop - c + shift : stop + shift] for s, stop, c in zip(source, stops, counts, strict=True)])
        for shift in (1, 0)
    )
    keys, log_p = np.empty((n, extractor.key.dim), np.float32), np.empty(n)
    view = LmView(np.empty(n, np.int64), np.empty(n), np.empty(n)) if views else None
    most = max(int((stops - starts).max()), LOGITS_BYTES // (4 * vocab_size))
    tokens_per_batch = min(TOKENS_PER_BATCH.get(extractor.model.device.type, TOKENS_PER_BATCH["cpu"]), most)
    for batch in batches(stops - starts, tokens_per_batch=tokens_per_batch):
        inputs = [waiting[source[w]][1][starts[w] : stops[w]] for w in batch.tolist()]
        rows = np.concatenate([np.arange(ends[w] - counts[w], ends[w]) for w in batch.tolist()])
        keys[rows], logits = _run(extractor, inputs, counts[batch])
        log_p[rows], of_batch = gold_log_probs(logits, gold[rows], views=views)
        if view is not None and of_batch is not None:
            view[rows] = of_batch
    return Positions(
        document=np.array([number for number, _, _ in waiting], np.int64)[source[window]],
        index=index,
        window=number[window],
        gold=gold,
        before=before,
        keys=keys,
        log_p_lm=log_p,
        view=view,
    )


def _run(extractor: KeyExtractor, inputs: list[Ids], counts: Ids) -> tuple[NDArray[np.float32], Tensor]:
    """Keys (n, dim) and logits (n, vocab) of the last counts[i] positions of each input, one after the other."""
    lengths = np.array([len(ids) for ids in inputs])
    longest = int(lengths.max())
    last = int((longest - lengths + counts).max())
    keys, logits = extractor.keys_and_logits(right_padded(inputs, extractor.model.device), last=last)  # (b, last, …)
    if (counts == last).all():
        keys, logits = keys.flatten(0, 1), logits.flatten(0, 1)
    else:
        begins = last - longest + lengths - counts
        columns = np.concatenate([np.arange(begin, begin + count) for begin, count in zip(begins, counts, strict=True)])
        at = torch.from_numpy(np.repeat(np.arange(len(inputs)), counts)).to(keys.device), torch.from_numpy(columns).to(keys.device)
        keys, logits = keys[at], logits[at]
    return keys.float().cpu().numpy(), logits
