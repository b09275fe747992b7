"""What a change becomes where others committed meanwhile: it goes through on what they left, or is a conflict that names them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from effort import examples
from held import QUERIES, append, assert_holds, newest, put
from hypothesis import given
from hypothesis import strategies as st
from living import Drawn, by_key, check_answers, create, draw

import knnstore
from knnstore import deletion, settling
from knnstore.changes import Change, commit_change
from knnstore.errors import ConflictError, FormatError, NotFoundError
from knnstore.storage.calibration import Calibration
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.manifest import Operation

Batch = tuple[object, object, object]


NAMES = "abcd"
versions = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2), max_size=3)


def versioned(documents: Mapping[str, int]) -> list[Drawn]:
    return [draw(name, version, n=2 + version) for name, version in documents.items()]


@given(
    base=versions.filter(bool),
    ours=versions.filter(bool),
    theirs=versions,
    deletes=st.sets(st.sampled_from(NAMES)),
    purge=st.booleans(),
)
@examples(60)
def test_an_append_goes_through_unless_its_documents_were_touched(tmp_path_factory, base, ours, theirs, deletes, purge):
    """Others delete and add documents meanwhile. It is a conflict where they added one of ours, or replaced one that ours replaces."""
    path = tmp_path_factory.mktemp("changes") / "s.knn"
    create(path, versioned({**base, "z": 0}))

    def deed() -> None:
        if gone := sorted(deletes & base.keys()):
            knnstore.delete(path, gone, purge=purge)
        if theirs:
            append(path, *versioned(theirs))

    left = {name: version for name, version in base.items() if name not in deletes} | theirs | {"z": 0}
    news = {name: version for name, version in ours.items() if base.get(name) != version}
    touched = [name for name in news if name in left and left[name] != base.get(name)]
    if not touched:
        append(path, *versioned(ours), meanwhile=deed)
        left |= news
    else:
        with pytest.raises(ConflictError, match=f"document '[{''.join(touched)}]' of domain 'default' was (added|replaced) by snapshot"):
            append(path, *versioned(ours), meanwhile=deed)
    assert_holds(path, by_key(versioned(left)))


@given(base=versions.filter(bool), theirs=versions, deletes=st.sets(st.sampled_from(NAMES)), whole=st.booleans(), purge=st.booleans())
@examples(60)
def test_a_deletion_takes_what_was_there_or_what_others_put_in_its_place(tmp_path_factory, base, theirs, deletes, whole, purge):
    """Where others touched what it takes, it looks again, and always goes through. What they added beside it stays."""
    path = tmp_path_factory.mktemp("changes") / "s.knn"
    create(path, versioned(base))
    named = set(base) if whole else set(sorted(base)[:2])
    commits = []

    def others_first(*arguments, **fields):
        if not commits:
            commits.append(True)
            if gone := sorted(deletes & base.keys()):
                knnstore.delete(path, gone)
            if theirs:
                append(path, *versioned(theirs))
        return commit_change(*arguments, **fields)

    left = {name: version for name, version in base.items() if name not in deletes} | theirs
    touched = any(name in deletes or left[name] != base[name] for name in named)
    if touched and whole:
        named = set(left)  # the domain as it is by then
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deletion, "commit_change", others_first)
        arguments = {"domain": "default"} if whole else {"documents": sorted(named)}
        if touched and not (named and named <= left.keys()):
            with pytest.raises(NotFoundError):
                knnstore.delete(path, purge=purge, **arguments)
        else:
            assert knnstore.delete(path, purge=purge, **arguments).snapshot == newest(path).snapshot
            left = {name: version for name, version in left.items() if name not in named}
    assert_holds(path, by_key(versioned(left)))


def test_the_same_id_in_another_domain_is_another_document(tmp_path):
    """Added, replaced or deleted by others there, it is no conflict and stays as they left it."""
    path = tmp_path / "s.knn"
    create(path, [draw("a"), draw("a", domain="law"), draw("b", domain="law")])

    def deed() -> None:
        append(path, draw("c", domain="law"), draw("a", 1, domain="law"))
        knnstore.delete(path, "b", domain="law")

    append(path, draw("a", 2), draw("b"), draw("c"), meanwhile=deed)
    assert_holds(path, by_key([draw("a", 2), draw("b"), draw("c"), draw("a", 1, domain="law"), draw("c", domain="law")]))


def test_a_conflict_names_the_other_commit(tmp_path):
    """Which document, which snapshot, what made it and when; the exit code is 5, and nothing is left of the attempt."""
    path = tmp_path / "s.knn"
    create(path, [draw("a")])
    with pytest.raises(ConflictError) as caught:
        append(path, draw("b"), draw("c"), meanwhile=lambda: append(path, draw("c", 1)))
    other = newest(path)
    assert caught.value.exit_code == 5
    assert str(caught.value) == (
        f"{path}: document 'c' of domain 'default' was added by snapshot 2 or one before it (the newest: append_entries, {other.time}) "
        "while this was built. Nothing was changed; run the command again."
    )
    assert_holds(path, by_key([draw("a"), draw("c", 1)]))


def three_segments(path: Path) -> list[Drawn]:
    """One more, and all four are written as one."""
    drawn = [draw("a"), draw("a2"), draw("b", domain="law"), draw("c")]
    create(path, drawn[:2])
    append(path, drawn[2])
    append(path, drawn[3])
    return drawn


@pytest.mark.parametrize("purge", [False, True])
def test_a_segment_that_was_to_be_joined_is_joined_as_others_left_it(tmp_path, purge):
    path = tmp_path / "s.knn"
    drawn = three_segments(path)
    append(path, draw("d"), draw("e"), meanwhile=lambda: knnstore.delete(path, "a2", purge=purge))
    assert len(newest(path).segments) == 1
    assert_holds(path, by_key([drawn[0], *drawn[2:], draw("d"), draw("e")]))


def test_others_joined_the_segments_meanwhile(tmp_path):
    path = tmp_path / "s.knn"
    drawn = three_segments(path)
    append(path, draw("d"), meanwhile=lambda: append(path, draw("e")))
    assert [record.content.documents for record in newest(path).segments] == [5, 1]
    assert_holds(path, by_key([*drawn, draw("e"), draw("d")]))


@pytest.mark.parametrize(("comes_between", "n_tries"), [(True, 3), (False, 1)])
def test_a_commit_is_tried_again_as_long_as_others_come_between(tmp_path, monkeypatch, comes_between, n_tries):
    """Not where nobody did, and not for ever."""
    path = tmp_path / "s.knn"
    drawn = three_segments(path)
    tried = []

    def outrun(*_arguments: object, **_fields: object) -> None:
        tried.append(put(path) if comes_between else None)
        raise ConflictError("outrun")

    with monkeypatch.context() as patch:
        patch.setattr(settling, "_TRIES", 3)
        patch.setattr(settling, "commit_change", outrun)
        with pytest.raises(ConflictError, match="outrun"):
            append(path, draw("e"))
    assert len(tried) == n_tries
    assert_holds(path, by_key(drawn))


def test_a_document_to_be_replaced_is_found_where_it_was_moved(tmp_path):
    """Others wrote its segment again meanwhile: it goes from the new one."""
    path = tmp_path / "s.knn"
    create(path, [draw("a"), draw("b")])
    append(path, draw("a", 1), meanwhile=lambda: knnstore.delete(path, "b", purge=True))
    assert_holds(path, by_key([draw("a", 1)]))


@pytest.mark.parametrize("version", [0, 1])
def test_a_document_that_a_restore_brought_back_is_a_conflict(tmp_path, version):
    """It was looked for in that segment, where it was dead."""
    path = tmp_path / "s.knn"
    create(path, [draw("a"), draw("b")])
    knnstore.delete(path, "a")
    with pytest.raises(ConflictError, match="document 'a' of domain 'default' was added by snapshot 3"):
        append(path, draw("a", version), meanwhile=lambda: knnstore.restore(path, 1))
    assert_holds(path, by_key([draw("a"), draw("b")]))


def test_a_document_is_not_taken_in_twice_with_a_segment_that_others_made(tmp_path):
    """Tried again on what they left, the segment they made would be joined, with the document in it that comes from us too."""
    path = tmp_path / "s.knn"
    create(path, [draw("a")])
    append(path, draw("b"))
    with pytest.raises(ConflictError, match="document 'd' of domain 'default' was added by snapshot 3"):
        append(path, draw("c"), draw("d", 1), meanwhile=lambda: append(path, draw("d")))
    assert_holds(path, by_key([draw(name) for name in "abd"]))


def test_another_datastore_in_its_place_is_a_conflict(tmp_path):
    for name in ("s", "other"):
        create(tmp_path / f"{name}.knn", [draw("a")])
    change = Change(operation=Operation(name="x", arguments={}, counts={}))
    for start, message in ((newest(tmp_path / "other.knn"), "another datastore was put in its place"), (None, "was committed to it")):
        with pytest.raises(ConflictError, match=message):
            commit_change(StoreFolder(tmp_path / "s.knn"), start or replace(newest(tmp_path / "s.knn"), snapshot=0), change)
    (tmp_path / "other.knn" / "CURRENT").rename(tmp_path / "CURRENT")
    (tmp_path / "other.knn" / "manifests" / "1.json").rename(tmp_path / "1.json")
    with pytest.raises(ConflictError, match="the store was removed meanwhile"):
        commit_change(StoreFolder(tmp_path / "other.knn"), newest(tmp_path / "s.knn"), change)


def crowd(name: str, scale: float, n: int = 4_200) -> Drawn:
    """A document of enough entries to train a quantizer on; scale sets its keys apart."""
    drawn = draw(name, n=n, text=False)
    return replace(drawn, keys=drawn.keys * np.float32(scale))


@pytest.mark.parametrize("joins", [False, True])
def test_spaces_are_listed_as_long_as_they_are_used(tmp_path, joins):
    """One whose segments go is dropped, also while an append into it is built: then it is listed again, and its files are there.

    joins: the append would have taken in small segments that go too, so that it tries again on what others left.
    """
    near, far = crowd("near", 1.0), crowd("far", 40.0)
    for drawn in (near, far):
        create(tmp_path / f"{drawn.id}.knn", [drawn], seed=len(drawn.id))
    path = tmp_path / "s.knn"
    knnstore.merge([tmp_path / "near.knn", tmp_path / "far.knn"], path, domains={str(tmp_path / "near.knn"): "near"}).close()
    spaces = {record.content.space: record for record in newest(path).segments}
    assert [space.id for space in newest(path).spaces] == list(spaces)
    of_near, of_far = spaces
    small = [draw(f"s{number}", n=40, domain="near") for number in range(3 if joins else 0)]
    for item in small:
        assert append(path, item).segments[-1].content.space == of_near

    def drop() -> None:
        knnstore.delete(path, domain="near")
        assert [space.id for space in newest(path).spaces] == [of_far]
        knnstore.gc(path, keep=1)

    append(path, draw("x", n=40), draw("y", n=40), meanwhile=drop)
    assert [space.id for space in newest(path).spaces] == [of_far, of_near]
    with knnstore.open(path) as store:
        check_answers(store, by_key([replace(far, domain="far"), draw("x", n=40), draw("y", n=40)]), QUERIES, k=60)
    knnstore.delete(path, ["x", "y"])
    knnstore.delete(path, domain="far")
    assert [space.id for space in newest(path).spaces] == [of_far]  # one stays


@pytest.mark.parametrize("n", [3, 4_200])
def test_a_store_without_documents_is_a_store(tmp_path, n):
    """All deleted: it opens, answers with nothing, is whole, and takes documents again."""
    path = tmp_path / "s.knn"
    create(path, [crowd("a", 1.0, n), draw("b", domain="law")])
    knnstore.delete(path, "a")
    receipt = knnstore.delete(path, domain="law")
    assert (receipt.documents, newest(path).documents, newest(path).segments) == ({"law": 1}, {}, ())
    with knnstore.open(path) as store:
        assert (len(store), store.domains, list(store.documents())) == (0, [], [])
        hits = store.search(QUERIES, k=4)
        assert hits.distances.tolist() == [[np.inf] * 4] * 3
        assert (hits.values == -1).all()
        assert (hits.rows == -1).all()
        assert hits.n_found.tolist() == [0, 0, 0]
        assert store.info()["entries"] == 0
    assert_holds(path, {})
    with pytest.raises(NotFoundError, match=r"not in this datastore\. It has none"):
        knnstore.delete(path, domain="law")
    append(path, draw("a", 2), draw("c"))
    assert_holds(path, by_key([draw("a", 2), draw("c")]))


def calibrate(path: Path, status: str = "fresh") -> None:
    manifest = newest(path)
    fitted = Calibration(
        lmbda=0.3, temperature=7.0, k=8, nprobe=4, exact=False, spaces=tuple(space.id for space in manifest.spaces),
        domains=tuple(manifest.domains()), status=status, made_by="test", tokens=9, perplexity={},
    )  # fmt: skip
    put(path, calibration=fitted)


@pytest.mark.parametrize(
    ("deed", "after"),
    [
        (lambda path: append(path, draw("c")), "fresh"),
        (lambda path: append(path, draw("a", 1)), "fresh"),
        (lambda path: knnstore.delete(path, "a"), "fresh"),
        (lambda path: knnstore.delete(path, domain="law", purge=True), "fresh"),
        (lambda path: append(path, draw("c", domain="medicine")), "stale"),
        (lambda path: append(path, crowd("c", 1.0)), "stale"),  # raw keys become codes of a new space
    ],
)
def test_a_calibration_is_stale_for_what_it_was_not_fitted_on(tmp_path, deed, after):
    """Other spaces or other domains; its numbers stay. One that was never fitted is not called stale."""
    for status in ("fresh", "stale", "default"):
        path = tmp_path / f"{status}.knn"
        create(path, [draw("a"), draw("b", domain="law")])
        calibrate(path, status)
        deed(path)
        calibration = newest(path).calibration
        assert calibration.status == (after if status == "fresh" else status)
        assert (calibration.lmbda, calibration.temperature, calibration.tokens) == (0.3, 7.0, 9)


def test_what_a_later_version_reserved_for_itself_is_refused_at_once(tmp_path):
    """A writer feature that is unknown here: nothing is taken, staged or changed; reading works."""
    path = tmp_path / "s.knn"
    create(path, [draw("a")])
    put(path, writer_features=("braided lists",))
    create(tmp_path / "other.knn", [draw("b")])

    def never() -> Iterator[Batch]:
        raise AssertionError("taken")
        yield

    deeds = {
        "append": lambda: knnstore.append_entries(path, never()),
        "delete": lambda: knnstore.delete(path, "a", purge=True),
        "merge into": lambda: knnstore.merge([tmp_path / "other.knn"], path),
        "merge from": lambda: knnstore.merge([tmp_path / "other.knn", path], tmp_path / "new.knn"),
        "commit": lambda: commit_change(StoreFolder(path), newest(path), Change(operation=Operation(name="x", arguments={}, counts={}))),
    }
    for deed in deeds.values():
        with pytest.raises(FormatError, match="needs braided lists, which this knnstore does not have"):
            deed()
    assert_holds(path, by_key([draw("a")]))
    assert not (tmp_path / "new.knn").exists()
