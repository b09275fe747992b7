"""`create`: what it makes of a corpus. What it refuses is in test_create_refusals.py, λ in test_calibrate.py, kills in test_resume.py."""

import gzip
import json
from pathlib import Path

import lms
import numpy as np
import pytest
import zstandard

from knnstore.lm import calibrate, embed
from knnstore.lm.create import create
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import LanguageModel, load_language_model

CONTEXT, STRIDE = 32, 16
WINDOWS = {"context": CONTEXT, "stride": STRIDE}


@pytest.fixture(autouse=True)
def little_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens to fit on, so that it does not take long."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 512)


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


@pytest.fixture(scope="module")
def qwen() -> LanguageModel:
    """Without BOS."""
    return load_language_model(lms.llama_model(), tokenizer=lms.llama_tokenizer(bos=False))


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return load_language_model(lms.llama_model(), tokenizer=lms.llama_tokenizer(bos=True))


# --- documents, values, texts


EMOJI = "Ærø 漢字 😀👩‍👩‍👧 e\u0301 naïve"


def mixed_corpus(folder: Path) -> dict[str, tuple[str, str, dict]]:
    """A folder of every kind of file; {id: (source, text, metadata)} as they should be read."""
    book = lms.book()
    plain = {
        "long.txt": book[:1_500],
        "sub/one.txt": "x",
        "sub/deep/crlf.md": "first line\r\nsecond\r\n\r\nthird\n" + book[2_000:2_100],
        "sub/emoji.rst": EMOJI * 9,
        "tabs.txt": "\t\tfunction  with    spaces\n\n\n",
    }
    lms.write_texts(folder, plain)
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfWith a mark of its byte order.")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "zipped.txt.gz").write_bytes(gzip.compress(book[3_000:3_400].encode()))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    lines = [
        {"text": book[4_000:4_200], "id": "by-name", "year": 1843, "tags": ["a", "b"]},
        {"text": EMOJI, "year": 1844},
        {"text": "", "id": "nothing"},
        {"text": "no id\u2028one line"},
    ]
    packed = zstandard.ZstdCompressor().compress("\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode() + b"\n\n")
    (folder / "lines.jsonl.zst").write_bytes(packed)
    here = {name: (f"{folder}/{name}", text, {}) for name, text in plain.items()}
    here["bom.txt"] = (f"{folder}/bom.txt", "With a mark of its byte order.", {})
    here["zipped.txt.gz"] = (f"{folder}/zipped.txt.gz", book[3_000:3_400], {})
    here["by-name"] = (f"{folder}/lines.jsonl.zst#1", lines[0]["text"], {"year": 1843, "tags": ["a", "b"]})
    here["lines.jsonl.zst#2"] = (f"{folder}/lines.jsonl.zst#2", EMOJI, {"year": 1844})
    here["lines.jsonl.zst#4"] = (f"{folder}/lines.jsonl.zst#4", "no id\u2028one line", {})
    return here


def place(item: tuple[str, tuple[str, str, dict]]) -> tuple[str, int]:
    """What documents are read by: the file's path in the folder, then the line."""
    name, _, line = item[1][0].partition("#")
    return name, int(line or 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen"])
def test_a_store_holds_what_an_independent_reading_finds(tmp_path, kind, request):
    """Documents, sources, metadata, texts and token ids are those of the files; each token but the first has an entry."""
    model = request.getfixturevalue(kind)
    corpus = mixed_corpus(tmp_path / "corpus")
    progress = lms.Recorder()
    with create(tmp_path / "made.knn", tmp_path / "corpus", model=model, **WINDOWS, progress=progress) as store:
        found = lms.content_of(store)
    expected = sorted(corpus.items(), key=place)
    eos, bos = model.tokenizer.eos_token_id, model.tokenizer.bos_token_id
    ids = {name: [*lms.token_ids(model.tokenizer, text)[0 if bos is not None else 1 :], eos] for name, (_, text, _) in expected}
    assert found.documents == [(name, source, len(ids[name]), metadata) for name, (source, _, metadata) in expected]
    assert found.texts == [text for _, (_, text, _) in expected]
    assert found.values.tolist() == [token for name, _ in expected for token in ids[name]]
    assert [note for note in progress.notes if "picture.png" in note]
    assert sum("(empty)" in note for note in progress.notes) == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen"])
def test_each_entry_stands_at_its_characters(tmp_path, kind, request):
    """Every token's characters stand in the named source at the named offsets, with the text around it on both sides."""
    model = request.getfixturevalue(kind)
    corpus = mixed_corpus(tmp_path / "corpus")
    with create(tmp_path / "made.knn", tmp_path / "corpus", model=model, **WINDOWS) as store:
        lm = KnnLM.load(store, model)
        step = lm.predict([text[:40] for _, text, _ in corpus.values()])
        seen = set()
        for i in range(len(step.neighbors)):
            for j in range(0, int(step.neighbors.n_found[i]), 7):
                hit = step.neighbors.context(i, j)
                source, text, metadata = corpus[hit.document]
                seen.add(hit.document)
                assert (hit.source, hit.metadata, hit.domain) == (source, metadata, "default")
                assert hit.token == text[hit.char_start : hit.char_end]
                begin, end = hit.char_start - len(hit.left), hit.char_end + len(hit.right)
                assert hit.left + hit.token + hit.right == text[begin:end]
                assert hit.token_id == step.neighbors.values[i, j]
                if hit.token_id == model.tokenizer.eos_token_id:
                    assert hit.char_start == hit.char_end == len(text)
                else:
                    assert hit.token
                    token = model.tokenizer.convert_ids_to_tokens(hit.token_id).strip("▁Ġ")
                    if token.isalpha() and token.isascii():
                        assert hit.token.strip() == token
        assert seen == set(corpus)


def test_a_store_without_eos_has_one_entry_less_a_document(tmp_path, qwen):
    """eos=False: the last value is the last token; a document of one token has then no entry where there is no BOS either."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Scrooge was here.", "b.txt": "x"})
    progress = lms.Recorder()
    with create(tmp_path / "made.knn", corpus, model=qwen, eos=False, **WINDOWS, progress=progress) as store:
        found = lms.content_of(store)
    assert found.values.tolist() == lms.token_ids(qwen.tokenizer, "Scrooge was here.")[1:]
    assert [note for note in progress.notes if "b.txt" in note and "one token" in note]
    assert store.manifest.operation.counts == {"documents": 1, "entries": len(found.values), "repeated": 0, "skipped": 1}


# --- documents in parts


def keys_by_part(model: LanguageModel, ids: list[int], ends: list[int]) -> np.ndarray:
    """Keys of one document cut into parts, by the documented rule, in a loop.

    A part begins with up to context - stride + 1 tokens from before it, and is cut into windows of its own.
    """
    found, begin = [], 0
    for end in ends:
        prefix = min(begin + 1, CONTEXT - STRIDE + 1)
        tokens = ids[begin + 1 - prefix : end + 1]
        done = 0
        while done < end - begin:
            stop = CONTEXT if done == 0 else prefix + done + STRIDE - 1
            stop = min(max(stop, prefix + STRIDE - 1) if done == 0 else stop, prefix + end - begin - 1)
            start = max(0, stop - CONTEXT)
            inputs = np.array([tokens[start:stop]])
            keys = embed.KeyExtractor(model.model).keys(embed.right_padded(inputs, model.device))[0].numpy()
            found.append(keys[prefix - 1 + done - start :])
            done += len(found[-1])
        begin = end
    return np.concatenate(found)


@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
def test_a_document_larger_than_a_segment_is_continued_in_the_next(tmp_path, kind, request):
    """Every entry once, parts joined to one document, and windows that see across the boundary."""
    model = request.getfixturevalue(kind)
    texts = {"a.txt": lms.book()[:150], "b.txt": lms.book()[200:2_400], "c.txt": lms.book()[2_400:2_500]}
    corpus = lms.write_texts(tmp_path / "corpus", texts)
    options = {"model": model, "keep_keys": "f32", **WINDOWS}
    with create(tmp_path / "whole.knn", corpus, **options) as store:
        whole = lms.content_of(store)
    with create(tmp_path / "parts.knn", corpus, segment_entries=300, **options) as store:
        parts = lms.content_of(store)
        sizes = [record.content.entries for record in store.manifest.segments]
        assert store.info()["documents"] == 3
    assert sizes == [300] * (len(whole.values) // 300) + [len(whole.values) % 300]
    assert parts.documents == whole.documents
    assert parts.texts == whole.texts == list(texts.values())
    np.testing.assert_array_equal(parts.values, whole.values)
    np.testing.assert_array_equal(parts.spans, whole.spans)
    first, n = whole.documents[0][2], whole.documents[1][2]
    ends = [end - first for end in np.cumsum(sizes).tolist() if first < end < first + n] + [n]
    bos = [] if model.tokenizer.bos_token_id is None else [model.tokenizer.bos_token_id]
    ids = bos + lms.token_ids(model.tokenizer, texts["b.txt"]) + [model.tokenizer.eos_token_id]
    np.testing.assert_allclose(parts.keys[first : first + n], keys_by_part(model, ids, ends), atol=1e-4)
    np.testing.assert_allclose(whole.keys[first : first + n], keys_by_part(model, ids, [n]), atol=1e-4)


def test_parts_at_window_boundaries_have_the_keys_of_the_whole(tmp_path, gpt2):
    """Where a segment ends with a window, cutting a document changes no key."""
    corpus = lms.write_texts(tmp_path / "corpus", {"b.txt": lms.book()[:2_500]})
    options = {"model": gpt2, "keep_keys": "f32", **WINDOWS}
    with (
        create(tmp_path / "whole.knn", corpus, **options) as store,
        create(tmp_path / "parts.knn", corpus, segment_entries=CONTEXT + 16 * STRIDE, **options) as cut,
    ):
        assert len(cut.segments) >= 4
        np.testing.assert_allclose(lms.content_of(cut).keys, lms.content_of(store).keys, atol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_characters_of_several_tokens_stand_on_both_sides_of_a_boundary(tmp_path, gpt2, size):
    """However small the segments, each token has its whole character and its place in the document."""
    text = EMOJI
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": text})
    with create(tmp_path / "parts.knn", corpus, model=gpt2, segment_entries=size, **WINDOWS) as store:
        found = lms.content_of(store)
        assert found.texts == [text]
        hits = store.search(np.zeros(store.dim), k=len(store))
        places = {}
        for j in range(len(store)):
            hit = hits.context(0, j)
            assert hit.token == text[hit.char_start : hit.char_end]
            assert hit.token or hit.token_id == gpt2.tokenizer.eos_token_id
            places[hit.token_index] = hit.token_id
    assert [places[i] for i in range(len(places))] == [*lms.token_ids(gpt2.tokenizer, text), gpt2.tokenizer.eos_token_id]


def test_a_segment_that_ends_with_a_document_ends_there(tmp_path, gpt2):
    """Documents that fill segments exactly are not cut, and none is empty."""
    text = "Scrooge was his sole executor"
    n = len(lms.token_ids(gpt2.tokenizer, text)) + 1
    corpus = lms.write_texts(tmp_path / "corpus", {f"{i}.txt": text for i in range(4)})
    with create(tmp_path / "made.knn", corpus, model=gpt2, segment_entries=2 * n, **WINDOWS) as store:
        assert [record.content.entries for record in store.manifest.segments] == [2 * n, 2 * n]
        assert [record.content.documents for record in store.manifest.segments] == [2, 2]
        assert lms.content_of(store).texts == [text] * 4


# --- tiny stores


@pytest.mark.parametrize("n_chars", [1, 2, 40, 600])
def test_stores_of_any_smallness_just_work(tmp_path, gpt2, n_chars):
    """One token, twenty, three hundred: created, opened, queried; with too few to fit on, λ and T are careful defaults."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:n_chars]})
    with create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS) as store:
        calibration = store.manifest.calibration
        assert calibration.status == ("fresh" if len(store) >= 256 else "default")
        if calibration.status == "default":
            assert calibration.lmbda == calibrate.DEFAULT_LAMBDA
        assert calibration.temperature > 0
        step = KnnLM.load(store, gpt2).predict(["Scrooge", "", "x" * 500])
        np.testing.assert_allclose(step.p.sum(axis=1), 1.0)
        np.testing.assert_allclose(step.p_knn.sum(axis=1), 1.0)


def test_one_entry_is_a_store(tmp_path, gpt2):
    """BOS and one token without EOS: a neighbour for everything."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "x"})
    with create(tmp_path / "made.knn", corpus, model=gpt2, eos=False, keep_keys="f32") as store:
        assert len(store) == 1
        step = KnnLM.load(store, gpt2, exact=True).predict("Scrooge")
        assert step.p_knn.argmax() == lms.token_ids(gpt2.tokenizer, "x")[0]
        assert step.neighbors.n_found.tolist() == [1]


def test_a_store_of_many_one_token_documents_works(tmp_path, gpt2):
    """Three hundred documents of one token."""
    lines = "\n".join(json.dumps({"text": chr(97 + i % 26)}) for i in range(300))
    corpus = lms.write_texts(tmp_path / "corpus", {"a.jsonl": lines})
    with create(tmp_path / "made.knn", corpus, model=gpt2, segment_entries=100) as store:
        assert (len(store), store.info()["documents"]) == (600, 300)
        np.testing.assert_allclose(KnnLM.load(store, gpt2).predict("a").p.sum(), 1.0)
