"""merge: what the merged store says of itself, what is refused, damage, kills and others beside it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from held import append, assert_holds, listing, newest, put
from living import Drawn, by_key, check_contents, create, draw
from stores import PowerCut, checkpoint

import knnstore
from knnstore.errors import (
    CheckpointMismatchError,
    ConflictError,
    DamageError,
    ExistsError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
)
from knnstore.storage import files
from knnstore.storage.calibration import Calibration


def renamed(drawn: Sequence[Drawn], name: str) -> list[Drawn]:
    """As a merge calls their domain."""
    return [replace(item, domain=name) if item.domain == "default" else item for item in drawn]


def merge(sources: Sequence[Path], into: Path, **arguments) -> None:
    knnstore.merge(sources, into, **arguments).close()


# What a merged store says of itself


def fitted(path: Path, temperature: float, status: str = "fresh") -> Calibration:
    """What was fitted on all that a store has."""
    manifest = newest(path)
    return Calibration(
        lmbda=0.3, temperature=temperature, k=8, nprobe=4, exact=False, spaces=tuple(space.id for space in manifest.spaces),
        domains=tuple(manifest.domains()), status=status, made_by="t", tokens=9, perplexity={},
    )  # fmt: skip


def test_the_calibration_of_the_largest_is_kept_as_stale(tmp_path):
    """Never a fresh one, though spaces and domains are the same; of a store that is merged into its own; a default stays a default."""
    small, large = tmp_path / "small.knn", tmp_path / "large.knn"
    create(small, [draw("a", domain="law")])
    create(large, [draw("b", domain="law"), draw("c", domain="law")])
    of_small, of_large = fitted(small, 3.0), fitted(large, 7.0)
    put(small, calibration=of_small, k=5)
    put(large, calibration=of_large, k=9)
    merge([small, large], tmp_path / "all.knn")
    made = newest(tmp_path / "all.knn")
    assert (made.calibration, made.k) == (replace(of_large, status="stale"), 9)
    assert made.operation.arguments == {"sources": [str(small), str(large)]}
    assert made.operation.counts == {"stores": 2, "documents": 3, "repeated": 0, "entries": 18}
    merge([large], small)
    assert (newest(small).calibration, newest(small).k) == (replace(of_small, status="stale"), 5)
    put(large, calibration=replace(of_large, status="default"))
    merge([large], tmp_path / "alone.knn")
    assert newest(tmp_path / "alone.knn").calibration.status == "default"


UNLIKE = {
    "checkpoint": {"checkpoint": replace(checkpoint(), identity="cd" * 32, name="other")},
    "tokenizer": {"checkpoint": replace(checkpoint(), tokenizer="ef" * 32)},
    "vocabulary": {"checkpoint": checkpoint(999)},
    "key layer": {"key": {"layer": "final"}},
    "rule of tokens": {"tokens": {"bos": 2, "piece_chars": 10, "eos": True}},
}


@pytest.mark.parametrize("what", UNLIKE)
def test_unlike_stores_are_refused_with_both_named(tmp_path, what):
    """Nothing is made. What a store does not say (entries have no tokenizer, no rule) is no difference; two that do say are compared."""
    a, b, c = (tmp_path / f"{name}.knn" for name in "abc")
    for path in (a, b, c):
        create(path, [draw(path.stem)])
    put(b, tokens={"bos": 1, "piece_chars": 10, "eos": False}, checkpoint=replace(checkpoint(), tokenizer="ab" * 32))
    merge([a, b], tmp_path / "alike.knn")
    made = newest(tmp_path / "alike.knn")
    assert (made.tokens, made.checkpoint.tokenizer) == ({"bos": 1, "piece_chars": 10, "eos": False}, "ab" * 32)
    fields = dict(UNLIKE[what])
    if "key" in fields:
        fields["key"] = replace(newest(c).key, **fields["key"])
    put(c, **fields)
    for into in (tmp_path / "all.knn", tmp_path / "alike.knn"):
        before = listing(into) if into.exists() else None
        with pytest.raises(CheckpointMismatchError) as caught:
            merge([a, b, c], into, domains={str(a): "a"})
        assert (listing(into) if into.exists() else None) == before
        assert caught.value.exit_code == 6
        assert f"{c} cannot be merged: {what} " in str(caught.value)
        assert str(caught.value).endswith("Merge stores that were built with the same model and key layer.")


# What goes wrong


def test_arguments_that_cannot_be_followed_are_refused(tmp_path):
    a, b = tmp_path / "a.knn", tmp_path / "b.knn"
    create(a, [draw("a", domain="law")])
    create(b, [draw("b")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    (tmp_path / "file").touch()
    new = tmp_path / "new.knn"
    for sources, into, arguments, kind, message in (
        ([], new, {}, InvalidArgumentError, "no stores to merge were given"),
        ([b], b, {}, InvalidArgumentError, "no stores to merge were given beside the one they go into"),
        ([a], new, {"on_conflict": "keep-both"}, InvalidArgumentError, "on_conflict 'keep-both': use keep-first or keep-last."),
        ([a], new, {"domains": {"c.knn": "x"}}, InvalidArgumentError, "domains: 'c.knn' is not one of the stores to merge"),
        ([a], new, {"domains": {str(a): "x"}}, InvalidArgumentError, "it has no domain 'default' that would be called 'x', only law;"),
        ([b], new, {"domains": {str(b): ""}}, InvalidArgumentError, "an empty name for its domain"),
        ([a, b], b, {"domains": {str(b): "x"}}, InvalidArgumentError, "its domains keep their names"),
        ([a, tmp_path / "none.knn"], new, {}, NotFoundError, "none.knn: no such datastore"),
        ([tmp_path / "folder"], new, {}, NotFoundError, "folder: not a datastore"),
        ([a], tmp_path / "folder", {}, ExistsError, "something that is not a datastore is there"),
        ([a], tmp_path / "file", {}, ExistsError, "something that is not a datastore is there"),
    ):
        with pytest.raises(kind) as caught:
            merge(sources, into, **arguments)
        assert message in str(caught.value)
    assert not new.exists()
    assert [newest(a).snapshot, newest(b).snapshot] == [1, 1]
    knnstore.merge(str(a), b).close()  # one path is one store; the one merged into may be named among the others
    merge([b, tmp_path / "." / "b.knn", a], b)
    assert newest(b).snapshot == 2
    assert_holds(b, by_key([draw("a", domain="law"), draw("b")]))


@pytest.mark.parametrize("name", ["lists.bin", "values.bin", "contexts.lmdb", "ids.bin", "segment.json", "space.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "link"])
def test_a_source_with_a_damaged_file_is_refused_before_anything_is_made(tmp_path, name, damage):
    """What is missing, of another size, or no plain file; the store it was to go into is as it was."""
    for store in "ab":
        create(tmp_path / f"{store}.knn", [draw(store)])
    (file,) = (tmp_path / "b.knn").rglob(name)
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path / "a.knn")
    for into in ("a", "new"):
        if (name, damage) == ("segment.json", "link"):
            continue  # it is read, and has the right content
        with pytest.raises(DamageError, match=name):
            merge([tmp_path / "b.knn", tmp_path / "a.knn"], tmp_path / f"{into}.knn")
    assert listing(tmp_path / "a.knn") == before
    assert not (tmp_path / "new.knn").exists()


@pytest.mark.parametrize("into", ["new", "old"])
@pytest.mark.parametrize("link", [False, True])
def test_a_merge_that_was_killed_is_finished_by_the_same_command(tmp_path, monkeypatch, into, link):
    """Cut off after each call to the disk, then typed again: the same store, nothing left behind."""
    sources = [tmp_path / f"{name}.knn" for name in "ab"]
    for path in sources:
        create(path, [draw(path.stem)])
    create(tmp_path / "base.knn", [draw("c")])
    expected = by_key([*renamed([draw("a")], "a"), *renamed([draw("b")], "b"), *([draw("c")] if into == "old" else [])])
    at, n_calls = 0, None
    while n_calls is None or at < n_calls:
        target = tmp_path / f"{at}.knn"
        if into == "old":
            shutil.copytree(tmp_path / "base.knn", target)
        cut = PowerCut(at)
        with cut.on(monkeypatch):
            try:
                merge(sources, target, link=link)
                n_calls = at
            except StorageError:
                pass
        merge(sources, target, link=link)
        with knnstore.open(target) as store:
            check_contents(store, expected)
        assert not list((target / "staging").iterdir())
        left = [path.name for part in ("spaces", "segments") for path in (target / part).iterdir()]
        made = newest(target)
        assert sorted(left) == sorted([*(space.id for space in made.spaces), *(record.content.uuid for record in made.segments)])
        shutil.rmtree(target)
        at += 7
    assert at > 35


def test_a_merge_that_was_killed_may_be_finished_otherwise(tmp_path, monkeypatch):
    """With another choice among conflicting documents: nothing stays of the first one."""
    for name, version in (("a", 0), ("b", 1)):
        create(tmp_path / f"{name}.knn", [draw("x", version, domain="law")])
    sources = [tmp_path / "a.knn", tmp_path / "b.knn"]
    at, n_calls = 0, None
    while n_calls is None or at < n_calls:
        target = tmp_path / f"{at}.knn"
        with PowerCut(at).on(monkeypatch):
            try:
                merge(sources, target, on_conflict="keep-first")
                n_calls = at
            except StorageError:
                pass
        if not (target / "CURRENT").exists():
            merge(sources, target, on_conflict="keep-last")
            assert_holds(target, by_key([draw("x", 1, domain="law")]))
        at += 3


def test_others_who_change_the_store_it_goes_into(tmp_path, monkeypatch):
    """A document that both bring is a conflict, another is not; what they deleted of a shared segment is one too."""
    a, b = tmp_path / "a.knn", tmp_path / "b.knn"
    create(a, [draw("x", domain="law"), draw("y", domain="law")])
    create(b, [draw("z", domain="law")])

    def meanwhile(deed):
        class Watched(files.Disk):
            def copy(self, source: Path, target: Path) -> None:
                with monkeypatch.context() as patch:
                    patch.setattr(files.disk, "__class__", files.Disk)
                    if todo:
                        todo.pop()()
                super().copy(source, target)

        todo = [deed]
        with monkeypatch.context() as patch:
            patch.setattr(files.disk, "__class__", Watched)
            merge([a], b)

    with pytest.raises(ConflictError, match="document 'x' of domain 'law' was added by snapshot 2"):
        meanwhile(lambda: append(b, draw("x", 1, domain="law")))
    assert_holds(b, by_key([draw("x", 1, domain="law"), draw("z", domain="law")]))
    knnstore.delete(b, "x")
    append(b, draw("x", domain="law"))  # which then does not come from a
    meanwhile(lambda: append(b, draw("x", 2, domain="law"), draw("w")))
    assert_holds(b, by_key([draw("w"), draw("x", 2, domain="law"), *(draw(name, domain="law") for name in "yz")]))
    append(b, draw("x", domain="law"))
    knnstore.delete(b, ["y", "w"])
    meanwhile(lambda: append(b, draw("w")))
    assert_holds(b, by_key([draw("w"), *(draw(name, domain="law") for name in "xyz")]))


def test_no_model_and_no_quantizer_is_loaded(tmp_path):
    """Merging imports neither torch nor transformers, and reads no list."""
    for name in "ab":
        create(tmp_path / f"{name}.knn", [draw(name)])
        (lists,) = (tmp_path / f"{name}.knn").rglob("lists.bin")
        lists.write_bytes(os.urandom(lists.stat().st_size))
    code = "import sys, knnstore; knnstore.merge(['a.knn', 'b.knn'], 'all.knn').close(); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert newest(tmp_path / "all.knn").documents == {"a": 1, "b": 1}
