"""`evaluate`: every number it reports, against an oracle that shares no code with the package (evaluations.py)."""

import codecs
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evaluations
import lms
import numpy as np
import pytest
from evaluations import CONTEXT, KINDS, STRIDE, Entries, Kind, build, entries_of, expected, predicted

import knnstore
from knnstore.errors import CorpusError, InvalidArgumentError, NotFoundError
from knnstore.lm import calibrate, predicting, scoring
from knnstore.lm.evaluate import Evaluation, evaluate, evaluate_text
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.mixing import mix_gold_tokens
from knnstore.lm.models import load_language_model
from knnstore.lm.retrieval import retriever_for
from knnstore.lm.searched import Searched
from knnstore.lm.settings import settings_of
from knnstore.lm.tallies import Tally
from knnstore.storage.calibration import Gate
from knnstore.store import Datastore

SETTINGS = {"lmbda": 0.3, "temperature": 8.0, "k": 2_000}  # more than there are entries


def dickens() -> dict[str, str]:
    book = lms.book()
    return {"carol/one.txt": book[:700], "carol/two.txt": book[30_000:30_500], "gone.txt": book[40_000:40_400]}


def law() -> dict[str, str]:
    return {"act.txt": lms.random_words(1, 60), "bill.txt": lms.random_words(2, 40), "cities.txt": lms.book()[50_000:50_300]}


def texts() -> dict[str, str]:
    """Long, short, of one character, empty, of characters of several tokens, and some that share much with the store."""
    book = lms.book()
    return {
        "a/long.txt": book[80_000:80_600],
        "a/known.txt": book[100:400],
        "b.txt": "Ærø 漢字 😀👩‍👩‍👧 naïve\r\n\r\n" + book[60_000:60_100],
        "empty.txt": "",
        "one.txt": "x",
        "z.txt": "Scrooge",
    }


@dataclass(frozen=True, eq=False)
class Made:
    """Three segments in two domains, a document of which was deleted. entries: that count, in row order."""

    kind: Kind
    store: Datastore
    entries: Entries
    texts: Path

    def lm(self, **options: Any) -> KnnLM:
        return KnnLM.load(self.store, self.kind.model, tokenizer=self.kind.tokenizer, **{**SETTINGS, **options})

    def n_bytes(self, given: Mapping[str, str]) -> int:
        """Of all texts; without BOS, less the first token, which nothing stands before, unless it is a part of a character."""
        n = 0
        for text in given.values():
            ids = self.kind.ids(text)
            first = self.kind.tokenizer.decode(ids[:1])
            n += len(text.encode()) if len(ids) > 1 else 0
            n -= len(first.encode()) if len(ids) > 1 and not self.kind.bos and text.startswith(first) else 0
        return n

    def check(self, evaluation: Evaluation, given: Mapping[str, str], **settings: Any) -> None:
        """All numbers are the oracle's. settings: as of `evaluations.predicted`; exclude may be {id of text: documents}."""
        settings = {**SETTINGS, **settings}
        exclude = settings.pop("exclude", ())
        tokens = []
        for name, text in sorted(given.items()):
            out = exclude.get(name, ()) if isinstance(exclude, dict) else exclude
            tokens += predicted(self.kind, text, self.entries, exclude=out, **settings)
        weights = settings.get("weights")
        domains = evaluations.searched_domains(self.entries, weights)
        always = () if isinstance(exclude, dict) else exclude
        counts = np.isin(self.entries.domains, domains) & ~np.isin(self.entries.documents, list(always))
        entries = {name: int((self.entries.domains[counts] == name).sum()) for name in domains}
        agree(evaluation.fields(), expected(tokens, self.entries.values[counts], self.n_bytes(given), entries))


def agree(found: Any, right: Any, at: str = "") -> None:
    """Numbers to 1e-6 of their size; only what the oracle has is compared."""
    if isinstance(right, dict):
        for name in right:
            agree(found[name], right[name], f"{at}.{name}")
    elif isinstance(right, list | tuple):
        assert len(found) == len(right), at
        for i, item in enumerate(right):
            agree(found[i], item, f"{at}[{i}]")
    elif isinstance(right, str | None):
        assert found == right, at
    else:
        assert found == pytest.approx(right, rel=1e-6, abs=1e-7, nan_ok=True), at


def make(kind: Kind, folder: Path) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 256)  # λ and T are given here
        options = {"model": load_language_model(kind.model, tokenizer=kind.tokenizer)}
        first, more, other = dickens(), {"hymn.txt": "God rest you merry, gentlemen; let nothing you dismay! " * 3}, law()
        path = folder / "made.knn"
        knnstore.create(path, lms.write_texts(folder / "c", first), domain="dickens", context=CONTEXT, stride=STRIDE, **options).close()
        knnstore.append(path, lms.write_texts(folder / "d", other), domain="law", **options).close()
        knnstore.append(path, lms.write_texts(folder / "e", more), domain="dickens", **options).close()
        knnstore.delete(path, "gone.txt")
    del first["gone.txt"]
    entries = entries_of(kind, [("dickens", first), ("law", other), ("dickens", more)])
    return Made(kind, knnstore.open(path), entries, lms.write_texts(folder / "texts", texts()))


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


# --- numbers


@pytest.mark.parametrize("exact", [True, False])
def test_every_number_is_the_oracles(made, exact):
    """Several segments and domains, dead rows, texts of many lengths: all that is reported, with every entry a neighbour."""
    assert len(made.store.segments) == 3
    assert len(made.store) == len(made.entries.values)
    made.check(evaluate(made.lm(exact=exact), made.texts), texts())


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"k": 15}, {"k": 15}),
        ({"domains": {"law": 0.25, "dickens": 2.0}}, {"weights": {"law": 0.25, "dickens": 2.0}}),
        ({"domains": "law"}, {"weights": {"law": 1.0}}),
        ({"domains": {"law": 0, "dickens": 3}, "k": 40}, {"weights": {"dickens": 3.0}, "k": 40}),
        ({"exclude": ["carol/one.txt", "bill.txt"]}, {"exclude": {"carol/one.txt", "bill.txt"}}),
        ({"lmbda": 0.0}, {"lmbda": 0.0}),
        ({"lmbda": 1.0, "k": 15}, {"lmbda": 1.0, "k": 15}),
        ({"temperature": 0.05}, {"temperature": 0.05}),
    ],
    ids=["k", "weights", "one-domain", "weight-0", "exclude", "lambda-0", "lambda-1", "cold"],
)
def test_every_number_is_the_oracles_under_other_settings(gpt2, options, settings):
    """k, domains, exclusions, λ and T. With λ = 1 a token that no neighbour has is infinitely surprising; a cold domain is not lost."""
    given = {"a.txt": texts()["a/known.txt"]}
    evaluation = evaluate_text(gpt2.lm(exact=True, **options), given["a.txt"])
    if settings.get("lmbda") == 1.0:
        tokens = predicted(gpt2.kind, given["a.txt"], gpt2.entries, **{**SETTINGS, **settings})
        shares = {"zero": [token.p == 0 for token in tokens], "hurt": [token.p < token.p_lm for token in tokens]}
        assert evaluation.zero > 0
        for name, share in shares.items():
            assert getattr(evaluation, name) == pytest.approx(np.mean(share))
        assert evaluation.perplexity["mixed"] == evaluation.bits_per_byte["mixed"] == -evaluation.loss == math.inf
        assert evaluation.histogram[0].tokens >= sum(shares["zero"])
        return
    gpt2.check(evaluation, given, **settings)


@pytest.mark.parametrize(("context", "stride"), [(None, None), (24, 10), (24, 24), (9, 1), (2, 1), (60, 7), (64, None), (13, None)])
def test_windows_are_those_asked_for(gpt2, context, stride):
    """Context and stride as given; the datastore's where not; half of another context."""
    text = texts()["a/long.txt"]
    evaluation = evaluate_text(gpt2.lm(exact=True), text, context=context, stride=stride)
    used = (context or CONTEXT, stride or (STRIDE if context in (None, CONTEXT) else context // 2))
    assert (evaluation.context, evaluation.stride) == used
    gpt2.check(evaluation, {"a": text}, context=used[0], stride=used[1])


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """What is tallied from now on, token by token."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in ("gold", "log_p_lm", "log_p_knn", "log_p", "lmbda")}
    add = Tally.add

    def note(self, *arrays, **named):
        for name, array in zip(seen, arrays, strict=False):
            seen[name].append(array)
        add(self, *arrays, **named)

    monkeypatch.setattr(Tally, "add", note)
    return seen


def test_windows_by_hand(gpt2, monkeypatch):
    """Context 6, stride 3, BOS and 13 tokens: windows that a person wrote down give each token its probability."""
    seen = recorded(monkeypatch)
    text = "Scrooge was not the man to be frightened by echoes."
    ids = gpt2.kind.ids(text)
    assert len(ids) >= 14
    short = gpt2.lm(exact=True).decode(ids[1:14])
    assert gpt2.kind.ids(short) == ids[:14]
    evaluate_text(gpt2.lm(exact=True), short, context=6, stride=3)
    #  inputs (first, past the last) → places of the tokens that are predicted from them
    windows = {(0, 6): [1, 2, 3, 4, 5, 6], (3, 9): [7, 8, 9], (6, 12): [10, 11, 12], (7, 13): [13]}
    right = np.full(14, np.nan)
    for (first, stop), places in windows.items():
        with np.errstate(all="ignore"):
            _, log_p = evaluations.positions(gpt2.kind, ids[first : stop + 1], 64, 64)
        for place in places:
            right[place] = log_p[place - 1 - first, ids[place]]
    np.testing.assert_array_equal(np.concatenate(seen["gold"]), ids[1:14])
    np.testing.assert_allclose(np.concatenate(seen["log_p_lm"]), right[1:], atol=1e-4)


def test_each_token_is_the_oracles(made, monkeypatch):
    """log p of each token, by the LM, the neighbours and both: to 1e-4, in the order of the texts, once each."""
    seen = recorded(monkeypatch)
    evaluate(made.lm(exact=True), made.texts)
    right = [token for _, text in sorted(texts().items()) for token in predicted(made.kind, text, made.entries, **SETTINGS)]
    np.testing.assert_array_equal(np.concatenate(seen["gold"]), [token.id for token in right])
    for name, field in (("log_p_lm", "p_lm"), ("log_p_knn", "p_knn"), ("log_p", "p")):
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(np.concatenate(seen[name]), np.log([getattr(token, field) for token in right]), rtol=0, atol=1e-4)


def test_pieces_of_any_size_give_the_same(made, monkeypatch, tmp_path):
    """However many positions are scored, searched or tallied at a time, also one by one."""
    few = lms.write_texts(tmp_path, {name: text[:130] for name, text in texts().items()})
    whole = evaluate(made.lm(exact=True), few).fields()
    kept = [name for name in whole if name not in ("tokens_per_s", "seconds")]
    for chunk, tokens_per_batch, cells, report in ((1, 1, 1, 1), (50, 40, 200_000, 30_000), (10**9, 10**9, 10**9, 10**9)):
        monkeypatch.setattr(scoring.score_documents, "__kwdefaults__", {"chunk": chunk})
        monkeypatch.setitem(scoring.TOKENS_PER_BATCH, "cpu", tokens_per_batch)
        monkeypatch.setattr(predicting, "CELLS", cells)
        monkeypatch.setattr(predicting, "REPORT_CELLS", report)
        again = evaluate(made.lm(exact=True), few).fields()
        agree({name: again[name] for name in kept}, {name: whole[name] for name in kept})


def test_many_texts_are_the_sum_of_each_alone(gpt2, tmp_path):
    """A hundred short documents in one JSONL: tokens, bytes and log p add up; none sees another."""
    lines = [lms.book()[i * 300 : i * 300 + 5 + i] for i in range(100)]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    lm = gpt2.lm()
    together, alone = evaluate(lm, path), [evaluate_text(lm, line) for line in lines]
    assert together.documents == 100
    assert together.tokens == sum(one.tokens for one in alone) == sum(len(gpt2.kind.ids(line)) - 1 for line in lines)
    assert together.bytes == sum(one.bytes for one in alone) == sum(len(line.encode()) for line in lines)
    for name in ("lm", "mixed"):
        total = sum(one.tokens * math.log(one.perplexity[name]) for one in alone)
        assert math.log(together.perplexity[name]) * together.tokens == pytest.approx(total, rel=1e-6)


def test_one_evaluation_is_the_sum_of_score(gpt2):
    """With a gate too: λ is then one for each token, and `evaluate` reports its mean."""
    text = texts()["a/long.txt"]
    gates = [
        None,
        Gate(kind="distance", distances=(5.0, 20.0, 60.0), lambdas=(0.9, 0.4, 0.0)),
        Gate(kind="logistic", features=("nearest", "lm_entropy", "agreement"), weights=(-1.0, 0.5, 1.0), bias=-1.0),
    ]
    for gate in gates:
        lm = gpt2.lm()
        lm.settings = replace(lm.settings, gate=gate)
        score, found = lm.score(text), evaluate_text(lm, text, stride=CONTEXT // 2)
        assert found.tokens == len(score.log_p)
        assert found.lmbda == pytest.approx(score.lmbda.mean(), rel=1e-9)
        assert bool(np.ptp(score.lmbda) > 0.1) is (gate is not None)
        for name, log_p in (("lm", score.log_p_lm), ("mixed", score.log_p)):
            assert found.perplexity[name] == pytest.approx(math.exp(-log_p.mean()), rel=1e-9)
        assert found.helped == np.mean(score.log_p > score.log_p_lm)


def test_one_window_is_a_prediction_of_each_token(gpt2):
    """What `predict` says of each token, one at a time."""
    lm = gpt2.lm()
    ids = lm.encode("Scrooge was not the man to be")
    steps = [lm.predict(ids[:i]) for i in range(1, len(ids))]
    found = evaluate_text(lm, "Scrooge was not the man to be")
    assert found.tokens == len(steps) <= CONTEXT
    for name, field in (("lm", "p_lm"), ("knn", "p_knn"), ("mixed", "p")):
        p = [getattr(step, field)[token] for step, token in zip(steps, ids[1:], strict=True)]
        assert found.perplexity[name] == pytest.approx(evaluations.perplexity(p), rel=1e-5)
    assert found.helped == np.mean([step.p[token] > step.p_lm[token] for step, token in zip(steps, ids[1:], strict=True)])


def test_bytes_are_those_of_what_is_predicted(tmp_path, made):
    """UTF-8 bytes of the texts without their BOM; without BOS, less those of the first token, unless it is a part of a character."""
    given = {"plain": "and the", "wide": "é and", "broken": "漢字 ab", "bom": "and so"}
    for name, text in given.items():
        (tmp_path / f"{name}.txt").write_bytes((codecs.BOM_UTF8 if name == "bom" else b"") + text.encode())
    by_hand = {"plain": 7, "wide": 6, "broken": 9, "bom": 6}
    if not made.kind.bos:
        first = made.kind.tokenizer.decode(made.kind.ids("and the")[:1])
        by_hand |= {"plain": 7 - len(first), "bom": 6 - len(first)}
    for name, n in by_hand.items():
        found = evaluate(made.lm(), tmp_path / f"{name}.txt")
        assert found.bytes == n, name
        assert found.bits_per_byte["lm"] == pytest.approx(found.tokens * math.log2(found.perplexity["lm"]) / n)


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


def same(one: Evaluation, other: Evaluation) -> None:
    """But for what was left out, and the time it took."""
    names = ("tokens", "bytes", "perplexity", "zero", "lambda", "helped", "hurt", "gain", "loss", "histogram")
    agree({name: one.fields()[name] for name in names}, {name: other.fields()[name] for name in names})
    assert one.perplexity["mixed"] != one.perplexity["lm"]


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
    """What a retriever finds that is told, of each position, the token that its key has read: searches and probabilities."""
    text = texts()["a/known.txt"]
    lm = gpt2.lm()
    lm.settings = replace(lm.settings, retrieval="pointers", min_knns=4, k=64)
    ids = lm.encode(text)
    options = {"vocab_size": 400, "context": CONTEXT, "stride": STRIDE, "views": False, "chunk": 10**6}
    (piece,) = scoring.score_documents(lm.extractor, [ids], **options)
    retriever = retriever_for(lm.store, lm.settings)
    right = retriever.find(piece.keys, None, sequence=np.zeros(len(piece), np.int64), came=ids[piece.index - 1])
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_long_text_takes_no_more_memory(gpt2, tmp_path):
    """From the first tenth of 100,000 tokens to their end, memory grows by 8 MB at most: their keys alone would be 13 MB."""
    path = tmp_path / "long.txt"
    path.write_text((lms.book() + lms.random_words(0, 5_000)), encoding="utf-8")
    child = lms.in_child(evaluate_long, str(gpt2.store.path), str(path), str(tmp_path / "seen.json"))
    child.join(240)
    assert child.exitcode == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    tokens = seen[-1][0]
    assert tokens > 90_000
    early = max(held for n, held in seen if n <= tokens / 10)
    assert max(held for _, held in seen) - early < 8 << 20
