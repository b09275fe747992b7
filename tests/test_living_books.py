"""A datastore of books that lives: create, append, merge, delete, compact, gc, as typed; after each it is what one made in one go is.

The books are pieces of the sample that ships with the package. KNNSTORE_TEST_BOOKS may name a folder with real ones: six or more `.txt`
files in `dickens`, two or more in `general`; of each the first 60,000 characters are taken.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grown
import numpy as np
import pytest
from commands import fields_of, well
from numpy.typing import NDArray
from tokenizers import Tokenizer

import knnstore

REAL = os.environ.get("KNNSTORE_TEST_BOOKS")
CHARACTERS = 60_000  # of each real book
K = 50

Books = Mapping[tuple[str, str], str]  # (domain, document) → text


def books_of(folder: Path, n: int) -> dict[str, str]:
    """The first n texts of a folder."""
    found = sorted(folder.glob("*.txt"))[:n]
    assert len(found) == n, f"{folder}: {len(found)} books, {n} are needed"
    return {path.name: path.read_bytes().decode("utf-8")[:CHARACTERS] for path in found}


@pytest.fixture(scope="module")
def books(sample_book: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Six books, and two of another kind."""
    if REAL:
        return books_of(Path(REAL) / "dickens", 6), books_of(Path(REAL) / "general", 2)
    text = sample_book.read_bytes().decode("utf-8")
    ends = np.linspace(0, len(text), 9).astype(int).tolist()
    pieces = {f"stave {i}.txt": text[ends[i] : ends[i + 1]] for i in range(8)}
    names = sorted(pieces)
    return {name: pieces[name] for name in names[:6]}, {name: pieces[name] for name in names[6:]}


@pytest.fixture(scope="module")
def n_tokens(default_model_dir: Path) -> Callable[[str], int]:
    """Entries of a text by the model's tokenizer alone: its tokens, and the end of it."""
    tokenizer = Tokenizer.from_file(str(default_model_dir / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids) + 1


def write(folder: Path, texts: Mapping[str, str]) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


class Oracle:
    """Keys and values of all books, from stores that were made in one go, and brute force over those of some."""

    def __init__(self, made: Mapping[str, Path]) -> None:
        """made: domain → a store of all books of it."""
        self._keys: dict[tuple[str, str], NDArray[np.float32]] = {}
        self._values: dict[tuple[str, str], NDArray[np.int64]] = {}
        for domain, path in made.items():
            with knnstore.open(path) as store:
                for (_, name), item in grown.held(store).items():
                    self._keys[domain, name], self._values[domain, name] = item.keys, np.array(item.values)

    def queries(self) -> NDArray[np.float32]:
        """Two keys near each book's."""
        rng = np.random.default_rng(0)
        drawn = [keys[rng.integers(0, len(keys), 2)] + rng.normal(scale=0.3, size=(2, keys.shape[1])) for keys in self._keys.values()]
        return np.concatenate(drawn).astype(np.float32)

    def check(self, store: Any, there: Books, queries: NDArray[np.float32]) -> None:
        """Exact search finds the k nearest entries of all books that are there: documents, tokens, values, distances."""
        names = sorted(there)
        keys = np.concatenate([self._keys[name] for name in names]).astype(np.float64)
        values = np.concatenate([self._values[name] for name in names])
        places = [(*name, index) for name in names for index in range(len(self._keys[name]))]
        hits = store.search(queries, k=K, exact=True)
        for row, query in enumerate(queries.astype(np.float64)):
            distances = np.square(keys - query).sum(axis=1)
            nearest = np.argsort(distances, kind="stable")[:K]
            np.testing.assert_allclose(hits.distances[row], distances[nearest], rtol=1e-3, atol=0.02)
            last = distances[nearest[-1]]
            wanted = {(*places[at], int(values[at])) for at in nearest if distances[at] < last - 0.02 - 2e-3 * last}
            found = {
                (context.domain, context.document, context.token_index, context.token_id)
                for context in (hits.context(row, j) for j in range(K))
            }
            assert wanted <= found
            assert len(wanted) > K // 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_books_that_come_and_go(tmp_path: Path, books: tuple[dict[str, str], dict[str, str]], n_tokens: Callable[[str], int]) -> None:
    """After each command verify is clean, counts are those of the tokenizer, texts those of the files, and exact search brute force."""
    dickens, general = books
    options = ("--keep-keys", "f32", "--dtype", "float32", "--quiet")
    made = {}
    for domain, texts in (("dickens", dickens), ("general", general)):
        made[domain] = tmp_path / f"{domain} in one go.knn"
        well("create", write(tmp_path / f"all of {domain}", texts), "--store", made[domain], *options)
    oracle = Oracle(made)
    queries = oracle.queries()

    def check(path: Path, there: Books, snapshot: int) -> None:
        report = fields_of("verify", "--store", path, "--level", "full", "--quiet")
        assert (report["ok"], report["problems"], report["orphans"]) == (True, [], [])
        info = fields_of("info", "--store", path, "--documents")
        assert info["snapshot"] == snapshot
        counted = {name: n_tokens(text) for name, text in there.items()}
        assert {(item["domain"], item["id"]): item["entries"] for item in info["document_list"]} == counted
        assert (info["entries"], info["documents"]) == (sum(counted.values()), len(there))
        domains = {domain for domain, _ in there}
        assert info["domains"] == {
            domain: {
                "entries": sum(n for (of, _), n in counted.items() if of == domain),
                "documents": sum(of == domain for of, _ in counted),
            }
            for domain in domains
        }
        with knnstore.open(path) as store:
            assert {name: item.text for name, item in grown.held(store).items()} == there
            oracle.check(store, there, queries)

    names = list(dickens)
    path = tmp_path / "dickens.knn"
    well("create", write(tmp_path / "four", {name: dickens[name] for name in names[:4]}), "--store", path, "--domain", "dickens", *options)
    check(path, {("dickens", name): dickens[name] for name in names[:4]}, 1)

    well("append", write(tmp_path / "two", {name: dickens[name] for name in names[4:]}), "--store", path, "--domain", "dickens", "--quiet")
    six = {("dickens", name): text for name, text in dickens.items()}
    check(path, six, 2)

    well("create", tmp_path / "all of general", "--store", tmp_path / "general.knn", *options)
    both = tmp_path / "both.knn"
    well("merge", path, tmp_path / "general.knn", "--store", both, "--quiet")
    all_books = six | {("general", name): text for name, text in general.items()}
    check(both, all_books, 1)
    check(path, six, 2)

    well("delete", names[2], "--store", both, "--quiet")
    left = {name: text for name, text in all_books.items() if name != ("dickens", names[2])}
    check(both, left, 2)

    well("compact", "--store", both, "--quiet")
    check(both, left, 3)

    collected = fields_of("gc", "--keep", "1", "--store", both)
    assert collected["snapshots"]
    check(both, left, 3)
    with knnstore.open(both) as store:  # nothing of before is there any more
        folders = {segment.folder.name for segment in store.segments}
        assert {folder.name for folder in (both / "segments").iterdir()} == folders

    five = write(tmp_path / "five", {name: dickens[name] for name in names if name != names[2]})
    well("create", five, "--store", tmp_path / "five.knn", "--domain", "dickens", *options)
    with knnstore.open(both) as store, knnstore.open(tmp_path / "five.knn") as whole:
        hits, wanted = store.search(queries, k=K, exact=True, domains="dickens"), whole.search(queries, k=K, exact=True)
        np.testing.assert_allclose(hits.distances, wanted.distances, rtol=1e-3, atol=0.02)
        # Codes of two spaces side by side find most of what the keys themselves do.
        exact, approximate = (store.search(queries, k=K, exact=kind, domains="dickens") for kind in (True, False))
        pairs = [
            [set(zip(hits.segments[row], hits.rows[row], strict=True)) for row in range(len(queries))] for hits in (exact, approximate)
        ]
        assert np.mean([len(one & other) for one, other in zip(*pairs, strict=True)]) > 0.7 * K
