"""Digests of model files, computed once per file and kept in the user's cache folder."""

import hashlib
import json
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knnstore.errors import ModelError, StorageError

__all__ = ["TensorDigest", "cache_folder", "file_digest", "tensor_digest", "tensor_digests"]

_KEPT_FROM_BYTES = 32 << 20
"""Smaller files are hashed again each time: it takes less than a tenth of a second."""

_SETTLED_S = 2.0
"""A file changed less than this before it was hashed is not kept: a second change could leave the same time stamp (FAT counts in 2 s)."""

_CHUNK_BYTES = 64 << 20
_KEPT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDigest:
    """One stored tensor: torch's name of its dtype (`float16`), its shape, and the sha256 of its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def cache_folder() -> Path:
    """Where knnstore keeps what it can compute again: file digests and de-quantized models."""
    return Path(platformdirs.user_cache_dir("knnstore"))


def tensor_digest(tensor: Tensor) -> TensorDigest:
    """Digest of a tensor on any device, with at most 64 MiB (or one row along its first dimension) copied at a time.

    Raises ModelError for a tensor without bytes to hash (on the meta device, sparse).
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ModelError(f"a tensor of shape {tuple(tensor.shape)} is on the meta device or sparse: it has no bytes to hash.")
    digest = hashlib.sha256()
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        digest.update(_bytes_of(tensor))
    else:
        rows = tensor if tensor.ndim else tensor.reshape(1)
        row_bytes = max(1, rows[:1].numel() * rows.element_size())
        for part in rows.split(max(1, _CHUNK_BYTES // row_bytes)):
            digest.update(_bytes_of(part.contiguous().cpu()))
    return TensorDigest(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), sha256=digest.hexdigest())


def tensor_digests(path: Path) -> dict[str, TensorDigest]:
    """Digest of each tensor stored in a `.safetensors` or `.bin` file, by its name there.

    The file is mapped, never read as a whole. Raises ModelError for a file that is not of its kind, StorageError if it cannot be read.
    """

    def read() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name, tensor in _stored_tensors(path):
            digest = tensor_digest(tensor)
            found[name] = [digest.dtype, list(digest.shape), digest.sha256]
        return found

    return {
        name: TensorDigest(dtype=dtype, shape=tuple(shape), sha256=sha256)
        for name, (dtype, shape, sha256) in _kept(path, "tensors", read).items()
    }


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hex digits. Raises StorageError if it cannot be read."""

    def read() -> dict[str, Any]:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    return str(_kept(path, "file", read)["sha256"])


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _stored_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path}: not a whole safetensors file ({error}). Fetch or save the model again.") from error
        return
    try:
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 are not zip archives and cannot be mapped.
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{path}: not a whole torch checkpoint of plain tensors ({error}). Save the model as safetensors.") from error
    if not isinstance(stored, dict):
        raise ModelError(f"{path}: holds a {type(stored).__name__}, not named tensors. Save the model as safetensors.")
    for name, tensor in stored.items():
        if isinstance(tensor, Tensor):
            yield str(name), tensor


def _kept(path: Path, kind: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` finds in the file, or what it found before in the very same file. A cache that fails is as if it were not there."""
    with _reading(path):
        before = path.stat()
        stamp = [_KEPT_VERSION, kind, before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        settled = time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S
        if before.st_size < _KEPT_FROM_BYTES or not settled:
            return read()
        place = cache_folder() / "digests" / f"{_checksum(stamp)}.json"
        kept = _load(place, stamp)
        if kept is not None:
            return kept
        found = read()
        after = path.stat()
        if (after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns) == tuple(stamp[3:]):
            with suppress(OSError):
                _store(place, stamp, found)
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _load(place: Path, stamp: list[Any]) -> dict[str, Any] | None:
    try:
        kept = json.loads(place.read_bytes())
        sound = kept["stamp"] == stamp and kept["checksum"] == _checksum(kept["found"])
        return dict(kept["found"]) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(place: Path, stamp: list[Any], found: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"stamp": stamp, "found": found, "checksum": _checksum(found)})
    with NamedTemporaryFile("w", dir=place.parent, suffix=".part", delete=False) as file:
        part = Path(file.name)
        try:
            file.write(content)
            file.close()
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
