"""`append`: what becomes of a corpus that is added to a datastore. Kills, and others at work, are in test_append_resume.py."""

import io
import json
import sys

import lms
import numpy as np
import pytest
from grown import WINDOWS, check_same, check_whole, files, grow, held, load, make, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from resumed import counted_tokens

import knnstore
from knnstore.errors import CheckpointMismatchError, ExistsError, InvalidArgumentError, ModelError, NotFoundError
from knnstore.lm import calibrate
from knnstore.lm.append import append
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import LanguageModel, load_language_model

LONG = lms.book()[5_000:7_500]  # more than a segment of 300 entries holds


@pytest.fixture(autouse=True)
def little_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens to fit on, so that it does not take long."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 256)


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return load()


# --- a store that grows


@pytest.mark.parametrize(
    ("first", "steps", "options"),
    [
        ({"a.txt": "Marley was dead"}, [{"b.txt": "to begin with"}], {}),
        (texts(0, 3), [texts(3, 1), texts(4, 2), {"long.txt": LONG}, texts(6, 1), texts(7, 1)], {}),
        (texts(0, 3), [{"long.txt": LONG}, texts(4, 1)], {"segment_entries": 300}),
        (texts(0, 12, 1_400), [texts(12, 1), texts(13, 2), texts(15, 1)], {"codec": "pq4"}),
    ],
    ids=["two documents", "joined on the way", "documents in parts", "4-bit codes"],
)
def test_a_store_that_grew_is_one_that_was_made_in_one_go(tmp_path, gpt2, first, steps, options):
    """Documents, values, texts, offsets, keys and exact neighbours do not tell in how many steps a store was made."""
    make(tmp_path / "grown.knn", first, gpt2, **options).close()
    for number, step in enumerate(steps):
        with grow(tmp_path / "grown.knn", step, gpt2) as store:
            assert store.snapshot == number + 2
            assert store.manifest.operation.counts["documents"] == len(step)
            assert len(store.segments) <= 4 or "segment_entries" in options
            check_whole(store)
    every = dict(first)
    for step in steps:
        every |= step
    with knnstore.open(tmp_path / "grown.knn") as store, make(tmp_path / "whole.knn", every, gpt2, **options) as whole:
        check_same(store, whole, keys="segment_entries" not in options)
        assert store.info()["spaces"][0]["codec"] == whole.info()["spaces"][0]["codec"]
        if "segment_entries" in options:
            return
        kept = [KnnLM.load(one, gpt2, exact=True, lmbda=0.5, temperature=20.0).predict("Scrooge was").p for one in (store, whole)]
        np.testing.assert_allclose(kept[0], kept[1], atol=1e-4)


def test_a_store_of_raw_keys_becomes_one_of_codes(tmp_path, gpt2):
    """Where there are enough keys to train on, those that were kept as they are become codes of the same space."""
    make(tmp_path / "grown.knn", texts(0, 5, 1_000), gpt2).close()
    with grow(tmp_path / "grown.knn", texts(5, 1, 1_000), gpt2) as store:
        assert store.info()["spaces"][0]["codec"] == "raw"
        assert store.manifest.calibration.status == "fresh"
    with grow(tmp_path / "grown.knn", texts(6, 6, 1_000), gpt2) as store:
        assert [space["codec"] for space in store.info()["spaces"]] == ["pq4"]
        assert store.manifest.calibration.status == "stale"  # codes are further off than keys
        check_whole(store)
        with make(tmp_path / "whole.knn", texts(0, 12, 1_000), gpt2) as whole:
            check_same(store, whole)


def test_the_same_content_again_changes_nothing(tmp_path, gpt2):
    """It is skipped and counted, the model is not run, no snapshot is made and no file is written."""
    make(tmp_path / "s.knn", texts(0, 3), gpt2).close()
    before = files(tmp_path / "s.knn")
    progress = lms.Recorder()
    with counted_tokens() as computed, grow(tmp_path / "s.knn", texts(0, 3), gpt2, progress=progress) as store:
        assert store.snapshot == 1
    assert computed == []
    assert files(tmp_path / "s.knn") == before
    with counted_tokens() as computed, grow(tmp_path / "s.knn", texts(1, 4), gpt2) as store:
        assert store.manifest.operation.counts == {
            "documents": 2,
            "entries": sum(computed),
            "repeated": 2,
            "replaced": 0,
            "removed": 0,
            "skipped": 0,
        }
        assert sum(computed) == sum(len(held(store)["default", f"{i}.txt"].values) for i in (3, 4))


def test_changed_content_is_refused_by_name(tmp_path, gpt2):
    """Exit code 4; the store is as it was, and nothing of the attempt stays."""
    make(tmp_path / "s.knn", texts(0, 2), gpt2).close()
    before = files(tmp_path / "s.knn")
    for changed in ({"1.txt": "other text"}, {"1.txt": ""}):
        with pytest.raises(ExistsError, match=r"1\.txt: the datastore has a document '1\.txt' with other content.*--replace") as failure:
            grow(tmp_path / "s.knn", {"new.txt": "new", **changed}, gpt2)
        assert failure.value.exit_code == 4
    assert files(tmp_path / "s.knn") == before
    with knnstore.open(tmp_path / "s.knn") as store:
        check_whole(store)


# --- documents that change, and go


def test_replace_takes_the_old_out_and_the_new_in_with_one_commit(tmp_path, gpt2):
    """The old content answers no more, the new does; documents that are as they were stay untouched."""
    old = {**texts(0, 3), "long.txt": LONG}
    new = {"1.txt": "Humbug! " * 30, "long.txt": LONG[:1_000], "9.txt": "another"}
    make(tmp_path / "s.knn", old, gpt2, segment_entries=300).close()
    with grow(tmp_path / "s.knn", {**old, **new}, gpt2, replace=True) as store:
        assert store.snapshot == 2
        counts = store.manifest.operation.counts
        assert (counts["documents"], counts["replaced"], counts["repeated"], counts["removed"]) == (3, 2, 2, 0)
        check_whole(store)
        with make(tmp_path / "whole.knn", {**old, **new}, gpt2, segment_entries=300) as whole:
            check_same(store, whole, keys=False)
    with knnstore.open(tmp_path / "s.knn", snapshot=1) as before:
        assert {document: item.text for (_, document), item in held(before).items()} == old


def test_a_document_whose_text_is_gone_goes(tmp_path, gpt2):
    """With replace, an empty file takes its document out, also where nothing else changes; alone in its store too."""
    make(tmp_path / "s.knn", texts(0, 2), gpt2).close()
    with grow(tmp_path / "s.knn", {"0.txt": ""}, gpt2, replace=True) as store:
        assert [document for _, document in held(store)] == ["1.txt"]
        assert store.manifest.operation.counts["replaced"] == 1
        check_whole(store)
    with grow(tmp_path / "s.knn", {"1.txt": ""}, gpt2, replace=True) as store:
        assert len(store) == 0
        assert store.snapshot == 3
    with grow(tmp_path / "s.knn", {"1.txt": ""}, gpt2, replace=True) as store:
        assert store.snapshot == 3


def test_prune_follows_a_folder(tmp_path, gpt2):
    """What the folder does not have any more goes in the same commit; other domains are not looked at."""
    make(tmp_path / "s.knn", texts(0, 4), gpt2).close()
    grow(tmp_path / "s.knn", texts(0, 2), gpt2, domain="copies").close()
    with grow(tmp_path / "s.knn", {**texts(1, 2), "2.txt": "changed", "5.txt": "new"}, gpt2, replace=True, prune=True) as store:
        assert store.snapshot == 3
        counts = store.manifest.operation.counts
        assert {name: counts[name] for name in ("documents", "replaced", "removed", "repeated")} == {
            "documents": 2,
            "replaced": 1,
            "removed": 2,
            "repeated": 1,
        }
        assert store.manifest.documents == {"copies": 2, "default": 3}
        found = {key: item.text for key, item in held(store).items()}
        check_whole(store)
    mine = {"1.txt": texts(1, 1)["1.txt"], "2.txt": "changed", "5.txt": "new"}
    assert found == {**{("default", name): text for name, text in mine.items()}, **{("copies", n): t for n, t in texts(0, 2).items()}}
    with grow(tmp_path / "s.knn", {"1.txt": mine["1.txt"]}, gpt2, replace=True, prune=True) as store:  # nothing is added
        assert store.manifest.operation.counts["removed"] == 2
        assert store.manifest.documents == {"copies": 2, "default": 1}
        check_whole(store)


def test_prune_without_replace_is_refused(tmp_path, gpt2):
    """Exit code 2, before anything is read."""
    with pytest.raises(InvalidArgumentError, match="prune goes with replace"):
        append(tmp_path / "none.knn", tmp_path, model=gpt2, prune=True)


some_folder = st.dictionaries(st.sampled_from(["a.txt", "b.txt", "sub/c.txt", "d.md"]), st.integers(0, 5), min_size=1)


@settings(max_examples=12)
@given(states=st.lists(some_folder, min_size=2, max_size=5))
def test_a_store_follows_any_folder(tmp_path_factory, gpt2, states):
    """After each `append --replace --prune` a store holds the folder's texts and no others; a snapshot is made where they changed."""
    folder = tmp_path_factory.mktemp("followed")
    corpora = [{name: lms.book()[size * 400 : size * 400 + 40 * size] for name, size in state.items()} for state in states]
    path = folder / "s.knn"
    make(path, {"first.txt": "Marley was dead"}, gpt2, **WINDOWS).close()
    there = {"first.txt": "Marley was dead"}
    for number, corpus in enumerate(corpora):
        source = lms.write_texts(folder / str(number), corpus)
        with knnstore.open(path) as before, append(path, source, model=gpt2, replace=True, prune=True) as store:
            there, changed = {name: text for name, text in corpus.items() if text}, there
            assert {document: item.text for (_, document), item in held(store).items()} == there
            assert store.snapshot == before.snapshot + (there != changed)
            check_whole(store)


# --- domains, metadata, where a corpus comes from


def test_domains_are_apart(tmp_path, gpt2):
    """The same id in another domain is another document; the calibration, fitted on one domain, is stale then, and loading says so."""
    corpus = texts(0, 4)
    with make(tmp_path / "s.knn", corpus, gpt2, domain="law") as store:
        assert store.manifest.calibration.status == "fresh"
    with grow(tmp_path / "s.knn", texts(4, 1), gpt2, domain="law") as store:
        assert store.manifest.calibration.status == "fresh"
        KnnLM.load(store, gpt2)  # a warning would be an error
    with grow(tmp_path / "s.knn", {"0.txt": "other text"}, gpt2, domain="medicine") as store:
        assert store.domains == ["law", "medicine"]
        assert [held(store)[domain, "0.txt"].text for domain in store.domains] == [corpus["0.txt"], "other text"]
        assert store.manifest.calibration.status == "stale"
        with pytest.warns(UserWarning, match="changed after λ and temperature were fitted"):
            lm = KnnLM.load(store, gpt2, domains="medicine")
        assert lm.predict("Scrooge").neighbors.context(0, 0).document == "0.txt"
        check_whole(store)
    with pytest.raises(InvalidArgumentError, match="domain: an empty name"):
        grow(tmp_path / "s.knn", corpus, gpt2, domain="")


def test_lines_are_documents_with_metadata(tmp_path, gpt2):
    """Ids and metadata are those of the lines; a line with the same text again is skipped, one with another is refused by its line."""
    make(tmp_path / "s.knn", texts(0, 2), gpt2).close()
    lines = [{"id": "letter", "text": "My dear Bob", "year": 1843}, {"text": "no id"}, {"id": 7, "text": ""}]

    def written() -> dict[str, str]:
        return {"lines.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}

    with grow(tmp_path / "s.knn", written(), gpt2) as store:
        found = {document: (item.text, item.metadata) for (_, document), item in held(store).items()}
        assert found["letter"] == ("My dear Bob", {"year": 1843})
        assert found["lines.jsonl#2"] == ("no id", {})
        assert store.manifest.operation.counts["skipped"] == 1
        assert [hit.id for hit in store.documents() if hit.metadata.get("year") == 1843] == ["letter"]
        assert store.search(np.zeros(store.dim), k=99, where={"year": 1843}).n_found[0] == len(held(store)["default", "letter"].values)
    with grow(tmp_path / "s.knn", written(), gpt2) as store:
        assert store.snapshot == 2
    lines[0]["text"] = "My dear Fred"
    with pytest.raises(ExistsError, match=r"lines\.jsonl#1: the datastore has a document 'letter'"):
        grow(tmp_path / "s.knn", written(), gpt2)


def test_standard_input_has_the_name_given(tmp_path, gpt2, monkeypatch):
    """As for `create`: what comes through a pipe is a document of this name, and changed content under it is told."""
    make(tmp_path / "s.knn", texts(0, 1), gpt2).close()
    for given_text, outcome in (("Humbug!", 2), ("Humbug!", 2), ("Bah!", ExistsError)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given_text.encode())))
        if isinstance(outcome, int):
            with append(tmp_path / "s.knn", "-", name="in.txt", model=gpt2) as store:
                assert store.snapshot == outcome
                assert held(store)["default", "in.txt"].text == "Humbug!"
        else:
            with pytest.raises(outcome, match=r"'in\.txt'"):
                append(tmp_path / "s.knn", "-", name="in.txt", model=gpt2)
    with pytest.raises(InvalidArgumentError, match="no name"):
        append(tmp_path / "s.knn", "-", model=gpt2)


def test_a_corpus_of_empty_files_adds_nothing(tmp_path, gpt2):
    """They are noted; there is no new snapshot."""
    make(tmp_path / "s.knn", texts(0, 1), gpt2).close()
    progress = lms.Recorder()
    with grow(tmp_path / "s.knn", {"a.txt": "", "b.txt": "\ufeff"}, gpt2, progress=progress) as store:
        assert store.snapshot == 1
    assert sum("(empty)" in note for note in progress.notes) == 2


# --- which stores, which models


@pytest.mark.parametrize(("dtype", "other"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_rules_of_the_store_are_kept(tmp_path, dtype, other):
    """Tokens, windows, key layer, index options and dtype are those it was made with, whatever the defaults are."""
    folder = tmp_path / "model"
    lms.gpt2_model().save_pretrained(folder)
    lms.gpt2_tokenizer().save_pretrained(folder)
    options = {"eos": False, "key_layer": "final", "codec": "pq8", "seed": 3, "segment_entries": 700, "dtype": dtype}
    with make(tmp_path / "s.knn", texts(0, 2), str(folder), **options) as before:
        made = before.manifest
    with append(tmp_path / "s.knn", lms.write_texts(tmp_path / "more", texts(2, 3))) as store:  # the model that the manifest names
        now = store.manifest
        assert (now.tokens, now.windows, now.key, now.index) == (made.tokens, made.windows, made.key, made.index)
        assert {record.content.dtype for record in now.segments} == {dtype}
        assert all(record.content.entries <= 700 for record in now.segments)
        assert held(store)["default", "3.txt"].values == tuple(lms.token_ids(lms.gpt2_tokenizer(), texts(3, 1)["3.txt"]))
        check_whole(store)
    with append(tmp_path / "s.knn", lms.write_texts(tmp_path / "wide", texts(5, 1)), dtype=other) as store:
        assert {record.content.dtype for record in store.manifest.segments} == {dtype, other}


def test_another_model_is_refused_unless_allowed(tmp_path, gpt2):
    """Exit code 6 before anything is read; where it is allowed, the snapshot says so, and keys of another width are refused still."""
    make(tmp_path / "s.knn", texts(0, 2), gpt2).close()
    before = files(tmp_path / "s.knn")
    other = load(seed=9)
    with pytest.raises(CheckpointMismatchError, match="built with checkpoint") as failure:
        grow(tmp_path / "s.knn", texts(2, 1), other)
    assert failure.value.exit_code == 6
    wider = load_language_model(lms.gpt2_model(width=48), tokenizer=lms.gpt2_tokenizer())
    with pytest.warns(UserWarning, match="built with"), pytest.raises(CheckpointMismatchError, match=r"32 dimensions.* has 48"):
        grow(tmp_path / "s.knn", texts(2, 1), wider, allow_model_mismatch=True)
    with pytest.raises(ModelError, match="without a tokenizer"):
        grow(tmp_path / "s.knn", texts(2, 1), lms.gpt2_model())
    assert files(tmp_path / "s.knn") == before
    with pytest.warns(UserWarning, match="built with checkpoint"):
        allowed = grow(tmp_path / "s.knn", texts(2, 1), other, allow_model_mismatch=True)
    with allowed as store:
        assert store.manifest.operation.arguments["allow_model_mismatch"] is True
        check_whole(store)
    with grow(tmp_path / "s.knn", texts(3, 1), gpt2, allow_model_mismatch=True) as store:  # the same model after all
        assert store.snapshot == 3


def test_a_store_of_entries_takes_no_text(tmp_path, gpt2):
    """Exit code 2, naming the call that adds to it."""
    document = knnstore.EntryDocument(id="a", n_entries=9)
    batch = (np.eye(9, 32), np.arange(9), [document])
    knnstore.create_from_entries(tmp_path / "s.knn", [batch], checkpoint=gpt2.checkpoint, dim=32, vocab_size=400)
    with pytest.raises(InvalidArgumentError, match=r"came from elsewhere.*append_entries"):
        grow(tmp_path / "s.knn", texts(0, 1), gpt2)


def test_where_there_is_no_store_nothing_is_made(tmp_path, gpt2):
    """Exit code 3."""
    with pytest.raises(NotFoundError, match="no such datastore") as failure:
        grow(tmp_path / "s.knn", texts(0, 1), gpt2)
    assert failure.value.exit_code == 3
    assert not (tmp_path / "s.knn").exists()
    make(tmp_path / "s.knn", texts(0, 1), gpt2).close()
    with pytest.raises(NotFoundError, match="gone"):
        append(tmp_path / "s.knn", tmp_path / "gone", model=gpt2)


@pytest.mark.parametrize("n", [3, 12])
def test_a_store_whose_documents_were_all_deleted_grows_again(tmp_path, gpt2, n):
    """Also with the ids it had before."""
    make(tmp_path / "s.knn", texts(0, n, 1_400), gpt2).close()
    knnstore.delete(tmp_path / "s.knn", domain="default")
    with knnstore.open(tmp_path / "s.knn") as store:
        assert len(store) == 0
    with grow(tmp_path / "s.knn", texts(1, 4), gpt2) as store, make(tmp_path / "whole.knn", texts(1, 4), gpt2) as whole:
        check_same(store, whole)
        check_whole(store)


def test_a_handle_stays_at_its_snapshot(tmp_path, gpt2):
    """`Datastore.append` returns the store at the next snapshot; the one it was called on has what it had."""
    corpus = lms.write_texts(tmp_path / "more", texts(2, 1))
    with make(tmp_path / "s.knn", texts(0, 2), gpt2) as store:
        before = held(store)
        with store.append(corpus, model=gpt2, domain="law") as after:
            assert (store.snapshot, after.snapshot) == (1, 2)
            assert held(store).keys() == before.keys()
            assert held(after).keys() == {*before, ("law", "2.txt")}
            with store.append(corpus, model=gpt2, domain="law") as again:  # to the store as it is now, not as the handle saw it
                assert again.snapshot == 2
