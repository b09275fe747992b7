"""entries → codes → segments → commit: what every way of making a datastore goes through.

`knnstore.entries` makes a datastore without a model, `knnstore.lm.create` with one.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.changes import Staged
from knnstore.errors import DamageError, ExistsError, NotFoundError
from knnstore.format import CODECS_BY_NAME, STORE_FILE, Codec
from knnstore.storage.calibration import Calibration
from knnstore.storage.catalog import StoreFolder, file_records, list_manifests, read_current, read_manifest
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.coarse import SAMPLES_PER_LIST, Coarse, choose_nlist, load_coarse, save_coarse, train_coarse
from knnstore.storage.commits import lay_foundation
from knnstore.storage.files import disk, hold_lock, write_file
from knnstore.storage.jobs import JOB_FILE, MOVES_FILE, job_name, other_jobs, read_moves
from knnstore.storage.manifest import (
    CoarseRecord,
    IndexOptions,
    Manifest,
    Operation,
    SegmentRecord,
    SpaceRecord,
    WindowRule,
)
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json
from knnstore.storage.segment import read_segment_content
from knnstore.storage.segment_writer import CodesWriter
from knnstore.storage.space import MIN_TRAINING, Space, load_space, save_space, train_space

__all__ = ["StagedSegment", "sample_rows", "train_index"]

Keys = NDArray[np.float32]
Index = tuple[Space, Coarse | None]

DEFAULT_K = 1_024  # neighbours: more help perplexity more than better distances do (docs/design.md, Index)
SAMPLE_BYTES = 1 << 30  # bytes of sampled keys held while training
SAMPLE_MIN = 65_536  # keys: what a product quantizer is trained on at most
MEASURED_ROWS = 1_024  # rows, of those encoded at a time, whose distortion is measured
ENCODE_ROWS = 16_384  # rows encoded at a time
_CHOICE = "choice.json"  # which space and coarse quantizer a job uses


@dataclass(frozen=True, slots=True)
class StagedSegment:
    """A segment in a job's folder that waits for its commit. runs: (domain, first row, stop row); dead: rows that never count."""

    folder: Path
    runs: tuple[tuple[str, int, int], ...]
    dead: tuple[tuple[int, int], ...] = ()


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
    # A sample may be a gigabyte that is mapped from the disk: its centroids are turned, and not a copy of it.
    return space, train_coarse(sample, space=space.id, nlist=nlist, seed=options.seed, turn=space.rotate)


def save_index(job: Path, space: Space, coarse: Coarse | None, *, known: Container[str] = ()) -> None:
    """Stages space and coarse quantizer in a job's folder, both or none. known: ids of those that the store has already."""
    temporary = job / "index.tmp"
    disk.remove_tree(temporary)
    for name in ("spaces", "coarse"):
        disk.make_folder(temporary / name)
    if space.id not in known:
        save_space(space, temporary / "spaces" / space.id)
    if coarse is not None and coarse.id not in known:
        save_coarse(coarse, temporary / "coarse" / coarse.id)
    write_file(temporary / _CHOICE, canonical({"space": space.id, "coarse": None if coarse is None else coarse.id}))
    for folder in (temporary / "spaces", temporary / "coarse", temporary):
        disk.sync_folder(folder)
    disk.rename(temporary, job / "index")
    disk.sync_folder(job)


def load_index(
    job: Path, dim: int, spaces: Mapping[str, Space] = MappingProxyType({}), coarse: Mapping[str, Coarse] = MappingProxyType({})
) -> Index:
    """What `save_index` chose: staged, or one of those the store has. Raises NotFoundError where it did not get that far."""
    folder = job / "index"
    if not folder.exists():
        raise NotFoundError(f"{job}: no index was trained yet.")
    choice = parse_json(folder / _CHOICE)
    space_id, coarse_id = choice["space"], choice["coarse"]
    space = spaces.get(space_id) or load_space(folder / "spaces" / space_id, space_id)
    if coarse_id is None:
        return space, None
    return space, coarse.get(coarse_id) or load_coarse(folder / "coarse" / coarse_id, coarse_id, space=space_id, dim=dim)


def has_index(job: Path, known: Container[str]) -> bool:
    """Whether what `save_index` chose can be had: it is staged, or known, the ids of what the store has, has it. True before a choice."""
    folder = job / "index"
    if not folder.exists():
        return True
    choice = parse_json(folder / _CHOICE)
    places = {choice["space"]: folder / "spaces", choice["coarse"]: folder / "coarse"}
    return all(name is None or name in known or (place / name).exists() for name, place in places.items())


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


def blank_manifest(
    store_uuid: str,
    *,
    checkpoint: Checkpoint,
    key: KeyLayer,
    tokens: dict[str, Any] | None,
    windows: WindowRule | None,
    index: IndexOptions,
    calibration: Calibration | None = None,
    nprobe: int,
    k: int = DEFAULT_K,
) -> Manifest:
    """What a store says of itself before anything is in it."""
    return Manifest(
        uuid=store_uuid,
        snapshot=0,
        parent=None,
        time="",
        operation=Operation(name="", arguments={}, counts={}),
        checkpoint=checkpoint,
        key=key,
        tokens=tokens,
        windows=windows,
        index=index,
        spaces=(),
        coarse=(),
        segments=(),
        documents={},
        calibration=calibration,
        k=k,
        nprobe=nprobe,
    )


def staged_index(job: Path, dim: int) -> dict[str, Any]:
    """What `save_index` staged, as a `Change` takes it."""
    folder = job / "index"
    spaces = [load_space(child, child.name) for child in sorted((folder / "spaces").iterdir())]
    space_id = parse_json(folder / _CHOICE)["space"]
    coarse = [load_coarse(child, child.name, space=space_id, dim=dim) for child in sorted((folder / "coarse").iterdir())]
    return {
        "spaces": [Staged(folder / "spaces" / space.id, space_record(space, folder / "spaces" / space.id)) for space in spaces],
        "coarse": [Staged(folder / "coarse" / item.id, coarse_record(item, folder / "coarse" / item.id)) for item in coarse],
    }


def staged_segment(segment: StagedSegment) -> Staged[SegmentRecord]:
    """A segment that waits in a job's folder, with what a manifest says of it."""
    return Staged(segment.folder, replace(segment_record(segment.folder, segment.runs), dead=segment.dead))


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


def take_back(store: StoreFolder, job: Path) -> bool:
    """Moves back to a job what its commit had put in place when it was killed. Returns whether all of it is in the job again.

    It is not where that commit had counted, or others use what it staged: such a job is to begin anew.
    """
    if not (job / MOVES_FILE).exists():
        return True
    moves = read_moves(store, job)
    with hold_lock(store.lock, purpose="taking back what a killed command left", wait=True):
        newest = read_current(store)[0] if store.current.exists() else 0
        named: set[Path] = set()
        for manifest in (read_manifest(store, number) for number in list_manifests(store) if number <= newest):
            named.update(store.segment(record.content.uuid) for record in manifest.segments)
            named.update(store.space(record.id) for record in manifest.spaces)
            named.update(store.coarse(record.id) for record in manifest.coarse)
        for source, target in moves:
            if target not in named and target.exists() and not source.exists():
                disk.make_folder(source.parent)
                disk.rename(target, source)
                disk.sync_folder(source.parent)
        if not all(source.exists() for source, _ in moves):
            return False
        for number in [number for number in list_manifests(store) if number > newest]:
            disk.remove(store.manifest(number))  # it never counted; left alone, it would be taken for a snapshot whose CURRENT is lost
            disk.sync_folder(store.manifests)
        disk.remove(job / MOVES_FILE)
    return True


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
