"""`knnstore append`, `merge` and `delete`: what they print and where, what their JSON has, and how they fail."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import BOOK, change_model, fields_of, knnstore, well

import knnstore as package
from knnstore.lm import append as append_module

INFO = {"path", "format", "snapshot", "entries", "documents", "domains", "segments", "spaces", "bytes", "calibration"}
CITIES = "It was the best of times, it was the worst of times. "


def write(folder: Path, **texts: str) -> Path:
    """A folder with these texts as files."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def documents(store: Path) -> list[tuple[str, str]]:
    return sorted((item["domain"], item["id"]) for item in fields_of("info", "--store", store, "--documents")["document_list"])


def another_model(path: Path) -> Path:
    """A store of entries whose keys are as wide as those of the default model, of another checkpoint."""
    checkpoint = package.Checkpoint(
        name="other", revision=None, identity="0" * 64, tokenizer=None, architecture="GPT2LMHeadModel", vocab_size=8192
    )
    batch = (np.eye(9, 256), np.arange(9), [package.EntryDocument(id="a", n_entries=9)])
    package.create_from_entries(path, [batch], checkpoint=checkpoint, dim=256, vocab_size=8192)
    return path


@pytest.fixture(scope="module")
def other_model(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with one parameter changed."""
    return change_model(default_model_dir, tmp_path_factory.mktemp("other") / "model")


# append


def test_append(copy: Path, tmp_path: Path) -> None:
    """What was added, what was there already, what was left out; progress and the summary on stderr, nothing on stdout."""
    more = write(tmp_path / "more", cities=CITIES, carol=BOOK, nothing="")
    done = well("append", more, "--store", copy, "--domain", "dickens")
    assert done.stdout == ""
    *stages, summary = done.stderr.splitlines()
    assert "embedding: " in done.stderr
    assert any("nothing.txt: left out (empty)" in line for line in stages)
    added = fields_of("info", "--store", copy, "--documents")
    (cities,) = [item for item in added["document_list"] if item["id"] == "cities.txt"]
    assert summary == (
        f"{copy}: {cities['entries']} entries of 1 document added, 1 there already, 1 left out; snapshot 2, {added['entries']} entries"
    )
    again = well("append", more, "--store", copy, "--domain", "dickens")
    assert again.stderr.splitlines()[-1] == f"{copy}: nothing is new, 2 there already, 1 left out; snapshot 2 stays"
    assert well("append", more, "--store", copy, "--domain", "dickens", "--quiet").output == ""


def test_append_json(copy: Path, tmp_path: Path) -> None:
    """One object on stdout: whether anything changed, the counts, and what `info --json` has."""
    more = write(tmp_path / "more", cities=CITIES)
    fields = fields_of("append", more, "--store", copy, "--domain", "cities", "--quiet")
    assert set(fields) >= INFO | {"changed", "counts"}
    assert fields["changed"] is True
    assert set(fields["counts"]) == {"documents", "entries", "repeated", "replaced", "removed", "skipped"}
    assert (fields["counts"]["documents"], fields["domains"]["cities"]["documents"], fields["snapshot"]) == (1, 1, 2)
    assert fields["counts"]["entries"] == fields["domains"]["cities"]["entries"]
    assert {name: fields[name] for name in INFO} == {name: fields_of("info", "--store", copy)[name] for name in INFO}
    again = fields_of("append", more, "--store", copy, "--domain", "cities")
    assert (again["changed"], again["snapshot"], again["counts"]["repeated"]) == (False, 2, 1)


def test_append_tells_what_it_did_and_not_what_others_did(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another commit between its begin and its end is not taken for its own."""
    more, others = write(tmp_path / "more", carol=BOOK), write(tmp_path / "others", cities=CITIES)
    find = append_module.list_inputs

    def others_first(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(append_module, "list_inputs", find)
        well("append", others, "--store", copy)
        return find(*arguments, **options)

    monkeypatch.setattr(append_module, "list_inputs", others_first)
    fields = fields_of("append", more, "--store", copy, "--domain", "dickens")
    assert (fields["changed"], fields["snapshot"], fields["counts"]["documents"]) == (False, 1, 0)
    assert fields_of("info", "--store", copy)["snapshot"] == 2


def test_append_replaces_and_prunes(copy: Path, tmp_path: Path) -> None:
    """--replace takes changed documents, --prune removes those whose file has gone, in the same commit."""
    folder = write(tmp_path / "letters", one="My dear Bob", two="Humbug!", three="Bah!")
    well("append", folder, "--store", copy, "--domain", "letters")
    write(folder, two="Humbug, I say!")
    (folder / "three.txt").unlink()
    assert knnstore("append", folder, "--store", copy, "--domain", "letters").exit_code == 4
    done = well("append", folder, "--store", copy, "--domain", "letters", "--replace", "--prune")
    said = "1 document added, 1 replaced, 1 removed, gone from the corpus, 1 there already; snapshot 3, "
    assert said in done.stderr.splitlines()[-1]
    assert [name for domain, name in documents(copy) if domain == "letters"] == ["one.txt", "two.txt"]


def test_append_from_standard_input(copy: Path) -> None:
    """- with --name."""
    fields = json.loads(well("append", "-", "--name", "in.txt", "--store", copy, "--json", stdin=CITIES).stdout)
    assert fields["counts"]["documents"] == 1
    assert ("default", "in.txt") in documents(copy)


def test_how_append_fails(copy: Path, tmp_path: Path) -> None:
    """Each failure with its exit code and a message that names what it is about; the datastore stays as it was."""
    more = write(tmp_path / "more", cities=CITIES)
    changed = write(tmp_path / "changed", carol="other text")
    entries = another_model(tmp_path / "entries.knn")
    (tmp_path / "model").mkdir()
    for code, said, arguments in (
        (2, "prune goes with replace", [more, "--prune"]),
        (2, "domain", [more, "--domain", ""]),
        (2, "--name", ["-"]),
        (2, "has no config.json", [more, "--model", tmp_path / "model"]),
        (2, "append_entries", [more, "--store", entries]),
        (3, "gone.knn: no such datastore", [more, "--store", tmp_path / "gone.knn"]),
        (3, "no such file", [tmp_path / "gone"]),
        (4, "carol.txt: the datastore has a document 'carol.txt'", [changed, "--domain", "dickens"]),
    ):
        done = knnstore("append", "--store", copy, *arguments)
        assert (done.exit_code, done.stdout) == (code, ""), done.output
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert fields_of("info", "--store", copy)["snapshot"] == 1


def test_append_of_another_model(copy: Path, tmp_path: Path, other_model: Path) -> None:
    """6; with --allow-model-mismatch a warning."""
    more = write(tmp_path / "more", cities=CITIES)
    assert knnstore("append", more, "--store", copy, "--model", other_model).exit_code == 6
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the warning is what is looked for, not a failure
        done = well("append", more, "--store", copy, "--model", other_model, "--allow-model-mismatch")
    assert "warning: " in done.stderr


def test_append_after_another_commit(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5: others added the same document while this was built; the message names it and their snapshot."""
    more = write(tmp_path / "more", cities=CITIES)
    commit = append_module.commit_growth

    def others_first(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(append_module, "commit_growth", commit)
        well("append", write(tmp_path / "others", cities="other text"), "--store", copy)
        return commit(*arguments, **options)

    monkeypatch.setattr(append_module, "commit_growth", others_first)
    done = knnstore("append", more, "--store", copy, "--json")
    assert (done.exit_code, done.stdout) == (5, "")
    assert "document 'cities.txt' of domain 'default' was added by snapshot 2" in done.stderr


# merge


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore of its own."""
    folder = tmp_path_factory.mktemp("cities")
    well("create", write(folder / "texts", cities=CITIES, carol="Bah! Humbug!"), "--store", folder / "cities.knn")
    return folder / "cities.knn"


def test_merge(store: Path, cities: Path, tmp_path: Path) -> None:
    """Domains are kept, `default` takes the store's name; the summary is on stderr, and the datastores stay as they were."""
    done = well("merge", store, cities, "--store", tmp_path / "all.knn")
    assert done.stdout == ""
    fields = fields_of("info", "--store", tmp_path / "all.knn")
    both = [fields_of("info", "--store", one) for one in (store, cities)]
    assert fields["entries"] == both[0]["entries"] + both[1]["entries"]
    assert sorted(fields["domains"]) == ["cities", "dickens"]
    assert f"all.knn: {fields['entries']:,} entries of 6 documents in cities, dickens, " in done.stderr.splitlines()[-1]
    assert [one["snapshot"] for one in both] == [1, 1]
    assert fields["calibration"]["status"] in ("stale", "default")
    query = fields_of("query", "It was the best of", "--store", tmp_path / "all.knn", "--lambda", "0.5", "--temperature", "50")
    assert query["neighbors"][0]["document"] == "cities.txt"


def test_merge_json_and_names(store: Path, cities: Path, tmp_path: Path) -> None:
    """--domain STORE=NAME; --link; into a datastore that is there, one commit."""
    fields = fields_of("merge", store, cities, "--store", tmp_path / "all.knn", "--domain", f"{cities}=two", "--link")
    assert set(fields) >= INFO | {"counts"}
    assert set(fields["counts"]) == {"stores", "documents", "repeated", "entries"}
    assert sorted(fields["domains"]) == ["dickens", "two"]
    linked = next((tmp_path / "all.knn" / "segments").glob("*/lists.bin"))
    assert linked.stat().st_nlink >= 2
    well("create", write(tmp_path / "third", bob="My dear Bob"), "--store", tmp_path / "third.knn", "--quiet")
    again = fields_of("merge", tmp_path / "third.knn", "--store", tmp_path / "all.knn", "--quiet")
    assert (again["snapshot"], sorted(again["domains"])) == (2, ["dickens", "third", "two"])
    assert again["documents"] == fields["documents"] + 1
    same = knnstore("merge", cities, "--store", tmp_path / "all.knn")  # under another name than before
    assert same.exit_code == 2
    assert "share segment" in same.stderr


def test_merge_of_conflicting_documents(store: Path, cities: Path, tmp_path: Path) -> None:
    """4, listing them; --on-conflict says which stays."""
    names = ("--domain", f"{cities}=dickens")
    done = knnstore("merge", store, cities, "--store", tmp_path / "all.knn", *names)
    assert (done.exit_code, done.stdout) == (4, "")
    assert "1 documents have different contents: 'carol.txt' of domain 'dickens'" in done.stderr
    assert not (tmp_path / "all.knn").exists()
    kept = {}
    for choice in ("keep-first", "keep-last"):
        target = tmp_path / f"{choice}.knn"
        well("merge", store, cities, "--store", target, *names, "--on-conflict", choice)
        listed = fields_of("info", "--store", target, "--documents")["document_list"]
        kept[choice] = next(item["entries"] for item in listed if item["id"] == "carol.txt")
        assert documents(target) == sorted([*documents(store), ("dickens", "cities.txt")])
    assert kept["keep-first"] > kept["keep-last"]


def test_how_merge_fails(store: Path, cities: Path, tmp_path: Path) -> None:
    """Nothing is made where it fails."""
    other = another_model(tmp_path / "other.knn")
    for code, said, arguments in (
        (2, "Missing argument", []),
        (2, "write each store once, as STORE=NAME", [cities, "--domain", "cities"]),
        (2, "is not one of the stores to merge", [cities, "--domain", "gone.knn=a"]),
        (2, "keep-best", [cities, "--on-conflict", "keep-best"]),
        (3, "gone.knn: no such datastore", [store, tmp_path / "gone.knn"]),
        (4, "not a datastore", [store, cities, "--store", tmp_path]),
        (6, "cannot be merged: checkpoint", [store, other]),
    ):
        done = knnstore("merge", "--store", tmp_path / "new.knn", *arguments)
        assert (done.exit_code, done.stdout) == (code, ""), done.output
        assert said in done.stderr
    assert not (tmp_path / "new.knn").exists()


# delete


def test_delete(copy: Path) -> None:
    """The receipt on stdout; the document answers no more, and the snapshot before has it still."""
    listed = {item["id"]: item["entries"] for item in fields_of("info", "--store", copy, "--documents")["document_list"]}
    n = listed["carol.txt"]
    told = well("delete", "carol.txt", "--store", copy, "--dry-run").stdout
    assert told.startswith(f"{copy}: would delete 1 document of dickens: {n} entries, ")
    assert fields_of("info", "--store", copy)["snapshot"] == 1
    done = well("delete", "carol.txt", "--store", copy)
    assert done.stdout.startswith(f"{copy}: deleted 1 document of dickens: {n} entries, ")
    assert "; snapshot 2; `knnstore compact` and `knnstore gc --keep 1` give the space back" in done.stdout
    assert {hit["document"] for hit in fields_of("query", "Marley was", "--store", copy, "--top", "99")["neighbors"]} == {
        *listed.keys() - {"carol.txt"}
    }
    assert "carol.txt" in well("query", "Marley was", "--store", copy, "--at", "1").stdout
    assert well("delete", "letter 1", "--store", copy, "--quiet").output == ""


def test_delete_json(copy: Path) -> None:
    """What went, by domain; --where by metadata; --purge; a dry run and one that finds nothing change nothing."""
    dry = fields_of("delete", "--where", "year=1843", "--store", copy, "--dry-run")
    done = fields_of("delete", "--where", "year=1843", "--store", copy, "--purge")
    assert set(done) == {"dry_run", "documents", "entries", "bytes", "dropped", "rewritten", "purged", "snapshot"}
    assert (dry["dry_run"], dry["snapshot"], done["dry_run"], done["snapshot"]) == (True, 1, False, 2)
    assert dry["documents"] == done["documents"] == {"dickens": 1}
    assert (done["purged"], done["rewritten"], done["dropped"]) == (True, 1, 0)
    none = fields_of("delete", "--where", "year=1843", "--store", copy)
    assert (none["documents"], none["entries"], none["snapshot"]) == ({}, 0, 2)
    assert "no document is like that" in well("delete", "--where", 'year="1843"', "--store", copy).stdout
    whole = fields_of("delete", "--domain", "dickens", "--store", copy)
    assert (whole["documents"], whole["dropped"]) == ({"dickens": 3}, 1)
    assert fields_of("info", "--store", copy)["entries"] == 0


def test_how_delete_fails(copy: Path, tmp_path: Path) -> None:
    """The datastore stays as it was."""
    well("append", write(tmp_path / "more", carol="other text"), "--store", copy)
    for code, said, arguments in (
        (2, "nothing to delete was named", []),
        (2, "give one of them", ["carol.txt", "--where", "year=1843"]),
        (2, "in domains default, dickens. Say which", ["carol.txt"]),
        (2, "as KEY=VALUE", ["--where", "year"]),
        (3, "document 'gone.txt': not in this datastore", ["gone.txt"]),
        (3, "in domain 'default'", ["letter 1", "--domain", "default"]),
        (3, "domain 'law': not in this datastore", ["--domain", "law"]),
        (3, "no such datastore", ["carol.txt", "--store", tmp_path / "gone.knn"]),
    ):
        done = knnstore("delete", "--store", copy, *arguments)
        assert (done.exit_code, done.stdout) == (code, ""), done.output
        assert said in done.stderr
    assert fields_of("info", "--store", copy)["snapshot"] == 2
    well("delete", "carol.txt", "--domain", "default", "--store", copy)
    assert ("dickens", "carol.txt") in documents(copy)
