"""`KnnLM`: which settings hold, what a Step holds, and what is refused. That its numbers are right is shown in test_oracle.py."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import lms
import numpy as np
import pytest
import torch

import knnstore
from knnstore.entries import EntryDocument, create_from_entries
from knnstore.errors import InvalidArgumentError, ModelError, NotFoundError
from knnstore.filters import RowRange
from knnstore.lm import calibrate
from knnstore.lm.create import create
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.knnlm import KnnLM, Step
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.store import Datastore

SHARED = {"lmbda": 0.4, "temperature": 9.0}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Iterator[Datastore]:
    """Three documents in one domain, calibrated."""
    folder = tmp_path_factory.mktemp("knnlm")
    corpus = lms.write_texts(folder / "corpus", {f"{name}.txt": lms.book()[i * 900 : (i + 1) * 900] for i, name in enumerate("abc")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 512)
        with create(folder / "made.knn", corpus, model=model, context=32, stride=16) as made:
            yield made


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Iterator[Datastore]:
    """Entries of the model's own keys in two domains, each with values of its own (10 to 19, 20 to 29); no calibration."""
    extractor, rng = KeyExtractor(model.model), np.random.default_rng(0)
    batches = []
    for domain, first in (("law", 10), ("poems", 20)):
        keys = extractor.keys(torch.from_numpy(rng.integers(3, 300, (4, 20))))[:, 1:].reshape(-1, 32).numpy()
        values = rng.integers(first, first + 10, len(keys))
        batches.append(
            (keys, values, [EntryDocument(id="one", domain=domain, n_entries=50), EntryDocument(id="two", domain=domain, n_entries=26)])
        )
    path = tmp_path_factory.mktemp("domains") / "made.knn"
    create_from_entries(path, batches, checkpoint=model.checkpoint, dim=32, vocab_size=model.vocab_size, key_layer=extractor.key.layer)
    with knnstore.open(path) as made:
        yield made


# --- what a Step holds


def test_one_context_gives_rows_and_several_give_matrices(store, model):
    """(vocab,) for one, (n, vocab) for n; the ids are what the model saw."""
    lm = KnnLM.load(store, model, k=50, **SHARED)
    one, several = lm.predict("Scrooge was"), lm.predict(["Scrooge was", "the"])
    assert one.p.shape == one.p_lm.shape == one.p_knn.shape == (400,)
    assert one.weights.shape == (50,)
    assert len(one.neighbors) == 1
    assert several.p.shape == several.p_lm.shape == several.p_knn.shape == (2, 400)
    assert several.weights.shape == (2, 50)
    assert len(several.neighbors) == len(several.ids) == 2
    assert lm.predict(["Scrooge was"]).p.shape == (1, 400)  # a list of one is a batch
    bos = model.tokenizer.bos_token_id
    assert one.ids[0].tolist() == [bos, *lms.token_ids(model.tokenizer, "Scrooge was")]
    assert (one.k, one.nprobe, one.lmbda, one.temperature) == (50, lm.settings.nprobe, lm.settings.lmbda, lm.settings.temperature)


def test_a_batch_gives_what_its_contexts_give_alone(store, model):
    """Unequal lengths, text and ids, some longer than the context: rows equal single predictions."""
    lm = KnnLM.load(store, model, **SHARED)
    rng = np.random.default_rng(0)
    contexts = ["Scrooge was", "", lms.book()[:600], rng.integers(0, 400, 32), rng.integers(0, 400, 90).tolist(), [5]]
    batch = lm.predict(contexts)
    for i, context in enumerate(contexts):
        alone = lm.predict(context)
        for name in ("p_lm", "p_knn", "p", "weights"):
            np.testing.assert_allclose(getattr(batch, name)[i], getattr(alone, name), atol=1e-5)
        np.testing.assert_array_equal(batch.ids[i], alone.ids[0])
        assert len(alone.ids[0]) <= 32


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"k": 5_000}, {"exact": True}, {"lmbda": 0.0}, {"lmbda": 1.0}, {"temperature": 1e-9}])
def test_each_distribution_sums_to_one(store, model, options):
    """p, p_LM and p_kNN over the vocabulary, at any k, λ and T; the weights are the shares of p_kNN."""
    step = KnnLM.load(store, model, **{**SHARED, **options}).predict(["Scrooge", "the of in", lms.book()[5_000:5_060]])
    for p in (step.p, step.p_lm, step.p_knn):
        np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-9)
        assert (p >= 0).all()
    for i in range(3):
        shares = np.bincount(np.maximum(step.neighbors.values[i], 0), step.weights[i], minlength=400)
        np.testing.assert_allclose(shares, step.p_knn[i], atol=1e-9)
    lmbda = step.lmbda[:, None]
    np.testing.assert_allclose(step.p, lmbda * step.p_knn + (1 - lmbda) * step.p_lm, atol=1e-9)


def test_only_the_last_tokens_of_a_context_are_looked_at(store, model):
    """As many as a window had when the keys were made."""
    lm = KnnLM.load(store, model, **SHARED)
    ids = np.random.default_rng(0).integers(0, 400, 64)
    assert lm.context == 32
    np.testing.assert_array_equal(lm.predict(ids).p, lm.predict(ids[-32:]).p)
    assert np.abs(lm.predict(ids).p - lm.predict(ids[-31:]).p).max() > 1e-6


def test_a_special_token_in_a_text_is_plain_text(store, model):
    """As in the documents: the end-of-text token cannot be typed."""
    lm = KnnLM.load(store, model)
    assert model.tokenizer.eos_token_id not in lm.predict(f"a{lms.END}b").ids[0][1:]
    assert lm.decode(lm.encode("Scrooge was").tolist()) == f"{lms.END}Scrooge was"


def test_neighbours_come_with_their_contexts(store, model):
    """The nearest entry to a passage of the corpus is its own continuation."""
    text = lms.book()[900:1_800]
    ids = lms.token_ids(model.tokenizer, text)[:31]
    step = KnnLM.load(store, model, exact=True).predict([model.tokenizer.bos_token_id, *ids])
    hit = step.neighbors.context(0, 0)
    assert (hit.document, hit.token_index) == ("b.txt", 31)
    assert hit.token == text[hit.char_start : hit.char_end]


# --- which settings hold


def test_what_is_not_given_comes_from_the_calibration(store, model):
    """Each setting by itself; the manifest's own k and nprobe where there is no calibration."""
    calibration = store.manifest.calibration
    fitted = (calibration.k, calibration.nprobe, calibration.lmbda, calibration.temperature)
    given = {"k": 7, "nprobe": 3, "lmbda": 0.125, "temperature": 2.5}

    def settings(**options) -> tuple:
        with warnings.catch_warnings(action="ignore"):  # that it was fitted for another k or nprobe: below
            found = KnnLM.load(store, model, **options).settings
        return found.k, found.nprobe, found.lmbda, found.temperature

    assert settings() == fitted
    assert settings(**given) == tuple(given.values())
    for i, (name, value) in enumerate(given.items()):
        assert settings(**{name: value}) == (*fitted[:i], value, *fitted[i + 1 :])
    assert settings(lmbda=0, k=1)[2] == 0.0  # zero is a value, not nothing


@pytest.mark.parametrize(
    ("options", "said"),
    [({"k": 7}, "k 1024, not 7"), ({"nprobe": 3}, "nprobe 32, not 3"), ({"k": 7, "nprobe": 3}, "k 1024.*nprobe 32, not 3")],
)
def test_a_search_that_the_calibration_was_not_fitted_for_says_so(store, model, options, said):
    """Unless both λ and temperature are one's own. In a store of plain keys exact search is the same search."""
    for given in ({}, {"lmbda": 0.5}, {"temperature": 5.0}):
        with pytest.warns(UserWarning, match=f"fitted for {said}"):
            KnnLM.load(store, model, **options, **given)
    KnnLM.load(store, model, **options, **SHARED)
    KnnLM.load(store, model, exact=True)


def test_without_a_calibration_lambda_and_temperature_must_be_given(domains, model):
    """There is no constant that would do."""
    for options in ({}, {"lmbda": 0.5}, {"temperature": 5.0}):
        with pytest.raises(InvalidArgumentError, match="no calibration, so λ and temperature must be given"):
            KnnLM.load(domains, model, **options)
    settings = KnnLM.load(domains, model, **SHARED).settings
    assert (settings.k, settings.nprobe) == (domains.manifest.k, domains.manifest.nprobe)


def test_a_stale_calibration_warns_where_it_is_used(store, model, monkeypatch):
    """Values from before the store changed are used with a warning; own values need none."""
    stale = replace(store.manifest, calibration=replace(store.manifest.calibration, status="stale"))
    monkeypatch.setattr(store, "manifest", stale)
    for options in ({}, {"lmbda": 0.5}, {"temperature": 5.0}):
        with pytest.warns(UserWarning, match="changed after λ and temperature were fitted") as caught:
            KnnLM.load(store, model, **options)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KnnLM.load(store, model, **SHARED)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k 0"),
        ({"k": 1 << 21}, "k 2097152"),
        ({"nprobe": 0}, "nprobe 0"),
        ({"lmbda": 1.5}, "lambda 1.5"),
        ({"lmbda": -0.1}, "lambda -0.1"),
        ({"lmbda": float("nan")}, "lambda nan"),
        ({"temperature": 0}, "temperature 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"domains": {"default": -1.0}}, "weight -1"),
    ],
)
def test_settings_out_of_range_are_refused_before_a_model_is_loaded(store, options, words):
    """The value is in the message."""
    with pytest.raises(InvalidArgumentError, match=words):
        KnnLM.load(store, "no-such-model", **options)


def test_a_domain_that_is_not_there_is_named_before_a_model_is_loaded(store):
    """With those that are."""
    with pytest.raises(NotFoundError, match=r"domain 'law': not in this datastore\. It has default"):
        KnnLM.load(store, "no-such-model", domains="law")


def test_exact_search_needs_kept_keys(tmp_path, model):
    """Said before a model is loaded: with 4-bit codes alone it cannot be done."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:9_500]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 256)
        with create(tmp_path / "made.knn", corpus, model=model) as store:
            assert store.info()["spaces"][0]["codec"] == "pq4"
            with pytest.raises(InvalidArgumentError, match="keys were not kept"):
                KnnLM.load(store, "no-such-model", exact=True)
            np.testing.assert_allclose(KnnLM.load(store, model).predict("Scrooge").p.sum(), 1.0)


# --- domains and exclusions


def shares(step: Step) -> tuple[float, float]:
    """Mass of p_kNN on the values of each domain."""
    return float(step.p_knn[10:20].sum()), float(step.p_knn[20:30].sum())


def test_domains_choose_and_weigh_the_neighbours(domains, model):
    """A name or names search those alone; weights multiply; weight 0 is not searched."""

    def predict(given: object) -> Step:
        return KnnLM.load(domains, model, k=200, domains=given, **SHARED).predict("Scrooge was")

    law, poems = shares(predict(None))
    assert law > 0
    assert law + poems == pytest.approx(1.0)
    assert shares(predict("law")) == pytest.approx((1.0, 0.0))
    assert shares(predict(["law", "poems"])) == pytest.approx((law, poems))
    assert shares(predict({"law": 0.0, "poems": 2.0})) == pytest.approx((0.0, 1.0))
    weighted = shares(predict({"law": 3.0, "poems": 1.0}))
    assert weighted == pytest.approx((3 * law / (3 * law + poems), poems / (3 * law + poems)), rel=1e-5)


def test_settings_do_not_change_with_the_callers_mapping(domains, model):
    """The weights are copied."""
    weights = {"law": 1.0, "poems": 0.0}
    lm = KnnLM.load(domains, model, k=200, domains=weights, **SHARED)
    weights["law"] = 0.0
    assert shares(lm.predict("Scrooge"))[0] == pytest.approx(1.0)


def test_excluded_documents_and_rows_do_not_answer(store, model):
    """By id or by rows; with everything excluded, p is p_LM."""
    lm = KnnLM.load(store, model, exclude=["b.txt", RowRange(0, 0, 10)], k=5_000, **SHARED)
    step = lm.predict("Scrooge was")
    found = int(step.neighbors.n_found[0])
    assert {step.neighbors.context(0, j).document for j in range(found)} == {"a.txt", "c.txt"}
    assert int(step.neighbors.rows[0, :found].min()) == 10
    nothing = KnnLM.load(store, model, exclude=["a.txt", "b.txt", "c.txt"], **SHARED).predict(["Scrooge was", "the"])
    assert nothing.neighbors.n_found.tolist() == [0, 0]
    assert nothing.p_knn.sum() == nothing.weights.sum() == 0.0
    np.testing.assert_allclose(nothing.p, nothing.p_lm)
    with pytest.raises(NotFoundError, match=r"document 'd\.txt'"):
        KnnLM.load(store, model, exclude=["d.txt"]).predict("Scrooge")


# --- what is refused


@pytest.mark.parametrize(
    ("context", "words"),
    [
        ([], "no context"),
        ([[]], r"shape \(0,\)"),
        ([["a"]], "give text"),
        ([0.5, 1.0], "give text"),
        ([True, False], "give text"),
        (np.zeros((1, 2, 2), int), r"shape \(2, 2\)"),
        ([400], "token ids 400 to 400: the vocabulary has 400"),
        ([5, -1], "token ids -1 to 5"),
        ([[5], [401]], "token ids 401"),
    ],
)
def test_contexts_that_are_none_are_refused(store, model, context, words):
    """Each with what would do."""
    with pytest.raises(InvalidArgumentError, match=words):
        KnnLM.load(store, model).predict(context)


def test_an_empty_text_is_a_context_only_where_there_is_a_bos(store, model, tmp_path):
    """With BOS the model sees that; without it sees nothing."""
    assert KnnLM.load(store, model).predict("").ids[0].tolist() == [model.tokenizer.bos_token_id]
    bare = load_language_model(lms.llama_model(), tokenizer=lms.llama_tokenizer(bos=False))
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    with create(tmp_path / "made.knn", corpus, model=bare) as made, pytest.raises(InvalidArgumentError, match=r"shape \(0,\)"):
        KnnLM.load(made, bare).predict("")


def test_a_store_may_be_given_by_its_path(store, model):
    """A string, a path or an open store; what is not there is not found."""
    wanted = KnnLM.load(store, model).predict("Scrooge").p
    for given in (store.path, str(store.path)):
        lm = KnnLM.load(given, model)
        np.testing.assert_allclose(lm.predict("Scrooge").p, wanted, atol=1e-6)
        lm.store.close()
    with pytest.raises(NotFoundError):
        KnnLM.load(store.path / "nothing", model)


def test_a_closed_store_is_refused(store, model):
    """At the first prediction, by name."""
    again = knnstore.open(store.path)
    lm = KnnLM.load(again, model)
    again.close()
    with pytest.raises(InvalidArgumentError, match="was closed"):
        lm.predict("Scrooge")


def test_a_model_without_a_tokenizer_is_refused(store):
    """It could read ids but not text."""
    with pytest.raises(ModelError, match="without a tokenizer"):
        KnnLM.load(store, lms.gpt2_model())


# --- models and their types


def test_another_dtype_than_the_keys_warns(store, model):
    """Distances differ a little; the sums do not."""
    with pytest.warns(UserWarning, match="computed in float32, this model runs in bfloat16") as caught:
        lm = KnnLM.load(store, lms.gpt2_model(), tokenizer=model.tokenizer, dtype="bfloat16")
    assert caught[0].filename == __file__
    np.testing.assert_allclose(lm.predict("Scrooge").p.sum(), 1.0)


def test_a_model_in_memory_stays_as_it_is(tmp_path, store, model):
    """Its dtype is the caller's, also where the keys were computed in another; a folder is loaded in that of the keys."""
    folder = tmp_path / "model"
    lms.gpt2_model().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:300]})
    with create(tmp_path / "half.knn", corpus, model=folder, dtype="bfloat16") as half:
        assert half.info()["windows"]["dtype"] == "bfloat16"
        own = lms.gpt2_model()
        with pytest.warns(UserWarning, match="computed in bfloat16, this model runs in float32"):
            KnnLM.load(half, own, tokenizer=model.tokenizer)
        assert own.dtype == torch.float32
        assert KnnLM.load(half).language_model.dtype == torch.bfloat16
        assert KnnLM.load(half, folder).language_model.dtype == torch.bfloat16
    assert KnnLM.load(store, folder).language_model.dtype == torch.float32


def test_nothing_of_the_model_is_replaced_or_left_behind(store, model):
    """No hook remains after a prediction, and the model's own outputs are as before."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model.model(ids).logits
    KnnLM.load(store, model).predict(["Scrooge", "the"])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids).logits, before)
