"""What evaluating texts should give, by other means: transformers' own tokenization, one window at a time, every distance, a loop for
each token. No code of the package."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import lms
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

EDGES = [-math.inf, -4, -2, -1, -0.5, -0.25, -0.1, -0.01, 0.01, 0.1, 0.25, 0.5, 1, 2, 4, 8, math.inf]
PER_MILLION = [(0, 0), (0, 1), (1, 10), (10, 100), (100, 1_000), (1_000, 10_000), (10_000, 100_000), (100_000, math.inf)]
CONTEXT, STRIDE = 24, 10  # of the datastores


@dataclass(frozen=True, eq=False)
class Kind:
    """A model, its tokenizer, and where its last feed-forward net is, written down by hand."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    feed_forward: torch.nn.Module

    @property
    def bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def ids(self, text: str) -> list[int]:
        return self.bos + lms.token_ids(self.tokenizer, text)


@cache
def build(name: str) -> Kind:
    if name == "gpt2":
        model = lms.gpt2_model()
        return Kind(model, lms.gpt2_tokenizer(), model.transformer.h[1].mlp)
    model = lms.llama_model()
    return Kind(model, lms.llama_tokenizer(bos=name == "llama"), model.model.layers[1].mlp)


KINDS = ("gpt2", "llama", "llama-without-bos")


@dataclass(frozen=True, eq=False)
class Entries:
    """All (n,), keys (n, dim), in row order."""

    keys: np.ndarray
    values: np.ndarray
    documents: np.ndarray
    domains: np.ndarray


@dataclass(frozen=True)
class Token:
    """One predicted token.

    found: whether it has a neighbour. p_knn, p: by all neighbours. of_domain: name → (share of weight, p_kNN, p), if only the domain's
    neighbours counted.
    """

    id: int
    p_lm: float
    p_knn: float
    p: float
    lmbda: float
    found: bool
    of_domain: Mapping[str, tuple[float, float, float]]

    @property
    def bits(self) -> float:
        return math.log2(self.p / self.p_lm)


def windows(n: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, begin, end): from the tokens [start, end) those after [begin, end) are predicted, n - 1 in all."""
    begin, end = 0, min(context, n - 1)
    while begin < n - 1:
        yield max(0, end - context), begin, end
        begin, end = end, min(end + stride, n - 1)


def positions(kind: Kind, ids: Sequence[int], context: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n - 1, dim) and log p_LM (n - 1, vocab) before each token but the first."""
    keys, log_p = [], []
    for start, begin, end in windows(len(ids), context, stride):
        seen = []
        hook = kind.feed_forward.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0].detach().numpy()))
        with torch.no_grad():
            logits = kind.model(torch.tensor([list(ids[start:end])]), use_cache=False).logits[0].double()
        hook.remove()
        keys.append(seen[0].reshape(end - start, -1)[begin - start :])
        log_p.append(logits.log_softmax(-1).numpy()[begin - start :])
    return np.concatenate(keys), np.concatenate(log_p)


def entries_of(kind: Kind, corpora: Sequence[tuple[str, Mapping[str, str]]]) -> Entries:
    """The entries of (domain, {id: text}), documents sorted by id, with EOS."""
    parts: dict[str, list[np.ndarray]] = {"keys": [], "values": [], "documents": [], "domains": []}
    for domain, texts in corpora:
        for name in sorted(texts):
            ids = [*kind.ids(texts[name]), kind.tokenizer.eos_token_id]
            keys, _ = positions(kind, ids, CONTEXT, STRIDE)
            for field, values in (
                ("keys", keys),
                ("values", ids[1:]),
                ("documents", [name] * len(keys)),
                ("domains", [domain] * len(keys)),
            ):
                parts[field].append(np.array(values))
    return Entries(**{field: np.concatenate(values) for field, values in parts.items()})


def predicted(
    kind: Kind,
    text: str,
    entries: Entries,
    *,
    lmbda: float,
    temperature: float,
    k: int,
    weights: Mapping[str, float] | None = None,
    exclude: Collection[str] = (),
    context: int = CONTEXT,
    stride: int = STRIDE,
) -> list[Token]:
    """Every token of a text but its first. weights: of domains, None for 1 of each. exclude: documents that do not count."""
    ids = kind.ids(text)
    if len(ids) < 2:
        return []
    domains = searched_domains(entries, weights)
    counts = np.flatnonzero(np.isin(entries.domains, domains) & ~np.isin(entries.documents, list(exclude)))
    stored, values, labels = entries.keys[counts].astype(np.float64), entries.values[counts], entries.domains[counts]
    heights = np.array([1.0 if weights is None else weights[name] for name in labels])
    tokens = []
    for key, log_p, gold in zip(*positions(kind, ids, context, stride), ids[1:], strict=True):
        distances = np.square(stored - key.astype(np.float64)).sum(axis=1)
        near = np.argsort(distances, kind="stable")[:k]
        p_lm, lambda_here = float(np.exp(log_p[gold])), lmbda if len(near) else 0.0
        p_knn = _share(distances[near], heights[near], values[near] == gold, temperature)
        of_domain = {}
        for name in domains:
            own = near[labels[near] == name]
            p_own = _share(distances[own], heights[own], values[own] == gold, temperature)
            share = _share(distances[near], heights[near], labels[near] == name, temperature)
            of_domain[name] = (share, p_own, lmbda * p_own + (1 - lmbda) * p_lm if len(own) else p_lm)
        tokens.append(Token(gold, p_lm, p_knn, lambda_here * p_knn + (1 - lambda_here) * p_lm, lambda_here, bool(len(near)), of_domain))
    return tokens


def searched_domains(entries: Entries, weights: Mapping[str, float] | None) -> list[str]:
    return sorted(set(entries.domains.tolist()) if weights is None else {name for name, weight in weights.items() if weight})


def _share(distances: np.ndarray, heights: np.ndarray, which: np.ndarray, temperature: float) -> float:
    """The share of the weight that some neighbours have."""
    if not len(distances):
        return 0.0
    scores = heights * np.exp((distances.min() - distances) / temperature)
    return float(scores[which].sum() / scores.sum())


def perplexity(probabilities: Sequence[float]) -> float:
    if not probabilities:
        return math.nan
    return math.inf if min(probabilities) == 0 else math.exp(-sum(math.log(p) for p in probabilities) / len(probabilities))


def expected(tokens: Sequence[Token], values: np.ndarray, n_bytes: int, entries_of_domain: Mapping[str, int]) -> dict[str, Any]:
    """What `Evaluation.fields()` holds of these tokens. values: of all entries that are searched."""
    n = len(tokens)
    columns = {name: [getattr(token, field) for token in tokens] for name, field in (("lm", "p_lm"), ("knn", "p_knn"), ("mixed", "p"))}
    some = [token for token in tokens if token.p_knn > 0]
    helped, hurt = ([token.bits for token in tokens if sign * token.bits > 0] for sign in (1, -1))
    frequency = Counter(values.tolist())
    million = {token.id: frequency[token.id] * 1e6 / max(1, len(values)) for token in tokens}
    found = [token for token in tokens if token.found]
    return {
        "tokens": n,
        "bytes": n_bytes,
        "perplexity": {name: perplexity(p) for name, p in columns.items()},
        "bits_per_byte": {name: math.log2(perplexity(p)) * n / n_bytes for name, p in columns.items()},
        "zero": 1 - len(some) / n,
        "covered": {"lm": perplexity([token.p_lm for token in some]), "knn": perplexity([token.p_knn for token in some])},
        "lambda": sum(token.lmbda for token in tokens) / n,
        "helped": len(helped) / n,
        "hurt": len(hurt) / n,
        "gain": sum(helped) / max(1, len(helped)),
        "loss": sum(hurt) / max(1, len(hurt)),
        "histogram": [_bin(tokens, low, high) for low, high in pairwise(EDGES)],
        "frequency": [_bucket(tokens, million, low, high) for low, high in PER_MILLION],
        "domains": {
            name: {
                "entries": entries_of_domain[name],
                "share": sum(token.of_domain[name][0] for token in found) / max(1, len(found)),
                "zero": sum(token.of_domain[name][1] == 0 for token in tokens) / n,
                "perplexity": {
                    "knn": perplexity([token.of_domain[name][1] for token in tokens]),
                    "mixed": perplexity([token.of_domain[name][2] for token in tokens]),
                },
            }
            for name in entries_of_domain
        },
    }


def _bin(tokens: Sequence[Token], low: float, high: float) -> dict[str, Any]:
    inside = [token.bits for token in tokens if low <= token.bits < high]
    return {"low": low, "high": high, "tokens": len(inside), "bits": sum(inside) / len(tokens), "share": len(inside) / len(tokens)}


def _bucket(tokens: Sequence[Token], million: Mapping[int, float], low: float, high: float) -> dict[str, Any]:
    inside = [token for token in tokens if (million[token.id] == 0 if high == 0 else max(low, 1e-9) <= million[token.id] < high)]
    scores = {"lm": perplexity([token.p_lm for token in inside]), "mixed": perplexity([token.p for token in inside])}
    return {"low": low, "high": high, "tokens": len(inside), "share": len(inside) / len(tokens), "perplexity": scores}
