"""Who calls the model while a KnnLM is attached, under which settings: a Trainer, transformers' `generate`, a loop of one's own."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mixtures
import numpy as np
import pytest
import torch
import transformers
from mixtures import CLOSE, LMBDA, VOCAB, Kind, bare, build, forward, log_p

from knnstore.lm import attaching
from knnstore.lm.knnlm import KnnLM
from knnstore.storage.calibration import Gate

KIND = build("gpt2")


@pytest.fixture
def lm(tmp_path: Path) -> Iterator[KnnLM]:
    with mixtures.loaded(KIND, tmp_path) as made:
        yield made


def changed(lm: KnnLM, **settings: object) -> KnnLM:
    return KnnLM(lm.store, lm.language_model, lm.extractor, replace(lm.settings, **settings), lm.context)


def after(lm: KnnLM, rows: list[list[int]]) -> np.ndarray:
    """p after each text, by a pass of the attached model over each alone."""
    return np.stack([forward(lm, [row]).logits[0, -1].double().exp().numpy() for row in rows])


# --- settings


def nearest(lm: KnnLM) -> float:
    return float(np.median(lm.predict(mixtures.prompts(8)).neighbors.distances[:, 0]))


@pytest.mark.parametrize("how", ["distance", "logistic", "excluded", "k", "inexact"])
def test_every_setting_holds_as_in_predict(lm, how):
    """Gates, exclusions, k and approximate search: p after a text is that of `predict`."""
    middle = nearest(lm)
    features = ("nearest", "knn_entropy", "knn_max", "lm_max", "lm_entropy", "agreement")
    settings = {
        "distance": {"gate": Gate(kind="distance", distances=(0.5 * middle, 2.0 * middle), lambdas=(0.9, 0.1))},
        "logistic": {"gate": Gate(kind="logistic", features=features, weights=(-0.7, 0.2, 1.0, -0.3, 0.1, 2.0), bias=-0.4)},
        "excluded": {"exclude": ("one",)},
        "k": {"k": 5},
        "inexact": {"exact": False},
    }
    other, rows = changed(lm, **settings[how]), mixtures.prompts(6)
    step = other.predict(rows)
    np.testing.assert_allclose(after(other, rows), step.p, rtol=0, atol=1e-5)
    if how in ("distance", "logistic"):
        assert np.ptp(step.lmbda) > 0.01  # the gate has something to say
    if how == "excluded":
        np.testing.assert_allclose(step.p, step.p_lm)


@pytest.mark.parametrize(("lmbda", "words"), [(0.0, "LM"), (1.0, "neighbours")])
def test_lambda_may_be_at_its_ends(lm, lmbda, words):
    """The LM alone, or the neighbours alone: then log p is -inf for a token that none of them has."""
    found = forward(changed(lm, lmbda=lmbda), [[5, 6, 7]]).logits[0].double().numpy()
    with np.errstate(divide="ignore"):
        wanted = log_p(KIND, [5, 6, 7], lmbda=lmbda)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert np.isneginf(found).any() == (lmbda == 1.0)


def test_long_passes_are_searched_and_mixed_in_pieces(lm, monkeypatch):
    """However small the pieces are, the result is the same, and no search has more positions than said."""
    rows = np.random.default_rng(0).integers(3, VOCAB, (3, 9))
    wanted, searched = forward(lm, rows).logits, []
    search = type(lm.store).search
    monkeypatch.setattr(type(lm.store), "search", lambda self, keys, **options: searched.append(len(keys)) or search(self, keys, **options))
    for positions, cells, mixed in ((7, 1 << 22, 2 * 4 * VOCAB), (100, 4 * lm.settings.k, 1 << 27), (100, 1, 1)):
        monkeypatch.setattr(attaching, "SEARCH_POSITIONS", positions)
        monkeypatch.setattr(attaching, "SEARCH_CELLS", cells)
        monkeypatch.setattr(attaching, "MIX_BYTES", mixed)
        del searched[:]
        torch.testing.assert_close(forward(lm, rows).logits, wanted)
        assert max(searched) == max(1, min(positions, cells // lm.settings.k))
        assert sum(searched) == 27


def test_a_layer_that_runs_twice_gives_the_keys_of_its_first_run(tmp_path):
    """As they are stored: blocks may share their feed-forward net, and the datastore has what entered it first."""
    model = copy.deepcopy(KIND.model)
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    entering = []
    hook = model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: entering.append(args[0].detach().numpy()[0]))
    ids = np.random.default_rng(1).integers(3, VOCAB, 30)
    with torch.no_grad():
        model(torch.tensor(ids[None]))
    hook.remove()
    assert len(entering) == 2
    loaded = transformers_loaded(model)
    kind = replace(KIND, model=model, keys=entering[0], values=np.roll(ids, -1), layer="h.1.mlp", language_model=loaded)
    with mixtures.loaded(kind, tmp_path) as shared:
        step = shared.predict(ids[:7])
        assert step.neighbors.distances[0, 0] == pytest.approx(0, abs=1e-4)
        np.testing.assert_allclose(after(shared, [ids[:7].tolist()])[0], step.p, rtol=0, atol=1e-5)


def transformers_loaded(model: transformers.PreTrainedModel):
    return mixtures.load_language_model(model, tokenizer=KIND.tokenizer)


def test_with_confident_retrieval_the_unsure_positions_are_mixed_alone(lm):
    """Where the LM is sure nothing is searched, and p is p_LM."""
    before = Gate(kind="logistic", features=("lm_max",), weights=(-1.0,), bias=0.0)  # λ expected: high where max p_LM is low
    ids = np.random.default_rng(2).integers(3, VOCAB, 20)
    plain = mixtures.log_softmax(mixtures.states(KIND.model, KIND.before, ids)[1])
    expected = 1 / (1 + np.exp(plain.max(axis=1)))
    threshold = float(np.median(expected))
    found = forward(changed(lm, retrieval="confident", before=before, threshold=threshold), ids[None]).logits[0].numpy()
    wanted = np.where((expected >= threshold)[:, None], log_p(KIND, ids), plain)
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_with_pointers_each_pass_begins_anew(lm):
    """Passes of an attached model may be of any texts: what one found is nothing to the next."""
    other, tokens = changed(lm, retrieval="pointers", min_knns=1), np.argsort(-np.bincount(KIND.values))[:3].tolist()
    with other.attached() as model, torch.no_grad():
        found = [model(torch.tensor([[token]])).logits[0, 0] for token in tokens]
    for token, scores in zip(tokens, found, strict=True):
        np.testing.assert_allclose(scores, log_p(KIND, [token])[0], **CLOSE)


# --- transformers' own generate


def greedy(kind: Kind, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        ids = [*ids, int(log_p(kind, ids)[-1].argmax())]
    return ids


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}])
def test_the_models_own_generate_decodes_the_mixture(tmp_path, name, options):
    """Greedily, over a padded batch, with any cache: each text goes on as the oracle's loop does."""
    kind, texts = build(name), mixtures.prompts(3)
    wanted = [greedy(kind, text, 6) for text in texts]
    with mixtures.loaded(kind, tmp_path) as made, made.attached() as model:
        found = model.generate(
            **mixtures.left_padded(texts), max_new_tokens=6, eos_token_id=None, pad_token_id=7, disable_compile=True, **options
        )
    assert [row[-len(text) :] for row, text in zip(found.tolist(), wanted, strict=True)] == wanted


def test_a_loop_of_ones_own_has_log_p_as_logits(lm):
    """Softmax of log p is p: code that treats them as logits is right."""
    ids = [5, 6, 7]
    with lm.attached() as model, torch.no_grad():
        p = model(torch.tensor([ids])).logits[0].softmax(-1)
    np.testing.assert_allclose(p, np.exp(log_p(KIND, ids)), rtol=0, atol=1e-6)


# --- a Trainer


def evaluated(model: transformers.PreTrainedModel, rows: np.ndarray, folder: Path, **options: object) -> float:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    # A Trainer divides by the number of labels; the first of a row is never predicted.
    dataset = [{"input_ids": row.tolist(), "labels": [-100, *row[1:].tolist()]} for row in rows]
    return transformers.Trainer(model=model, args=arguments, eval_dataset=dataset).evaluate()["eval_loss"]


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 1e-9}, {"prediction_loss_only": True}])
def test_a_trainer_evaluates_the_mixture(lm, tmp_path, options):
    """`Trainer.evaluate` reports the mixture's loss inside and the LM's outside, and leaves the model as it was."""
    pytest.importorskip("accelerate")
    rows = np.random.default_rng(3).integers(3, VOCAB, (4, 12))
    plain = [mixtures.log_softmax(mixtures.states(KIND.model, KIND.before, ids)[1])[np.arange(11), ids[1:]] for ids in rows]
    mixed = [log_p(KIND, ids)[np.arange(11), ids[1:]] for ids in rows]
    with lm.attached() as model:
        found = evaluated(model, rows, tmp_path / "inside", **options)
    assert found == pytest.approx(-np.mean(mixed), abs=1e-4)
    assert bare(lm)
    assert evaluated(lm.model, rows, tmp_path / "outside", **options) == pytest.approx(-np.mean(plain), abs=1e-4)
    assert abs(np.mean(mixed) - np.mean(plain)) > 0.1
    assert math.isfinite(found)
    assert lm.settings.lmbda == LMBDA
