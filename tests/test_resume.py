"""A `create` that is killed and typed again: nothing is lost, doubled or computed twice that was saved."""

from collections.abc import Iterator
from pathlib import Path

import lms
import numpy as np
import pytest
from resumed import (
    EMBEDDING,
    FITTING,
    READING,
    SAMPLE,
    TRAINING,
    Counting,
    Stopped,
    counted_tokens,
    load,
    stopping,
    take_small_steps,
)

import knnstore
from knnstore.errors import ExistsError, NotFoundError
from knnstore.lm.create import create
from knnstore.lm.models import LanguageModel
from knnstore.storage.files import Disk, disk
from knnstore.store import Datastore


def make(folder: Path, name: str, model: LanguageModel, progress: lms.Recorder | None = None, **options) -> Datastore:
    options = {"context": 32, "stride": 16, "keep_keys": "f32", "segment_entries": 300} | options
    return create(folder / name, folder / "corpus", model=model, progress=progress or lms.Recorder(), **options)


def corpus(folder: Path) -> Path:
    """Documents smaller and larger than a segment, one of them twice, one empty, and lines: 1,020 entries in 4 segments."""
    book = lms.book()
    texts = {
        "a.txt": book[:200],
        "b.txt": book[1_000:2_300] + "😀👩‍👩‍👧" * 5,
        "c.txt": "",
        "d.jsonl": '{"text": "one", "id": "same"}\n{"text": "one", "id": "same"}\n{"text": "x", "n": 1}\n',
        "e.txt": book[4_000:4_300],
    }
    lms.write_texts(folder / "corpus", texts)
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    take_small_steps(monkeypatch)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Iterator[Datastore]:
    """The store of the corpus, made in one go."""
    folder = corpus(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        take_small_steps(patch)
        with make(folder, "made.knn", model) as store:
            yield store


def check_same(store: Datastore, undisturbed: Datastore) -> None:
    """The same documents, values, texts, offsets, rows and keys, and no file that the manifest does not name."""
    found, wanted = lms.content_of(store), lms.content_of(undisturbed)
    shown = [[(name, n, metadata) for name, _, n, metadata in content.documents] for content in (found, wanted)]
    assert shown[0] == shown[1]
    assert found.texts == wanted.texts
    np.testing.assert_array_equal(found.values, wanted.values)
    np.testing.assert_array_equal(found.spans, wanted.spans)
    np.testing.assert_allclose(found.keys, wanted.keys, atol=1e-4)
    counts = [made.manifest.operation.counts for made in (store, undisturbed)]
    assert counts[0] == counts[1]
    sizes = [made.info()["bytes"]["total"] for made in (store, undisturbed)]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sizes[1]
    assert store.manifest.calibration.temperature == pytest.approx(undisturbed.manifest.calibration.temperature, rel=1e-3)
    assert store.manifest.calibration.lmbda == pytest.approx(undisturbed.manifest.calibration.lmbda, abs=0.011)
    for segment in store.segments:
        names = {file.name for file in segment.content.files} | {"segment.json"}
        assert {path.name for path in segment.folder.iterdir()} == names
    assert {path.name for path in (store.path / "segments").iterdir()} == {segment.content.uuid for segment in store.segments}
    assert list((store.path / "staging").iterdir()) == []
    problems = knnstore.verify(store.path, level="full").problems
    assert not problems, problems


# --- SIGKILL, in a process of its own


def die(folder: str, title: str, at: int) -> None:
    """Makes the store until a stage has advanced some times, then kills its own process."""
    take_small_steps()
    make(Path(folder), "made.knn", load(), lms.killing(title, at))


def killed(folder: Path, title: str, at: int) -> None:
    child = lms.in_child(die, str(folder), title, at)
    child.join(120)
    assert child.exitcode == -9, f"at {title} {at}: exit code {child.exitcode}"


@pytest.mark.parametrize(
    ("title", "at"),
    [(READING, 1), (READING, 5), (SAMPLE, 1), (SAMPLE, 3), (TRAINING, 1), (EMBEDDING, 1), (EMBEDDING, 6), (FITTING, 1)],
)
def test_a_killed_create_is_continued_by_typing_it_again(tmp_path, model, undisturbed, title, at):
    """SIGKILL at any stage: until then there is no store, and then it is the one that an undisturbed run makes."""
    folder = corpus(tmp_path)
    killed(folder, title, at)
    with pytest.raises(NotFoundError):
        knnstore.open(folder / "made.knn")
    with make(folder, "made.knn", model) as store:
        check_same(store, undisturbed)
    with pytest.raises(ExistsError):
        make(folder, "made.knn", model)


def test_killed_again_and_again(tmp_path, model, undisturbed):
    """Four kills on the way, each further on, in one document of several segments; then every key is computed at most once more."""
    folder = corpus(tmp_path)
    for title, at in ((READING, 4), (SAMPLE, 2), (EMBEDDING, 4), (EMBEDDING, 5)):
        killed(folder, title, at)
    with make(folder, "made.knn", model) as store:
        check_same(store, undisturbed)


# --- the same, faster: a stop in this process


@pytest.mark.parametrize(("title", "at"), [(SAMPLE, 1), (SAMPLE, 3), (TRAINING, 1), (EMBEDDING, 2), (EMBEDDING, 7), (FITTING, 2)])
def test_keys_that_were_saved_are_not_computed_again(tmp_path, model, undisturbed, title, at):
    """What comes after a kill is what was not saved: of the batch that was cut, and of those that never began."""
    folder = corpus(tmp_path)
    with pytest.raises(Stopped), counted_tokens() as before:
        make(folder, "made.knn", model, stopping(title, at))
    with counted_tokens() as after, make(folder, "made.knn", model) as store:
        check_same(store, undisturbed)
    # The batch that was being counted when it stopped was not saved yet.
    lost = before[-1] if title in (SAMPLE, EMBEDDING) and before else 0
    assert sum(before) + sum(after) - lost <= len(store) <= sum(before) + sum(after)


def test_a_corpus_is_tokenized_once(tmp_path, model, undisturbed, monkeypatch):
    """Segments that were read stay; the rest of the corpus is read from where it was, in the middle of a document too."""
    folder = corpus(tmp_path)
    reading = stopping(READING, 6)
    with pytest.raises(Stopped):
        make(folder, "made.knn", model, reading)
    finishing = lms.Recorder()
    with make(folder, "made.knn", model, finishing) as store:
        check_same(store, undisturbed)
    assert finishing.done[READING] > 0
    assert finishing.done[READING] % 300 == 0
    assert finishing.done[READING] + finishing.advanced[READING] == len(store)


def test_progress_counts_what_an_earlier_run_did(tmp_path, model):
    """The bar of a stage begins where the work does, and ends full."""
    folder = corpus(tmp_path)
    with pytest.raises(Stopped):
        make(folder, "made.knn", model, stopping(EMBEDDING, 6))
    finishing = lms.Recorder()
    with make(folder, "made.knn", model, finishing) as store:
        assert finishing.done[EMBEDDING] + finishing.advanced[EMBEDDING] == finishing.totals[EMBEDDING] == len(store)
    assert READING not in finishing.advanced
    assert TRAINING not in finishing.advanced


def test_4_bit_codes_are_continued_too(tmp_path, model):
    """A store large enough to train: the same space, lists and codes after a stop in the midst of embedding."""
    texts = {f"{i}.txt": lms.book()[i * 3_000 : (i + 1) * 3_000] for i in range(3)}
    lms.write_texts(tmp_path / "corpus", texts)
    options = {"segment_entries": 3_000}
    with pytest.raises(Stopped):
        make(tmp_path, "made.knn", model, stopping(EMBEDDING, 12), **options)
    with make(tmp_path, "made.knn", model, **options) as store, make(tmp_path, "whole.knn", model, **options) as whole:
        check_same(store, whole)
        assert store.info()["spaces"][0]["codec"] == "pq4"
        assert [space.id for space in store.manifest.spaces] == [space.id for space in whole.manifest.spaces]
        for one, other in zip(store.segments, whole.segments, strict=True):
            assert one.content.distortion == pytest.approx(other.content.distortion, rel=0.05)
            codes = [segment.lists.entries(0)[0] for segment in (one, other)]
            assert (codes[0] == codes[1]).mean() > 0.999  # a key at the border of two centroids may round to either


# --- a stop at any write


def stop_before(folder: Path, model: LanguageModel, deed: int) -> bool:
    """Makes the store with nothing changed on the disk from the nth deed on. False if it comes to its end before that."""
    with pytest.MonkeyPatch.context() as patch:
        Counting(patch, deed)
        try:
            make(folder, "made.knn", model).close()
        except Stopped:
            return True
    return False


def deeds_of(folder: Path, model: LanguageModel) -> list[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        counting = Counting(patch)
        make(folder, "counted.knn", model).close()
    return counting.deeds


def check_stopped_before(folder: Path, model: LanguageModel, undisturbed: Datastore, deed: int) -> None:
    assert stop_before(folder, model, deed)
    if (folder / "made.knn" / "CURRENT").exists():  # the commit was made; only tidying up was left
        with knnstore.open(folder / "made.knn") as store:
            assert lms.content_of(store).texts == lms.content_of(undisturbed).texts
        with pytest.raises(ExistsError):
            make(folder, "made.knn", model)
    else:
        with make(folder, "made.knn", model) as store:
            check_same(store, undisturbed)


def test_a_stop_before_any_change_of_name_is_survived(tmp_path, model, undisturbed):
    """The places where names begin or cease to count: of drafts, index, segments, everything in the commit, and what is removed."""
    deeds = deeds_of(corpus(tmp_path / "counted"), model)
    names = [i for i, (deed, _) in enumerate(deeds) if deed in ("rename", "replace", "link")]
    removals = [i for i, (deed, name) in enumerate(deeds) if deed == "remove" and name in ("codes.tmp", "draft.json", "1.json.tmp")]
    assert [deeds[i][1] for i in names[-3:-1]] == ["1.json", "CURRENT"]  # then the job's folder goes
    for deed in [*names[1:-9:6], *names[-9:], *removals[-3:]]:
        check_stopped_before(corpus(tmp_path / str(deed)), model, undisturbed, deed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stop_before_any_write_is_survived(tmp_path, model, undisturbed):
    """Every deed in turn, and one in ten of those that put rows."""
    deeds = deeds_of(corpus(tmp_path / "counted"), model)
    rows = [i for i, deed in enumerate(deeds) if deed[0] == "pwrite" and deed[1] in ("codes.tmp", "assigned.tmp", "keys.bin")]
    for deed in sorted({*range(len(deeds))} - {*rows} | {*rows[::10]}):
        check_stopped_before(corpus(tmp_path / str(deed)), model, undisturbed, deed)


def test_nothing_goes_around_the_door(tmp_path, model):
    """The deeds counted are all there are: `disk` is of the class whose methods were replaced."""
    assert type(disk) is Disk
    assert len(deeds_of(corpus(tmp_path), model)) > 100
