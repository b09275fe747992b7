"""A coarse quantizer: the centroids that say which list a code is in. It belongs to a space, and segments may share it."""

import hashlib
import math
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
MAX_NLIST = 65_536  # more centroids than this need a graph to search them
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

    def probe(self, rotated: Keys, nprobe: int) -> tuple[Keys, NDArray[np.int64]]:
        """The nearest centroids of each key: distances (n, nprobe) float32 and lists (n, nprobe) int64."""
        return self.index.search(np.ascontiguousarray(rotated), nprobe)  # type: ignore[no-any-return]

    def assign(self, rotated: Keys) -> NDArray[np.uint32]:
        """The list of each key, (n,) u32."""
        return self.probe(rotated, 1)[1][:, 0].astype(np.uint32)


def _hash(space: str, centroids: Keys) -> str:
    digest = hashlib.sha256(f"coarse 1 {space} {centroids.shape}".encode())
    digest.update(np.ascontiguousarray(centroids, "<f4"))
    return digest.hexdigest()[:32]


def train_coarse(rotated: Keys, *, space: str, nlist: int, seed: int = 0) -> Coarse:
    """k-means over a sample of rotated keys, (n, dim) float32. nlist is lowered to n where the sample is smaller."""
    nlist = min(nlist, len(rotated))
    kmeans = faiss.Kmeans(
        rotated.shape[1],
        nlist,
        niter=KMEANS_ITERATIONS,
        seed=seed + 1234,
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLES_PER_LIST,
    )
    kmeans.train(np.ascontiguousarray(rotated, dtype=np.float32))
    centroids = np.asarray(kmeans.centroids, dtype=np.float32).reshape(nlist, -1)
    return Coarse(id=_hash(space, centroids), space=space, centroids=centroids)


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
