"""A corpus added to a datastore: the same stages as `create`, in the spaces and lists that are there where they serve the new text."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnstore.build import StagedSegment, has_index, take_back
from knnstore.changes import Change, DocumentKey, commit_change
from knnstore.errors import InvalidArgumentError
from knnstore.filters import live_hashes
from knnstore.growth import Ground
from knnstore.lm.building import Building, dtype_name, fingerprint, short_list
from knnstore.lm.corpus import CorpusInputs, list_inputs
from knnstore.lm.embed import Embedder
from knnstore.lm.models import LanguageModel
from knnstore.lm.opening import open_embedder
from knnstore.lm.reading import Known, is_left_out_rightly
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.progress import SILENT, Progress
from knnstore.settling import commit_growth
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.files import disk, replace_file
from knnstore.storage.jobs import JOB_FILE, job_name, run_job
from knnstore.storage.manifest import Manifest, Operation
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json
from knnstore.storage.rows import RangeSet, as_ranges, subtract
from knnstore.store import Datastore, open_made

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["append", "append_corpus"]

_CHECKED_FILE = "checked.json"  # segments in which the documents of the job were looked for, with their dead rows


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
    return append_corpus(
        path,
        corpora,
        domain=domain,
        replace=replace,
        prune=prune,
        name=name,
        allow_model_mismatch=allow_model_mismatch,
        progress=progress,
        model=model,
        tokenizer=tokenizer,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        device=device,
        dtype=dtype,
    ).store


@dataclass(frozen=True, slots=True)
class Appended:
    """What an append did.

    store: open at the snapshot it made, or at the one there was where nothing changed. counts: of documents and entries added, documents
    repeated, replaced, removed, skipped.
    """

    store: Datastore
    changed: bool
    counts: dict[str, int]


def append_corpus(
    path: str | Path,
    corpora: "str | Path | Sequence[str | Path] | CorpusInputs",
    *,
    domain: str,
    replace: bool,
    prune: bool,
    name: str | None,
    allow_model_mismatch: bool,
    progress: Progress,
    **model_options: Any,
) -> Appended:
    """`append`, telling what it did."""
    if not domain:
        raise InvalidArgumentError("domain: an empty name. Give one, or leave the option out.")
    if prune and not replace:
        raise InvalidArgumentError("prune goes with replace: a store that follows a folder takes its changes too. Give both.")
    store = StoreFolder(Path(path))
    with ExitStack() as stack:
        base, pin = open_snapshot(store)
        stack.callback(pin.release)
        ground = Ground.of(store, base)
        stack.callback(ground.close)
        if base.tokens is None or base.windows is None:
            raise InvalidArgumentError(f"{path}: its entries came from elsewhere, not from text. Add more with knnstore.append_entries.")
        inputs = corpora if isinstance(corpora, CorpusInputs) else list_inputs(corpora, stdin_name=name)
        for ignored in inputs.ignored:
            progress.note(f"{ignored.source}: left out ({ignored.reason})")
        embedder = open_embedder(path, base, allow_model_mismatch=allow_model_mismatch, progress=progress, **model_options)
        shown: dict[str, Any] = {
            "corpora": short_list([file.source for file in inputs]),
            "domain": domain,
            "replace": replace,
            "prune": prune,
        }
        if allow_model_mismatch:
            shown["allow_model_mismatch"] = True
        arguments = {
            **shown,
            "command": "append",
            "content": job_name({"files": [fingerprint(file) for file in inputs]})[:12],
            "model": embedder.model.checkpoint.identity,
            "dtype": dtype_name(embedder.model),
        }
        known = Known(
            content_of=lambda document_id: ground.known_content(domain, document_id),
            replace=replace,
            all_of=(lambda: live_hashes(ground.segments, domain)) if prune else None,
        )
        with run_job(store, job_name(arguments), arguments) as job:
            made, counts = _Append(store, job, ground, embedder, domain, known, progress).run(inputs, shown)
        return Appended(open_made(path, (made or base).snapshot), made is not None, counts)


class _Append:
    """One append, from its job's folder to its commit."""

    def __init__(
        self, store: StoreFolder, job: Path, ground: Ground, embedder: Embedder, domain: str, known: Known, progress: Progress
    ) -> None:
        self._store, self._job, self._ground, self._embedder, self._domain = store, job, ground, embedder, domain
        self._known, self._progress = known, progress

    def run(self, inputs: CorpusInputs, arguments: dict[str, Any]) -> tuple[Manifest | None, dict[str, int]]:
        """Goes on where a killed process left off, and commits. Returns the new snapshot (None where nothing changes) and the counts."""
        base = self._ground.manifest
        tokenizer = self._embedder.model.tokenizer
        assert base.windows is not None, "said by append"
        assert tokenizer is not None, "said by append"
        eos = bool((base.tokens or {}).get("eos", True))
        work = Building(self._job, DocumentTokenizer(tokenizer, eos=eos), self._embedder, base.windows, base.index, self._progress)
        if work.tokenizer.rule != base.tokens:
            raise InvalidArgumentError(
                f"{self._store.path}: its text was tokenized by the rule {base.tokens}, this version has {work.tokenizer.rule}. "
                "Create a new datastore."
            )
        checked = self._take_up(inputs)
        reading = work.read(inputs, self._known)
        replaced, gone = self._still_there(reading.replaced), self._still_there(reading.gone)
        counts = {
            "documents": reading.documents,
            "entries": reading.entries,
            "repeated": reading.repeated,
            "replaced": len(replaced),
            "removed": len(gone),
            "skipped": len(reading.skipped),
        }
        if not (reading.entries or replaced or gone):
            return None, counts
        change = Change(
            operation=Operation(name="append", arguments=arguments, counts=counts),
            documents={self._domain: reading.documents} if reading.documents else {},
            removes=[*replaced, *gone],
            checked=checked,
        )
        if not reading.entries:
            return commit_change(self._store, base, change, job=self._job), counts
        index = work.index(reading, self._ground)
        work.encode(reading, *index)
        new = [StagedSegment(draft.folder, ((self._domain, 0, draft.n_rows),)) for draft in reading.segments]
        return commit_growth(self._store, self._job, self._ground, new, index, change, progress=self._progress), counts

    def _take_up(self, inputs: CorpusInputs) -> dict[str, RangeSet]:
        """Takes up what is left of the job, or begins it. Returns the segments in which its documents were looked for: dead rows by uuid.

        It begins anew where its commit had counted, where others have removed documents that it left out because the store had them, or
        where they have dropped the space or lists that it chose.
        """
        job, path = self._job, self._job / _CHECKED_FILE
        checked = {}
        if take_back(self._store, job) and path.exists():
            checked = {uuid: as_ranges(map(tuple, dead)) for uuid, dead in parse_json(path).items()}
            if has_index(job, self._ground.known_index()) and (self._has_all(checked) or is_left_out_rightly(job, inputs, self._known)):
                return checked
        for leftover in job.iterdir():
            if leftover.name not in ("lock", JOB_FILE):
                disk.remove_tree(leftover)
        records = self._ground.manifest.segments
        replace_file(path, canonical({record.content.uuid: record.dead for record in records}))
        return {record.content.uuid: record.dead_ranges() for record in records}

    def _has_all(self, checked: Mapping[str, RangeSet]) -> bool:
        """Whether every row that lived when the job was begun lives still, where it was."""
        dead = {record.content.uuid: record.dead_ranges() for record in self._ground.manifest.segments}
        return all(uuid in dead and not len(subtract(dead[uuid], before)) for uuid, before in checked.items())

    def _still_there(self, documents: Sequence[tuple[str, str | None]]) -> list[DocumentKey]:
        """Those, by id and content hash, that nobody has removed since they were found."""
        return [DocumentKey(self._domain, *item) for item in documents if self._ground.known_content(self._domain, item[0]) is not None]
