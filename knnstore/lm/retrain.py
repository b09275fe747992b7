"""Compaction of a datastore, and a new space for keys that were not kept: the model runs over the stored tokens again.

Neither torch nor a model is loaded where they are not needed.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from knnstore.build import Index, StagedSegment, staged_index, take_back, train_index
from knnstore.compaction import COMMAND, Family, compact_store, packs, write_families
from knnstore.errors import InvalidArgumentError
from knnstore.growth import Ground
from knnstore.joining import copy_documents
from knnstore.progress import SILENT, Progress
from knnstore.rewriting import Rewriting
from knnstore.sampling import has_keys, sample_keys
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.files import disk, replace_file
from knnstore.storage.jobs import JOB_FILE, job_name, other_jobs, remove_job, run_job
from knnstore.storage.manifest import Manifest
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json
from knnstore.storage.segment import Segment
from knnstore.store import Datastore, open_made

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from knnstore.lm.embed import Embedder
    from knnstore.lm.models import LanguageModel

__all__ = ["compact"]

_JOB = "retrain"
_DRAFTS_FILE = "drafts.json"  # segments whose documents are copied, and which they were copied from


def compact(
    path: str | Path,
    *,
    retrain: bool = False,
    lossy: bool = False,
    model: "str | Path | PreTrainedModel | LanguageModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    allow_model_mismatch: bool = False,
    progress: Progress = SILENT,
) -> Datastore:
    """Writes segments again where that helps, in one commit: small ones of a space are joined, dead rows dropped, keys of stores that
    were too small for codes encoded, and codes listed anew where a space has outgrown its lists. Codes stay as they are.

    retrain: all entries come into one new space, trained on a sample of all, from kept keys, or by running the model over the stored
    tokens. lossy: with retrain, from what the codes stand for where keys were not kept, and no model. model: None for the one the
    manifest names; any other must be the same checkpoint. dtype: None for what the newest keys were computed in.
    The calibration is kept; after retrain it is stale. A run of the model that was killed goes on where it was, anything else begins
    anew. Needs as much disk space as what it writes again, and a half more on the way; what was there before goes with `gc`.
    Memory: 64 MiB of codes, 4 bytes an entry of one segment, 1 GiB for the sample, some hundred bytes a document.
    Returns the datastore, open at the new snapshot (at the one there was, where nothing is to do). Raises ConflictError where others
    rewrote the same segments meanwhile, InvalidArgumentError, CheckpointMismatchError, NotFoundError, ModelError, DamageError,
    StorageError, LockedError.
    """
    if lossy and not retrain:
        raise InvalidArgumentError("lossy (--lossy) goes with retrain (--retrain): without it no code is decoded. Give both.")
    with ExitStack() as stack:
        store = StoreFolder(Path(path))
        base, pin = open_snapshot(store)
        stack.callback(pin.release)
        ground = Ground.of(store, base)
        stack.callback(ground.close)
        if retrain and not lossy and _runs_model(ground):
            options = {"tokenizer": tokenizer, "token": token, "cache_dir": cache_dir, "device": device}
            made = _with_model(
                store,
                ground,
                progress,
                model=model,
                revision=revision,
                dtype=dtype,
                allow_model_mismatch=allow_model_mismatch,
                **options,
            )
            return open_made(path, made.snapshot)
    if model is not None:
        progress.note("the model is not used: nothing has to be computed again")
    return open_made(path, compact_store(store.path, retrain=retrain, lossy=lossy, progress=progress).snapshot)


def _runs_model(ground: Ground) -> bool:
    """Whether there are keys to be computed again, and tokens to compute them from."""
    without = [segment for segment in ground.segments if not has_keys(segment)]
    return bool(without) and ground.manifest.windows is not None and all(segment.content.windows for segment in without)


@dataclass(frozen=True)
class _AllKeys(Ground):
    """A ground whose spaces do not count. segments: those with keys, of which a part comes into the sample."""

    def choose_index(self, sample: NDArray[np.float32], n_new: int) -> Index:
        n = sum(segment.record.n_live() for segment in self.segments)
        options = self.manifest.index
        stored = sample_keys(self.segments, len(sample) * n // n_new, seed=options.seed)
        return train_index(np.concatenate((sample, stored)) if n else sample, n_new + n, options)

    def known_index(self) -> frozenset[str]:
        return frozenset()


def _with_model(store: StoreFolder, ground: Ground, progress: Progress, *, allow_model_mismatch: bool, **model_options: Any) -> Manifest:
    """A new space for all entries; keys that were not kept are computed."""
    from knnstore.lm.building import dtype_name
    from knnstore.lm.opening import open_embedder

    base = ground.manifest
    embedder = open_embedder(store.path, base, allow_model_mismatch=allow_model_mismatch, progress=progress, **model_options)
    arguments = {
        "command": _JOB,
        "snapshot": base.snapshot,
        "time": base.time,
        "model": embedder.model.checkpoint.identity,
        "dtype": dtype_name(embedder.model),
    }
    name = job_name(arguments)
    for other, asked in other_jobs(store, name):
        if asked.get("command") == _JOB:
            remove_job(store.staging / other)  # of an older snapshot, or another model
    shown = {"retrain": True, "lossy": False} | ({"allow_model_mismatch": True} if allow_model_mismatch else {})
    with run_job(store, name, arguments) as job:
        return _compute(Rewriting(store, ground, job, progress), embedder).commit(COMMAND, shown, stale=True)


def _compute(work: Rewriting, embedder: "Embedder") -> Rewriting:
    """All segments written again, keys computed where there are none."""
    from knnstore.lm.building import Building
    from knnstore.lm.drafts import DraftSegment, Reading
    from knnstore.lm.tokens import DocumentTokenizer

    ground, job = work.ground, work.job
    base, tokenizer = ground.manifest, embedder.model.tokenizer
    assert base.windows is not None, "said by _runs_model"
    assert tokenizer is not None, "said by open_embedder"
    if not take_back(work.store, job):
        for leftover in job.iterdir():
            if leftover.name not in ("lock", JOB_FILE):
                disk.remove_tree(leftover)
    drafts = _copied(work)
    segments = tuple(DraftSegment(staged.folder, staged.runs[-1][2], n_records) for _, staged, n_records in drafts)
    reading = Reading(segments=segments, documents=0, repeated=0, skipped=(), replaced=(), gone=())
    with_keys = tuple(segment for segment in ground.segments if has_keys(segment))
    building = Building(job, DocumentTokenizer(tokenizer), embedder, base.windows, base.index, work.progress)
    space, coarse = building.index(reading, _AllKeys(base, with_keys, {}, {}))
    building.encode(reading, space, coarse)
    work.made += [(pack, staged) for pack, staged, _ in drafts]
    index = staged_index(job, base.key.dim)
    work.spaces += index["spaces"]
    work.coarse += index["coarse"]
    if with_keys:
        write_families(work, [Family(space, coarse, with_keys, base.index, whole=True)])
    return work


def _copied(work: Rewriting) -> list[tuple[list[Segment], StagedSegment, int]]:
    """The documents of all segments without keys, copied to segments that are to be filled; those that a killed process copied.

    With each: which segments it was copied from, and how many records it has.
    """
    ground, folder, listed = work.ground, work.job / "segments", work.job / _DRAFTS_FILE
    if not listed.exists():
        disk.remove_tree(folder)
        without = [segment for segment in ground.segments if not has_keys(segment)]
        fields = []
        with work.progress.stage("copying documents", total=sum(s.record.n_live() for s in without), unit="entries") as stage:
            for pack in packs(without, lambda segment: None, ground.manifest.index.segment_entries):
                copy, runs, n_records = copy_documents(folder, pack)
                fields.append({"parts": [part.content.uuid for part in pack], "records": n_records, "runs": runs, "uuid": copy.name})
                stage.advance(runs[-1][2])
        disk.sync_folder(folder)
        replace_file(listed, canonical(fields))
    of_uuid = {segment.content.uuid: segment for segment in ground.segments}
    found = []
    for draft in parse_json(listed):
        runs = tuple((domain, first, stop) for domain, first, stop in draft["runs"])
        found.append(([of_uuid[uuid] for uuid in draft["parts"]], StagedSegment(folder / draft["uuid"], runs), draft["records"]))
    kept = {staged.folder for _, staged, _ in found}
    for leftover in folder.iterdir():
        if leftover not in kept:
            disk.remove_tree(leftover)
    return found
