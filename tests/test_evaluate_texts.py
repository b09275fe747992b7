"""`evaluate`: texts that are in the datastore or have nothing to predict, what is refused, searches saved, time and memory."""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lms
import numpy as np
import pytest
from evaluated import SETTINGS, Made, dickens, law, make, same, texts
from evaluations import CONTEXT, KINDS, STRIDE, build

import knnstore
from knnstore.errors import CorpusError, InvalidArgumentError, NotFoundError
from knnstore.lm import calibrate, predicting, scoring
from knnstore.lm.evaluate import evaluate, evaluate_text
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.mixing import mix_gold_tokens
from knnstore.lm.models import load_language_model
from knnstore.lm.retrieval import retriever_for
from knnstore.lm.searched import Searched
from knnstore.lm.settings import settings_of
from knnstore.lm.tallies import Tally
from knnstore.storage.calibration import Gate
from knnstore.store import Datastore


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    made = make(build(request.param), tmp_path_factory.mktemp("evaluate"))
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    made = make(build("gpt2"), tmp_path_factory.mktemp("evaluate-gpt2"))
    yield made
    made.store.close()


# --- texts that are in the store, or have nothing to predict


def test_own_documents_are_left_out(gpt2, tmp_path, monkeypatch):
    """By id, or by content under another id, in every domain; of other texts nothing is left out. λ and all else are the oracle's."""
    first, other = dickens(), law()
    given = {
        "act.txt": first["carol/two.txt"][:200],  # the id of one in `law`, other content
        "copy.txt": other["cities.txt"],  # the content of one in `law`, another id
        "gone.txt": first["gone.txt"][:150],  # deleted: nothing to leave out
        "new.txt": "Scrooge was not the man to be frightened.",
        "bill.txt": other["bill.txt"][:100] + " and more",
    }
    lms.write_texts(tmp_path, given)
    recorder = lms.Recorder()
    found = evaluate(gpt2.lm(exact=True), tmp_path, exclude_own=True, progress=recorder)
    assert found.own == 3
    assert recorder.notes == []
    gpt2.check(found, given, exclude={"act.txt": {"act.txt"}, "copy.txt": {"cities.txt"}, "bill.txt": {"bill.txt"}})
    monkeypatch.setattr(scoring.score_documents, "__kwdefaults__", {"chunk": 16})  # a document in many pieces
    same(evaluate(gpt2.lm(exact=True), tmp_path, exclude_own=True), found)
    cheating = evaluate(gpt2.lm(exact=True), tmp_path)
    assert cheating.own == 0
    gpt2.check(cheating, given)
    assert cheating.perplexity["mixed"] < found.perplexity["mixed"]


def test_own_documents_come_in_parts_and_under_one_id_in_two_domains(gpt2, tmp_path):
    """A document larger than a segment is left out whole; content found in one domain leaves the other's document of that id in."""
    path, model = tmp_path / "parts.knn", load_language_model(gpt2.kind.model, tokenizer=gpt2.kind.tokenizer)
    long, other = lms.book()[:900], lms.book()[70_000:70_300]
    options = {"domain": "one", "context": CONTEXT, "stride": STRIDE, "segment_entries": 100, "model": model}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 128)
        knnstore.create(path, lms.write_texts(tmp_path / "a", {"same.txt": long, "x.txt": other}), **options).close()
    knnstore.append(path, lms.write_texts(tmp_path / "b", {"same.txt": other[:200]}), domain="two", model=model).close()
    with knnstore.open(path) as store:
        parts = [record for segment in store.segments for record in segment.find("same.txt")]
        assert len(parts) > 3
        lm = KnnLM.load(store, model, **SETTINGS)
        text = lms.write_texts(tmp_path / "c", {"copy.txt": long})
        ranges = [
            knnstore.RowRange(number, record.first_row, record.first_row + record.n_entries)
            for number, segment in enumerate(store.segments)
            for record in segment.find("same.txt")
            if segment.record.runs[0][0] == "one"
        ]
        without = KnnLM.load(store, model, **SETTINGS, exclude=ranges)
        same(evaluate(lm, text, exclude_own=True), evaluate(without, text))
        named = lms.write_texts(tmp_path / "d", {"same.txt": "Nobody wrote this."})
        same(evaluate(lm, named, exclude_own=True), evaluate(KnnLM.load(store, model, **SETTINGS, exclude=["same.txt"]), named))


def test_a_text_that_is_in_the_store_is_told(gpt2, tmp_path):
    """Without exclude_own a note names it; with it, a note says where there was nothing to leave out."""
    lms.write_texts(tmp_path / "in", {"act.txt": law()["act.txt"], "bill.txt": "an id alone"})
    lms.write_texts(tmp_path / "out", {"new.txt": "God bless us every one"})
    for folder, exclude_own, said in (
        ("in", False, [r"act\.txt: it is in the datastore"]),
        ("out", False, []),
        ("in", True, []),
        ("out", True, ["none of the texts is in"]),
    ):
        recorder = lms.Recorder()
        evaluate(gpt2.lm(), tmp_path / folder, exclude_own=exclude_own, progress=recorder)
        assert len(recorder.notes) == len(said)
        for note, pattern in zip(recorder.notes, said, strict=True):
            assert re.search(pattern, note)


def test_a_store_of_one_document_without_it_leaves_the_model_alone(gpt2, tmp_path):
    """Nothing is left to search: p is p_LM, λ is 0, no token is helped or hurt."""
    path, model = tmp_path / "one.knn", load_language_model(gpt2.kind.model, tokenizer=gpt2.kind.tokenizer)
    text = lms.write_texts(tmp_path / "a", {"one.txt": lms.book()[:200]})
    with knnstore.create(path, text, model=model, context=CONTEXT) as store:
        found = evaluate(KnnLM.load(store, model, **SETTINGS), text, exclude_own=True)
    assert found.perplexity["mixed"] == found.perplexity["lm"]
    assert (found.zero, found.lmbda, found.helped, found.hurt, found.gain, found.loss) == (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert found.perplexity["knn"] == math.inf
    assert math.isnan(found.covered["lm"])
    assert found.domains["default"].share == 0.0


def test_texts_with_nothing_to_predict_are_left_out(made, tmp_path):
    """Empty texts, and one token without BOS before it, with a note for each; where no text has more, that is an error."""
    lms.write_texts(tmp_path / "some", {"empty.txt": "", "one.txt": "x", "two.txt": "Scrooge was", "sub/image.png": "x"})
    recorder = lms.Recorder()
    found = evaluate(made.lm(), tmp_path / "some", progress=recorder)
    notes = [note.removeprefix(f"{tmp_path}/some/") for note in recorder.notes]
    alone = [] if made.kind.bos else ["one.txt: left out (one token, which has nothing before it to predict it from)"]
    assert notes == ["sub/image.png: left out (suffix)", "empty.txt: left out (empty)", *alone]
    assert found.documents == 3 - 1 - len(alone)
    assert recorder.advanced["evaluating"] == found.tokens
    for text in ["", *([] if made.kind.bos else ["x"])]:
        with pytest.raises(InvalidArgumentError, match="nothing to predict"):
            evaluate_text(made.lm(), text)


# --- what is asked for


def test_a_store_its_path_or_a_knnlm(gpt2, monkeypatch):
    """All give the same; a store that was given stays open, one that was opened for this is closed."""
    path = gpt2.texts / "a"
    options = {**SETTINGS, "model": gpt2.kind.model, "tokenizer": gpt2.kind.tokenizer}
    right = evaluate(gpt2.lm(), path)
    same(evaluate(gpt2.store, path, **options), right)
    same(evaluate(gpt2.store.path, path, **options), right)
    same(knnstore.evaluate(gpt2.store, [path / "long.txt", str(path / "known.txt")], **options), right)
    assert gpt2.store.search(np.zeros((1, 32)), k=1).n_found.tolist() == [1]
    assert right.store == {"path": str(gpt2.store.path), "snapshot": gpt2.store.snapshot, "entries": len(gpt2.store)}
    assert right.checkpoint == gpt2.store.info()["checkpoint"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"context": 65}, InvalidArgumentError, "takes 64 tokens"),
        ({"context": 1}, InvalidArgumentError, "at least 2"),
        ({"stride": 0}, InvalidArgumentError, "from 1 to the context"),
        ({"stride": 25}, InvalidArgumentError, "from 1 to the context"),
        ({"k": 5}, InvalidArgumentError, "settings of its own"),
    ],
)
def test_what_cannot_be_is_refused(gpt2, options, error, said):
    with pytest.raises(error, match=said):
        evaluate(gpt2.lm(), gpt2.texts, **options)


def test_texts_that_cannot_be_read_are_refused(gpt2, tmp_path):
    """Before a model is loaded where that is possible; a lone surrogate is no text."""
    with pytest.raises(NotFoundError, match=r"nowhere\.txt"):
        evaluate(gpt2.store, tmp_path / "nowhere.txt", model="no-model")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match=r"latin\.txt.*not UTF-8"):
        evaluate(gpt2.lm(), tmp_path / "latin.txt")
    with pytest.raises(CorpusError, match="surrogate"):
        evaluate_text(gpt2.lm(), "half \ud800")


def test_fewer_searches_are_reported(gpt2):
    """Pointers that never last and a threshold of 0 search always and give the same; a threshold of 1 never does: p is p_LM."""
    text = texts()["a/known.txt"]
    before = Gate(kind="logistic", features=("lm_max", "lm_entropy"), weights=(0.0, 0.0), bias=0.0)
    full = gpt2.lm()
    right = evaluate_text(full, text)
    assert right.searched == 1.0
    for changed in ({"retrieval": "pointers", "min_knns": 100_000}, {"retrieval": "confident", "threshold": 0.0}):
        lm = gpt2.lm()
        lm.settings = replace(lm.settings, before=before, **changed)
        found = evaluate_text(lm, text)
        same(found, right)
        assert (found.searched, found.retrieval) == (1.0, changed["retrieval"])
    full.settings = replace(full.settings, before=before, retrieval="confident", threshold=0.6)
    never = evaluate_text(full, text)
    assert never.searched == 0.0
    assert never.perplexity["mixed"] == never.perplexity["lm"] == right.perplexity["lm"]
    pointers = gpt2.lm()
    pointers.settings = replace(pointers.settings, retrieval="pointers", min_knns=4, k=64)
    assert 0.0 < evaluate_text(pointers, text).searched < 1.0


def test_pointers_follow_the_token_that_came(gpt2):
    """What a retriever finds that is told, window by window, of each position the token its key has read: searches and probabilities."""
    text = texts()["a/known.txt"]
    lm = gpt2.lm()
    lm.settings = replace(lm.settings, retrieval="pointers", min_knns=1, k=64)
    ids = lm.encode(text)
    options = {"vocab_size": 400, "context": CONTEXT, "stride": STRIDE, "views": False, "chunk": 10**6}
    (piece,) = scoring.score_documents(lm.extractor, [ids], **options)
    retriever = retriever_for(lm.store, lm.settings)
    right = retriever.find(piece.keys, None, sequence=piece.window, came=ids[piece.index - 1])
    log_p = mix_gold_tokens(ids[1:], piece.log_p_lm, None, right.neighbors, lm.settings).log_p
    found = evaluate_text(lm, text)
    assert 0.0 < found.searched == right.searched.mean() < 1.0
    assert found.perplexity["mixed"] == pytest.approx(math.exp(-log_p.mean()), rel=1e-9)


def test_domains_that_share_a_segment_are_told_apart(tmp_path):
    """The last row of a run, and the first of the next; of a domain that is not searched there is nothing."""
    rng = np.random.default_rng(0)
    checkpoint = knnstore.Checkpoint(name="m", revision=None, identity="0" * 64, tokenizer=None, architecture="A", vocab_size=9)
    documents = [knnstore.EntryDocument(id=name, domain=name, n_entries=n) for name, n in (("law", 3), ("poems", 5), ("verse", 2))]
    keys, values = rng.normal(size=(10, 4)), rng.integers(0, 9, 10)
    path = tmp_path / "made.knn"
    knnstore.create_from_entries(path, [(keys, values, documents)], checkpoint=checkpoint, dim=4, vocab_size=9)
    with knnstore.open(path) as store:
        assert len(store.segments) == 1
        hits = store.search(keys[:1], k=12)
        for domains in (None, {"poems": 2.0, "verse": 1.0}):
            searched = Searched(store, settings_of(store, lmbda=0.5, temperature=1.0, domains=domains))
            entries = {"law": 3, "poems": 5, "verse": 2}
            names = [name for name in entries if domains is None or name in domains]
            assert searched.domains == {name: entries[name] for name in names}
            for place, number in enumerate(searched.numbers_of(hits)[0].tolist()):
                name = hits.context(0, place).domain if place < 10 else None
                assert number == (names.index(name) if name in names else 0)
            rows = np.repeat(["law", "poems", "verse"], [3, 5, 2])
            counts = searched.token_counts(9, lambda n: None)
            assert counts.tolist() == np.bincount(values[np.isin(rows, names)], minlength=9).tolist()


def test_time_is_told_apart(gpt2, monkeypatch):
    """The model's time has no reading, searching or reporting in it: each is made slow, and shows in its own place alone."""
    text = texts()["a/known.txt"]
    lm = gpt2.lm(k=20)
    slow = {
        "reading": (predicting.Texts, "_take"),
        "lm": (type(lm.extractor), "keys_and_logits"),
        "datastore": (Datastore, "search"),
        "report": (Tally, "add"),
    }
    for name, (kind, method) in slow.items():
        plain = getattr(kind, method)

        def late(*given, plain=plain, **options):
            time.sleep(1.0)
            return plain(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(kind, method, late)
            found = evaluate_text(lm, text)
        assert found.seconds[name] >= 1.0
        assert sum(found.seconds.values()) < found.seconds[name] + 0.9
        assert found.tokens_per_s["lm"] == pytest.approx(found.tokens / found.seconds["lm"])
        assert found.tokens_per_s["mixed"] == pytest.approx(found.tokens / (found.seconds["lm"] + found.seconds["datastore"]))


# --- memory


def anonymous_bytes() -> int:
    """What this process holds beside the files that it maps."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


def evaluate_long(store: str, text: str, out: str) -> None:
    """Evaluates in a process of its own, and writes down [tokens so far, memory held] at every advance."""
    kind, seen = build("gpt2"), []

    recorder = lms.Recorder(lambda title, n: seen.append((recorder.advanced[title], anonymous_bytes())) if title == "evaluating" else None)
    options = {"model": kind.model, "tokenizer": kind.tokenizer, "lmbda": 0.3, "temperature": 8.0, "k": 64}
    found = evaluate(store, text, context=64, stride=64, exclude_own=True, progress=recorder, **options)
    assert found.tokens == seen[-1][0]
    Path(out).write_text(json.dumps(seen))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_long_text_takes_no_more_memory(gpt2, tmp_path):
    """From the second third of 200,000 tokens to the last, memory grows by under 6 MB: what their keys alone would take is 8.5 MB.

    Not from the first: the allocator takes some 25 MB there, for each thread, and keeps them. The least of each third is compared.
    """
    path = tmp_path / "long.txt"
    path.write_text((lms.book() + lms.random_words(0, 5_000)) * 2, encoding="utf-8")
    child = lms.in_child(evaluate_long, str(gpt2.store.path), str(path), str(tmp_path / "seen.json"))
    child.join(240)
    assert child.exitcode == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    tokens = seen[-1][0]
    assert tokens > 180_000
    first, last = (min(held for n, held in seen if low < n / tokens <= high) for low, high in ((1 / 3, 2 / 3), (2 / 3, 1)))
    assert last - first < 6 << 20
