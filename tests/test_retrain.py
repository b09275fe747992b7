"""`compact --retrain` where keys were not kept: the model runs over the stored tokens again, and only over those."""

from pathlib import Path

import lms
import numpy as np
import pytest
from lms import content_of
from resumed import EMBEDDING, SAMPLE, TRAINING, Stopped, counted_tokens, load, stopping, take_small_steps
from stores import decoded_keys
from verified import assert_clean

import knnstore
from knnstore.errors import CheckpointMismatchError
from knnstore.format import Codec
from knnstore.lm.create import create
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.storage import space
from knnstore.storage.catalog import StoreFolder
from knnstore.store import Datastore

OPTIONS = {"context": 32, "stride": 16, "segment_entries": 400}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    take_small_steps(monkeypatch)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Path:
    """A folder with two stores that were trained by themselves, `plain.knn` without keys and `kept.knn` with them, and both merged."""
    folder = tmp_path_factory.mktemp("merged")
    book = lms.book()
    texts = {"a.txt": book[:900], "b.txt": book[2_000:3_900] + "😀👩‍👩‍👧", "c.txt": book[5_000:5_300]}
    lms.write_texts(folder / "plain", texts)
    lms.write_texts(folder / "kept", {"d.txt": book[7_000:8_500], "e.txt": book[9_000:9_400]})
    with pytest.MonkeyPatch.context() as patch:
        take_small_steps(patch)
        patch.setitem(space.MIN_TRAINING, Codec.PQ4, 300)
        create(folder / "plain.knn", folder / "plain", model=model, **OPTIONS).close()
        create(folder / "kept.knn", folder / "kept", model=model, seed=1, keep_keys="f32", **OPTIONS).close()
        create(folder / "oracle.knn", [folder / "plain"], model=model, keep_keys="f32", **OPTIONS).close()
    knnstore.merge([folder / "plain.knn", folder / "kept.knn"], folder / "merged.knn").close()
    return folder


@pytest.fixture
def path(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(space.MIN_TRAINING, Codec.PQ4, 300)
    knnstore.merge([merged / "merged.knn"], tmp_path / "s.knn").close()
    return tmp_path / "s.knn"


def n_entries(store: Datastore, keys: str | None) -> int:
    return sum(segment.record.n_live() for segment in store.segments if segment.content.keys == keys)


def true_keys(merged: Path) -> dict[str, np.ndarray]:
    """Keys of every document as they were computed, by id."""
    found = {}
    for name in ("oracle", "kept"):
        with knnstore.open(merged / f"{name}.knn") as store:
            keys = content_of(store).keys
            at = 0
            for item in store.documents():
                found[item.id] = keys[at : at + item.entries]
                at += item.entries
    return found


def check(path: Path, merged: Path, without: tuple[str, ...] = ()) -> None:
    """One space for all; the documents are those of the merged store; codes are those of the keys the model gives."""
    assert_clean(path)
    assert list(StoreFolder(path).staging.iterdir()) == []
    keys = true_keys(merged)
    with knnstore.open(path) as store, knnstore.open(merged / "merged.knn") as before:
        held = {item.id: item for item in before.documents() if item.id not in without}
        assert {item.id: item for item in store.documents()} == held
        assert len(store.manifest.spaces) == 1
        assert not {item.id for item in store.manifest.spaces} & {item.id for item in before.manifest.spaces}
        assert store.manifest.calibration.status == "stale"
        assert store.manifest.calibration.temperature == before.manifest.calibration.temperature
        texts = dict(zip(held, [text for name, text in named_texts(before) if name not in without], strict=True))
        assert dict(named_texts(store)) == texts
        equal = n = 0
        for segment in store.segments:
            decoded = decoded_keys(segment)
            for record in segment.contexts.documents():
                rows = slice(record.first_row, record.first_row + record.n_entries)
                wanted = segment.space.rotate(keys[record.id][record.first_token :][: record.n_entries])
                expected = segment.space.decode(segment.space.encode(wanted))
                equal += int((np.abs(decoded[rows] - expected) < 1e-4).all(axis=1).sum())
                n += record.n_entries
        assert equal >= 0.97 * n, f"{equal} of {n} codes are those of the keys"


def named_texts(store: Datastore) -> list[tuple[str, str]]:
    content = content_of(store)
    return list(zip([name for name, *_ in content.documents], content.texts, strict=True))


def test_the_model_runs_where_keys_are_missing(path, merged, model):
    """Over each token without a key once; what has kept keys is not computed again, and keeps them."""
    with knnstore.open(path) as store:
        missing, kept = n_entries(store, None), n_entries(store, "f32")
        assert missing > 800
        assert kept > 400
    with counted_tokens() as counts:
        knnstore.compact(path, retrain=True, model=model).close()
    assert missing <= sum(counts) <= missing + 64
    check(path, merged)
    with knnstore.open(path) as store:
        assert (n_entries(store, None), n_entries(store, "f32")) == (missing, kept)
        assert all(segment.content.dtype == "float32" for segment in store.segments)


def test_dead_documents_are_left_out(path, merged, model):
    """Nothing is computed for what was deleted, before or meanwhile; what is deleted meanwhile stays so."""
    knnstore.delete(path, "a.txt")
    with knnstore.open(path) as store:
        missing = n_entries(store, None)

    def delete(title: str, n: int) -> None:
        if (title, n) == (EMBEDDING, 1):
            knnstore.delete(path, "c.txt")

    with counted_tokens() as counts:
        knnstore.compact(path, retrain=True, model=model, progress=lms.Recorder(delete)).close()
    assert sum(counts) <= missing + 64
    with knnstore.open(path) as store:
        assert {item.id for item in store.documents()} == {"b.txt", "d.txt", "e.txt"}
        assert sum(bool(segment.record.dead) for segment in store.segments) == 1
    knnstore.compact(path).close()
    check(path, merged, without=("a.txt", "c.txt"))


@pytest.mark.parametrize(("title", "at"), [(SAMPLE, 2), (TRAINING, 1), (EMBEDDING, 3), ("rewriting", 1)])
def test_a_killed_run_goes_on(path, merged, model, title, at):
    """Stopped at any stage, the store is as it was; the same command does not compute what was saved."""
    with counted_tokens() as before, pytest.raises(Stopped):
        knnstore.compact(path, retrain=True, model=model, progress=stopping(title, at))
    with knnstore.open(path) as store:
        assert store.snapshot == 1
        missing = n_entries(store, None)
    assert_clean(path)
    with counted_tokens() as after:
        knnstore.compact(path, retrain=True, model=model).close()
    assert sum(before) + sum(after) <= missing + 256
    check(path, merged)


def test_a_run_for_an_older_snapshot_is_given_up(path, merged, model):
    with pytest.raises(Stopped):
        knnstore.compact(path, retrain=True, model=model, progress=stopping(EMBEDDING, 3))
    knnstore.delete(path, "b.txt")
    knnstore.compact(path, retrain=True, model=model).close()
    check(path, merged, without=("b.txt",))


def test_lossy_needs_no_model(path, merged):
    """Codes are decoded where keys were not kept; the documents stay."""
    with counted_tokens() as counts, knnstore.compact(path, retrain=True, lossy=True) as store:
        assert not counts
        assert len(store.manifest.spaces) == 1
        with knnstore.open(merged / "merged.knn") as before:
            assert named_texts(store) == named_texts(before)
    assert_clean(path)


def test_another_model_is_refused(path):
    other = load_language_model(lms.gpt2_model(seed=1), tokenizer=lms.gpt2_tokenizer())
    with pytest.raises(CheckpointMismatchError):
        knnstore.compact(path, retrain=True, model=other)
    assert list(StoreFolder(path).staging.iterdir()) == []
    with pytest.warns(UserWarning, match="checkpoint"):
        knnstore.compact(path, retrain=True, model=other, allow_model_mismatch=True).close()
    with knnstore.open(path) as store:
        assert store.manifest.operation.arguments["allow_model_mismatch"] is True


def test_a_model_that_is_not_needed_is_said_to_be_so(merged, tmp_path, model):
    """Kept keys are enough."""
    knnstore.merge([merged / "kept.knn"], tmp_path / "s.knn").close()
    told = lms.Recorder()
    with counted_tokens() as counts:
        knnstore.compact(tmp_path / "s.knn", retrain=True, model=model, progress=told).close()
    assert not counts
    assert told.notes == ["the model is not used: nothing has to be computed again"]


def test_the_same_space_again(merged, tmp_path, model, monkeypatch):
    """What was trained on the same sample of the same text comes out as the same space, and the commit finds it in its place."""
    monkeypatch.setitem(space.MIN_TRAINING, Codec.PQ4, 300)
    knnstore.merge([merged / "plain.knn"], tmp_path / "s.knn").close()
    for _ in range(2):
        knnstore.compact(tmp_path / "s.knn", retrain=True, model=model).close()
    assert_clean(tmp_path / "s.knn")
    with knnstore.open(tmp_path / "s.knn") as store, knnstore.open(merged / "plain.knn") as before:
        assert store.snapshot == 3
        assert named_texts(store) == named_texts(before)
        assert len(store.manifest.spaces) == 1
