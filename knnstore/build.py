"""entries → codes → segments → commit: what every way of making a datastore goes through.

`knnstore.entries` makes a datastore without a model, `knnstore.lm.create` with one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError, ExistsError, InvalidArgumentError, NotFoundError
from knnstore.format import COARSE, CODECS_BY_NAME, SEGMENT_ENTRIES, SEGMENTS, SPACES, STORE_FILE, Codec
from knnstore.storage.catalog import StoreFolder, commit, file_records, lay_foundation, list_manifests, now
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.coarse import SAMPLES_PER_LIST, Coarse, choose_nlist, load_coarse, save_coarse, train_coarse
from knnstore.storage.files import disk
from knnstore.storage.jobs import JOB_FILE, job_name, other_jobs
from knnstore.storage.manifest import (
    Calibration,
    CoarseRecord,
    Manifest,
    Operation,
    SegmentRecord,
    SpaceRecord,
)
from knnstore.storage.segment import read_segment_content
from knnstore.storage.segment_writer import CodesWriter
from knnstore.storage.space import MIN_TRAINING, ROTATIONS, Space, load_space, save_space, train_space

__all__ = ["IndexOptions", "StagedSegment", "sample_rows", "train_index"]

Keys = NDArray[np.float32]

DEFAULT_K = 1_024  # neighbours: more help perplexity more than better distances do (docs/design.md, Index)
DEFAULT_NPROBE = 32  # lists: beyond this, perplexity gains under 0.1%
SAMPLE_BYTES = 1 << 30  # bytes of sampled keys held while training
SAMPLE_MIN = 65_536  # keys: what a product quantizer is trained on at most
MEASURED_ROWS = 1_024  # rows, of those encoded at a time, whose distortion is measured
ENCODE_ROWS = 16_384  # rows encoded at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """How keys become codes and lists.

    codec: `pq4` (4-bit codes, scanned by FastScan) or `pq8`. rotation: `random`, `opq` or `none`. keep_keys: None, `f16`,
    `bf16` or `f32`, for exact search. seed: of rotation, sample and k-means. segment_entries: entries in a segment at most.
    """

    codec: str = "pq4"
    rotation: str = "random"
    keep_keys: str | None = None
    seed: int = 0
    segment_entries: int = SEGMENT_ENTRIES

    def __post_init__(self) -> None:
        if self.codec not in ("pq4", "pq8"):
            raise InvalidArgumentError(f"codec {self.codec!r}: use pq4 or pq8.")
        if self.rotation not in ROTATIONS:
            raise InvalidArgumentError(f"rotation {self.rotation!r}: use one of {', '.join(ROTATIONS)}.")
        if self.keep_keys not in (None, "f16", "bf16", "f32"):
            raise InvalidArgumentError(f"keep_keys {self.keep_keys!r}: use f16, bf16 or f32.")
        if not 1 <= self.segment_entries <= 1 << 32:
            raise InvalidArgumentError(f"segment_entries {self.segment_entries}: use 1 to {1 << 32}.")


@dataclass(frozen=True, slots=True)
class StagedSegment:
    """A segment in a job's folder that waits for its commit. runs: (domain, first row, stop row)."""

    folder: Path
    runs: tuple[tuple[str, int, int], ...]


def sample_size(n_entries: int, dim: int) -> int:
    """Keys to train on: enough for each list, within the memory allowed."""
    wanted = max(SAMPLE_MIN, choose_nlist(n_entries) * SAMPLES_PER_LIST)
    return min(n_entries, wanted, max(SAMPLE_MIN, SAMPLE_BYTES // (4 * dim)))


def sample_rows(n_entries: int, dim: int, seed: int) -> NDArray[np.int64]:
    """Rows of a whole datastore to train on, ascending."""
    n = sample_size(n_entries, dim)
    return np.sort(np.random.default_rng(seed).choice(n_entries, n, replace=False))


def choose_codec(n_entries: int, options: IndexOptions) -> Codec:
    """The codec asked for, or raw where there are too few entries to train it."""
    codec = CODECS_BY_NAME[options.codec]
    return codec if n_entries >= MIN_TRAINING[codec] else Codec.RAW


def train_index(sample: Keys, n_entries: int, options: IndexOptions) -> tuple[Space, Coarse | None]:
    """Space and coarse quantizer (None: one flat list) for a datastore of n_entries, from a sample of its keys (n, dim) float32."""
    space = train_space(sample, codec=choose_codec(n_entries, options), rotation=options.rotation, seed=options.seed)
    nlist = 1 if space.codec is Codec.RAW else choose_nlist(n_entries)
    if nlist == 1:
        return space, None
    return space, train_coarse(space.rotate(sample), space=space.id, nlist=nlist, seed=options.seed)


def save_index(job: Path, space: Space, coarse: Coarse | None) -> None:
    """Stages space and coarse quantizer in a job's folder, both or none."""
    temporary = job / "index.tmp"
    disk.remove_tree(temporary)
    disk.make_folder(temporary / "coarse")
    save_space(space, temporary / "spaces" / space.id)
    if coarse is not None:
        save_coarse(coarse, temporary / "coarse" / coarse.id)
    for folder in (temporary / "spaces", temporary / "coarse", temporary):
        disk.sync_folder(folder)
    disk.rename(temporary, job / "index")
    disk.sync_folder(job)


def load_index(job: Path, dim: int) -> tuple[Space, Coarse | None]:
    """What `save_index` staged. Raises NotFoundError where it did not get that far."""
    if not (job / "index").exists():
        raise NotFoundError(f"{job}: no index was trained yet.")
    space_id = next((job / "index" / "spaces").iterdir()).name
    space = load_space(job / "index" / "spaces" / space_id, space_id)
    coarse_folder = next((job / "index" / "coarse").iterdir(), None)
    coarse = None if coarse_folder is None else load_coarse(coarse_folder, coarse_folder.name, space=space_id, dim=dim)
    return space, coarse


def encode_runs(writer: CodesWriter, first_rows: Sequence[int], runs: Sequence[Keys], space: Space, coarse: Coarse | None) -> None:
    """Encodes keys, (n, dim) float32 for each run of consecutive rows, all at once, and hands them to the writer."""
    keys = runs[0] if len(runs) == 1 else np.concatenate(runs)
    rotated = space.rotate(keys)
    codes = space.encode(rotated)
    lists = np.zeros(len(keys), np.uint32) if coarse is None else coarse.assign(rotated)
    at = 0
    for first_row, run in zip(first_rows, runs, strict=True):
        stop = at + len(run)
        writer.put(first_row, codes[at:stop], lists[at:stop], run)
        at = stop
    some = slice(None, None, max(1, len(keys) // MEASURED_ROWS))
    error = np.square(rotated[some] - space.decode(codes[some])).sum(dtype=np.float64)
    writer.measured(float(error), len(rotated[some]))


def commit_new_store(
    store: StoreFolder,
    job: Path,
    staged: Sequence[StagedSegment],
    space: Space,
    coarse: Coarse | None,
    *,
    store_uuid: str,
    operation: Operation,
    checkpoint: Checkpoint,
    key: KeyLayer,
    tokens: dict[str, Any] | None,
    documents: dict[str, int],
    calibration: Calibration | None,
    k: int,
    nprobe: int,
) -> Manifest:
    """The first snapshot of a store from what its job staged."""
    moves = [(job / "index" / "spaces" / space.id, store.space(space.id))]
    if coarse is not None:
        moves.append((job / "index" / "coarse" / coarse.id, store.coarse(coarse.id)))
    moves += [(segment.folder, store.segment(segment.folder.name)) for segment in staged]

    def build(number: int, parent: tuple[int, str] | None) -> Manifest:
        return Manifest(
            uuid=store_uuid,
            snapshot=number,
            parent=parent,
            time=now(),
            operation=operation,
            checkpoint=checkpoint,
            key=key,
            tokens=tokens,
            spaces=(space_record(space, store.space(space.id)),),
            coarse=() if coarse is None else (coarse_record(coarse, store.coarse(coarse.id)),),
            segments=tuple(segment_record(store.segment(segment.folder.name), segment.runs) for segment in staged),
            documents=documents,
            calibration=calibration,
            k=k,
            nprobe=nprobe,
        )

    return commit(store, None, build, staged=moves)


def space_record(space: Space, folder: Path) -> SpaceRecord:
    """A space as the manifest lists it."""
    return SpaceRecord(
        id=space.id,
        codec=space.codec,
        n_sub=space.n_sub,
        rotation=space.rotation_kind,
        distortion=space.distortion,
        files=file_records(folder),
    )


def coarse_record(coarse: Coarse, folder: Path) -> CoarseRecord:
    """A coarse quantizer as the manifest lists it."""
    return CoarseRecord(id=coarse.id, space=coarse.space, nlist=coarse.nlist, files=file_records(folder))


def segment_record(folder: Path, runs: tuple[tuple[str, int, int], ...]) -> SegmentRecord:
    """A segment as the manifest lists it."""
    content, sha256 = read_segment_content(folder)
    return SegmentRecord(content=content, runs=runs, dead=(), sha256=sha256)


def check_vacant(store: StoreFolder) -> None:
    """Raises ExistsError where a finished store, or something that is no datastore, is at the path."""
    if store.current.exists():
        raise ExistsError(f"{store.path}: a datastore exists already. Choose another --store, or remove it first.")
    if store.path.exists() and not store.identity.exists() and (not store.path.is_dir() or _is_foreign(store.path)):
        raise ExistsError(f"{store.path}: something that is not a datastore is there. Choose another --store.")


def begin_store(path: str | Path, arguments: Mapping[str, Any]) -> tuple[StoreFolder, str, str]:
    """Lays the foundation of a new store, or takes up the same unfinished job. Returns the store, its uuid, the job's name.

    Raises ExistsError where a finished store, another unfinished one or something else is at the path, DamageError where a finished
    store lost its CURRENT.
    """
    store = StoreFolder(Path(path))
    name = job_name(arguments)
    check_vacant(store)
    if list_manifests(store) and not (store.staging / name / JOB_FILE).exists():
        # A create that was killed still has its job: this is a finished store that lost its CURRENT.
        raise DamageError(f"{store.current}: the file is missing, though there are snapshots. Nothing was changed; run `knnstore verify`.")
    others = other_jobs(store, name)
    if others:
        begun, asked = _difference(others[0][1], arguments)
        raise ExistsError(
            f"{store.path}: an unfinished datastore is there, begun with {begun}; this command has {asked}. "
            "Type the first command again to finish it, or remove the folder."
        )
    return store, lay_foundation(store), name


def take_back(store: StoreFolder, job: Path) -> None:
    """Moves back to a job what its commit had put in place when it was killed: before the first snapshot, nothing else is there."""
    if store.current.exists():
        return
    for name, back in ((SPACES, job / "index" / "spaces"), (COARSE, job / "index" / "coarse"), (SEGMENTS, job / "segments")):
        for folder in sorted((store.path / name).iterdir()):
            disk.make_folder(back)
            disk.rename(folder, back / folder.name)


def _is_foreign(path: Path) -> bool:
    left_by_a_kill = f"{STORE_FILE}.tmp"  # KNNSTORE comes first
    return any(child.name != left_by_a_kill for child in path.iterdir())


def _difference(begun: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, str]:
    names = [name for name in sorted({*begun, *asked}) if begun.get(name) != asked.get(name)]
    sides = (", ".join(f"{name} {_short(side.get(name))}" for name in names) for side in (begun, asked))
    first, second = sides
    return first, second


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
