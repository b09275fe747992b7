"""Laws of `attached()`: the model's own forward pass gives log p, against the oracle of `mixtures`, and all is undone."""

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mixtures
import numpy as np
import pytest
import torch
from mixtures import CLOSE, VOCAB, Kind, bare, build, forward, in_threads, log_p, log_softmax, states

from knnstore.errors import InvalidArgumentError, ModelError
from knnstore.lm.attaching import attached_here
from knnstore.lm.knnlm import KnnLM

every_kind = pytest.mark.parametrize("name", [*mixtures.NAMES, "mixtral"])
some_kinds = pytest.mark.parametrize("name", ["gpt2", "opt", "gpt2-final"])


@pytest.fixture
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KnnLM]:
    """The kind that the test names, or GPT-2."""
    name = request.node.callspec.params.get("name", "gpt2") if hasattr(request.node, "callspec") else "gpt2"
    with mixtures.loaded(build(name), tmp_path) as made:
        yield made


def kind_of(lm: KnnLM) -> Kind:
    return next(kind for kind in map(build, [*mixtures.NAMES, "mixtral"]) if kind.language_model is lm.language_model)


# --- what a pass gives


@every_kind
def test_a_pass_gives_log_p_at_every_position(lm, name):
    """Each position's log p is the oracle's to 1e-4, in float32, normalized; texts of a batch do not see each other."""
    kind = build(name)
    rows = np.random.default_rng(1).integers(3, VOCAB, (3, 11))
    found = forward(lm, rows).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(3, 11), atol=1e-5, rtol=0)
    for i, ids in enumerate(rows):
        wanted = log_p(kind, ids)
        np.testing.assert_allclose(found[i], wanted, **CLOSE)
        assert np.abs(wanted - log_softmax(states(kind.model, kind.before, ids)[1])).max() > 1  # the datastore has a say


@some_kinds
@pytest.mark.parametrize("keep", [0, 1, 3, [4], [2, 0], [5, 4, 3, 2, 1, 0], [[0, 3], [5, 1]], "mask"])
def test_the_positions_kept_have_their_own_keys(lm, name, keep):
    """`logits_to_keep` as a number, as positions in any order, for each text its own, or as a mask: log p is that of those positions."""
    kind, rows = build(name), np.random.default_rng(2).integers(3, VOCAB, (2, 6))
    mask = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    given = mask if keep == "mask" else keep if isinstance(keep, int) else torch.tensor(keep)
    found = forward(lm, rows, logits_to_keep=given).logits.numpy()
    whole = np.stack([log_p(kind, ids) for ids in rows])
    if keep == "mask":
        wanted = whole[mask.numpy()]
    elif isinstance(keep, int):
        wanted = whole[:, -keep:]
    else:
        wanted = np.take_along_axis(whole, np.broadcast_to(keep, (2, len(keep) if np.ndim(keep) == 1 else 2))[..., None], axis=1)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, **CLOSE)


@every_kind
def test_padding_on_the_left_changes_nothing(lm, name, monkeypatch):
    """A text's log p is the same alone and padded; padded positions have the LM's and are not searched."""
    kind, texts = build(name), mixtures.prompts(4)
    batch = mixtures.left_padded(texts)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if name == "opt":
        del batch["position_ids"]  # it counts from the mask by itself
    with torch.no_grad():
        plain = lm.model(**batch).logits.log_softmax(-1)
    searched = []
    search = type(lm.store).search
    monkeypatch.setattr(type(lm.store), "search", lambda self, keys, **options: searched.append(len(keys)) or search(self, keys, **options))
    with lm.attached() as model, torch.no_grad():
        found = model(**batch).logits
    for i, text in enumerate(texts):
        np.testing.assert_allclose(found[i, -len(text) :], log_p(kind, text), **CLOSE)
        torch.testing.assert_close(found[i, : -len(text)], plain[i, : -len(text)])
    assert sum(searched) == sum(map(len, texts))


@every_kind
def test_a_cache_changes_nothing(lm, name):
    """Fed token by token, or in pieces, with a cache: log p of each is that of the whole text."""
    ids = np.random.default_rng(4).integers(3, VOCAB, 12)
    wanted, found, cache = log_p(build(name), ids), [], None
    with lm.attached() as model, torch.no_grad():
        for begin, stop in ((0, 5), (5, 6), (6, 9), (9, 10), (10, 12)):
            output = model(torch.tensor(ids[None, begin:stop]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0])
    np.testing.assert_allclose(torch.cat(found), wanted, **CLOSE)


def test_masks_of_four_dimensions_search_every_position(lm):
    """As static caches make them: nothing says what is padding, so that every position has the mixture."""
    ids = np.random.default_rng(5).integers(3, VOCAB, 7)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    np.testing.assert_allclose(forward(lm, ids[None], attention_mask=causal).logits[0], log_p(kind_of(lm), ids), **CLOSE)


def test_embeddings_may_be_given_for_ids(lm):
    """`inputs_embeds` have the same keys."""
    ids = torch.tensor([[5, 6, 7, 8]])
    with lm.attached() as model, torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits[0]
    np.testing.assert_allclose(found, log_p(kind_of(lm), ids[0]), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
@pytest.mark.parametrize("labels", [False, True])
def test_a_tuple_has_log_p_where_it_had_logits(lm, name, labels):
    """`return_dict=False`: the same output as with names, in order, the loss first."""
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"labels": ids} if labels else {}
    named = forward(lm, ids, **options)
    found = forward(lm, ids, return_dict=False, **options)
    assert isinstance(found, tuple)
    for item, wanted in zip(found, (value for name, value in named.items() if value is not None), strict=True):
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(item, wanted)
    place = next(i for i, item in enumerate(found) if isinstance(item, torch.Tensor) and item.shape == (1, 4, VOCAB))
    np.testing.assert_allclose(found[place][0], log_p(kind_of(lm), ids[0]), **CLOSE)


# --- the loss


@every_kind
def test_the_loss_is_that_of_the_mixture(lm, name):
    """Mean of -log p over the tokens that have a label; divided by num_items_in_batch where that is given."""
    kind, rows = build(name), np.random.default_rng(6).integers(3, VOCAB, (2, 9))
    labels = torch.tensor(rows)
    labels[0, :4] = -100
    log_probs = [
        float(log_p(kind, ids)[i, ids[i + 1]]) for ids, kept in zip(rows, labels, strict=True) for i in range(8) if kept[i + 1] > 0
    ]
    with torch.no_grad():
        plain = lm.model(torch.tensor(rows), labels=labels)
    extra = float(lm.model.config.router_aux_loss_coef * plain.aux_loss) if name == "mixtral" else 0.0  # stays as it is
    assert forward(lm, rows, labels=labels).loss.item() == pytest.approx(-np.mean(log_probs) + extra, abs=1e-4)
    assert forward(lm, rows, labels=labels, num_items_in_batch=50).loss.item() == pytest.approx(-np.sum(log_probs) / 50 + extra, abs=1e-4)
    assert abs(plain.loss.item() - (-np.mean(log_probs) + extra)) > 0.1


# --- dtypes, gradients, modes


@pytest.mark.filterwarnings("ignore:.*computed in float32, this model runs in bfloat16")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_in_bfloat16_gives_log_p_in_float32(lm, name):
    """Searched with its keys as they come, mixed in float32: rounded to bfloat16, log p would be no distribution any more."""
    kind = build(name)
    half = copy.deepcopy(kind.model)
    path = "transformer.h.1.mlp" if name == "gpt2" else "model.layers.1.mlp"
    other = replace(kind, model=half, before=half.get_submodule(path))
    ids = [5, 6, 7, 8, 9, 10]
    found = forward(KnnLM.load(lm.store, half, tokenizer=kind.tokenizer, dtype="bfloat16", **options_of(lm)), [ids]).logits[0]
    assert half.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, log_p(other, ids), **CLOSE)


def options_of(lm: KnnLM) -> dict:
    return {name: getattr(lm.settings, name) for name in ("k", "lmbda", "temperature", "exact")}


def test_the_result_is_detached(lm):
    """No gradient flows through a search; the loss has none either."""
    ids = torch.tensor([[5, 6, 7]])
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
    with lm.attached() as model:
        output = model(ids, labels=ids)
    assert not output.logits.requires_grad
    assert not output.loss.requires_grad


def test_inference_mode_is_no_hindrance(lm):
    """Tensors made in it are taken as they are."""
    ids = torch.tensor([[5, 6, 7]])
    with lm.attached() as model, torch.inference_mode():
        found = model(ids).logits[0]
    np.testing.assert_allclose(found, log_p(kind_of(lm), [5, 6, 7]), **CLOSE)


def test_training_mode_is_refused(lm):
    """Dropout would change keys; nothing is left behind by the refusal."""
    ids = torch.tensor([[5, 6, 7]])
    lm.model.train()
    try:
        with pytest.raises(ModelError, match=r"training mode.*model\.eval"), lm.attached() as model:
            model(ids)
    finally:
        lm.model.eval()
    assert bare(lm)


# --- passes that cannot be mixed


@pytest.mark.parametrize("name", ["llama"])
def test_a_pass_that_leaves_early_is_an_error(lm, name):
    """Also after a pass that broke off behind the key layer: no pass is mixed with another one's keys."""
    ids = torch.tensor([[5, 6, 7]])
    wanted = forward(lm, ids).logits

    def broken(module, args):
        raise RuntimeError("broke off")

    with lm.attached() as model, torch.no_grad():
        hook = model.lm_head.register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broke off"):
            model(ids)
        hook.remove()
        model.config.num_hidden_layers = 1
        try:
            with pytest.raises(ModelError, match=r"did not run the key layer layers\.1\.mlp \(an early exit\?\)"):
                model(ids)
        finally:
            model.config.num_hidden_layers = 2
        torch.testing.assert_close(model(ids).logits, wanted)


def test_keys_that_are_not_finite_are_refused_unless_padded(lm):
    """By number and layer; what stands in padding does not matter."""
    model = copy.deepcopy(lm.model)
    other = KnnLM.load(lm.store, model, tokenizer=lm.tokenizer, **options_of(lm))
    with torch.no_grad():
        model.transformer.wte.weight[5] = torch.inf
    with pytest.raises(ModelError, match=r"1 of 2 keys at layer h\.1\.mlp are not finite"):
        forward(other, [[7], [5]])
    assert forward(other, [[7], [5]], attention_mask=torch.tensor([[1], [0]])).logits.shape == (2, 1, VOCAB)


def test_an_output_without_logits_is_refused(lm):
    """A model may be asked to leave them out."""
    hook = lm.model.register_forward_hook(lambda module, args, output: {"loss": torch.zeros(())})
    with pytest.raises(ModelError, match="gave a dict without logits"):
        forward(lm, [[5]])
    hook.remove()


# --- coming and going


def test_all_is_undone_on_exit(lm):
    """No hook is left, and the model gives its own logits: at the end, and after an exception inside."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = lm.model(ids).logits
    with lm.attached():
        assert not bare(lm)
    assert bare(lm)
    with pytest.raises(ZeroDivisionError), lm.attached() as model, torch.no_grad():
        1 / float(model(ids).logits.exp().sum() * 0)
    assert bare(lm)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, before, rtol=0, atol=0)


def test_nested_it_mixes_once(lm):
    """The datastore is mixed in one time, and stays until the outermost is left."""
    ids, wanted = torch.tensor([[5, 6, 7]]), log_p(kind_of(lm), [5, 6, 7])
    with lm.attached() as model, torch.no_grad():
        with lm.attached(), attached_here(lm):
            np.testing.assert_allclose(model(ids).logits[0], wanted, **CLOSE)
        np.testing.assert_allclose(model(ids).logits[0], wanted, **CLOSE)
    assert bare(lm)


def test_another_knnlm_at_the_same_model_is_refused(lm):
    """While one is attached; its settings would be mixed with the other's. Afterwards it may."""
    other = KnnLM(lm.store, lm.language_model, lm.extractor, replace(lm.settings, lmbda=0.9), lm.context)
    for enter in (other.attached, lambda: attached_here(other)):
        with lm.attached(), pytest.raises(InvalidArgumentError, match="another KnnLM attached"), enter():
            pass
    with attached_here(lm), pytest.raises(InvalidArgumentError, match="another KnnLM attached"), other.attached():
        pass
    np.testing.assert_allclose(forward(other, [[5, 6, 7]]).logits[0], log_p(kind_of(lm), [5, 6, 7], lmbda=0.9), **CLOSE)
    assert bare(lm)


def test_predictions_inside_are_those_outside(lm):
    """`predict`, `score` and loading see the LM's own logits, in the middle of it all."""
    ids = np.random.default_rng(7).integers(3, VOCAB, 20)
    step, score, wanted = lm.predict([ids, ids[:4]]), lm.score(ids), log_p(kind_of(lm), ids)
    with lm.attached() as model:
        within, scored = lm.predict([ids, ids[:4]]), lm.score(ids)
        KnnLM.load(lm.store, model, tokenizer=lm.tokenizer, **options_of(lm))
        with torch.no_grad():
            np.testing.assert_allclose(model(torch.tensor(ids[None])).logits[0], wanted, **CLOSE)
    for name in ("p", "p_lm", "p_knn"):
        np.testing.assert_array_equal(getattr(within, name), getattr(step, name))
    np.testing.assert_array_equal(scored.log_p, score.log_p)
    np.testing.assert_allclose(score.log_p, wanted[np.arange(19), ids[1:]], **CLOSE)


def test_a_pass_that_began_before_is_not_mixed(lm):
    """Attached in the middle of it, say by another thread: its keys may not be known, so it stays the LM's; the next is mixed."""
    ids, wanted = torch.tensor([[5, 6, 7]]), log_p(kind_of(lm), [5, 6, 7])
    with torch.no_grad(), contextlib.ExitStack() as stack:
        plain = lm.model(ids).logits
        mine = lm.model.register_forward_hook(lambda module, args, output: None)  # without any, torch looks for none at the end
        hook = lm.model.transformer.ln_f.register_forward_pre_hook(lambda module, args: stack.enter_context(lm.attached()) and None)
        torch.testing.assert_close(lm.model(ids).logits, plain)
        hook.remove()
        mine.remove()
        np.testing.assert_allclose(lm.model(ids).logits[0], wanted, **CLOSE)
    assert bare(lm)


def test_a_copy_of_the_model_does_not_take_the_datastore_along(lm):
    """A model may be copied while attached (some trainers do): the copy is plain once all is undone."""
    ids = torch.tensor([[5, 6, 7]])
    with lm.attached() as model:
        other = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, lm.model(ids).logits)


# --- threads


def test_passes_of_several_threads_keep_their_keys_apart(lm):
    """Attached by one thread, the model is used by others: each pass has its own keys."""
    texts = [np.random.default_rng(n).integers(3, VOCAB, 4 + n).tolist() for n in range(6)]
    wanted = [log_p(kind_of(lm), text) for text in texts]

    def work(start: int) -> None:
        with torch.no_grad():
            for _ in range(8):
                for n in range(start, 6, 2):
                    np.testing.assert_allclose(lm.model(torch.tensor([texts[n]])).logits[0], wanted[n], **CLOSE)

    with lm.attached():
        in_threads(lambda: work(0), lambda: work(1))


def test_attached_here_is_for_one_thread(lm):
    """Another thread has the model's own logits meanwhile, and may even have another KnnLM there."""
    ids = torch.tensor([[5, 6, 7]])
    other = KnnLM(lm.store, lm.language_model, lm.extractor, replace(lm.settings, lmbda=0.9), lm.context)
    plain = log_softmax(states(lm.model, kind_of(lm).before, [5, 6, 7])[1])
    wanted, others = (log_p(kind_of(lm), [5, 6, 7], lmbda=lmbda) for lmbda in (mixtures.LMBDA, 0.9))
    both = threading.Barrier(2, timeout=30)

    def one() -> None:
        with attached_here(lm) as model, torch.no_grad():
            both.wait()
            np.testing.assert_allclose(model(ids).logits[0], wanted, **CLOSE)
            both.wait()

    def two() -> None:
        both.wait()
        with torch.no_grad():
            np.testing.assert_allclose(lm.model(ids).logits[0].log_softmax(-1), plain, **CLOSE)
            with attached_here(other) as model:
                np.testing.assert_allclose(model(ids).logits[0], others, **CLOSE)
        both.wait()

    in_threads(one, two)
    assert bare(lm)


def test_a_hook_that_is_just_being_added_or_removed_is_no_hindrance(lm):
    """torch calls the hook of another thread without kwargs between two steps of its own: a pass here goes on, unmixed."""
    ids, there, done = torch.tensor([[5, 6, 7]]), threading.Event(), threading.Event()
    with torch.no_grad():
        plain = lm.model(ids).logits

    def hold() -> None:
        with attached_here(lm):
            there.set()
            done.wait(30)

    def run() -> None:
        there.wait(30)
        for module in (lm.model, lm.extractor.module):
            module._forward_pre_hooks_with_kwargs.clear()
            module._forward_hooks_with_kwargs.clear()
        try:
            with torch.no_grad():
                torch.testing.assert_close(lm.model(ids).logits, plain)
        finally:
            done.set()

    in_threads(hold, run)
    assert bare(lm)
