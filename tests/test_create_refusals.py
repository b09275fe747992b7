"""What `create` refuses, and what of a corpus, an option or a model it takes."""

import os
import time
from pathlib import Path

import lms
import numpy as np
import pytest

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
from knnstore.lm import calibrate
from knnstore.lm.create import create
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import LanguageModel, load_language_model

WINDOWS = {"context": 32, "stride": 16}
READING = "reading and tokenizing"  # the stage of this name


@pytest.fixture(autouse=True)
def little_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens to fit on, so that it does not take long."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 512)


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


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
