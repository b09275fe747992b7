"""`tune`: on which tokens it fits, that none answers for itself, and how the calibration becomes a snapshot."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knnstore
from knnstore.errors import CheckpointMismatchError, CorpusError, InvalidArgumentError, NotFoundError
from knnstore.lm import calibrate, fitting, tuning
from knnstore.lm.create import create
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.lm.texts import Text
from knnstore.lm.tuning import tune
from knnstore.store import open_store

CONTEXT, STRIDE = 32, 16


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


@pytest.fixture(scope="module")
def base(gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents of the sample book, and one of random words."""
    folder = tmp_path_factory.mktemp("tune")
    texts = {"a.txt": lms.book()[:6_000], "b.txt": lms.book()[6_000:9_000], "random.txt": lms.random_words(1, 300)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 512)
        create(folder / "base.knn", lms.write_texts(folder / "corpus", texts), model=gpt2, context=CONTEXT, stride=STRIDE).close()
    return folder / "base.knn"


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "s.knn"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text that the datastore does not have, of fewer tokens than are taken together."""
    lms.write_texts(tmp_path, {"unseen.txt": lms.book()[9_000:10_500]})
    return tmp_path / "unseen.txt"


@pytest.mark.parametrize("gate", ["fixed", "distance", "logistic", "auto"])
def test_what_is_reported_is_what_a_search_gives(store, text, gpt2, gate):
    """The text scored with the datastore as it is then: perplexity with and without, mean λ, as tune told."""
    tuned = tune(store, text, model=gpt2, gate=gate)
    with open_store(store) as opened:
        assert opened.snapshot == tuned.snapshot == 2
        assert opened.manifest.calibration == tuned.calibration
        score = KnnLM.load(opened, gpt2).score(text.read_text())
    assert len(score.log_p) == tuned.calibration.tokens
    for name, log_p in (("lm", score.log_p_lm), ("mixed", score.log_p)):
        np.testing.assert_allclose(np.exp(-log_p.mean()), tuned.calibration.perplexity[name], rtol=1e-4)
    np.testing.assert_allclose(score.lmbda.mean(), tuned.mean_lambda, rtol=1e-4)
    assert gate == "auto" or (tuned.calibration.gate.kind if tuned.calibration.gate else "fixed") == gate


def test_only_the_calibration_changes(store, text, gpt2):
    """The next snapshot is the one before with another calibration, which says what it holds for; a dry run changes nothing."""
    with open_store(store) as opened:
        before = opened.manifest
    dry = tune(store, text, model=gpt2, k=64, nprobe=3, dry_run=True)
    assert dry.snapshot is None
    with open_store(store) as opened:
        assert opened.manifest == before
    tuned = tune(store, text, model=gpt2, k=64, nprobe=3)
    assert replace(dry, snapshot=2, surface=tuned.surface) == tuned
    with open_store(store) as opened:
        after = opened.manifest
    assert (after.operation.name, after.operation.counts) == ("tune", {"tokens": tuned.calibration.tokens})
    same = {name: getattr(before, name) for name in ("snapshot", "parent", "time", "operation", "calibration")}
    assert replace(after, **same) == before
    fitted = after.calibration
    assert (fitted.status, fitted.made_by, fitted.nprobe, fitted.exact) == ("fresh", "tune", 3, False)
    assert fitted.k <= 64
    assert (fitted.spaces, fitted.domains) == (tuple(space.id for space in before.spaces), ("default",))


def test_a_search_with_other_settings_says_so(store, text, gpt2):
    """k, nprobe and exactness are part of what was fitted: a warning names those that differ."""
    tuned = tune(store, text, model=gpt2, k=64, nprobe=3).calibration
    with open_store(store) as opened:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            KnnLM.load(opened, gpt2)
        with pytest.warns(UserWarning, match=rf"fitted for k {tuned.k}, not 5 and nprobe 3, not 7"):
            KnnLM.load(opened, gpt2, k=5, nprobe=7)


def test_all_neighbours_of_a_small_store_are_not_a_limit(store, text, gpt2):
    """Where all entries there are were searched and none could be spared, k is the one asked for: the datastore may grow."""
    with open_store(store) as opened:
        n = len(opened)
    tuned = tune(store, text, model=gpt2, k=100_000)
    tried = [choice.k for choice in tuned.choices if choice.gate == "fixed"]
    assert tried[-1] == n
    kept = next(choice.k for choice in tuned.choices if choice.kept)
    assert tuned.calibration.k == (100_000 if kept == n else kept)


# --- what is in the datastore too


def test_a_text_does_not_answer_for_itself(store, gpt2, tmp_path):
    """Random words that the datastore has: with their own entries each next token would be found at distance 0. By id and by content."""
    for name, words in (("random.txt", lms.random_words(1, 300)), ("other.txt", lms.random_words(1, 300))):
        lms.write_texts(tmp_path / "in", {name: words})
        recorder = lms.Recorder()
        tuned = tune(store, tmp_path / "in" / name, model=gpt2, progress=recorder)
        assert tuned.stored == (str(tmp_path / "in" / name),)
        assert any("the datastore has it too" in note for note in recorder.notes)
        assert tuned.calibration.perplexity["mixed"] > 20
    lms.write_texts(tmp_path / "in", {"new.txt": lms.random_words(1, 300) + " x"})
    tuned = tune(store, tmp_path / "in" / "new.txt", model=gpt2)
    assert tuned.stored == ()
    assert tuned.calibration.perplexity["mixed"] < 10  # so that the test above has teeth


def test_only_its_own_entries_are_left_out(store, gpt2, tmp_path, monkeypatch):
    """Of two texts, one in the datastore: what is left out of a search is what the text that is asked for has there, no more."""
    lms.write_texts(tmp_path / "in", {"b.txt": lms.book()[6_000:9_000], "unseen.txt": lms.book()[9_000:10_500]})
    searched: list[tuple[int, set[int]]] = []
    search = KnnLM.search

    def spied(self, keys, *, exclude=()):
        hits = search(self, keys, exclude=exclude)
        searched.append((len(tuple(exclude)), set(hits.rows[hits.rows >= 0].tolist())))
        return hits

    monkeypatch.setattr(KnnLM, "search", spied)
    tuned = tune(store, tmp_path / "in", model=gpt2, k=4_000, gate="fixed")
    with open_store(store) as opened:
        sizes = {document.id: document.entries for document in opened.documents()}
    own = set(range(sizes["a.txt"], sizes["a.txt"] + sizes["b.txt"]))
    assert tuned.stored == (str(tmp_path / "in" / "b.txt"),)
    assert {n for n, _ in searched} == {0, 1}
    assert not set.union(*(rows for n, rows in searched if n)) & own
    assert set.union(*(rows for n, rows in searched if not n)) & own


# --- which tokens are fitted on


def texts_of(lengths: list[int]) -> list[Text]:
    starts = np.cumsum([0, *lengths])
    return [Text(str(i), str(i), np.arange(at, at + n), n, n, "") for i, (at, n) in enumerate(zip(starts, lengths, strict=False))]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    most=st.integers(1, 150),
    lead=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_sample_takes_each_token_once_with_what_stands_before_it(lengths, most, lead, seed):
    """As many tokens as are asked for or are there, none twice, in the order of the text, each stretch after up to `lead` tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "STRETCH", 10)
        sample = tuning._Sample(most, lead, seed)
        texts = texts_of(lengths)
        for number, text in enumerate(texts):
            sample.take(number, text)
        stretches = sample.stretches()
    assert sample.n_tokens == sum(n - 1 for n in lengths)
    assert sum(map(len, stretches)) == min(most, sample.n_tokens)
    predicted: list[int] = []
    for stretch in stretches:
        ids, whole = stretch.ids.tolist(), texts[stretch.number].ids.tolist()
        first = whole.index(ids[0])
        assert ids == whole[first : first + len(ids)]
        assert stretch.lead == min(lead, stretch.place) >= 1
        assert stretch.place == first + stretch.lead
        predicted += ids[stretch.lead :]
        assert stretch.text.id == texts[stretch.number].id
    assert predicted == sorted(set(predicted))


def test_each_place_is_as_probable_as_any_other():
    """Of 20 stretches 5 are taken: over 400 seeds each comes about 100 times, the last as often as the first."""
    counts = np.zeros(20, int)
    for seed in range(400):
        sample = tuning._Sample(5 * tuning.STRETCH, 1, seed)
        sample.take(0, texts_of([20 * tuning.STRETCH + 1])[0])
        counts[[stretch.place // tuning.STRETCH for stretch in sample.stretches()]] += 1
    assert counts.sum() == 2_000
    assert counts.min() > 60
    assert counts.max() < 145  # five deviates of 8.7


def test_a_seed_draws_the_same_places(store, gpt2, tmp_path, monkeypatch):
    """The same texts, tokens and seed give the same calibration, another seed another one; how many were taken is noted."""
    monkeypatch.setattr(tuning, "STRETCH", 100)
    lms.write_texts(tmp_path, {"long.txt": lms.book()[9_000:14_000]})
    recorder = lms.Recorder()
    first, again, other = (
        tune(store, tmp_path / "long.txt", model=gpt2, tokens=500, seed=seed, dry_run=True, progress=recorder) for seed in (3, 3, 4)
    )
    assert first.calibration == again.calibration != other.calibration
    assert first.calibration.tokens == 500
    assert any("500 of" in note and "drawn with seed 3" in note for note in recorder.notes)


# --- others meanwhile


def appended(name: str, domain: str) -> Callable[[Path, LanguageModel], None]:
    def deed(store: Path, gpt2: LanguageModel) -> None:
        texts = lms.write_texts(store.parent / "more", {name: "It was the best of times, it was the worst of times."})
        knnstore.append(store, texts, domain=domain, model=gpt2).close()

    return deed


def merged(store: Path, gpt2: LanguageModel) -> None:
    other = Path(shutil.copytree(store, store.parent / "other.knn"))
    appended("merged.txt", "default")(other, gpt2)
    knnstore.merge([other], into=store, domains={str(other): "default"}).close()


@pytest.mark.parametrize(
    ("deed", "status"),
    [
        (appended("more.txt", "default"), "fresh"),
        (appended("more.txt", "law"), "stale"),
        (lambda store, gpt2: knnstore.delete(store, "b.txt"), "fresh"),
        (lambda store, gpt2: knnstore.compact(store, retrain=True, model=gpt2).close(), "stale"),
        (merged, "stale"),
        (lambda store, gpt2: tune(store, store.parent / "unseen.txt", model=gpt2, gate="fixed"), "fresh"),
    ],
    ids=["append", "another domain", "delete", "retrain", "merge", "tune"],
)
def test_a_tune_goes_on_over_what_others_commit(store, text, gpt2, monkeypatch, deed, status):
    """Nothing that others commit meanwhile is undone; where it is of domains or spaces that were not there, the calibration is stale."""
    fit, done = tuning.fit, []

    def others_first(held_out, *, gate):
        if not done:
            done.append(True)
            deed(store, gpt2)
            with open_store(store) as opened:
                done.append(opened.manifest)
        return fit(held_out, gate=gate)

    monkeypatch.setattr(tuning, "fit", others_first)
    tuned = tune(store, text, model=gpt2, gate="logistic")
    with open_store(store) as opened:
        made = opened.manifest
    assert made.snapshot == done[1].snapshot + 1 == tuned.snapshot
    assert (made.segments, made.documents, made.spaces) == (done[1].segments, done[1].documents, done[1].spaces)
    assert made.calibration == tuned.calibration
    assert (made.calibration.status, made.calibration.gate.kind) == (status, "logistic")


# --- what is refused


REFUSED: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "gate": ({"gate": "none"}, InvalidArgumentError, "gate 'none': use auto, fixed, distance, logistic"),
    "tokens": ({"tokens": 255}, InvalidArgumentError, "tokens 255: use 256 or more"),
    "k": ({"k": 0}, InvalidArgumentError, "k 0: use 1 to"),
    "nprobe": ({"nprobe": 0}, InvalidArgumentError, "nprobe 0: use 1 or more"),
    "seed": ({"seed": -1}, InvalidArgumentError, "seed -1: use 0 or more"),
    "exact": ({"exact": True}, InvalidArgumentError, "keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused(store, text, gpt2, case):
    """One message that shows the value; nothing is committed."""
    options, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        tune(store, text, **{"model": gpt2, **options})
    with open_store(store) as opened:
        assert opened.snapshot == 1


def test_too_little_text_is_refused(store, gpt2, tmp_path):
    """Fewer tokens than can be fitted on, or none; a text that is not there, or of a kind that is not read."""
    lms.write_texts(tmp_path, {"short.txt": "Marley was dead.", "empty.txt": "", "x.doc": "x"})
    with pytest.raises(InvalidArgumentError, match=r"has \d+ tokens to predict; 256 are the least"):
        tune(store, tmp_path / "short.txt", model=gpt2)
    with pytest.raises(InvalidArgumentError, match="has 0 tokens to predict"):
        tune(store, tmp_path / "empty.txt", model=gpt2)
    with pytest.raises(NotFoundError, match="no such file"):
        tune(store, tmp_path / "none.txt", model=gpt2)
    with pytest.raises(CorpusError, match="suffix"):
        tune(store, tmp_path / "x.doc", model=gpt2)
    with pytest.raises(NotFoundError, match="no such datastore"):
        tune(tmp_path / "none.knn", tmp_path / "short.txt", model=gpt2)


def test_another_model_is_refused(store, text):
    """Unless it is allowed, which warns and is recorded."""
    other = load_language_model(lms.gpt2_model(seed=1), tokenizer=lms.gpt2_tokenizer())
    with pytest.raises(CheckpointMismatchError):
        tune(store, text, model=other)
    with pytest.warns(UserWarning, match="built with checkpoint"):
        tune(store, text, model=other, allow_model_mismatch=True)
    with open_store(store) as opened:
        assert opened.manifest.operation.arguments["allow_model_mismatch"] is True


def test_nothing_to_be_found_is_refused(store, gpt2, tmp_path):
    """A datastore without entries, and one whose only entries are the text's own."""
    lms.write_texts(tmp_path / "in", {"a.txt": lms.book()[:6_000]})
    for name in ("b.txt", "random.txt"):
        knnstore.delete(store, name)
    with pytest.raises(InvalidArgumentError, match="no neighbour"):
        tune(store, tmp_path / "in", model=gpt2)
    knnstore.delete(store, "a.txt")
    with pytest.raises(InvalidArgumentError, match="no entries"):
        tune(store, tmp_path / "in", model=gpt2)


def test_domains_are_weighed(gpt2, tmp_path, monkeypatch):
    """A domain of text whose characters are in random order gets less weight than one of text; a search uses the weights."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 512)
    monkeypatch.setattr(fitting, "WORTH", 0.0)  # of a model of random numbers all there is to gain is little
    characters = list(lms.book()[:12_000])
    np.random.default_rng(0).shuffle(characters)
    lms.write_texts(
        tmp_path, {"book/a.txt": lms.book()[:12_000], "noise/b.txt": "".join(characters), "unseen.txt": lms.book()[12_000:16_000]}
    )
    create(tmp_path / "s.knn", tmp_path / "book", model=gpt2, domain="book", context=CONTEXT, stride=STRIDE).close()
    knnstore.append(tmp_path / "s.knn", tmp_path / "noise", domain="noise", model=gpt2).close()
    tuned = tune(tmp_path / "s.knn", tmp_path / "unseen.txt", model=gpt2, gate="fixed", k=64)
    assert [choice.weights for choice in tuned.choices if choice.kept] == [True]
    weights = tuned.calibration.weights
    assert 1.0 in weights.values()
    assert weights["noise"] < weights["book"]
    assert (tuned.calibration.status, tuned.calibration.domains) == ("fresh", ("book", "noise"))
    with open_store(tmp_path / "s.knn") as opened:
        lm = KnnLM.load(opened, gpt2)
        assert lm.settings.domains == weights
        score = lm.score((tmp_path / "unseen.txt").read_text())
    np.testing.assert_allclose(np.exp(-score.log_p.mean()), tuned.calibration.perplexity["mixed"], rtol=2e-2)  # other windows
