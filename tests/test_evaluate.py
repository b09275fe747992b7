"""`evaluate`: every number it reports, against an oracle that shares no code with the package (evaluations.py)."""

import codecs
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import evaluations
import lms
import numpy as np
import pytest
from evaluated import SETTINGS, Made, agree, make, texts
from evaluations import CONTEXT, KINDS, STRIDE, build, predicted

from knnstore.lm import predicting, scoring
from knnstore.lm.evaluate import evaluate, evaluate_text
from knnstore.lm.tallies import Tally
from knnstore.storage.calibration import Gate


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


@pytest.mark.parametrize(
    ("context", "stride"),
    [
        *[(None, None), (9, 1), (60, 7), (13, None)],
        *(pytest.param(*given, marks=pytest.mark.slow) for given in [(24, 10), (24, 24), (2, 1), (64, None)]),
    ],
)
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
