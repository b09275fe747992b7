"""`generate` against dull decoding over the oracle's log p: a greedy loop, a beam search with Python lists, a sampling loop.

The rules are transformers' own (length penalty, early stopping, order of warpers), written again here; log p after each token comes from a
pass over the whole text without a cache (`mixtures.log_p`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import lms
import mixtures
import numpy as np
import pytest
import test_oracle
import torch
from mixtures import CLOSE, VOCAB, Kind, build, log_p

from knnstore.lm import calibrate
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.retrieval import retriever_for

EOS = [int(token) for token in np.argsort(-np.bincount(build("gpt2").values))[:2]]  # likely to be met: the most frequent values
every_kind = pytest.mark.parametrize("name", mixtures.NAMES)


@pytest.fixture
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KnnLM]:
    name = request.node.callspec.params.get("name", "gpt2") if hasattr(request.node, "callspec") else "gpt2"
    with mixtures.loaded(build(name), tmp_path) as made:
        yield made


def generated(lm: KnnLM, prompts: object, **options: object):
    """transformers' output with log p of each step. Without an EOS where none is given, so that texts do not end by chance."""
    options = {"eos_token_id": None, "pad_token_id": 7, **options}
    return lm.generate(prompts, return_dict_in_generate=True, output_logits=True, **options)


# --- greedy


def greedy(kind: Kind, ids: list[int], n: int, eos: Sequence[int] = ()) -> tuple[list[int], list[np.ndarray]]:
    steps = []
    for _ in range(n):
        steps.append(log_p(kind, ids)[-1])
        ids = [*ids, int(steps[-1].argmax())]
        if ids[-1] in eos:
            break
    return ids, steps


@every_kind
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"logits_to_keep": 0}], ids=str)
def test_greedy_decoding_is_the_oracles(lm, name, options):
    """Token by token, and log p of each step to 1e-4; with a cache and without; prompts of unequal lengths alone and in a batch."""
    kind, texts = build(name), mixtures.prompts(4)
    wanted = [greedy(kind, text, 8) for text in texts]
    batch = generated(lm, texts, max_new_tokens=8, **options)
    for i, (ids, steps) in enumerate(wanted):
        assert batch.sequences[i, -len(ids) :].tolist() == ids
        alone = generated(lm, texts[i], max_new_tokens=8, **options)
        assert alone.sequences[0].tolist() == ids
        for logits, row in ((batch.logits, i), (alone.logits, 0)):
            np.testing.assert_allclose(torch.stack(logits)[:, row], np.stack(steps), **CLOSE)


def test_greedy_texts_end_at_an_eos(lm):
    """Each at its own; the rest of a batch goes on."""
    kind, texts = build("gpt2"), mixtures.prompts(8)
    wanted = [greedy(kind, text, 12, eos=EOS)[0] for text in texts]
    lengths = {len(ids) - len(text) for ids, text in zip(wanted, texts, strict=True)}
    assert len(lengths) > 2  # they do end at different places
    found = lm.generate(texts, max_new_tokens=12, eos_token_id=EOS, pad_token_id=7)
    alone = [lm.generate(text, max_new_tokens=12, eos_token_id=EOS, pad_token_id=7) for text in texts]
    assert found == alone == [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "other"}, {"assistant_model": "same"}])
@every_kind
def test_assisted_decoding_gives_the_greedy_text(lm, name, options):
    """Drafts by lookup, by another model or by the model itself are checked with the mixture, several positions in one pass."""
    kind, passes = build(name), []
    text = [5, 6, 7, 8, 5, 6, 7]
    wanted = greedy(kind, text, 14)[0]
    if "assistant_model" in options:
        options = {"assistant_model": kind.model if options["assistant_model"] == "same" else lms.gpt2_model(seed=9)}
    hook = kind.model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    try:
        found = lm.generate(text, max_new_tokens=14, eos_token_id=None, pad_token_id=7, return_dict_in_generate=True, **options)
    finally:
        hook.remove()
    assert found.sequences[0].tolist() == wanted
    assert any(1 < length < len(text) for length in passes)  # drafts were checked


@pytest.mark.parametrize(("name", "kept"), [pytest.param("gpt2", "f16", marks=pytest.mark.slow), ("llama", "bf16")])
def test_a_datastore_with_codes_and_kept_keys_decodes_what_the_oracle_does(tmp_path, monkeypatch, name, kept):
    """Made from texts by `create`: on its keys as they were rounded when kept, log p of each step is the oracle's to 1e-4."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 256)
    kind, settings = test_oracle.build(name), {"lmbda": 0.4, "temperature": 8.0}
    with test_oracle.make(tmp_path, kind, n_chars=9_500, keep_keys=kept) as store:
        keys, values = test_oracle.entries(kind, 9_500, eos=True)
        assert store.info()["spaces"][0]["codec"] == "pq4"
        lm = KnnLM.load(store, kind.model, tokenizer=kind.tokenizer, k=len(store), exact=True, **settings)
        ids = lm.encode("The spirits of all").tolist()[-12:]
        found = generated(lm, ids, max_new_tokens=8)
        for scores in found.logits:
            wanted = np.log(test_oracle.expected(kind, test_oracle.rounded(keys, kept), values, ids, *settings.values())[2])
            np.testing.assert_allclose(scores[0], wanted, **CLOSE)
            ids.append(int(wanted.argmax()))
        assert found.sequences[0].tolist() == ids


# --- pointers


def test_pointers_are_followed_from_token_to_token(lm):
    """Each text of a batch goes on from its own neighbours: log p of each step is that of a retriever that has it alone."""
    kind, texts, n_new = build("gpt2"), mixtures.prompts(2, seed=6), 8
    other = KnnLM(lm.store, lm.language_model, lm.extractor, replace(lm.settings, retrieval="pointers", min_knns=3), lm.context)
    found = generated(other, texts, max_new_tokens=n_new)
    saved = 0
    for row, text in enumerate(texts):
        ids = found.sequences[row, -len(text) - n_new :].tolist()
        keys, logits = mixtures.states(kind.model, kind.before, ids[:-1])
        retriever = retriever_for(lm.store, other.settings)
        for step in range(n_new):
            at = len(text) - 1 + step
            near = retriever.find(keys[at : at + 1], None, sequence=np.zeros(1, np.int64), came=np.array(ids[at : at + 1])).neighbors
            weights = np.where(near.values[0] >= 0, np.exp(-(near.distances[0] - near.distances[0, 0]) / kind.temperature), 0.0)
            p_knn = np.bincount(np.maximum(near.values[0], 0), weights / weights.sum(), minlength=VOCAB)
            wanted = np.log(mixtures.LMBDA * p_knn + (1 - mixtures.LMBDA) * np.exp(mixtures.log_softmax(logits[at])))
            np.testing.assert_allclose(found.logits[step][row], wanted, **CLOSE)
        saved += n_new - retriever.n_searched
    assert saved > 0


def test_without_a_cache_pointers_are_searched_for_anew(lm):
    """A pass over the whole text does not go on from the one before by one token: every step is a full search."""
    text = mixtures.prompts(1, seed=6)[0]
    other = KnnLM(lm.store, lm.language_model, lm.extractor, replace(lm.settings, retrieval="pointers", min_knns=1), lm.context)
    wanted, steps = greedy(build("gpt2"), text, 8)
    found = generated(other, text, max_new_tokens=8, use_cache=False)
    assert found.sequences[0].tolist() == wanted
    np.testing.assert_allclose(torch.stack(found.logits)[:, 0], np.stack(steps), **CLOSE)


# --- beams


def beams(
    kind: Kind,
    prompt: list[int],
    n_new: int,
    *,
    num_beams: int,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    eos: Sequence[int] = (),
    draw: bool = False,
) -> list[list[int]]:
    """Beam search over one text. draw: candidates are drawn from torch's generator, not the best taken."""
    running = [(0.0, list(prompt))] + [(-1e9, list(prompt))] * (num_beams - 1)
    finished: list[tuple[float, list[int]]] = []
    improvable = True
    for n in range(1, n_new + 1):
        table = np.stack([score + log_p(kind, ids)[-1] for score, ids in running]).reshape(-1)
        n_candidates = max(2, 1 + len(eos)) * num_beams
        if draw:
            p = torch.from_numpy(np.exp(table - table.max())).float()
            order = torch.multinomial((p / p.sum())[None], n_candidates)[0].tolist()
        else:
            order = np.argsort(-table, kind="stable")[:n_candidates].tolist()
        candidates = [(float(table[cell]), [*running[cell // VOCAB][1], cell % VOCAB]) for cell in order]
        ends = [ids[-1] in eos or n == n_new for _, ids in candidates]
        open_ones = sorted((c for c, end in zip(candidates, ends, strict=True) if not end), key=lambda c: -c[0])
        # Only what stands among the first num_beams may be finished; the others are there so that enough go on.
        new = [(score / n**length_penalty, ids) for (score, ids), end in zip(candidates[:num_beams], ends, strict=False) if end]
        full = len(finished) == num_beams
        if improvable and not (full and early_stopping is True):
            finished = sorted([*finished, *new], key=lambda c: -c[0])[:num_beams]
        running = open_ones[:num_beams]
        if not running:
            break
        longest = n_new if early_stopping == "never" and length_penalty > 0 else n
        best = running[0][0] / longest**length_penalty
        improvable = improvable and (len(finished) < num_beams or best > finished[-1][0])
        if not improvable or (early_stopping is True and len(finished) == num_beams):
            break
    return [ids for _, ids in finished[:num_return_sequences]]


BEAMS = [
    {"num_beams": 4},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 3, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
    {"num_beams": 3, "use_cache": False, "num_return_sequences": 2},
]


def cut(row: list[int], start: int, eos: Sequence[int]) -> list[int]:
    end = next((i for i in range(start, len(row)) if row[i] in eos), len(row) - 1)
    return row[: end + 1]


@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beam_search_is_the_oracles(lm, options):
    """With every length penalty and way to stop: the same texts, best first, alone and in a batch of unequal prompts."""
    kind, texts, n = build("gpt2"), mixtures.prompts(3, seed=1), options.get("num_return_sequences", 1)
    own = {name: value for name, value in options.items() if name != "use_cache"}
    wanted = [beams(kind, text, 7, eos=EOS, **own) for text in texts]
    batch = generated(lm, texts, max_new_tokens=7, eos_token_id=EOS, **options).sequences.tolist()
    longest = max(map(len, texts))
    for i, text in enumerate(texts):
        alone = generated(lm, text, max_new_tokens=7, eos_token_id=EOS, **options).sequences.tolist()
        assert [cut(row, len(text), EOS) for row in alone] == wanted[i]
        assert [cut(row[longest - len(text) :], len(text), EOS) for row in batch[i * n : i * n + n]] == wanted[i]
    if n > 1:
        assert any(row[-1] in EOS for rows in wanted for row in rows)  # some did end
    assert wanted != [[greedy(kind, text, 7, eos=EOS)[0]] for text in texts]


@every_kind
def test_beam_search_of_every_kind_is_the_oracles(lm, name):
    """Keys go with their beams as the cache is sorted."""
    text = mixtures.prompts(1, seed=3)[0]
    found = generated(lm, text, max_new_tokens=6, num_beams=4, num_return_sequences=4, output_scores=True)
    wanted = beams(build(name), text, 6, num_beams=4, num_return_sequences=4)
    assert found.sequences.tolist() == wanted
    for row, score in zip(wanted, found.sequences_scores.tolist(), strict=True):
        log_probs = log_p(build(name), row[:-1])[np.arange(len(text) - 1, len(row) - 1), row[len(text) :]]
        assert score == pytest.approx(log_probs.mean(), abs=1e-4)


# --- sampling


def warped(scores: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Probabilities to draw from: scores divided, then the k best kept, then the fewest that have p together."""
    scores = scores / temperature
    order = np.argsort(-scores, kind="stable")
    kept = order[: top_k or len(order)]
    p = np.exp(scores[kept] - scores[kept[0]])
    p /= p.sum()
    enough = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    out = np.zeros(len(scores))
    out[kept[:enough]] = p[:enough] / p[:enough].sum()
    return out


SAMPLES = [
    {"top_k": 0},
    {"top_k": 5},
    {"top_k": 0, "top_p": 0.6},
    {"top_k": 30, "top_p": 0.9, "temperature": 1.7},
    {"top_k": 0, "temperature": 0.5},
]


@pytest.mark.parametrize("warps", SAMPLES, ids=str)
@pytest.mark.parametrize("each", [1, 3])
def test_sampling_draws_from_the_mixture(lm, warps, each):
    """From the same seed, a batch of prompts with several sequences each is what a loop over log p draws."""
    kind, texts = build("gpt2"), mixtures.prompts(2, seed=4)
    rows = [list(text) for text in texts for _ in range(each)]
    torch.manual_seed(11)
    for _ in range(8):
        p = np.stack([warped(log_p(kind, row)[-1], **warps) for row in rows])
        drawn = torch.multinomial(torch.from_numpy(p).float(), 1)[:, 0].tolist()
        rows = [[*row, token] for row, token in zip(rows, drawn, strict=True)]
    torch.manual_seed(11)
    found = generated(lm, texts, max_new_tokens=8, do_sample=True, num_return_sequences=each, **warps).sequences.tolist()
    assert [row[-len(wanted) :] for row, wanted in zip(found, rows, strict=True)] == rows
    assert rows[0] != greedy(kind, texts[0], 8)[0]


def test_beam_sampling_draws_from_the_mixture(lm):
    """Beams whose candidates are drawn: from the same seed, the oracle's."""
    text = mixtures.prompts(1, seed=5)[0]
    torch.manual_seed(13)
    wanted = beams(build("gpt2"), text, 6, num_beams=3, num_return_sequences=3, draw=True)
    torch.manual_seed(13)
    found = generated(lm, text, max_new_tokens=6, num_beams=3, num_return_sequences=3, do_sample=True, top_k=0).sequences.tolist()
    assert found == wanted


def test_the_comparison_has_teeth(lm):
    """Another λ in the oracle gives other texts, and log p apart by more than the tolerance."""
    kind, texts = build("gpt2"), mixtures.prompts(6)
    found = generated(lm, texts, max_new_tokens=8)
    plain = lm.model.generate(**mixtures.left_padded(texts), max_new_tokens=8, eos_token_id=None, pad_token_id=7)
    assert (found.sequences[:, -8:] != plain[:, -8:]).any(1).all()
    other = log_p(kind, texts[0], lmbda=mixtures.LMBDA + 0.001)[-1]
    assert np.abs(other - found.logits[0][0].numpy()).max() > 1e-3
