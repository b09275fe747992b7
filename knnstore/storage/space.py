"""A space: what a code means. A rotation of the key, and a product quantizer over the rotated key (or none: `raw`).

Codes do not depend on a coarse quantizer, so a store's lists can change without encoding again.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import CENTROIDS_FILE, CODEC_NAMES, CODECS_BY_NAME, ROTATION_FILE, ROTATIONS, SPACE_FILE, Codec, DType, Kind
from knnstore.storage.arrays import read_array, write_array
from knnstore.storage.files import disk, write_file
from knnstore.storage.manifest import FileRecord
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json_bytes, parse_number, parse_object, parse_size, parse_word, read_small

__all__ = ["Space", "load_space", "n_subquantizers", "raw_space", "save_space", "train_space"]

Keys = NDArray[np.float32]
Codes = NDArray[np.uint8]

TARGET_SUBQUANTIZERS = {Codec.PQ4: 128, Codec.PQ8: 64}  # 64 bytes of code either way: the field's usual size
BITS = {Codec.PQ4: 4, Codec.PQ8: 8}
MIN_TRAINING = {Codec.RAW: 0, Codec.PQ4: 4_096, Codec.PQ8: 10_240}  # entries: 256 and 40 a centroid; below, keys stay raw
PQ_TRAINING_MAX = {Codec.PQ4: 16_384, Codec.PQ8: 65_536}  # sampled keys looked at: 4 times what a 4-bit quantizer is trained on
KMEANS_ITERATIONS = 25  # faiss's own number for product quantizers
POINTS_PER_CENTROID = {4: 256, 8: 256}  # sampled keys a centroid is trained on; more change the distortion by under 0.1%
OPQ_TRAINING_MAX = 16_384  # OPQ alternates PCA and PQ; more took longer and changed nothing measurable


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """rotation: (dim, dim) float32, orthogonal, or None. centroids: (n_sub, 2**bits, dim / n_sub) float32, or None for raw keys.

    distortion: mean squared distance between the training sample and its decoded codes. id: 32 hex digits over all of it.
    """

    id: str
    codec: Codec
    dim: int
    rotation: Keys | None
    centroids: Keys | None
    rotation_kind: str
    n_training: int
    distortion: float

    @property
    def n_sub(self) -> int:
        """Number of sub-quantizers (0 for raw keys)."""
        return 0 if self.centroids is None else int(self.centroids.shape[0])

    @property
    def code_size(self) -> int:
        """Bytes of one code as encoded (before packing)."""
        return self.dim * 4 if self.codec is Codec.RAW else -(-self.n_sub * BITS[self.codec] // 8)

    def rotate(self, keys: Keys) -> Keys:
        """(n, dim) keys into the space's own axes; distances do not change."""
        x = np.ascontiguousarray(keys, dtype=np.float32)
        if self.rotation is None:
            return x
        if len(x) != 1:
            return self._turn.apply(x)  # type: ignore[no-any-return]
        turned = np.empty_like(x)  # without waking threads for one key
        faiss.fvec_inner_products_ny(faiss.swig_ptr(turned), faiss.swig_ptr(x), faiss.swig_ptr(self._rows), self.dim, self.dim)
        return turned

    @cached_property
    def _rows(self) -> Keys:
        return np.ascontiguousarray(self.rotation, dtype=np.float32)

    @cached_property
    def _turn(self) -> Any:
        """The rotation as faiss multiplies. numpy's own threads go on turning for tenths of a second after each product, and take the
        processors from the search that follows."""
        turn = faiss.LinearTransform(self.dim, self.dim, False)
        faiss.copy_array_to_vector(np.ascontiguousarray(self.rotation, dtype=np.float32).reshape(-1), turn.A)
        turn.is_trained = True
        return turn

    def encode(self, rotated: Keys) -> Codes:
        """(n, dim) rotated keys → (n, code_size) u8."""
        x = np.ascontiguousarray(rotated, dtype=np.float32)
        if self.codec is Codec.RAW:
            return x.view(np.uint8).reshape(len(x), self.code_size)
        codes: Codes = self.quantizer().compute_codes(x)
        return codes

    def decode(self, codes: Codes) -> Keys:
        """(n, code_size) u8 → (n, dim) rotated keys, float32."""
        codes = np.ascontiguousarray(codes)
        if self.codec is Codec.RAW:
            return codes.view("<f4").reshape(len(codes), self.dim)
        keys: Keys = self.quantizer().decode(codes)
        return keys

    def quantizer(self) -> Any:
        """The space's product quantizer as a faiss object (a copy of some kilobytes)."""
        assert self.centroids is not None
        return _product_quantizer(self.centroids, BITS[self.codec])


def _product_quantizer(centroids: Keys, bits: int) -> Any:
    n_sub, _, width = centroids.shape
    pq = faiss.ProductQuantizer(n_sub * width, n_sub, bits)
    faiss.copy_array_to_vector(np.ascontiguousarray(centroids).reshape(-1), pq.centroids)
    return pq


def _train_quantizers(rotated: Keys, n_sub: int, bits: int, seed: int) -> Keys:
    """k-means of each sub-vector, (n_sub, 2**bits, width). One thread each: faiss's own threads meet at a barrier after every
    step of these small problems, which takes five times as long as soon as another process wants a core.
    """
    width = rotated.shape[1] // n_sub

    def train(part: int) -> Keys:
        faiss.omp_set_num_threads(1)  # of this thread
        kmeans = faiss.Kmeans(
            width,
            1 << bits,
            niter=KMEANS_ITERATIONS,
            seed=seed + 1234,
            min_points_per_centroid=1,  # small samples are our own choice (MIN_TRAINING), not worth a warning on stderr
            max_points_per_centroid=POINTS_PER_CENTROID[bits],
        )
        kmeans.train(np.ascontiguousarray(rotated[:, part * width : (part + 1) * width]))
        return np.asarray(kmeans.centroids, dtype=np.float32).reshape(1 << bits, width)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(train, range(n_sub))))


def n_subquantizers(dim: int, codec: Codec) -> int:
    """The divisor of dim nearest, as a ratio, to the codec's target (128 of 4 bits, 64 of 8); of two as near the larger."""
    target = TARGET_SUBQUANTIZERS[codec]
    divisors = [m for m in range(1, dim + 1) if dim % m == 0]
    return min(divisors, key=lambda m: (max(m / target, target / m), -m))


def _hash(codec: Codec, dim: int, rotation: Keys | None, centroids: Keys | None) -> str:
    digest = hashlib.sha256(json.dumps(["space", 1, CODEC_NAMES[codec], "l2", dim]).encode())
    for array in (rotation, centroids):
        digest.update(b"-" if array is None else np.asarray(array.shape, "<u8").tobytes() + np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()[:32]


def raw_space(dim: int) -> Space:
    """The space of keys as they are: for stores too small to train a quantizer."""
    return Space(
        id=_hash(Codec.RAW, dim, None, None),
        codec=Codec.RAW,
        dim=dim,
        rotation=None,
        centroids=None,
        rotation_kind="none",
        n_training=0,
        distortion=0.0,
    )


def train_space(sample: Keys, *, codec: Codec, rotation: str = "random", seed: int = 0) -> Space:
    """A space fitted to a sample of keys, (n, dim) float32, n at least 256 (PQ4: 16) for a usable result.

    rotation: `random` orthogonal from the seed (4-bit PQ is blind on Llama-type keys without), `opq` (trained), `none`.
    Raises InvalidArgumentError for an unknown rotation.
    """
    if rotation not in ROTATIONS:
        raise InvalidArgumentError(f"rotation {rotation!r}: use one of {', '.join(ROTATIONS)}.")
    dim = sample.shape[1]
    if codec is Codec.RAW:
        return raw_space(dim)
    rng = np.random.default_rng(seed)
    n_sub = n_subquantizers(dim, codec)
    chosen = sample
    if len(sample) > PQ_TRAINING_MAX[codec]:
        chosen = sample[np.sort(rng.choice(len(sample), PQ_TRAINING_MAX[codec], replace=False))]
    chosen = np.ascontiguousarray(chosen, dtype=np.float32)
    matrix = _rotation(chosen, rotation, n_sub, rng)
    rotated = chosen if matrix is None else np.ascontiguousarray(chosen @ matrix.T)
    centroids = _train_quantizers(rotated, n_sub, BITS[codec], seed)
    pq = _product_quantizer(centroids, BITS[codec])
    distortion = float(np.square(rotated - pq.decode(pq.compute_codes(rotated))).sum(axis=1, dtype=np.float64).mean())
    return Space(
        id=_hash(codec, dim, matrix, centroids),
        codec=codec,
        dim=dim,
        rotation=matrix,
        centroids=centroids,
        rotation_kind=rotation,
        n_training=len(chosen),
        distortion=distortion,
    )


def _rotation(sample: Keys, kind: str, n_sub: int, rng: np.random.Generator) -> Keys | None:
    dim = sample.shape[1]
    if kind == "none":
        return None
    if kind == "opq":
        opq = faiss.OPQMatrix(dim, n_sub)
        opq.train(np.ascontiguousarray(sample[:OPQ_TRAINING_MAX]))
        return np.asarray(faiss.vector_to_array(opq.A), dtype=np.float32).reshape(dim, dim)
    q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
    return np.ascontiguousarray(q * np.sign(np.diag(r)), dtype=np.float32)


def save_space(space: Space, folder: Path) -> None:
    """Writes a space into a new folder and syncs it."""
    disk.make_folder(folder)
    owner = bytes.fromhex(space.id)
    if space.rotation is not None:
        write_array(folder / ROTATION_FILE, space.rotation, kind=Kind.ROTATION, dtype=DType.F32, owner=owner)
    if space.centroids is not None:
        flat = space.centroids.reshape(space.n_sub * space.centroids.shape[1], -1)
        write_array(folder / CENTROIDS_FILE, flat, kind=Kind.CENTROIDS, dtype=DType.F32, owner=owner, codec=space.codec)
    record = {
        "codec": CODEC_NAMES[space.codec],
        "dim": space.dim,
        "distortion": space.distortion,
        "metric": "l2",
        "n_sub": space.n_sub,
        "n_training": space.n_training,
        "rotation": space.rotation_kind,
    }
    write_file(folder / SPACE_FILE, canonical(record))
    disk.sync_folder(folder)


def load_space(folder: Path, space_id: str, files: Sequence[FileRecord] = ()) -> Space:
    """A space from its folder. files: what a manifest says of it.

    Raises DamageError if its arrays do not have the hash in its name, or its record is not the one in the manifest.
    """
    at = str(folder / SPACE_FILE)
    raw = read_small(folder / SPACE_FILE)
    if files and {file.name: file.sha256 for file in files}.get(SPACE_FILE) != hashlib.sha256(raw).hexdigest():
        raise DamageError(f"{at}: its content does not match its checksum. Run `knnstore verify`.")
    fields = parse_object(
        parse_json_bytes(raw, at), at, required=("codec", "dim", "distortion", "metric", "n_sub", "n_training", "rotation")
    )
    codec = CODECS_BY_NAME[parse_word(fields["codec"], f"{at}.codec", tuple(CODECS_BY_NAME))]
    parse_word(fields["metric"], f"{at}.metric", ("l2",))
    dim, n_sub = parse_size(fields["dim"], f"{at}.dim", most=1 << 20), parse_size(fields["n_sub"], f"{at}.n_sub", most=1 << 20)
    kind = parse_word(fields["rotation"], f"{at}.rotation", ROTATIONS)
    owner = bytes.fromhex(space_id)
    rotation = centroids = None
    if codec is not Codec.RAW:
        if not n_sub or dim % n_sub:
            raise DamageError(f"{at}: {n_sub} sub-quantizers do not divide {dim} dimensions. Run `knnstore verify`.")
        if kind != "none":
            rotation = read_array(folder / ROTATION_FILE, kind=Kind.ROTATION, owner=owner, shape=(dim, dim))
        shape = (n_sub << BITS[codec], dim // n_sub)
        centroids = read_array(folder / CENTROIDS_FILE, kind=Kind.CENTROIDS, owner=owner, shape=shape).reshape(n_sub, -1, dim // n_sub)
    if _hash(codec, dim, rotation, centroids) != space_id:
        raise DamageError(f"{folder}: its content does not have the hash in its name. Run `knnstore verify`.")
    return Space(
        id=space_id,
        codec=codec,
        dim=dim,
        rotation=rotation,
        centroids=centroids,
        rotation_kind=kind,
        n_training=parse_size(fields["n_training"], f"{at}.n_training"),
        distortion=parse_number(fields["distortion"], f"{at}.distortion"),
    )
