"""`append` beside others: what they commit while it is killed and waits, or while it runs, and several appends at once."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import lms
import pytest
from grown import check_same, check_whole, grow, held, make, texts
from resumed import EMBEDDING, READING, Stopped, counted_tokens, load, stopping, take_small_steps

import knnstore
from knnstore.errors import ConflictError, ExistsError, LockedError
from knnstore.lm.append import append
from knnstore.lm.models import LanguageModel
from knnstore.store import Datastore

HAS = {**texts(0, 2), "again.txt": "Bah!"}
COMES = {**texts(2, 2), "again.txt": "Bah!", "long.txt": lms.book()[3_000:4_200]}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    take_small_steps(monkeypatch)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load()


def lay(folder: Path, model: LanguageModel) -> Path:
    """A store, and a corpus that has one document of it and others."""
    make(folder / "s.knn", HAS, model, segment_entries=300).close()
    lms.write_texts(folder / "corpus", COMES)
    return folder


def add(folder: Path, model: LanguageModel, progress: lms.Recorder | None = None, **options) -> Datastore:
    return append(folder / "s.knn", folder / "corpus", model=model, progress=progress or lms.Recorder(), **options)


def check_holds(store: Datastore, corpus: dict[str, str], model: LanguageModel, folder: Path) -> None:
    """The texts, and the keys that a store made of them in one go has."""
    assert {document: item.text for (_, document), item in held(store).items()} == corpus
    check_whole(store)
    with make(folder / "whole.knn", corpus, model, segment_entries=300) as whole:
        check_same(store, whole, keys=False)


def add_others(folder: Path, model: LanguageModel) -> None:
    grow(folder / "s.knn", texts(6, 3), model).close()


def delete_another(folder: Path, model: LanguageModel) -> None:
    knnstore.delete(folder / "s.knn", "0.txt")


def write_it_again(folder: Path, model: LanguageModel) -> None:
    knnstore.delete(folder / "s.knn", "0.txt", purge=True)


def join_it(folder: Path, model: LanguageModel) -> None:
    """Four segments are written as one, which has the document that was left out."""
    for i in range(6, 9):
        grow(folder / "s.knn", texts(i, 1), model).close()


def compact_it(folder: Path, model: LanguageModel) -> None:
    delete_another(folder, model)
    knnstore.compact(folder / "s.knn")
    knnstore.gc(folder / "s.knn", keep=1, keep_jobs=True)


NOTHING_OF_ITS = [
    (add_others, {**HAS, **COMES, **texts(6, 3)}),
    (delete_another, {name: text for name, text in (HAS | COMES).items() if name != "0.txt"}),
    (write_it_again, {name: text for name, text in (HAS | COMES).items() if name != "0.txt"}),
    (join_it, {**HAS, **COMES, **texts(6, 3)}),
    (compact_it, {name: text for name, text in (HAS | COMES).items() if name != "0.txt"}),
]


@pytest.mark.parametrize(("deed", "left"), NOTHING_OF_ITS, ids=[deed.__name__ for deed, _ in NOTHING_OF_ITS])
@pytest.mark.parametrize(("title", "at"), [(READING, 4), (EMBEDDING, 3)])
def test_a_killed_append_goes_on_after_what_others_did(tmp_path, model, title, at, deed: Callable[[Path, LanguageModel], None], left):
    """Where they left its documents alone, it ends as if it had come after them, and computes nothing again."""
    folder = lay(tmp_path, model)
    with pytest.raises(Stopped), counted_tokens() as before:
        add(folder, model, stopping(title, at))
    deed(folder, model)
    with counted_tokens() as after:
        store = add(folder, model)
    lost = before[-1] if before else 0
    n = store.manifest.operation.counts["entries"]
    assert sum(before) + sum(after) - lost <= n <= sum(before) + sum(after)
    with store:
        check_holds(store, left, model, folder)
        assert store.manifest.operation.counts["repeated"] == 1


@pytest.mark.parametrize(("title", "at"), [(READING, 5), (EMBEDDING, 3)])
@pytest.mark.parametrize("purge", [False, True])
def test_a_document_that_was_left_out_and_has_gone_since_is_added(tmp_path, model, title, at, purge):
    """The store had it when the append was begun; when it is typed again, it has not."""
    folder = lay(tmp_path, model)
    with pytest.raises(Stopped):
        add(folder, model, stopping(title, at))
    knnstore.delete(folder / "s.knn", "again.txt", purge=purge)
    with add(folder, model) as store:
        check_holds(store, {**HAS, **COMES}, model, folder)
        assert store.manifest.operation.counts["repeated"] == 0


def test_a_document_that_was_left_out_and_has_changed_since_is_told(tmp_path, model):
    """Refused as any other changed document, and replaced if that is asked for."""
    folder = lay(tmp_path, model)
    with pytest.raises(Stopped):
        add(folder, model, stopping(EMBEDDING, 3))
    grow(folder / "s.knn", {"again.txt": "Humbug!"}, model, replace=True).close()
    with pytest.raises(ExistsError, match=r"document 'again\.txt' with other content"):
        add(folder, model)
    with pytest.raises(Stopped):
        add(folder, model, stopping(EMBEDDING, 3), replace=True)
    with add(folder, model, replace=True) as store:
        check_holds(store, {**HAS, **COMES}, model, folder)


def test_a_restore_between(tmp_path, model):
    """An older snapshot has neither the document that was left out nor the segment it was found in."""
    folder = tmp_path
    make(folder / "s.knn", texts(0, 2), model, segment_entries=300).close()
    grow(folder / "s.knn", {"again.txt": "Bah!"}, model).close()
    lms.write_texts(folder / "corpus", COMES)
    with pytest.raises(Stopped):
        add(folder, model, stopping(EMBEDDING, 3))
    knnstore.restore(folder / "s.knn", 1)
    with add(folder, model) as store:
        check_holds(store, {**HAS, **COMES}, model, folder)


@pytest.mark.parametrize("gone", [False, True])
def test_a_space_that_others_gave_up(tmp_path, model, gone):
    """The codes of a killed append stay of use as long as their space is there; else it begins anew."""
    folder = tmp_path
    make(folder / "s.knn", texts(0, 12, 1_400), model).close()
    lms.write_texts(folder / "corpus", texts(12, 1, 1_400))
    with pytest.raises(Stopped):
        add(folder, model, stopping(EMBEDDING, 3))
    knnstore.compact(folder / "s.knn", retrain=True)
    if gone:
        knnstore.gc(folder / "s.knn", keep=1, keep_jobs=True)
    with add(folder, model) as store:
        assert len(store.info()["spaces"]) == 1
        check_whole(store)
        with make(folder / "whole.knn", texts(0, 13, 1_400), model) as whole:
            check_same(store, whole)


def test_a_document_that_others_added_is_a_conflict(tmp_path, model):
    """Exit code 5, naming the document and the other commit; typed again, it finds the document there."""
    folder = lay(tmp_path, model)
    with pytest.raises(Stopped):
        add(folder, model, stopping(EMBEDDING, 3))
    grow(folder / "s.knn", texts(3, 1), model).close()
    with pytest.raises(ConflictError, match=r"document '3\.txt' of domain 'default' was added by snapshot 2") as failure:
        add(folder, model)
    assert failure.value.exit_code == 5
    with knnstore.open(folder / "s.knn") as store:
        assert store.snapshot == 2
        check_whole(store)
    with add(folder, model) as store:
        check_holds(store, {**HAS, **COMES}, model, folder)
        assert store.manifest.operation.counts["repeated"] == 2


# --- several at once


@pytest.mark.parametrize("title", [READING, EMBEDDING])
def test_others_commit_while_it_runs(tmp_path, model, title):
    """Appends of other documents, and a deletion, come first; this one takes its place after them, with nothing computed twice."""
    folder = lay(tmp_path, model)
    done = []

    def meanwhile(stage: str, n: int) -> None:
        if stage == title and n == 2 and not done:
            done.append(True)
            join_it(folder, model)
            delete_another(folder, model)

    with counted_tokens() as computed, add(folder, model, lms.Recorder(meanwhile)) as store:
        left = {name: text for name, text in (HAS | COMES | texts(6, 3)).items() if name != "0.txt"}
        assert store.snapshot == 6
    n_others = sum(len(held(store)["default", f"{i}.txt"].values) for i in range(6, 9))
    assert sum(computed) == store.manifest.operation.counts["entries"] + n_others
    with knnstore.open(folder / "s.knn") as store:
        check_holds(store, left, model, folder)


def test_others_join_the_segments_that_it_was_to_join(tmp_path, model):
    """Three small segments wait for a fourth, and two appends come with one: the second joins nothing, and computes nothing again."""
    make(tmp_path / "s.knn", texts(0, 1), model).close()
    for number in (1, 2):
        grow(tmp_path / "s.knn", texts(number, 1), model).close()
    done = []

    def meanwhile(stage: str, n: int) -> None:
        if stage == EMBEDDING and not done:
            done.append(True)
            grow(tmp_path / "s.knn", texts(3, 1), model).close()

    with counted_tokens() as computed, grow(tmp_path / "s.knn", texts(4, 1), model, progress=lms.Recorder(meanwhile)) as store:
        assert [record.content.documents for record in store.manifest.segments] == [4, 1]
        assert store.snapshot == 5
    with knnstore.open(tmp_path / "s.knn") as store:
        assert sum(computed) == sum(len(held(store)["default", f"{i}.txt"].values) for i in (3, 4))
        check_holds(store, texts(0, 5), model, tmp_path)


def append_some(folder: str, number: int) -> None:
    take_small_steps()
    for path in sorted(Path(folder).glob(f"part{number}.*")):
        append(Path(folder) / "s.knn", path, model=load()).close()


def test_two_processes_side_by_side(tmp_path, model):
    """Each appends four corpora, one after the other, while the other does: all are there, once."""
    make(tmp_path / "s.knn", texts(0, 1), model).close()
    for number in range(2):
        for step in range(4):
            lms.write_texts(tmp_path / f"part{number}.{step}", texts(1 + 4 * number + step, 1))
    children = [lms.in_child(append_some, str(tmp_path), number) for number in range(2)]
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    with knnstore.open(tmp_path / "s.knn") as store, make(tmp_path / "whole.knn", texts(0, 9), model) as whole:
        assert store.snapshot == 9
        check_whole(store)
        check_same(store, whole)


def hold(folder: str, ready: str) -> None:
    def wait(title: str, n: int) -> None:
        if title == READING:
            Path(ready).touch()
            time.sleep(120)

    add(Path(folder), load(), lms.Recorder(wait))


def test_two_processes_at_the_same_append(tmp_path, model):
    """The second gets exit code 5 and the first one's process id; when the first is killed, its lock is free, and the second goes on."""
    folder = lay(tmp_path, model)
    child = lms.in_child(hold, str(folder), str(tmp_path / "ready"))
    try:
        begun = time.monotonic()
        while not (tmp_path / "ready").exists():
            assert child.is_alive()
            assert time.monotonic() - begun < 100
            time.sleep(0.05)
        with pytest.raises(LockedError, match=f"process {child.pid} ") as failure:
            add(folder, model)
        assert failure.value.exit_code == 5
        with grow(folder / "s.knn", texts(6, 1), model) as store:  # another corpus need not wait
            assert store.snapshot == 2
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    with add(folder, model) as store:
        check_holds(store, {**HAS, **COMES, **texts(6, 1)}, model, folder)
