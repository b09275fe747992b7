"""Entries that come from elsewhere (own extractors, other kNN-LM datastores) → a datastore, without any model."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.build import begin_store, blank_manifest, choose_codec, save_index, staged_index, staged_segment, take_back, train_index
from knnstore.changes import Change, commit_change
from knnstore.errors import InvalidArgumentError
from knnstore.growth import Ground
from knnstore.intake import SPOOL_FILE, EntryDocument, Intake
from knnstore.progress import SILENT, Progress
from knnstore.search import check_keys
from knnstore.settling import commit_growth
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.coarse import choose_nprobe
from knnstore.storage.files import disk
from knnstore.storage.jobs import run_attempt, run_job
from knnstore.storage.manifest import IndexOptions, Manifest, Operation
from knnstore.storage.space import MIN_TRAINING

__all__ = ["append_entries", "create_from_entries"]

Keys = NDArray[np.float32]
Batches = Iterable[tuple[Any, Any, Sequence[EntryDocument]]]

_APPEND = "append_entries"


def create_from_entries(
    path: str | Path,
    batches: Batches,
    *,
    checkpoint: Checkpoint,
    dim: int,
    vocab_size: int,
    key_layer: str = "external",
    options: IndexOptions | None = None,
    training_keys: Any | None = None,
    expected_entries: int | None = None,
    progress: Progress = SILENT,
) -> Manifest:
    """A new datastore from entries that come from elsewhere, without any model.

    batches: of keys (n, dim) numbers, values (n,) token ids, and the documents they belong to, in order. training_keys: (m, dim)
    keys to train on, with expected_entries: how many entries will come; without, all keys are spooled to the store's disk
    first (4 * dim bytes an entry, removed at the end) and a random sample of all is trained on.
    Returns the manifest of snapshot 1. Raises ExistsError, InvalidArgumentError, StorageError.
    """
    options = options or IndexOptions()
    if not 1 <= dim <= 1 << 16:
        raise InvalidArgumentError(f"dim {dim}: use 1 to {1 << 16}.")
    if vocab_size != checkpoint.vocab_size:
        raise InvalidArgumentError(f"vocab_size {vocab_size}: the checkpoint has {checkpoint.vocab_size}.")
    if (training_keys is None) != (expected_entries is None):
        raise InvalidArgumentError("training_keys and expected_entries go together: give both or none.")
    arguments = {"command": "create_from_entries", "dim": dim, "checkpoint": asdict(checkpoint), **asdict(options)}
    store, store_uuid, name = begin_store(path, arguments)
    with run_job(store, name, arguments) as job:
        take_back(store, job)
        for leftover in ("segments", "index", SPOOL_FILE):
            disk.remove_tree(job / leftover)  # entries cannot be asked for again: such a job begins anew
        trained = None
        if training_keys is not None and expected_entries is not None:
            trained = train_index(_training_keys(training_keys, dim, expected_entries, options), expected_entries, options)
        with Intake(job, dim=dim, vocab_size=vocab_size, options=options, trained=trained) as intake:
            _take_all(intake, batches, dim, expected_entries, progress)
            if not intake.n_entries:
                raise InvalidArgumentError("no entries were given; a datastore has at least one.")
            index = trained or intake.encode_spool(lambda sample, n: train_index(sample, n, options), progress)
            save_index(job, *index)
            staged = intake.finish(*index)
        key = KeyLayer(layer=key_layer, dim=dim)
        nprobe = choose_nprobe(intake.n_entries, 1 if index[1] is None else index[1].nlist)
        start = blank_manifest(store_uuid, checkpoint=checkpoint, key=key, tokens=None, windows=None, index=options, nprobe=nprobe)
        change = Change(
            operation=Operation(
                name="create_from_entries",
                arguments={"codec": options.codec},
                counts={"documents": sum(intake.documents.values()), "entries": intake.n_entries},
            ),
            **staged_index(job, dim),
            segments=[staged_segment(segment) for segment in staged],
            documents=intake.documents,
        )
        return commit_change(store, start, change, job=job)


def append_entries(path: str | Path, batches: Batches, *, replace: bool = False, progress: Progress = SILENT) -> Manifest:
    """Adds entries that come from elsewhere to a datastore, in one commit.

    batches: as for `create_from_entries`, of the same model and key layer. A document that is there with the same content (its text,
    or without text its values) is left out and counted; with another content it is refused, or replaced with replace=True.
    Keys are spooled to the store's disk first (4 * dim bytes an entry). Small segments are joined on the way.
    Returns the manifest of the new snapshot, or of the one there was where nothing is new. Raises ExistsError for changed content,
    ConflictError where others added the same documents meanwhile, InvalidArgumentError, StorageError.
    """
    store = StoreFolder(Path(path))
    base, pin = open_snapshot(store)
    ground = Ground.of(store, base)
    try:
        with run_attempt(store, _APPEND) as job:  # entries cannot be asked for again: it is never continued
            return _append(store, job, ground, batches, replace=replace, progress=progress)
    finally:
        ground.close()
        pin.release()


def _append(store: StoreFolder, job: Path, ground: Ground, batches: Batches, *, replace: bool, progress: Progress) -> Manifest:
    base, dim = ground.manifest, ground.manifest.key.dim
    with Intake(
        job, dim=dim, vocab_size=base.checkpoint.vocab_size, options=base.index, known=ground.known_content, replace=replace
    ) as intake:
        _take_all(intake, batches, dim, None, progress)
        if not intake.documents:
            return base
        index = intake.encode_spool(ground.choose_index, progress)
        save_index(job, *index, known=ground.known_index())
        staged = intake.finish(*index)
    change = Change(
        operation=Operation(
            name=_APPEND,
            arguments={"replace": replace},
            counts={
                "documents": sum(intake.documents.values()),
                "entries": intake.n_new,
                "repeated": intake.repeated,
                "replaced": len(intake.removes),
            },
        ),
        documents=intake.documents,
        removes=intake.removes,
        checked={record.content.uuid: record.dead_ranges() for record in base.segments},
    )
    return commit_growth(store, job, ground, staged, index, change, progress=progress)


def _take_all(intake: Intake, batches: Batches, dim: int, expected_entries: int | None, progress: Progress) -> None:
    with progress.stage("reading entries", total=expected_entries, unit="entries") as stage:
        for keys, values, documents in batches:
            stage.advance(intake.take(check_keys(keys, dim) if len(keys) else np.zeros((0, dim), np.float32), values, documents))
    intake.end()


def _training_keys(training_keys: Any, dim: int, expected_entries: int, options: IndexOptions) -> Keys:
    keys = check_keys(training_keys, dim)
    least = MIN_TRAINING[choose_codec(expected_entries, options)]
    if len(keys) < least:
        raise InvalidArgumentError(f"training_keys: {len(keys)} keys; {options.codec} needs {least}. Give more, or none.")
    return keys
