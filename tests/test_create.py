"""`create`: what it makes of a corpus, what it refuses, and what λ and temperature it begins with. Kills are in test_resume.py."""

import gzip
import json
import os
import time
from pathlib import Path

import lms
import numpy as np
import pytest
import zstandard

import knnstore
from knnstore.errors import (
    CheckpointMismatchError,
    CorpusError,
    ExistsError,
    InvalidArgumentError,
    LockedError,
    ModelError,
    NotFoundError,
)
from knnstore.lm import calibrate, embed
from knnstore.lm.create import create
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.store import Datastore

CONTEXT, STRIDE = 32, 16
WINDOWS = {"context": CONTEXT, "stride": STRIDE}
READING = "reading and tokenizing"  # the stage of this name


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


# --- what a corpus may and may not be


def test_a_document_that_comes_twice_is_kept_once(tmp_path, gpt2):
    """The same id and content, from the same file or another: one document, and a note."""
    corpus = lms.write_texts(tmp_path / "one", {"a.txt": "Marley was dead", "b.txt": "to begin with"})
    lms.write_texts(tmp_path / "two", {"a.txt": "Marley was dead"})
    progress = lms.Recorder()
    with create(tmp_path / "made.knn", [corpus, corpus, tmp_path / "two"], model=gpt2, **WINDOWS, progress=progress) as store:
        assert lms.content_of(store).texts == ["Marley was dead", "to begin with"]
        assert store.manifest.operation.counts["repeated"] == 3
    assert [note for note in progress.notes if "3 documents came twice" in note]


def test_one_id_for_two_contents_is_refused(tmp_path, gpt2):
    """Ids are unique within a domain; the message names the second source, and another corpus can be given at once."""
    corpus = lms.write_texts(tmp_path / "one", {"a.txt": "Marley was dead"})
    lms.write_texts(tmp_path / "two", {"a.txt": "Marley was alive"})
    with pytest.raises(CorpusError, match=r"two/a\.txt: a second document with the id 'a\.txt'"):
        create(tmp_path / "made.knn", [corpus, tmp_path / "two"], model=gpt2, **WINDOWS)
    create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS).close()


def open_files() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - of this process, not of a path


def test_text_that_is_not_utf8_is_refused_and_can_be_corrected(tmp_path, gpt2):
    """The message has file, byte and offset; no file stays open; after the file is corrected the same command does it."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:300], "c.txt": "end"})
    (corpus / "b.txt").write_bytes(b"caf\xe9 au lait")
    options = {"model": gpt2, **WINDOWS}
    with pytest.raises(CorpusError, match=r"b\.txt: not UTF-8: byte 0xE9 at offset 3"):
        create(tmp_path / "made.knn", corpus, **options)
    before = open_files()
    for _ in range(3):
        with pytest.raises(CorpusError):
            create(tmp_path / "made.knn", corpus, **options)
    assert open_files() <= before
    assert list((tmp_path / "made.knn" / "staging").iterdir()) == []
    (corpus / "b.txt").write_text("café au lait", encoding="utf-8")
    with create(tmp_path / "made.knn", corpus, **options) as store:
        assert lms.content_of(store).texts == [lms.book()[:300], "café au lait", "end"]


@pytest.mark.parametrize("lines", ['{"text": "a"}\nnot json\n', '{"text": 5}\n', '{"words": "a"}\n', '{"text": "a", "id": 1.5}\n'])
def test_lines_that_are_no_documents_are_refused(tmp_path, gpt2, lines):
    """The line is named."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.jsonl": lines})
    with pytest.raises(CorpusError, match=rf"a\.jsonl#{lines.count(chr(10))}"):
        create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS)


@pytest.mark.parametrize("text", ["", "\ufeff"])
def test_a_corpus_without_a_token_is_refused(tmp_path, gpt2, text):
    """There is no datastore of nothing."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": text, "b.jsonl": '\n{"text": ""}\n'})
    with pytest.raises(CorpusError, match="no entries"):
        create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS)
    with pytest.raises(NotFoundError):
        knnstore.open(tmp_path / "made.knn")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, gpt2):
    """Half of one text and half of another is refused; typed again, the command takes the file as it is now."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead", "b.txt": "to begin with"})

    def change(title: str, n: int) -> None:
        if title != READING:
            return
        (corpus / "a.txt").write_text("Marley was dead, to begin with.")
        os.utime(corpus / "a.txt", ns=(time.time_ns(), time.time_ns() + 1_000_000_000))

    options = {"model": gpt2, **WINDOWS}
    with pytest.raises(CorpusError, match=r"a\.txt: the file was changed while it was read. Run the command again."):
        create(tmp_path / "made.knn", corpus, **options, progress=lms.Recorder(change))
    with create(tmp_path / "made.knn", corpus, **options) as store:
        assert lms.content_of(store).texts[0] == "Marley was dead, to begin with."


def test_a_file_that_vanishes_is_named(tmp_path, gpt2):
    """Before its turn it is not found; after it was read, it has changed."""
    options = {"model": gpt2, **WINDOWS}
    for name, error in (("b.txt", NotFoundError), ("a.txt", CorpusError)):
        corpus = lms.write_texts(tmp_path / name / "corpus", {"a.txt": "Marley was dead", "b.txt": "to begin with"})

        def vanish(title: str, n: int, file: Path = corpus / name) -> None:
            if title == READING:
                file.unlink(missing_ok=True)

        with pytest.raises(error, match=name):
            create(tmp_path / name / "made.knn", corpus, **options, progress=lms.Recorder(vanish))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named_before_any_work(tmp_path, gpt2):
    """No datastore is begun."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    (corpus / "a.txt").chmod(0)
    with pytest.raises(knnstore.errors.StorageError, match=r"a\.txt: no permission"):
        create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS)
    assert not (tmp_path / "made.knn").exists()


# --- what it is asked for


def test_a_second_create_says_that_the_store_exists(tmp_path, gpt2):
    """Exit code 4, before a model is loaded; the store is as it was."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS).close()
    with pytest.raises(ExistsError, match="exists already") as failure:
        create(tmp_path / "made.knn", corpus, model="no/such-model")
    assert failure.value.exit_code == 4
    with knnstore.open(tmp_path / "made.knn") as store:
        assert store.snapshot == 1


def test_something_else_at_the_path_is_left_alone(tmp_path, gpt2):
    """A folder or file that is no datastore is not written into."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    for path in (corpus, corpus / "a.txt"):
        with pytest.raises(ExistsError, match="not a datastore"):
            create(path, corpus, model=gpt2, **WINDOWS)
    assert sorted(path.name for path in corpus.iterdir()) == ["a.txt"]


def test_other_arguments_on_an_unfinished_store_are_refused(tmp_path, gpt2):
    """The message has both; the first command finishes it."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:300]})

    class Stopped(Exception):  # noqa: N818 - not an error of anything
        pass

    def stop(title: str, n: int) -> None:
        if title == "embedding":
            raise Stopped

    with pytest.raises(Stopped):
        create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS, progress=lms.Recorder(stop))
    with pytest.raises(NotFoundError):
        knnstore.open(tmp_path / "made.knn")
    for other in ({"seed": 1}, {"keep_keys": "f32"}, {"domain": "law"}, {"eos": False}, {"context": 31}, {"key_layer": "final"}):
        name = next(iter(other))
        with pytest.raises(ExistsError, match=f"unfinished.*begun with .*{name}.*this command has .*{name}"):
            create(tmp_path / "made.knn", corpus, model=gpt2, **{**WINDOWS, **other})
    other_tokenizer = lms.llama_tokenizer(bos=True)
    with pytest.raises(ExistsError, match="tokenizer"):
        create(tmp_path / "made.knn", corpus, model=gpt2.model, tokenizer=other_tokenizer, **WINDOWS)
    with create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS) as store:
        assert lms.content_of(store).texts == [lms.book()[:300]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 1}, "context 1"),
        ({"context": 0}, "context 0"),
        ({"context": 65}, "context 65: .* takes 64"),
        ({"context": 8, "stride": 9}, "stride 9"),
        ({"stride": 0}, "stride 0"),
        ({"stride": -1}, "stride -1"),
        ({"segment_entries": 0}, "segment_entries 0"),
        ({"codec": "sq8"}, "codec 'sq8'"),
        ({"rotation": "left"}, "rotation 'left'"),
        ({"keep_keys": "f64"}, "keep_keys 'f64'"),
        ({"domain": ""}, "domain"),
        ({"key_layer": "no.such.layer"}, "no.such.layer"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(tmp_path, gpt2, options, words):
    """The value is in the message; nothing is left at the path."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    with pytest.raises(InvalidArgumentError, match=words):
        create(tmp_path / "made.knn", corpus, model=gpt2, **options)
    assert not (tmp_path / "made.knn").exists()


def test_context_and_stride_have_defaults_that_fit_the_model(tmp_path, gpt2):
    """What the model takes, if that is under 512, and half of it."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    with create(tmp_path / "made.knn", corpus, model=gpt2) as store:
        assert store.info()["windows"] == {"context": 64, "stride": 32, "dtype": "float32"}
    with create(tmp_path / "small.knn", corpus, model=gpt2, context=2) as store:
        assert store.info()["windows"] == {"context": 2, "stride": 1, "dtype": "float32"}


def test_keys_that_are_not_finite_are_refused_and_the_path_is_free_again(tmp_path):
    """Keys of a model that overflows would answer nothing; another model can be given at once."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:200]})
    broken = lms.gpt2_model(seed=1)
    loaded = load_language_model(broken, tokenizer=lms.gpt2_tokenizer())
    broken.transformer.wte.weight.data[lms.token_ids(lms.gpt2_tokenizer(), " the")[0]] = np.inf
    with pytest.raises(ModelError, match="not finite"):
        create(tmp_path / "made.knn", corpus, model=loaded, **WINDOWS)
    create(tmp_path / "made.knn", corpus, model=lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer(), **WINDOWS).close()


# --- models


def test_a_model_may_be_an_object_or_a_folder(tmp_path, gpt2):
    """Both make the same store, and either answers it; without one, `load` takes what the manifest names."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:400]})
    folder = tmp_path / "model"
    lms.gpt2_model().save_pretrained(folder)
    lms.gpt2_tokenizer().save_pretrained(folder)
    with (
        create(tmp_path / "one.knn", corpus, model=lms.gpt2_model(), tokenizer=gpt2.tokenizer, keep_keys="f32", **WINDOWS) as one,
        create(tmp_path / "two.knn", corpus, model=str(folder), dtype="float32", keep_keys="f32", **WINDOWS) as two,
    ):
        assert one.manifest.checkpoint.identity == two.manifest.checkpoint.identity
        assert two.manifest.checkpoint.name == str(folder)
        first, second = lms.content_of(one), lms.content_of(two)
        np.testing.assert_array_equal(first.values, second.values)
        np.testing.assert_allclose(first.keys, second.keys, atol=1e-5)
        wanted = KnnLM.load(one, gpt2).predict("Scrooge").p
        np.testing.assert_allclose(KnnLM.load(two).predict("Scrooge").p, wanted, atol=1e-5)
        np.testing.assert_allclose(KnnLM.load(one, folder, dtype="float32").predict("Scrooge").p, wanted, atol=1e-5)


def test_without_a_model_the_one_that_ships_is_taken(tmp_path, sample_book):
    """It needs nothing but text, and answers with the same model."""
    (tmp_path / "carol.txt").write_text(sample_book.read_text(encoding="utf-8")[3_000:5_000], encoding="utf-8")
    with create(tmp_path / "made.knn", tmp_path / "carol.txt") as store:
        assert store.manifest.checkpoint.name == "default-gpt2"
        assert [document.id for document in store.documents()] == ["carol.txt"]
        step = KnnLM.load(store).predict("Scrooge was a")
        np.testing.assert_allclose([step.p.sum(), step.p_lm.sum(), step.p_knn.sum()], 1.0)


def test_another_model_is_refused_unless_allowed(tmp_path, gpt2):
    """Exit code 6; the one exit warns."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:400]})
    other = load_language_model(lms.gpt2_model(seed=9), tokenizer=lms.gpt2_tokenizer())
    wider = load_language_model(lms.gpt2_model(width=48), tokenizer=lms.gpt2_tokenizer())
    with create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS) as store:
        with pytest.raises(CheckpointMismatchError, match="built with checkpoint") as failure:
            KnnLM.load(store, other)
        assert failure.value.exit_code == 6
        with pytest.warns(UserWarning, match="built with checkpoint"):
            lm = KnnLM.load(store, other, allow_model_mismatch=True)
        np.testing.assert_allclose(lm.predict("Scrooge").p.sum(), 1.0)
        with pytest.warns(UserWarning, match="built with"), pytest.raises(CheckpointMismatchError, match=r"32 dimensions.* has 48"):
            KnnLM.load(store, wider, allow_model_mismatch=True)
        with pytest.raises(CheckpointMismatchError, match="tokenizer"):
            KnnLM.load(store, gpt2.model, tokenizer=lms.llama_tokenizer(bos=True))


def test_a_model_needs_a_tokenizer(tmp_path):
    """Said by name, with what to give."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    with pytest.raises(ModelError, match=r"without a tokenizer\. Give one with tokenizer="):
        create(tmp_path / "made.knn", corpus, model=lms.gpt2_model())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    """Ids beyond the logits' width are no values; a tokenizer that fits can be given at once."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    tokenizer = lms.gpt2_tokenizer()
    tokenizer.add_tokens([f"Marley{i}" for i in range(5)] + ["Marley"])
    with pytest.raises(InvalidArgumentError, match="the vocabulary has 400"):
        create(tmp_path / "made.knn", corpus, model=lms.gpt2_model(), tokenizer=tokenizer, **WINDOWS)
    create(tmp_path / "made.knn", corpus, model=lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer(), **WINDOWS).close()


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


# --- λ and temperature


def fit_by_hand(held_out: calibrate.HeldOut) -> tuple[float, float, float]:
    """λ, T and perplexity: all of both grids, one query at a time."""
    scale = float(np.median([row[0] for row in held_out.distances if np.isfinite(row[0])]))
    best = (np.inf, 0.0, 0.0)
    for quarter in range(-24, 13):
        temperature = scale * 2 ** (quarter / 4)
        p_knn = []
        for distances, values, gold in zip(held_out.distances.astype(float), held_out.values, held_out.gold, strict=True):
            weights = np.where(values >= 0, np.exp((distances[0] - distances) / temperature), 0.0) if values[0] >= 0 else None
            p_knn.append(None if weights is None else weights[values == gold].sum() / weights.sum())
        for step in range(96):
            lmbda = step / 100
            p = [
                np.exp(lm) if knn is None else lmbda * knn + (1 - lmbda) * np.exp(lm)
                for lm, knn in zip(held_out.log_p_lm, p_knn, strict=True)
            ]
            loss = -float(np.mean(np.log(p)))
            if loss < best[0] - 1e-12:
                best = (loss, lmbda, temperature)
    return best[1], best[2], float(np.exp(best[0]))


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_the_best_of_its_grid(seed):
    """λ, T and the perplexity reached are those of a search by hand, also where some queries have fewer neighbours or none."""
    rng = np.random.default_rng(seed)
    n, k, vocab = 60, 12, 9
    distances = np.sort(rng.gamma(4.0, 20.0, (n, k)).astype(np.float32), axis=1)
    gold = rng.integers(0, vocab, n)
    near = rng.random((n, k)) < np.exp(-distances / 25)
    values = np.where(near, gold[:, None], rng.integers(0, vocab, (n, k))).astype(np.int32)
    for row in range(0, n, 9):
        distances[row, row % k :], values[row, row % k :] = np.inf, -1
    held_out = calibrate.HeldOut(distances, values, gold, np.log(rng.uniform(0.1, 0.9, n)))
    lmbda, temperature, perplexity = calibrate.fit(held_out)
    wanted = fit_by_hand(held_out)
    assert 0 < wanted[0] < 0.95
    np.testing.assert_allclose((lmbda, temperature, perplexity), wanted, rtol=1e-5)


def test_neighbours_that_tell_nothing_get_no_weight():
    """λ falls to 0 where the gold token is never among the neighbours."""
    distances = np.sort(np.random.default_rng(0).gamma(4.0, 20.0, (50, 5)).astype(np.float32), axis=1)
    held_out = calibrate.HeldOut(distances, np.zeros((50, 5), np.int32), np.ones(50, np.int64), np.full(50, -2.0))
    lmbda, temperature, perplexity = calibrate.fit(held_out)
    assert lmbda == 0
    assert temperature > 0
    np.testing.assert_allclose(perplexity, np.exp(2.0))


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(segment, rows of the window, hits) of each search that calibration makes."""
    seen: list[tuple] = []
    windows: list[tuple] = []
    choose, search = calibrate._choose, calibrate.search

    def choosing(tokens, seed):
        for number, window in choose(tokens, seed):
            first = int(tokens[number].window_rows[window])
            windows.append((number, first, first + int(tokens[number].windows.n_entries[window])))
            yield number, window

    def searching(segments, allowed, keys, **options):
        hits = search(segments, allowed, keys, **options)
        seen.append((*windows[len(seen)], hits))
        return hits

    monkeypatch.setattr(calibrate, "_choose", choosing)
    monkeypatch.setattr(calibrate, "search", searching)
    return seen


def test_with_eight_documents_calibration_sees_no_row_of_its_own(tmp_path, gpt2, searches):
    """Documents that each repeat one phrase: what would tell the next token is in the window's own document, also its other parts."""
    corpus = lms.write_texts(tmp_path / "corpus", {f"{i}.txt": f"{lms.random_words(i, 6)} " * 8 for i in range(8)})
    with create(tmp_path / "made.knn", corpus, model=gpt2, segment_entries=400, **WINDOWS) as store:
        calibration = store.manifest.calibration
        assert calibration.status == "fresh"
        owner = {}
        for number, segment in enumerate(store.segments):
            for record in segment.contexts.documents():
                owner |= {(number, row): record.id for row in range(record.first_row, record.first_row + record.n_entries)}
        assert len(searches) > 8
        for number, first, stop, hits in searches:
            own = {owner[number, row] for row in range(first, stop)}
            assert len(own) == 1
            found = {owner[place] for place in zip(hits.segments[hits.rows >= 0].tolist(), hits.rows[hits.rows >= 0].tolist(), strict=True)}
            assert found
            assert not own & found


def test_with_few_documents_calibration_sees_no_row_within_its_reach(tmp_path, gpt2, searches):
    """The window's rows, and two contexts (a quarter of a short document) on both sides, do not count."""
    texts = {"a.txt": lms.random_words(1, 400), "b.txt": lms.random_words(2, 20)}
    corpus = lms.write_texts(tmp_path / "corpus", texts)
    with create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS) as store:
        sizes = [document.entries for document in store.documents()]
    assert len(searches) > 3
    for _, first, stop, hits in searches:
        begin, end = (0, sizes[0]) if first < sizes[0] else (sizes[0], sum(sizes))
        reach = min(2 * CONTEXT, (end - begin) // 4)
        found = np.unique(hits.rows[hits.rows >= 0])
        wanted = [row for row in range(sum(sizes)) if not max(begin, first - reach) <= row < min(end, stop + reach)]
        assert found.tolist() == wanted[: len(found)] if len(wanted) <= 1_024 else set(found) <= set(wanted)


def test_text_that_nothing_predicts_is_not_memorized(tmp_path, gpt2, monkeypatch):
    """Random words: with its own rows a window would find each next token at distance 0, and λ would be fitted to that."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.random_words(1, 700)})
    with create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS) as store:
        honest = store.manifest.calibration.perplexity
    monkeypatch.setattr(calibrate, "_exclusion", lambda tokens: lambda number, window: [])
    with create(tmp_path / "cheating.knn", corpus, model=gpt2, **WINDOWS) as store:
        cheating = store.manifest.calibration.perplexity
    assert honest["lm"] == pytest.approx(cheating["lm"], rel=1e-4)
    assert cheating["mixed"] < 2 < 20 < honest["mixed"]


def test_calibration_is_the_same_each_time(tmp_path, gpt2):
    """The same corpus, model and seed give the same λ and T."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:2_000]})
    made: list[Datastore] = [create(tmp_path / f"{i}.knn", corpus, model=gpt2, **WINDOWS) for i in range(2)]
    first, second = (store.manifest.calibration for store in made)
    assert (first.lmbda, first.temperature, first.tokens) == (second.lmbda, second.temperature, second.tokens)
    for store in made:
        store.close()


# --- two at once


def hold(folder: str, ready: str) -> None:
    """Begins a store and stays at it."""

    def wait(title: str, n: int) -> None:
        if title == READING:
            Path(ready).touch()
            time.sleep(120)

    model = load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())
    create(Path(folder) / "made.knn", Path(folder) / "corpus", model=model, **WINDOWS, progress=lms.Recorder(wait))


def test_two_processes_at_one_job_are_told_of_each_other(tmp_path, gpt2):
    """The second gets exit code 5 and the first one's process id; when the first is gone, it goes on."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": "Marley was dead"})
    child = lms.in_child(hold, str(tmp_path), str(tmp_path / "ready"))
    try:
        begun = time.monotonic()
        while not (tmp_path / "ready").exists():
            assert child.is_alive()
            assert time.monotonic() - begun < 100
            time.sleep(0.05)
        with pytest.raises(LockedError, match=f"process {child.pid} ") as failure:
            create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS)
        assert failure.value.exit_code == 5
    finally:
        child.kill()
        child.join()
    create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS).close()
