"""The whole way from text to p, against an oracle that shares no code with the package.

The oracle tokenizes with transformers, makes windows in a loop, hooks the last feed-forward net by hand, runs one window at a
time, and adds up probabilities in numpy. The package is only called: `create`, `KnnLM.load`, `predict`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import lms
import numpy as np
import pytest
import torch

from knnstore.lm import calibrate
from knnstore.lm.create import create
from knnstore.lm.knnlm import KnnLM

CONTEXT, STRIDE = 24, 10
CLOSE = {"rtol": 0, "atol": 1e-5}


@dataclass(frozen=True, eq=False)
class Kind:
    """A model, its tokenizer, and where its last feed-forward net is, written down by hand."""

    model: object
    tokenizer: object
    feed_forward: torch.nn.Module

    @property
    def bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]


@cache
def build(name: str) -> Kind:
    if name == "gpt2":
        model = lms.gpt2_model()
        return Kind(model, lms.gpt2_tokenizer(), model.transformer.h[1].mlp)
    model = lms.llama_model()
    return Kind(model, lms.llama_tokenizer(bos=name == "llama"), model.model.layers[1].mlp)


KINDS = ("gpt2", "llama", "llama-without-bos")


@pytest.fixture(autouse=True)
def little_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """λ and T are given here, so that fitting them need not take long."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 256)


# --- the oracle


def run(kind: Kind, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the last feed-forward net, (n, dim), and logits, (n, vocab), at every position of one input."""
    seen = []
    hook = kind.feed_forward.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().numpy()))
    with torch.no_grad():
        logits = kind.model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
    hook.remove()
    return seen[0].reshape(len(ids), -1).astype(np.float32), logits.astype(np.float64)


def entries_of(kind: Kind, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of one document's tokens: what was seen before each token after the first, and that token."""
    keys = np.zeros((len(ids) - 1, 32), np.float32)
    begin, end = 0, min(CONTEXT, len(ids) - 1)
    while begin < len(keys):
        start = max(0, end - CONTEXT)
        keys[begin:end] = run(kind, ids[start:end])[0][begin - start :]
        begin, end = end, min(end + STRIDE, len(ids) - 1)
    return keys, np.array(ids[1:])


@cache
def entries(kind: Kind, n_chars: int, *, eos: bool) -> tuple[np.ndarray, np.ndarray]:
    """All entries of the corpus `texts(n_chars)`, in reading order."""
    end = [kind.tokenizer.eos_token_id] if eos else []
    in_order = [text for _, text in sorted(texts(n_chars).items())]
    documents = [kind.bos + lms.token_ids(kind.tokenizer, text) + end for text in in_order if text]
    found = [entries_of(kind, ids) for ids in documents if len(ids) > 1]
    return np.concatenate([keys for keys, _ in found]), np.concatenate([values for _, values in found])


def rounded(keys: np.ndarray, kept: str) -> np.ndarray:
    if kept == "bf16":
        return torch.from_numpy(keys).bfloat16().float().numpy()
    return keys.astype({"f16": np.float16, "f32": np.float32}[kept]).astype(np.float32)


def expected(kind: Kind, stored: np.ndarray, values: np.ndarray, ids: Sequence[int], lmbda: float, temperature: float):
    """(p_LM, p_kNN, p) after the ids, every entry being a neighbour."""
    keys, logits = run(kind, list(ids)[-CONTEXT:])
    p_lm = np.exp(logits[-1] - logits[-1].max())
    p_lm /= p_lm.sum()
    distances = np.square(stored.astype(np.float64) - keys[-1].astype(np.float64)).sum(axis=1)
    weights = np.exp((distances.min() - distances) / temperature)
    p_knn = np.zeros(len(p_lm))
    np.add.at(p_knn, values, weights / weights.sum())
    return p_lm, p_knn, lmbda * p_knn + (1 - lmbda) * p_lm


# --- corpora


def texts(n_chars: int) -> dict[str, str]:
    """Documents of many lengths: a long one, short ones, one of a character, an empty one, one of characters of several tokens."""
    book = lms.book()
    return {
        "long.txt": book[:n_chars],
        "a/short.txt": book[50_000:50_300],
        "a/one.txt": "x",
        "b.md": "Ærø 漢字 😀👩‍👩‍👧 naïve\r\n\r\n" + book[60_000:60_200],
        "empty.txt": "",
        "z.txt": "Scrooge",
    }


def make(tmp_path, kind: Kind, *, n_chars: int, **options):
    corpus = lms.write_texts(tmp_path / "corpus", texts(n_chars))
    return create(tmp_path / "made.knn", corpus, model=kind.model, tokenizer=kind.tokenizer, context=CONTEXT, stride=STRIDE, **options)


QUERIES = ("Scrooge", "The 漢字 of Christmas, past and present and yet to come; and the spirits of all three shall strive within me.", "o")


def check(kind: Kind, lm: KnnLM, stored: np.ndarray, values: np.ndarray, *, atol: float = 1e-5) -> None:
    """p_LM, p_kNN and p of `predict` are the oracle's, for texts, ids and batches of unequal lengths."""
    lmbda, temperature = lm.settings.lmbda, lm.settings.temperature
    rng = np.random.default_rng(1)
    contexts = [*QUERIES, *(rng.integers(3, 300, n).tolist() for n in (1, 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 60))]
    as_ids = [kind.bos + lms.token_ids(kind.tokenizer, item) if isinstance(item, str) else item for item in contexts]
    batch = lm.predict(contexts)
    for i, ids in enumerate(as_ids):
        wanted = expected(kind, stored, values, ids, lmbda, temperature)
        for step in (lm.predict(contexts[i]), lm.predict(np.array(ids))):
            for found, right in zip((step.p_lm, step.p_knn, step.p), wanted, strict=True):
                np.testing.assert_allclose(found, right, rtol=0, atol=atol)
        for found, right in zip((batch.p_lm[i], batch.p_knn[i], batch.p[i]), wanted, strict=True):
            np.testing.assert_allclose(found, right, rtol=0, atol=atol)


# --- laws


@pytest.mark.parametrize(
    ("name", "eos"), [("gpt2", True), ("gpt2", False), ("llama", True), ("llama-without-bos", True), ("llama-without-bos", False)]
)
def test_a_small_store_predicts_what_the_oracle_does(tmp_path, name, eos):
    """Below 4,096 entries keys stay as they are: p and p_kNN are the oracle's to 1e-5, searched exactly and not."""
    kind = build(name)
    with make(tmp_path, kind, n_chars=1_200, eos=eos) as store:
        keys, values = entries(kind, 1_200, eos=eos)
        assert len(store) == len(values) < 4_096
        for exact in (True, False):
            lm = KnnLM.load(store, kind.model, tokenizer=kind.tokenizer, k=len(store), lmbda=0.3, temperature=8.0, exact=exact)
            check(kind, lm, keys, values)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("gpt2", "bf16"),
        ("llama-without-bos", "f16"),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in [("gpt2", "f16"), ("llama", "f32")]),
    ],
)
def test_exact_search_over_kept_keys_predicts_what_the_oracle_does(tmp_path, name, kept):
    """Beside 4-bit codes, exact search uses the keys as they were kept: the oracle's to 1e-5 on keys rounded alike.

    Searched by codes, p_kNN is near: for these wide distributions, less than 0.1 of its mass lies elsewhere.
    """
    kind = build(name)
    with make(tmp_path, kind, n_chars=9_500, keep_keys=kept) as store:
        keys, values = entries(kind, 9_500, eos=True)
        assert len(store) == len(values) >= 4_096
        assert store.info()["spaces"][0]["codec"] == "pq4"
        settings = {"k": len(store) + 7, "lmbda": 0.3, "temperature": 8.0}  # k beyond the entries: the rest is -1
        exact = KnnLM.load(store, kind.model, tokenizer=kind.tokenizer, exact=True, **settings)
        check(kind, exact, rounded(keys, kept), values)
        coded = KnnLM.load(store, kind.model, tokenizer=kind.tokenizer, **settings).predict(list(QUERIES))
        apart = np.abs(coded.p_knn - exact.predict(list(QUERIES)).p_knn).sum(axis=1) / 2
        assert apart.max() < 0.1


@pytest.mark.parametrize("name", KINDS)
def test_values_are_shifted_by_one_against_keys(tmp_path, name):
    """The value of a key is the next token: not the one the key was computed at, not the one after the next."""
    kind = build(name)
    document = lms.book()[:600]
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": document})
    options = {"model": kind.model, "tokenizer": kind.tokenizer, "context": CONTEXT, "stride": STRIDE}
    with create(tmp_path / "made.knn", corpus, **options) as store:
        lm = KnnLM.load(store, kind.model, tokenizer=kind.tokenizer, k=len(store), lmbda=1.0, temperature=2.0, exact=True)
        ids = kind.bos + lms.token_ids(kind.tokenizer, document) + [kind.tokenizer.eos_token_id]
        keys, values = entries_of(kind, ids)
        right, current, after_next = values[:-1], np.array(ids)[:-2], values[1:]
        found = lm.predict("Scrooge was").p_knn
        query = kind.bos + lms.token_ids(kind.tokenizer, "Scrooge was")
        # The last entry has no token after the next, so it is left out of all three; its share is small.
        apart = [np.abs(expected(kind, keys[:-1], shifted, query, 1.0, 2.0)[1] - found).max() for shifted in (right, current, after_next)]
        assert apart[0] < 0.005
        assert min(apart[1:]) > 0.05
        np.testing.assert_allclose(found, expected(kind, keys, values, query, 1.0, 2.0)[1], **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_the_stored_order_is_the_corpus_order(tmp_path, name):
    """Each row's value and key are the oracle's at the same place, and its own nearest neighbour is itself."""
    kind = build(name)
    with make(tmp_path, kind, n_chars=600) as store:
        keys, values = entries(kind, 600, eos=True)
        hits = store.search(keys, k=1, exact=True)
        same = hits.rows[:, 0] == np.arange(len(values))
        # Equal contexts at the beginnings of documents (BOS alone) have equal keys: the first of them answers.
        np.testing.assert_allclose(hits.distances, 0, atol=1e-4)
        assert same.mean() > 0.95
        np.testing.assert_array_equal(hits.values[same, 0], values[same])


def test_the_mixture_is_wrong_where_the_oracle_is_changed(tmp_path):
    """The comparison has teeth: another temperature, context or λ in the oracle is noticed."""
    kind = build("gpt2")
    with make(tmp_path, kind, n_chars=600) as store:
        keys, values = entries(kind, 600, eos=True)
        lm = KnnLM.load(store, kind.model, tokenizer=kind.tokenizer, k=len(store), lmbda=0.3, temperature=8.0, exact=True)
        check(kind, lm, keys, values)
        for changed in ({"lmbda": 0.31}, {"temperature": 8.4}):
            other = KnnLM(store, lm.language_model, lm.extractor, replace(lm.settings, **changed), lm.context)
            other_step, step = other.predict("Scrooge was"), lm.predict("Scrooge was")
            assert np.abs(other_step.p - step.p).max() > 1e-4
