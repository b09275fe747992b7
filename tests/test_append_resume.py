"""An `append` that is killed and typed again: no document twice, none lost, nothing computed twice (others: test_append_beside.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lms
import pytest
from grown import check_same, check_whole, files, grow, held, make, texts
from resumed import EMBEDDING, READING, SAMPLE, TRAINING, Counting, Stopped, counted_tokens, load, stopping, take_small_steps
from stores import PowerCut

import knnstore
from knnstore import growth, joining
from knnstore.errors import StorageError
from knnstore.lm.append import append
from knnstore.lm.models import LanguageModel
from knnstore.storage import coarse, jobs
from knnstore.store import Datastore

JOINING = "joining small segments"
FIRST = {**texts(0, 1), "again.txt": "Bah!", "1old.txt": "Marley was dead"}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    take_small_steps(monkeypatch)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load()


def lay(folder: Path, model: LanguageModel) -> Path:
    """A store of three small segments, and a corpus: documents smaller and larger than a segment, one that is there, one changed."""
    for number, text in enumerate(FIRST.items()):
        if number:
            append(folder / "s.knn", lms.write_texts(folder / f"first{number}", dict([text])), model=model).close()
        else:
            make(folder / "s.knn", dict([text]), model, segment_entries=300).close()
    lms.write_texts(folder / "corpus", {**texts(2, 2), "again.txt": "Bah!", "long.txt": lms.book()[3_000:4_200], "1old.txt": "changed"})
    return folder


def add(folder: Path, model: LanguageModel, progress: lms.Recorder | None = None) -> Datastore:
    return append(folder / "s.knn", folder / "corpus", model=model, replace=True, progress=progress or lms.Recorder())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Iterator[Datastore]:
    """The store after an append in one go."""
    with pytest.MonkeyPatch.context() as patch:
        take_small_steps(patch)
        progress = lms.Recorder()
        with add(lay(tmp_path_factory.mktemp("undisturbed"), model), model, progress) as store:
            assert set(progress.advanced) == {"loading the model", READING, SAMPLE, TRAINING, EMBEDDING, JOINING}
            assert store.manifest.operation.counts["replaced"] == store.manifest.operation.counts["repeated"] == 1
            yield store


def check_done(store: Datastore, undisturbed: Datastore) -> None:
    """As if nothing had happened, in as many snapshots."""
    check_whole(store, killed=True)
    check_same(store, undisturbed)
    assert store.snapshot == undisturbed.snapshot
    assert store.manifest.operation.counts == undisturbed.manifest.operation.counts


def check_not_begun(folder: Path, before: dict[str, bytes]) -> None:
    """The store is as it was, but for what waits in staging."""
    now = {name: content for name, content in files(folder / "s.knn").items() if not name.startswith("staging/")}
    assert now == before


# --- SIGKILL, in a process of its own


def die(folder: str, title: str, at: int) -> None:
    take_small_steps()
    add(Path(folder), load(), lms.killing(title, at))


@pytest.mark.parametrize(
    ("title", "at"),
    [(READING, 1), (READING, 4), (SAMPLE, 2), (TRAINING, 1), (EMBEDDING, 1), (EMBEDDING, 4), (JOINING, 1)],
)
def test_a_killed_append_is_continued_by_typing_it_again(tmp_path, model, undisturbed, title, at):
    """SIGKILL at any stage: until then the store is as it was, and then as after an undisturbed run."""
    folder = lay(tmp_path, model)
    before = files(folder / "s.knn")
    child = lms.in_child(die, str(folder), title, at)
    child.join(120)
    assert child.exitcode == -9
    check_not_begun(folder, before)
    with knnstore.open(folder / "s.knn") as store:
        assert store.snapshot == 3
    with add(folder, model) as store:
        check_done(store, undisturbed)


# --- the same, faster: a stop in this process


@pytest.mark.parametrize(("title", "at"), [(SAMPLE, 1), (SAMPLE, 3), (TRAINING, 1), (EMBEDDING, 2), (EMBEDDING, 4), (JOINING, 1)])
def test_keys_that_were_saved_are_not_computed_again(tmp_path, model, undisturbed, title, at):
    """What comes after a stop is what was not saved: of the batch that was cut, and of those that never began."""
    folder = lay(tmp_path, model)
    with pytest.raises(Stopped), counted_tokens() as before:
        add(folder, model, stopping(title, at))
    with counted_tokens() as after, add(folder, model) as store:
        check_done(store, undisturbed)
    lost = before[-1] if title in (SAMPLE, EMBEDDING) and before else 0
    n = store.manifest.operation.counts["entries"]
    assert sum(before) + sum(after) - lost <= n <= sum(before) + sum(after)


def test_a_corpus_is_tokenized_once(tmp_path, model, undisturbed):
    """Segments that were read stay, also of a document that goes on in the next; then nothing is read again."""
    folder = lay(tmp_path, model)
    for title, at in ((READING, 4), (EMBEDDING, 1)):
        with pytest.raises(Stopped):
            add(folder, model, stopping(title, at))
    progress = lms.Recorder()
    with add(folder, model, progress) as store:
        check_done(store, undisturbed)
    assert READING not in progress.advanced


@pytest.mark.parametrize("others", [False, True])
def test_lists_that_were_half_written_are_written_again(tmp_path, model, monkeypatch, others):
    """Small segments are joined to one that is large enough for lists; their centroids are cut off."""
    with make(tmp_path / "s.knn", texts(0, 12, 1_400), model) as store:
        n = len(store)
    for number in (12, 13):
        grow(tmp_path / "s.knn", texts(number, 1, 1_400), model).close()
    monkeypatch.setattr(coarse, "FLAT_ENTRIES", n + 1)
    monkeypatch.setattr(joining, "FIRST_TIER", n + 1)
    corpus = lms.write_texts(tmp_path / "corpus", texts(14, 1, 1_400))

    def cut_off(lists: coarse.Coarse, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "centroids.bin").write_bytes(b"half")
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):  # noqa: PT012 - the patch is part of it
        patch.setattr(growth, "save_coarse", cut_off)
        append(tmp_path / "s.knn", corpus, model=model)
    if others:  # they join those segments, with lists of their own
        grow(tmp_path / "s.knn", texts(15, 1, 1_400), model).close()
    n_documents = 16 if others else 15
    with (
        append(tmp_path / "s.knn", corpus, model=model) as store,
        make(tmp_path / "whole.knn", texts(0, n_documents, 1_400), model) as whole,
    ):
        assert [record.content.nlist > 1 for record in store.manifest.segments] == [True, False][: len(store.segments)]
        assert len(store.segments) == 1 + others
        check_whole(store)
        check_same(store, whole)


# --- a stop at any write


def deeds_of(folder: Path, model: LanguageModel) -> list[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        counting = Counting(patch)
        add(folder, model).close()
    return counting.deeds


def check_stopped_before(folder: Path, model: LanguageModel, undisturbed: Datastore, deed: int) -> None:
    """Nothing changes on the disk from the nth deed on; then the same command again."""
    before = files(folder / "s.knn")
    with pytest.MonkeyPatch.context() as patch:
        Counting(patch, deed)
        with pytest.raises(Stopped):
            add(folder, model)
    with knnstore.open(folder / "s.knn") as store:
        counted = store.snapshot == undisturbed.snapshot
    if not counted:
        assert {name: content for name, content in files(folder / "s.knn").items() if name in before} == before
    with add(folder, model) as store:
        check_done(store, undisturbed)


def test_a_stop_before_any_change_of_name_is_survived(tmp_path, model, undisturbed):
    """The places where names begin or cease to count, among them all of the commit: it is made once, and once only."""
    deeds = deeds_of(lay(tmp_path / "counted", model), model)
    names = [i for i, (deed, _) in enumerate(deeds) if deed in ("rename", "replace", "link")]
    assert [deeds[i][1] for i in names[-3:-1]] == ["4.json", "CURRENT"]
    last = [*names[-8:], len(deeds) - 1]  # the commit, then what was in the job's folder goes
    for deed in [*names[1:-8:6], *last]:
        check_stopped_before(lay(tmp_path / str(deed), model), model, undisturbed, deed)


def check_power_cut(folder: Path, model: LanguageModel, undisturbed: Datastore, at: int) -> None:
    """The power is cut before the nth call, and what was not synced is gone: every second time names too."""
    before = files(folder / "s.knn")
    cut = PowerCut(at)
    with pytest.MonkeyPatch.context() as patch, cut.on(patch), pytest.raises(StorageError, match="the power is cut"):
        add(folder, model)
    cut.lose(names=bool(at % 2))
    with knnstore.open(folder / "s.knn") as store:
        if store.snapshot != undisturbed.snapshot:
            assert {name: content for name, content in files(folder / "s.knn").items() if name in before} == before
    with add(folder, model) as store:
        check_done(store, undisturbed)


def n_calls(folder: Path, model: LanguageModel) -> int:
    cut = PowerCut(1 << 30)
    with pytest.MonkeyPatch.context() as patch, cut.on(patch):
        add(folder, model).close()
    return cut.n_calls


def test_a_power_cut_in_the_commit_loses_nothing(tmp_path, model, undisturbed):
    """At calls of the commit, and some before: the store is the old one or the new one, and the command can be typed again."""
    n = n_calls(lay(tmp_path / "counted", model), model)
    for at in [*range(3, n - 40, 97), *range(n - 40, n, 5)]:
        check_power_cut(lay(tmp_path / str(at), model), model, undisturbed, at)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_power_cut_at_any_call_loses_nothing(tmp_path, model, undisturbed, tell):
    """All calls of joining and the commit, and every eighth before."""
    n = n_calls(lay(tmp_path / "counted", model), model)
    cuts = [*range(0, n - 150, 8), *range(n - 150, n)]
    for at in cuts:
        check_power_cut(lay(tmp_path / str(at), model), model, undisturbed, at)
    tell(f"append with a model: {len(cuts)} power cuts")


# --- a commit that had counted


@contextmanager
def never_tidying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process ends when all that is left to do is to remove its job's folder."""

    def stop(job: Path) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_take_away", stop)
        yield


def test_an_append_that_had_counted_is_not_done_twice(tmp_path, model, undisturbed, monkeypatch):
    """Killed after its commit, before its folder was removed: the same command finds that nothing is new."""
    folder = lay(tmp_path, model)

    with never_tidying(monkeypatch), pytest.raises(Stopped):
        add(folder, model)
    assert list((folder / "s.knn" / "staging").iterdir())
    for _ in range(2):
        with counted_tokens() as computed, add(folder, model) as store:
            check_done(store, undisturbed)
        assert computed == []


def test_a_prune_that_had_counted_is_not_done_twice(tmp_path, model, monkeypatch):
    """The same where documents only went, so that no file tells of it."""
    folder = lay(tmp_path, model)
    lms.write_texts(tmp_path / "one", {"again.txt": "Bah!"})

    options = {"model": model, "replace": True, "prune": True}
    with never_tidying(monkeypatch), pytest.raises(Stopped):
        append(folder / "s.knn", tmp_path / "one", **options)
    for _ in range(2):
        with append(folder / "s.knn", tmp_path / "one", **options) as store:
            assert store.snapshot == 4
            assert [document for _, document in held(store)] == ["again.txt"]
            check_whole(store)
