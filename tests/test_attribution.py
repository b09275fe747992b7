"""Attribution: the shares of a token's probability are those that loops over every entry of the datastore give, and its sources are right.

The oracle reads keys and values from the store's files by hand, runs the model with a hook of its own, and adds up in Python.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lms
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import knnstore
from knnstore.entries import EntryDocument, create_from_entries
from knnstore.errors import InvalidArgumentError
from knnstore.lm import attribution, calibrate
from knnstore.lm.attribution import Trace, token_texts, trace, trace_fields
from knnstore.lm.create import create
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.storage.calibration import Gate
from knnstore.store import Datastore

TEMPERATURE = 40.0
ALL = {"k": 6_000, "exact": True, "temperature": TEMPERATURE}
N_PROMPT = 9


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Iterator[Datastore]:
    """Eight documents in three domains and many segments; one in parts; two with the same id; one of a domain is deleted."""
    folder, book = tmp_path_factory.mktemp("attribution"), lms.book()
    carol = {f"{name}.txt": book[i * 700 : (i + 1) * 700] for i, name in enumerate("abc")}
    carol |= {
        "long.txt": book[10_000:12_000],
        "with.jsonl": json.dumps({"id": "a letter", "text": book[20_000:20_300], "year": 1843}) + "\n",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 256)
        options = {"context": 32, "stride": 16, "keep_keys": "f32", "segment_entries": 300}
        path = folder / "made.knn"
        create(path, lms.write_texts(folder / "1", carol), model=model, domain="carol", **options).close()
        knnstore.append(path, lms.write_texts(folder / "2", {"a.txt": book[30_000:30_600]}), model=model, domain="law").close()
        other = {"d.txt": book[40_000:40_500], "dead.txt": book[:700]}
        knnstore.append(path, lms.write_texts(folder / "3", other), model=model, domain="poems").close()
        knnstore.delete(path, ["dead.txt"])
    with knnstore.open(path) as made:
        assert len(made.segments) > 3
        assert len({number for number, segment in enumerate(made.segments) if segment.find("long.txt")}) > 1
        yield made


@pytest.fixture(scope="module")
def ids(model: LanguageModel) -> list[int]:
    """A text that is in no document (BOS and all), as the model sees it: 44 tokens."""
    return [model.tokenizer.bos_token_id, *lms.token_ids(model.tokenizer, lms.book()[50_000:50_200])][:44]


# --- the oracle


@dataclass(frozen=True)
class Entry:
    domain: str
    document: str
    index: int  # of the value among the document's entries
    value: int
    key: np.ndarray


@pytest.fixture(scope="module")
def entries(store: Datastore) -> list[Entry]:
    """Every entry that lives, from the files: past the 64-byte headers of values and keys."""
    found: list[Entry] = []
    counts: dict[tuple[str, str], int] = {}
    for segment in store.segments:
        n = segment.content.entries
        values = np.fromfile(segment.folder / "values.bin", "<u2", n, offset=64).tolist()
        keys = np.fromfile(segment.folder / "keys.bin", "<f4", n * store.dim, offset=64).reshape(n, -1).astype(np.float64)
        for record in segment.contexts.documents():
            (domain,) = (name for name, first, stop in segment.record.runs if first <= record.first_row < stop)
            for row in range(record.first_row, record.first_row + record.n_entries):
                index = counts.get((domain, record.id), 0)
                counts[domain, record.id] = index + 1
                if record.id != "dead.txt":
                    found.append(Entry(domain, record.id, index, values[row], keys[row]))
    assert len(found) == store.info()["entries"]
    return found


def run(model: LanguageModel, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the last feed-forward net and p_LM at every position."""
    seen = []
    hook = model.model.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().numpy()))
    with torch.no_grad():
        logits = model.model(torch.tensor([list(ids)]), use_cache=False).logits[0].double()
    hook.remove()
    return seen[0][0].astype(np.float64), logits.softmax(-1).numpy()


@dataclass
class Wanted:
    p_lm: float
    p_knn: float
    p: float
    weights: dict[tuple[str, str], float]  # by (domain, document), of the entries that have the token
    nearest: dict[tuple[str, str], tuple[float, int]]  # distance and index
    counts: dict[tuple[str, str], int]


def oracle(
    model: LanguageModel, entries: list[Entry], ids: Sequence[int], lmbda: float, domains: dict[str, float] | None = None
) -> list[Wanted]:
    """By one loop over all entries for each token."""
    keys, p_lm = run(model, ids)
    wanted = []
    for i in range(N_PROMPT, len(ids)):
        total, found = 0.0, Wanted(float(p_lm[i - 1, ids[i]]), 0.0, 0.0, {}, {}, {})
        for entry in entries:
            weight = 1.0 if domains is None else domains.get(entry.domain, 0.0)
            if weight == 0.0:
                continue
            distance = float(np.square(entry.key - keys[i - 1]).sum())
            weight *= np.exp(-distance / TEMPERATURE)
            total += weight
            if entry.value == ids[i]:
                name = entry.domain, entry.document
                found.weights[name] = found.weights.get(name, 0.0) + weight
                found.counts[name] = found.counts.get(name, 0) + 1
                found.nearest[name] = min(found.nearest.get(name, (np.inf, -1)), (distance, entry.index))
        found.weights = {name: weight / total for name, weight in found.weights.items()}
        found.p_knn = sum(found.weights.values())
        found.p = lmbda * found.p_knn + (1 - lmbda) * found.p_lm
        wanted.append(found)
    return wanted


def check(found: Trace, wanted: list[Wanted], lmbda: float, *, rel: float = 2e-4) -> None:
    """Every number of a trace is the oracle's; what is not named is in the others."""
    assert len(found.tokens) == len(wanted)
    means: dict[tuple[str, str], float] = {}
    for token, right in zip(found.tokens, wanted, strict=True):
        assert (token.p_lm, token.p_knn, token.p) == pytest.approx((right.p_lm, right.p_knn, right.p), rel=rel)
        assert token.lmbda == lmbda
        assert token.lm_share == pytest.approx((1 - lmbda) * right.p_lm / right.p, rel=rel)
        shares = {name: lmbda * weight / right.p for name, weight in right.weights.items() if lmbda}
        for name, share in shares.items():
            means[name] = means.get(name, 0.0) + share / len(wanted)
        assert token.share == pytest.approx(sum(shares.values()), rel=rel, abs=1e-12)
        assert token.domains == pytest.approx(
            {domain: sum(share for name, share in shares.items() if name[0] == domain) for domain in {name[0] for name in shares}}, rel=rel
        )
        named = [(source.context.domain, source.context.document) for source in token.sources]
        assert len(named) == len(set(named)) == min(len(shares), attribution.DOCUMENTS)
        assert [source.share for source in token.sources] == sorted((source.share for source in token.sources), reverse=True)
        for name, source in zip(named, token.sources, strict=True):
            assert source.share == pytest.approx(shares[name], rel=rel)
            assert source.neighbors == right.counts[name]
            assert (source.distance, source.context.token_index) == pytest.approx(right.nearest[name], rel=1e-4)
            assert source.context.token_id == token.id
        rest = [share for name, share in shares.items() if name not in named]
        assert token.others.documents == len(rest)
        assert token.others.share == pytest.approx(sum(rest), rel=rel, abs=1e-12)
        assert all(share <= token.sources[-1].share * (1 + rel) for share in rest)
    assert {(item.domain, item.document): item.share for item in found.documents} == pytest.approx(means, rel=rel)
    assert [item.share for item in found.documents] == sorted((item.share for item in found.documents), reverse=True)
    for item in found.documents:
        assert item.tokens == sum((item.domain, item.document) in right.weights for right in wanted)


def check_sums(found: Trace) -> None:
    """The shares of every token and of the text sum to 1."""
    for token in found.tokens:
        assert token.share + token.lm_share == pytest.approx(1.0, abs=1e-9)
        assert sum(token.domains.values()) == pytest.approx(token.share, abs=1e-9)
        assert sum(source.share for source in token.sources) + token.others.share == pytest.approx(token.share, abs=1e-9)
    assert found.share + found.lm_share == pytest.approx(1.0, abs=1e-9)
    assert sum(item.share for item in found.documents) == pytest.approx(found.share, abs=1e-9)
    assert sum(found.domains.values()) == pytest.approx(found.share, abs=1e-9)


# --- laws


@pytest.mark.parametrize("lmbda", [0.0, 0.35, 1.0])
def test_shares_are_those_of_a_loop_over_all_entries(store, model, entries, ids, lmbda):
    """Documents in several segments, in parts, and of one id in two domains; λ from 0 (all of it is the LM's) to 1 (none is)."""
    found = trace(KnnLM.load(store, model, lmbda=lmbda, **ALL), ids, N_PROMPT)
    wanted = oracle(model, entries, ids, lmbda)
    check(found, wanted, lmbda)
    check_sums(found)
    if lmbda == 0.0:
        assert found.documents == ()
        assert all(token.sources == () and token.lm_share == 1.0 for token in found.tokens)
    else:
        names = {(item.domain, item.document) for item in found.documents}
        assert names >= {("carol", "long.txt"), ("carol", "a.txt"), ("law", "a.txt"), ("poems", "d.txt")}
        assert any(token.others.documents for token in found.tokens)


@pytest.mark.parametrize("domains", [{"law": 3.0, "poems": 1.0}, {"carol": 0.25, "law": 4.0, "poems": 0.0}])
def test_domain_weights_are_in_the_shares(store, model, entries, ids, domains):
    """A domain that is not named, or of weight 0, has no part; others have theirs times their weight."""
    found = trace(KnnLM.load(store, model, lmbda=0.5, domains=domains, **ALL), ids, N_PROMPT)
    check(found, oracle(model, entries, ids, 0.5, domains), 0.5)
    check_sums(found)


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 7}, {"k": 50, "nprobe": 1}, {"temperature": 1e-9}])
def test_shares_sum_to_one_whatever_is_searched(store, model, ids, options):
    """With few neighbours, codes instead of keys, and a temperature at which only the nearest counts."""
    found = trace(KnnLM.load(store, model, **({"lmbda": 0.3, "temperature": TEMPERATURE} | options)), ids, N_PROMPT)
    check_sums(found)


def test_lambda_is_that_of_the_gate(store, model, ids):
    """With a gate every token has a λ of its own, by which its shares are."""
    lm = KnnLM.load(store, model, lmbda=0.3, **ALL)
    gate = Gate(kind="logistic", features=("lm_entropy", "agreement"), weights=(0.8, -2.0), bias=-3.0)
    object.__setattr__(lm.settings, "gate", gate)
    found = trace(lm, ids, N_PROMPT)
    check_sums(found)
    assert len({round(token.lmbda, 6) for token in found.tokens}) > 10
    for token in found.tokens:
        assert token.share == pytest.approx(token.lmbda * token.p_knn / token.p, rel=1e-6)
    steps = [lm.predict(ids[:i]) for i in range(N_PROMPT, 32)]
    assert [token.lmbda for token in found.tokens[: len(steps)]] == pytest.approx([step.lmbda for step in steps], rel=1e-3)


def test_numbers_are_those_of_single_predictions(store, model, ids):
    """p, p_kNN and p_LM are what `predict` says of each token after those before it."""
    lm = KnnLM.load(store, model, lmbda=0.3, k=64, temperature=TEMPERATURE)
    found = trace(lm, ids[:32], N_PROMPT)
    for i, token in enumerate(found.tokens, start=N_PROMPT):
        step = lm.predict(ids[:i])
        assert (token.p_lm, token.p_knn, token.p) == pytest.approx([p[ids[i]] for p in (step.p_lm, step.p_knn, step.p)], rel=1e-4)


def test_without_neighbours_all_is_the_models(store, model, ids):
    """λ is 0 where nothing was found."""
    names = {document.id for document in store.documents()}
    found = trace(KnnLM.load(store, model, lmbda=0.3, exclude=names, **ALL), ids, N_PROMPT)
    check_sums(found)
    assert all((token.lmbda, token.p_knn, token.share, token.lm_share, token.p) == (0, 0, 0, 1, token.p_lm) for token in found.tokens)
    assert found.documents == ()
    assert found.domains == {}
    json.dumps(trace_fields(found), allow_nan=False)


def test_a_token_that_was_impossible_has_no_shares(store, model, ids):
    """λ = 1 and no neighbour has it (it was forced): p is 0, and so is every share; the numbers stay finite."""
    lm = KnnLM.load(store, model, lmbda=1.0, **{**ALL, "k": 2})
    found = trace(lm, [*ids[:20], 255, *ids[20:30]], N_PROMPT)
    token = found.tokens[20 - N_PROMPT]
    assert (token.id, token.p, token.share, token.lm_share, token.sources, token.others.documents) == (255, 0.0, 0.0, 0.0, (), 0)
    json.dumps(trace_fields(found), allow_nan=False)


def test_contexts_are_the_places_in_the_texts(store, model, ids):
    """What stands at the offsets is the token, with the document's text beside it; source and metadata are the document's."""
    found = trace(KnnLM.load(store, model, lmbda=0.5, **ALL), ids, N_PROMPT)
    listed = {(document.domain, document.id): document for document in store.documents()}
    seen = set()
    for token in found.tokens:
        for source in token.sources:
            context = source.context
            document = listed[context.domain, context.document]
            assert (context.source, context.metadata) == (document.source, document.metadata)
            if context.document != "a letter":
                text = Path(context.source).read_bytes().decode()
                assert text[context.char_start : context.char_end] == context.token == token.text
                assert text[: context.char_start].endswith(context.left)
                assert text[context.char_end :].startswith(context.right)
            else:
                assert context.metadata == {"year": 1843}
            seen.add(context.document)
    assert seen >= {"long.txt", "a.txt", "d.txt", "a letter"}


def test_entries_without_text_are_decoded(tmp_path, model, ids):
    """Where only ids came, left, token and right are decoded from them."""
    lm_keys, _ = run(model, ids)
    path = tmp_path / "made.knn"
    batch = (lm_keys[:-1].astype(np.float32), np.array(ids[1:]), [EntryDocument(id="one", domain="law", n_entries=len(ids) - 1)])
    layer = "h.1.mlp"
    create_from_entries(path, [batch], checkpoint=model.checkpoint, dim=32, vocab_size=model.vocab_size, key_layer=layer)
    with knnstore.open(path) as made:
        found = trace(KnnLM.load(made, model, lmbda=0.9, temperature=1e-3, k=4), ids, N_PROMPT)
    for i, token in enumerate(found.tokens, start=N_PROMPT):
        (source,) = token.sources
        assert source.share == pytest.approx(token.share)
        assert token.share > 0.5
        assert source.context.token == model.tokenizer.decode([ids[i]])
        assert source.context.left == model.tokenizer.decode(ids[max(1, i - 16) : i])
        assert source.context.char_start is None


def test_a_long_text_is_run_in_pieces(store, model, ids, monkeypatch):
    """However few logits are made at once, the numbers are the same."""
    lm = KnnLM.load(store, model, lmbda=0.3, **ALL)
    whole = trace_fields(trace(lm, ids, N_PROMPT))
    monkeypatch.setattr(attribution, "LOGITS_CELLS", 400 * 4)
    pieces = trace_fields(trace(lm, ids, N_PROMPT))
    for name in ("p_lm", "p_knn", "p", "lambda", "share"):
        assert [token[name] for token in pieces["tokens"]] == pytest.approx([token[name] for token in whole["tokens"]], rel=1e-4)


def test_fields_are_json(store, model, ids):
    """Every field of a trace is in its JSON, without NaN, and under the names of the command line."""
    found = trace(KnnLM.load(store, model, lmbda=0.5, **ALL), np.array(ids), N_PROMPT)
    fields = json.loads(json.dumps(trace_fields(found), allow_nan=False))
    assert set(fields) == {"prompt", "text", "tokens", "share", "lm_share", "domains", "documents"}
    assert set(fields["documents"][0]) == {"document", "domain", "source", "share", "tokens"}
    token = fields["tokens"][0]
    assert set(token) == {"id", "text", "p_lm", "p_knn", "p", "lambda", "share", "lm_share", "domains", "sources", "others"}
    places = {"left", "token", "right", "id", "document", "token_index", "domain", "source", "metadata", "char_start", "char_end"}
    assert set(token["sources"][0]) == {"share", "neighbors", "distance", "weight"} | places
    decode = model.tokenizer.decode
    assert (fields["prompt"], fields["text"]) == (decode(ids[1:N_PROMPT]), decode(ids[N_PROMPT:]))


@pytest.mark.parametrize("n_prompt", [0, -1, 44, 45])
def test_prompts_that_leave_nothing_are_refused(store, model, ids, n_prompt):
    """Nothing before the new tokens, or no new token."""
    with pytest.raises(InvalidArgumentError, match=f"n_prompt {n_prompt}: of 44 tokens"):
        trace(KnnLM.load(store, model, lmbda=0.3, **ALL), ids, n_prompt)


def test_a_text_that_the_model_cannot_see_is_refused(store, model):
    """The last token is predicted, not seen: as many as the model has positions, and one more."""
    lm = KnnLM.load(store, model, lmbda=0.3, **ALL)
    assert len(trace(lm, [5] * (lms.POSITIONS + 1), 60).tokens) == 5
    with pytest.raises(InvalidArgumentError, match=f"{lms.POSITIONS + 2} tokens: the model sees {lms.POSITIONS} at most"):
        trace(lm, [5] * (lms.POSITIONS + 2), 60)
    with pytest.raises(InvalidArgumentError, match="the vocabulary has 400"):
        trace(lm, [5, 400], 1)


# --- texts of tokens

TOKENIZERS = {"gpt2": lms.gpt2_tokenizer(), "llama": lms.llama_tokenizer(bos=True)}


@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), min_size=1, max_size=30),
    before=st.sampled_from(["", "Marley was", "naïve 漢"]),
)
def test_texts_of_tokens_join_to_the_text(name, text, before):
    """No character is lost or told twice, and one that takes several tokens is told by the last of them."""
    tokenizer = TOKENIZERS[name]
    prompt = [0, *lms.token_ids(tokenizer, before)]
    ids = np.array([*prompt, *lms.token_ids(tokenizer, text)])
    found = token_texts(tokenizer.decode, ids, len(prompt))
    assert len(found) == len(ids) - len(prompt)
    assert "".join(found) == tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
    assert not any("\ufffd" in part for part in found)


@given(tokens=st.lists(st.integers(0, 399), min_size=1, max_size=25))
def test_any_tokens_have_texts(tokens):
    """Also where their bytes are no characters: nothing is told twice."""
    decode = TOKENIZERS["gpt2"].decode
    found = token_texts(decode, np.array([0, *tokens]), 1)
    assert len(found) == len(tokens)
    kept = [part.replace("\ufffd", "") for part in ("".join(found), decode([0, *tokens])[len(decode([0])) :])]
    assert kept[0] == kept[1]
