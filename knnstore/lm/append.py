"""A corpus added to a datastore: the same stages as `create`, in the spaces and lists that are there where they serve the new text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnstore.build import StagedSegment, staged_index, take_back
from knnstore.changes import Change, DocumentKey, commit_change
from knnstore.errors import CheckpointMismatchError, InvalidArgumentError, ModelError
from knnstore.growth import Ground, settle
from knnstore.inspection import live_hashes
from knnstore.lm.building import Building, dtype_name, fingerprint, short_list
from knnstore.lm.checkpoint import check_same_checkpoint
from knnstore.lm.corpus import CorpusInputs, list_inputs
from knnstore.lm.embed import Embedder
from knnstore.lm.models import DEFAULT_MODEL, LanguageModel, load_language_model
from knnstore.lm.reading import Known, Reading
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.progress import SILENT, Progress
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.files import disk, replace_file
from knnstore.storage.jobs import job_name, run_job
from knnstore.storage.manifest import Manifest, Operation
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json
from knnstore.store import Datastore, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["append"]

_CHECKED_FILE = "checked.json"  # segments in which the documents of the job were looked for


def append(
    path: str | Path,
    corpora: "str | Path | Sequence[str | Path] | CorpusInputs",
    *,
    domain: str = "default",
    replace: bool = False,
    prune: bool = False,
    model: "str | Path | PreTrainedModel | LanguageModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    allow_model_mismatch: bool = False,
    progress: Progress = SILENT,
) -> Datastore:
    """Adds the documents of a corpus to a datastore, in one commit.

    corpora: folders, files, or "-" for standard input (named by `name`). A document is known by its domain and id: one that is there with
    the same content is left out and counted; one with another content is refused, or with replace=True put in the old one's place.
    prune: with replace, documents of the domain that the corpus does not have are removed, so that the store follows a folder.
    model: None for the one the manifest names; any other must be the same checkpoint. dtype: None for what the keys were computed in.
    Small segments are joined on the way. Called again after a kill with the same arguments, it goes on where it was.
    Memory: as `create`. Returns the datastore, open at the new snapshot (at the one there was, where nothing changes).
    Raises ExistsError for changed content, ConflictError where others added the same documents meanwhile, CheckpointMismatchError,
    NotFoundError, CorpusError, ModelError, InvalidArgumentError, StorageError, LockedError.
    """
    if not domain:
        raise InvalidArgumentError("domain: an empty name. Give one, or leave the option out.")
    if prune and not replace:
        raise InvalidArgumentError("prune goes with replace: a store that follows a folder takes its changes too. Give both.")
    store = StoreFolder(Path(path))
    base, pin = open_snapshot(store)
    ground = Ground.of(store, base)
    try:
        if base.tokens is None or base.windows is None:
            raise InvalidArgumentError(f"{path}: its entries came from elsewhere, not from text. Add more with knnstore.append_entries.")
        inputs = corpora if isinstance(corpora, CorpusInputs) else list_inputs(corpora, stdin_name=name)
        for ignored in inputs.ignored:
            progress.note(f"{ignored.source}: left out ({ignored.reason})")
        with progress.stage("loading the model", total=None, unit="models") as stage:
            loaded = _load_model(
                base, model, dtype, tokenizer=tokenizer, revision=revision, token=token, cache_dir=cache_dir, device=device
            )
            stage.advance(1)
        if loaded.tokenizer is None:
            raise ModelError(f"{loaded.checkpoint.name}: it came without a tokenizer. Give one with tokenizer=.")
        check_same_checkpoint(base.checkpoint, loaded.checkpoint, at=str(path), allow_model_mismatch=allow_model_mismatch)
        embedder = Embedder(loaded, base.key.layer)
        if embedder.extractor.key.dim != base.key.dim:
            raise CheckpointMismatchError(
                f"{path}: its keys have {base.key.dim} dimensions, layer {base.key.layer} of this model has {embedder.extractor.key.dim}. "
                "Append with the model it was built with."
            )
        arguments: dict[str, Any] = {
            "command": "append",
            "corpora": short_list([file.source for file in inputs]),
            "content": job_name({"files": [fingerprint(file) for file in inputs]})[:12],
            "domain": domain,
            "replace": replace,
            "prune": prune,
            "model": loaded.checkpoint.identity,
            "dtype": dtype_name(loaded),
        }
        if allow_model_mismatch:
            arguments["allow_model_mismatch"] = True
        with run_job(store, job_name(arguments), arguments) as job:
            _Append(store, job, ground, embedder, domain, progress).run(inputs, arguments, replace=replace, prune=prune)
    finally:
        ground.close()
        pin.release()
    return open_store(path)


def _load_model(
    base: Manifest,
    model: "str | Path | PreTrainedModel | LanguageModel | None",
    dtype: str | None,
    *,
    revision: str | None,
    **options: Any,
) -> LanguageModel:
    """The model given, or the one a store names; in the dtype its newest segment was computed in, if none is asked for."""
    built = base.checkpoint
    if model is None:
        model = None if built.name == DEFAULT_MODEL else built.name
        revision = revision or built.revision
    if dtype is None and (model is None or isinstance(model, str | Path)):
        dtype = next((record.content.dtype for record in reversed(base.segments) if record.content.dtype is not None), None)
    return load_language_model(model, revision=revision, dtype=dtype, **options)


class _Append:
    """One append, from its job's folder to its commit."""

    def __init__(self, store: StoreFolder, job: Path, ground: Ground, embedder: Embedder, domain: str, progress: Progress) -> None:
        self._store, self._job, self._ground, self._embedder, self._domain = store, job, ground, embedder, domain
        self._progress = progress

    def run(self, inputs: CorpusInputs, arguments: dict[str, Any], *, replace: bool, prune: bool) -> None:
        """Goes on where a killed process left off, commits, or finds that nothing changes."""
        base, job = self._ground.manifest, self._job
        assert base.windows is not None, "said by append"
        checked = self._checked()
        tokenizer = self._embedder.model.tokenizer
        assert tokenizer is not None, "said by append"
        eos = bool((base.tokens or {}).get("eos", True))
        work = Building(job, DocumentTokenizer(tokenizer, eos=eos), self._embedder, base.windows, base.index, self._progress)
        if work.tokenizer.rule != base.tokens:
            raise InvalidArgumentError(
                f"{self._store.path}: its text was tokenized by the rule {base.tokens}, this version has {work.tokenizer.rule}. "
                "Create a new datastore."
            )
        known = Known(content_of=self._content_of, replace=replace, all_of=self._all_of if prune else None)
        reading = work.read(inputs, known)
        removes = [DocumentKey(self._domain, *item) for item in (*reading.replaced, *reading.gone)]
        if not reading.entries and not removes:
            return
        change = Change(
            operation=Operation(
                name="append",
                arguments={name: arguments[name] for name in arguments if name not in ("command", "content", "model", "dtype")},
                counts={
                    "documents": reading.documents,
                    "entries": reading.entries,
                    "repeated": reading.repeated,
                    "replaced": len(reading.replaced),
                    "removed": len(reading.gone),
                    "skipped": len(reading.skipped),
                },
            ),
            **self._segments(work, reading, removes),
            documents={self._domain: reading.documents} if reading.documents else {},
            removes=removes,
            checked=checked,
        )
        commit_change(self._store, base, change, job=job)

    def _segments(self, work: Building, reading: Reading, removes: Sequence[DocumentKey]) -> dict[str, Any]:
        """What is staged of the change."""
        if not reading.entries:
            return {}
        index = work.index(reading, self._ground)
        work.encode(reading, *index)
        new = [StagedSegment(draft.folder, ((self._domain, 0, draft.n_rows),)) for draft in reading.segments]
        settled = settle(self._job, self._ground, new, index, dying=self._ground.rows_of(removes))
        return {**settled, **staged_index(self._job, self._ground.manifest.key.dim)}

    def _checked(self) -> frozenset[str]:
        """Takes up what is left of the job, or begins it. Returns the segments in which its documents were looked for."""
        job, path = self._job, self._job / _CHECKED_FILE
        if not take_back(self._store, job):
            for leftover in job.iterdir():
                if leftover.name not in ("lock", "job.json"):
                    disk.remove_tree(leftover)
        if not path.exists():
            replace_file(path, canonical([record.content.uuid for record in self._ground.manifest.segments]))
        return frozenset(parse_json(path))

    def _content_of(self, document_id: str) -> str | None:
        return self._ground.known_content(self._domain, document_id)

    def _all_of(self) -> Iterator[tuple[str, str | None]]:
        return live_hashes(self._ground.segments, self._domain)
