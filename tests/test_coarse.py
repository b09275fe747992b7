"""Centroids, few or many: the list of a key is the nearest, or nearly so."""

import numpy as np
import pytest
from stores import trained_space

from knnstore.format import Codec
from knnstore.storage import coarse as coarse_module
from knnstore.storage.coarse import Coarse, train_coarse

DIM = 16


def clustered(n: int, seed: int = 0) -> np.ndarray:
    """Keys about 60 middles, near enough to each other to overlap."""
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(7).normal(0, 3, (60, DIM))
    return (middles[rng.integers(0, 60, n)] + rng.normal(0, 1, (n, DIM))).astype(np.float32)


def nearest(centroids: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
    """By brute force in float64, (len(keys), n)."""
    distances = np.square(keys[:, None].astype(np.float64) - centroids.astype(np.float64)).sum(axis=2)
    return np.argsort(distances, axis=1, kind="stable")[:, :n]


def trained(nlist: int, sample: np.ndarray) -> Coarse:
    return train_coarse(sample, space=trained_space(Codec.PQ4, DIM).id, nlist=nlist)


def test_few_centroids_are_all_compared():
    """Lists to search and the list of a key are those of brute force."""
    coarse, keys = trained(40, clustered(4_000)), clustered(200, 1)
    assert np.array_equal(coarse.assign(keys), nearest(coarse.centroids, keys, 1)[:, 0])
    assert np.array_equal(coarse.probe(keys, 8)[1], nearest(coarse.centroids, keys, 8))


@pytest.fixture
def grouped(monkeypatch) -> Coarse:
    """900 centroids in 30 groups."""
    monkeypatch.setattr(coarse_module, "FLAT_LISTS", 256)
    monkeypatch.setattr(coarse_module, "FLAT_TRAINED", 256)
    return trained(900, clustered(20_000))


def test_many_centroids_are_compared_by_group(grouped):
    """Nearly always the same lists as by brute force; and never a list twice."""
    keys = clustered(500, 1)
    assert (grouped.assign(keys) == nearest(grouped.centroids, keys, 1)[:, 0]).mean() > 0.95
    distances, lists = grouped.probe(keys, 16)
    wanted = nearest(grouped.centroids, keys, 16)
    assert np.mean([len(set(a) & set(b)) / 16 for a, b in zip(lists.tolist(), wanted.tolist(), strict=True)]) > 0.95
    assert (np.diff(distances, axis=1) >= 0).all()
    assert all(len(set(row) - {-1}) == len([number for number in row if number >= 0]) for row in lists.tolist())
    exact = np.square(keys[:, None] - grouped.centroids[lists]).sum(axis=2)
    assert np.allclose(distances, exact, rtol=1e-3)


def test_all_lists_can_be_asked_for(grouped):
    """As many as there are: then every centroid is compared."""
    _, lists = grouped.probe(clustered(5, 2), grouped.nlist)
    assert np.array_equal(np.sort(lists, axis=1), np.tile(np.arange(900), (5, 1)))


def test_many_centroids_fit_as_well_as_k_means(monkeypatch):
    """Mean squared distance to the nearest: within 3% of k-means over all keys. The same sample gives the same centroids."""
    sample, fresh = clustered(20_000), clustered(2_000, 1)

    def error(coarse: Coarse) -> float:
        return float(np.square(fresh - coarse.centroids[nearest(coarse.centroids, fresh, 1)[:, 0]]).sum(axis=1).mean())

    monkeypatch.setattr(coarse_module, "FLAT_TRAINED", 1_000)
    flat = trained(400, sample)
    monkeypatch.setattr(coarse_module, "FLAT_LISTS", 256)
    monkeypatch.setattr(coarse_module, "FLAT_TRAINED", 256)
    many = trained(400, sample)
    assert many.nlist == 400
    assert np.isfinite(many.centroids).all()
    assert error(many) < 1.03 * error(flat)
    assert trained(400, sample).id == many.id


def test_keys_that_are_the_same_get_a_list(monkeypatch):
    """Samples of few different keys leave centroids alike and groups empty."""
    monkeypatch.setattr(coarse_module, "FLAT_LISTS", 64)
    monkeypatch.setattr(coarse_module, "FLAT_TRAINED", 64)
    sample = np.repeat(clustered(10), 100, axis=0)
    coarse = trained(300, sample)
    assert coarse.nlist == 300
    lists = coarse.assign(sample)
    assert np.square(sample - coarse.centroids[lists]).sum(axis=1).max() < 1e-2
