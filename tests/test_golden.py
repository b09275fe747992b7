"""A store that an early version of format 1 made opens and answers as it did, for ever."""

import json
import tarfile
from pathlib import Path

import golden
import numpy as np
import pytest

import knnstore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with tarfile.open(golden.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "golden.knn"


@pytest.fixture(scope="module")
def answers() -> dict[int, dict]:
    return {int(snapshot): fields for snapshot, fields in json.loads(golden.ANSWERS.read_text()).items()}


@pytest.mark.parametrize("snapshot", [1, 2, 3, 4, "tag:paper"])
def test_every_snapshot_answers_as_it_did(path, answers, snapshot):
    """Documents, metadata, and exact neighbours with their places and text; codes find most of the same."""
    wanted = answers[2 if snapshot == "tag:paper" else snapshot]
    queries = golden.entries(9, golden.QUERIES)[0]
    with knnstore.open(path, snapshot=snapshot) as store:
        listed = {(document.domain, document.id): (document.entries, document.metadata) for document in store.documents()}
        assert listed == {(domain, name): (n, metadata) for domain, name, n, metadata in wanted["documents"]}
        assert len(store) == sum(n for _, _, n, _ in wanted["documents"])
        hits = store.search(queries, k=golden.K, exact=True)
        for i, nearest in enumerate(wanted["nearest"]):
            np.testing.assert_allclose(hits.distances[i], [item[4] for item in nearest], rtol=1e-5)
            for rank, (domain, name, index, value, _) in enumerate(nearest):
                context = hits.context(i, rank)
                assert (context.domain, context.document, context.token_index, context.token_id) == (domain, name, index, value)
                assert context.token == golden.WORDS[value % len(golden.WORDS)]
                assert context.source == f"books/{name}"
        coded = store.search(queries, k=golden.K, nprobe=1_000)
        same = [set(zip(a, b, strict=True)) & set(zip(c, d, strict=True)) for a, b, c, d in _places(hits, coded)]
        assert sum(map(len, same)) > 0.5 * golden.QUERIES * golden.K


def _places(a, b):
    return zip(a.segments.tolist(), a.rows.tolist(), b.segments.tolist(), b.rows.tolist(), strict=True)


def test_it_is_whole(path):
    """Every byte is what was written, and nothing is there that no snapshot names."""
    report = knnstore.verify(path)
    assert report.ok
    assert report.orphans == ()
    assert report.checked_bytes > 100_000


def test_it_still_lives(path):
    """It can be appended to, compacted and collected."""
    keys, values = golden.entries(6, 500)
    knnstore.append_entries(path, [(keys, values, [knnstore.EntryDocument(id="new", domain="law", n_entries=500)])])
    knnstore.compact(path)
    knnstore.gc(path, keep=1)
    assert knnstore.verify(path).ok
    with knnstore.open(path) as store:
        assert len(store) == sum(n for _, _, _, n, _ in golden.live(4)) + 500
        assert store.search(keys[:3], k=1, exact=True).values[:, 0].tolist() == values[:3].tolist()
    assert [child.name for child in (path / "tags").iterdir()] == ["paper.json"]
