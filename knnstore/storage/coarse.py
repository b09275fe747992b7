"""A coarse quantizer: the centroids that say which list a code is in. It belongs to a space, and segments may share it.

Beyond 1,024 centroids they are themselves in groups, found when they are first searched: a key is compared with the middles of the groups
and then with the centroids of the nearest few, so that it costs the square root of what comparing it with all of them would.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError
from knnstore.format import CENTROIDS_FILE, HEADER_SIZE, DType, Kind, parse_header
from knnstore.storage.arrays import map_file, read_array, write_array
from knnstore.storage.files import disk

__all__ = [
    "FLAT_ENTRIES",
    "Coarse",
    "choose_nlist",
    "choose_nprobe",
    "is_listed",
    "load_coarse",
    "save_coarse",
    "takes_lists",
    "train_coarse",
]

Keys = NDArray[np.float32]

FLAT_ENTRIES = 32_768  # entries under which a segment is one list: scanning it costs less than choosing lists
SMALLEST_LISTED = 4_096  # entries: a flat list of fewer is a tenth of what a query of a large store scans
MAX_NLIST = 65_536  # at 64 entries of a sample each, they are trained on as many keys as fit the memory for it
FLAT_LISTS = 1_024  # centroids up to which a key is compared with each: 3 µs of two cores at 256 dimensions
FLAT_TRAINED = 256  # centroids up to which all are trained together
ASSIGN_GROUPS = 4  # groups looked into for a key's own list: it is the nearest of all in 99.6% of 16,384 (8: 99.9% at twice the time)
PROBE_GROUPS = 8  # groups looked into for the lists to search, at least: 99% of the nearest 32 of 16,384
PROBE_MARGIN = 16  # and so many centroids for each list that is wanted
LLOYD_STEPS = 2  # over all centroids, after those of each group were trained apart: error within 0.5% of k-means, in a tenth of the time
PROBED_ENTRIES = 32_768  # entries that a query is compared with: some thirty times as many as neighbours are wanted
MIN_NPROBE, MAX_NPROBE = 8, 32
SAMPLES_PER_LIST = 64  # sampled keys a centroid is trained on
KMEANS_ITERATIONS = 10  # more change recall by less than the sample does


def choose_nlist(n_entries: int) -> int:
    """Lists for a store of this many entries: a power of two near the square root, 1 below 32,768 entries."""
    if n_entries < FLAT_ENTRIES:
        return 1
    return int(min(MAX_NLIST, 1 << math.ceil(math.log2(math.sqrt(n_entries)))))


def choose_nprobe(n_entries: int, nlist: int) -> int:
    """Lists searched for each query where nothing else is said: 32 where they are short, fewer where each has more than 1,024 entries.

    On 3.3 million entries in 2,048 lists 16 take two thirds of the time of 32, at a perplexity that is 0.1% higher.
    """
    if nlist == 1:
        return MAX_NPROBE  # for when there will be lists
    wanted = PROBED_ENTRIES * nlist // max(1, n_entries)
    return max(MIN_NPROBE, min(MAX_NPROBE, 1 << max(0, wanted.bit_length() - 1)))


def is_listed(n_entries: int, known: "Coarse | None") -> bool:
    """Whether a segment of so many entries gets lists. known: a coarse quantizer that is there already, which costs nothing more.

    With two entries a list, its file is several times larger than one flat list; it is scanned in a fraction of the time.
    """
    return takes_lists(n_entries, 1 if known is None else known.nlist)


def takes_lists(n_entries: int, nlist: int) -> bool:
    """The same, by the number of lists of the coarse quantizer; 1 for none."""
    return n_entries >= FLAT_ENTRIES or (nlist > 1 and n_entries >= max(SMALLEST_LISTED, 2 * nlist))


@dataclass(frozen=True)
class Coarse:
    """centroids: (nlist, dim) float32 in the axes of the space. id: 32 hex digits over space and centroids."""

    id: str
    space: str
    centroids: Keys

    @property
    def nlist(self) -> int:
        return len(self.centroids)

    @cached_property
    def index(self) -> Any:
        """A faiss index over the centroids (one copy of them in memory)."""
        index = faiss.IndexFlatL2(self.centroids.shape[1])
        index.add(np.ascontiguousarray(self.centroids, dtype=np.float32))
        return index

    @cached_property
    def groups(self) -> Any:
        """The same in groups, about as many as each has centroids."""
        return _grouped(self.centroids)

    @cached_property
    def _members(self) -> list[NDArray[np.int64]]:
        """The centroids of each group."""
        lists = self.groups.invlists
        sizes = [lists.list_size(group) for group in range(self.groups.nlist)]
        return [faiss.rev_swig_ptr(lists.get_ids(group), size).copy() for group, size in enumerate(sizes)]

    def probe(self, rotated: Keys, nprobe: int) -> tuple[Keys, NDArray[np.int64]]:
        """The nearest centroids of each key: distances (n, nprobe) float32 and lists (n, nprobe) int64, -1 where groups had fewer."""
        x = np.ascontiguousarray(rotated, dtype=np.float32)
        n_groups = max(PROBE_GROUPS, math.ceil(PROBE_MARGIN * nprobe / math.sqrt(self.nlist)))
        if self.nlist <= FLAT_LISTS or 2 * n_groups >= self.groups.nlist:
            return self.index.search(x, nprobe)  # type: ignore[no-any-return]
        return self.groups.search(x, nprobe, params=faiss.SearchParametersIVF(nprobe=n_groups))  # type: ignore[no-any-return]

    def assign(self, rotated: Keys) -> NDArray[np.uint32]:
        """The list of each key, (n,) u32."""
        x = np.ascontiguousarray(rotated, dtype=np.float32)
        lists = self.index.search(x, 1)[1][:, 0] if self.nlist <= FLAT_LISTS else self._assign_by_group(x)
        return lists.astype(np.uint32)

    def _assign_by_group(self, x: Keys) -> NDArray[np.int64]:
        """All keys that look into a group are compared with its centroids at once, which is one product of matrices: twice as fast as key
        by key, with 65,536 lists four times."""
        groups = self.groups.quantizer.search(x, min(ASSIGN_GROUPS, self.groups.nlist))[1].reshape(-1)
        order = np.argsort(groups.astype(np.uint16), kind="stable")
        owners = order // (len(groups) // len(x)) if len(x) else order
        begins = np.searchsorted(groups[order], np.arange(self.groups.nlist + 1))
        nearest, lists = np.full(len(x), np.inf, np.float32), np.zeros(len(x), np.int64)
        for group, members in enumerate(self._members):
            some = owners[begins[group] : begins[group + 1]]
            if len(some) and len(members):
                distances, places = faiss.knn(x[some], self.centroids[members], 1)
                closer = distances[:, 0] < nearest[some]
                some = some[closer]
                nearest[some], lists[some] = distances[closer, 0], members[places[closer, 0]]
        if (lost := np.isinf(nearest)).any():  # groups may be empty
            lists[lost] = self.index.search(x[lost], 1)[1][:, 0]
        return lists


def _hash(space: str, centroids: Keys) -> str:
    digest = hashlib.sha256(f"coarse 1 {space} {centroids.shape}".encode())
    digest.update(np.ascontiguousarray(centroids, "<f4"))
    return digest.hexdigest()[:32]


def train_coarse(sample: Keys, *, space: str, nlist: int, seed: int = 0, turn: Callable[[Keys], Keys] | None = None) -> Coarse:
    """Centroids of a sample of keys, (n, dim) float32, by k-means; many by k-means of groups of the keys, and steps over all of them.

    nlist is lowered to n where the sample is smaller. turn: what rotates centroids into the space, where the sample is not rotated yet.
    """
    nlist = min(nlist, len(sample))
    sample = np.ascontiguousarray(sample, dtype=np.float32)
    centroids = _kmeans(sample, nlist, seed) if nlist <= FLAT_TRAINED else _many_centroids(sample, nlist, seed)
    centroids = centroids if turn is None else turn(centroids)
    return Coarse(id=_hash(space, centroids), space=space, centroids=centroids)


def _kmeans(sample: Keys, n: int, seed: int, *, per_centroid: int = SAMPLES_PER_LIST) -> Keys:
    kmeans = faiss.Kmeans(
        sample.shape[1], n, niter=KMEANS_ITERATIONS, seed=seed + 1234, min_points_per_centroid=1, max_points_per_centroid=per_centroid
    )
    kmeans.train(sample)
    return np.asarray(kmeans.centroids, dtype=np.float32).reshape(n, -1)


def _many_centroids(sample: Keys, nlist: int, seed: int) -> Keys:
    """Each group of keys gets as many of the centroids as it has of the keys, and one at least."""
    n_groups = round(math.sqrt(nlist))
    index = faiss.IndexFlatL2(sample.shape[1])
    index.add(_kmeans(sample, n_groups, seed, per_centroid=SAMPLES_PER_LIST * 16))
    group = index.search(sample, 1)[1][:, 0]
    sizes = np.bincount(group, minlength=n_groups)
    shares = sizes * (nlist / len(sample))
    counts = np.where(sizes > 0, np.maximum(1, np.floor(shares)), 0).astype(np.int64)
    while (left := nlist - int(counts.sum())) != 0:  # what rounding left, or what groups of less than one took
        order = np.argsort(counts - shares, kind="stable")
        few = order[sizes[order] > counts[order]][:left] if left > 0 else order[::-1][counts[order[::-1]] > 1][:-left]
        counts[few] += 1 if left > 0 else -1
    parts = [_kmeans(sample[group == number], int(counts[number]), seed) for number in np.flatnonzero(sizes).tolist()]
    centroids = np.concatenate(parts)
    for _ in range(LLOYD_STEPS):
        nearest = Coarse(id="", space="", centroids=centroids).assign(sample)
        order, members = np.argsort(nearest, kind="stable"), np.bincount(nearest, minlength=nlist)
        begins = np.concatenate(([0], np.cumsum(members)))
        for first in range(0, nlist, n_groups):  # a few at a time: a sample is a gigabyte
            some = slice(first, min(first + n_groups, nlist))
            kept = np.flatnonzero(members[some]) + first
            if len(kept):
                rows = sample[order[begins[some.start] : begins[some.stop]]]
                sums = np.add.reduceat(rows, begins[kept] - begins[some.start], axis=0)
                centroids[kept] = sums / members[kept, None]
    return centroids


def _grouped(centroids: Keys) -> Any:
    """A faiss index that looks for the nearest centroids in the nearest groups of them."""
    nlist, dim = centroids.shape
    n_groups = round(math.sqrt(nlist))
    middles = faiss.IndexFlatL2(dim)
    middles.add(_kmeans(centroids, n_groups, 0))
    index = faiss.IndexIVFFlat(middles, dim, n_groups)
    index.train(centroids)
    index.add(centroids)
    return index


def save_coarse(coarse: Coarse, folder: Path) -> None:
    """Writes a coarse quantizer into a new folder and syncs it."""
    disk.make_folder(folder)
    owner = bytes.fromhex(coarse.id)
    write_array(folder / CENTROIDS_FILE, coarse.centroids, kind=Kind.COARSE, dtype=DType.F32, owner=owner)
    disk.sync_folder(folder)


def load_coarse(folder: Path, coarse_id: str, *, space: str, dim: int) -> Coarse:
    """A coarse quantizer from its folder. Raises DamageError if its content does not have the hash in its name."""
    path = folder / CENTROIDS_FILE
    owner = bytes.fromhex(coarse_id)
    header = parse_header(map_file(path)[:HEADER_SIZE].tobytes(), str(path), kind=Kind.COARSE, owner=owner)
    centroids = read_array(path, kind=Kind.COARSE, owner=owner, shape=(header.rows, dim))
    if _hash(space, centroids) != coarse_id:
        raise DamageError(f"{folder}: its content does not have the hash in its name. Run `knnstore verify`.")
    return Coarse(id=coarse_id, space=space, centroids=centroids)
