"""The first λ and temperature of a datastore, fitted on held-out text of its own.

Distances of a real LM are of the order of hundreds and differ from model to model: no constant temperature fits two of them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from knnstore.build import DEFAULT_K
from knnstore.filters import RowRange, allowed_rows
from knnstore.lm.embed import Embedder, SegmentTokens, keys_and_gold
from knnstore.lm.fitting import LAMBDAS, TEMPERATURES, HeldOut, joined, surface, typical_nearest
from knnstore.progress import Progress, Stage
from knnstore.search import check_keys, search
from knnstore.storage.calibration import Calibration
from knnstore.storage.segment import Segment

__all__ = ["HeldOut", "calibrate", "fit"]

HELD_OUT_TOKENS = 4_096  # tokens to fit two numbers on: λ and T are then stable to a step of their grids
MIN_TOKENS = 256  # fewer tell too little: the defaults stay
DEFAULT_LAMBDA = 0.1  # where nothing could be fitted: too small a weight to do harm
MIN_DOCUMENTS = 8  # with fewer documents, only the text around a position is held out, not its whole document


def calibrate(
    segments: Sequence[Segment],
    tokens: Sequence[SegmentTokens],
    embedder: Embedder,
    *,
    nprobe: int,
    domains: Sequence[str],
    seed: int,
    progress: Progress,
) -> Calibration:
    """Fits λ and temperature on windows of the datastore itself, without what stands around them.

    With 8 documents or more, a window's own document does not count among its neighbours; with fewer, the rows within two
    contexts of it (a quarter of a short document) do not.
    """
    k = DEFAULT_K
    with progress.stage("fitting λ and temperature", total=HELD_OUT_TOKENS, unit="tokens") as stage:
        held_out = _hold_out(segments, tokens, embedder, k=k, nprobe=nprobe, seed=seed, stage=stage)
        n = len(held_out.gold)
        if n >= MIN_TOKENS and (held_out.values >= 0).any():
            lmbda, temperature, mixed = fit(held_out)
            scores = {"lm": float(np.exp(-held_out.log_p_lm.mean())), "mixed": mixed}
            status = "fresh"
        else:
            lmbda, temperature, scores, status = DEFAULT_LAMBDA, _typical_distance(held_out, segments), {}, "default"
    return Calibration(
        lmbda=lmbda,
        temperature=temperature,
        k=k,
        nprobe=nprobe,
        exact=False,
        spaces=tuple(sorted({segment.space.id for segment in segments})),
        domains=tuple(domains),
        status=status,
        made_by="create",
        tokens=n,
        perplexity=scores,
    )


def fit(held_out: HeldOut) -> tuple[float, float, float]:
    """λ, temperature and the mixed perplexity they reach: the best of a grid over both."""
    tried = surface(held_out, typical_nearest(held_out) * TEMPERATURES, LAMBDAS)
    t, best = np.unravel_index(tried.perplexity.argmin(), tried.perplexity.shape)
    return round(float(LAMBDAS[best]), 4), float(f"{tried.temperatures[t]:.6g}"), float(tried.perplexity[t, best])


def _hold_out(
    segments: Sequence[Segment],
    tokens: Sequence[SegmentTokens],
    embedder: Embedder,
    *,
    k: int,
    nprobe: int,
    seed: int,
    stage: Stage,
) -> HeldOut:
    excluded = _exclusion(tokens)
    k = min(k, sum(segment.content.entries for segment in segments))
    parts: list[HeldOut] = []
    n = 0
    for number, window in _choose(tokens, seed):
        gold = tokens[number].targets(window)
        keys, log_p_lm = keys_and_gold(embedder.extractor, tokens[number].inputs(window), gold)
        allowed = allowed_rows(segments, exclude=excluded(number, window))
        hits = search(segments, allowed, check_keys(keys, keys.shape[1]), k=k, nprobe=nprobe)
        parts.append(HeldOut(hits.distances, hits.values, gold, log_p_lm))
        n += len(gold)
        stage.advance(len(gold))
        if n >= HELD_OUT_TOKENS:
            break
    return joined(parts, ())


def _choose(tokens: Sequence[SegmentTokens], seed: int) -> list[tuple[int, int]]:
    """Windows in random order, over all segments: (segment, number of the window)."""
    counts = np.array([len(of_segment.windows) for of_segment in tokens])
    ends = np.cumsum(counts)
    picks = np.random.default_rng(seed).choice(int(ends[-1]), min(int(ends[-1]), HELD_OUT_TOKENS), replace=False)
    numbers = np.searchsorted(ends, picks, side="right")
    return [(int(s), int(p - (ends[s] - counts[s]))) for s, p in zip(numbers, picks, strict=True)]


def _exclusion(tokens: Sequence[SegmentTokens]) -> Callable[[int, int], list[RowRange]]:
    """For a window (segment, number), the rows that must not answer it."""
    places: dict[str, list[RowRange]] = {}
    for number, of_segment in enumerate(tokens):
        for name, first, n in zip(of_segment.ids, of_segment.first_rows.tolist(), of_segment.n_entries.tolist(), strict=True):
            places.setdefault(name, []).append(RowRange(number, first, first + n))
    if len(places) >= MIN_DOCUMENTS:
        return lambda number, window: places[tokens[number].ids[int(tokens[number].windows.document[window])]]

    def around(number: int, window: int) -> list[RowRange]:
        of_segment = tokens[number]
        document = int(of_segment.windows.document[window])
        first = int(of_segment.window_rows[window])
        stop = first + int(of_segment.windows.n_entries[window])
        reach = int(min(2 * of_segment.windows.lengths.max(), of_segment.n_entries[document] // 4))
        begin = int(of_segment.first_rows[document])
        end = begin + int(of_segment.n_entries[document])
        return [RowRange(number, max(begin, first - reach), min(end, stop + reach))]

    return around


def _typical_distance(held_out: HeldOut, segments: Sequence[Segment]) -> float:
    """A temperature where none can be fitted: half the median distance of the nearest neighbour, or of the keys' own size."""
    nearest = held_out.distances[:, 0]
    nearest = nearest[np.isfinite(nearest) & (nearest > 0)]
    if len(nearest):
        return float(f"{np.median(nearest) / 2:.6g}")
    segment = segments[0]
    keys = segment.space.decode(segment.lists.entries(0)[0][:1024])
    return float(f"{max(float(np.square(keys).sum(axis=1).mean()) / 2, 1e-3):.6g}")
