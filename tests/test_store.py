"""An open datastore: what it is used by (threads, a child process), and what it says when it cannot be."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from stores import create_store, draw_keys, draw_values

import knnstore
from knnstore import EntryDocument
from knnstore.errors import DamageError, InvalidArgumentError

DIM = 8
N = 9_000
KEYS, VALUES = draw_keys(0, N, DIM), draw_values(0, N)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store of three segments, 90 documents of 100 entries in two domains."""
    path = tmp_path_factory.mktemp("store") / "s.knn"
    documents = [EntryDocument(id=f"d{i}", n_entries=100, domain=("law", "med")[i % 2], metadata={"year": 2000 + i % 3}) for i in range(90)]
    create_store(path, KEYS, VALUES, documents, segment_entries=3_000, keep_keys="f32")
    return path


def test_threads_share_a_datastore(path):
    """Eight at once, from the first use on, give what one gives."""

    def ask(number):
        keys = KEYS[number * 100 : number * 100 + 20]
        hits = store.search(keys, k=10, exact=number % 2 == 0)
        return [(hits.context(i, j).document, hits.context(i, j).token_id) for i in range(20) for j in (0, 9)], hits.distances

    with knnstore.open(path) as store, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(24)))
    with knnstore.open(path) as store:
        alone = [ask(number) for number in range(24)]
    for (contexts, distances), (expected, expected_distances) in zip(together, alone, strict=True):
        assert contexts == expected
        assert np.array_equal(distances, expected_distances)


def test_filters_name_documents_and_domains(path):
    """Through the front door: domains, metadata and exclusions, alone and together, as few ranges and as many."""
    with knnstore.open(path) as store:
        everything = store.search(KEYS[:5], k=N, nprobe=1)
        assert (everything.n_found == N).all()
        for arguments, expected in (
            ({"domains": "law"}, lambda i: i % 2 == 0),
            ({"domains": {"law": 1.0, "med": 0.0}}, lambda i: i % 2 == 0),
            ({"where": {"year": 2001}}, lambda i: i % 3 == 1),
            ({"where": {"year": 2001}, "domains": ["med"], "exclude": "d7"}, lambda i: i % 6 == 1 and i != 7),
            ({"exclude": [f"d{i}" for i in range(0, 90, 2)]}, lambda i: i % 2 == 1),
        ):
            hits = store.search(KEYS[:5], k=N, nprobe=1, **arguments)
            chosen = [i for i in range(90) if expected(i)]
            assert (hits.n_found == 100 * len(chosen)).all()
            places = hits.segments[0] * 3_000 + hits.rows[0]
            found = places[hits.rows[0] >= 0] // 100
            assert sorted(set(found.tolist())) == chosen


def test_a_datastore_says_what_it_is(path):
    with knnstore.open(path) as store:
        assert (len(store), store.dim, store.domains, store.snapshot) == (N, DIM, ["law", "med"], 1)
        assert repr(store) == f"<Datastore {path} snapshot 1: 9000 entries>"
        assert store.search(KEYS[0]).k == store.manifest.k


def test_a_closed_datastore_is_not_used(path):
    """Closing twice is no harm; what a search returned before keeps its numbers."""
    store = knnstore.open(path)
    hits = store.search(KEYS[:1], k=2)
    store.close()
    store.close()
    for use in (lambda: store.search(KEYS[:1]), lambda: list(store.documents())):
        with pytest.raises(InvalidArgumentError, match="was closed"):
            use()
    assert hits.values.shape == (1, 2)


def test_a_datastore_is_opened_again_after_a_fork(path, monkeypatch):
    """faiss and LMDB do not survive one: the child is told so."""
    with knnstore.open(path) as store:
        store.search(KEYS[:1])
        parent = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(InvalidArgumentError, match=f"opened in process {parent}, used in {parent + 1}"):
            store.search(KEYS[:1])
        monkeypatch.undo()


def test_a_missing_file_is_said_by_name(path, tmp_path):
    """At its first use: the others still serve what does not need it."""

    for name in ("lists.bin", "lists.dir", "values.bin", "contexts.lmdb", "keys.bin"):
        copy = tmp_path / f"{name}.knn"
        shutil.copytree(path, copy)
        with knnstore.open(copy) as store:
            gone = copy / "segments" / store.manifest.segments[1].content.uuid / name
            gone.unlink()
            uses = {
                "lists.bin": lambda store=store: store.search(KEYS[:1]),
                "lists.dir": lambda store=store: store.search(KEYS[:1]),
                "keys.bin": lambda store=store: store.search(KEYS[:1], exact=True),
                "contexts.lmdb": lambda store=store: list(store.documents()),
                "values.bin": lambda store=store: store.search(KEYS[3_000:3_001], k=1, exact=True).context(0, 0),
            }
            with pytest.raises(DamageError, match=f"{gone}: the file is missing"):
                uses[name]()
