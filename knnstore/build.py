"""entries → codes → segments → commit: what every way of making a datastore goes through.

`create_from_entries` needs no model; `knnstore.lm.create` adds one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import ExistsError, InvalidArgumentError
from knnstore.format import CODEC_NAMES, CODECS_BY_NAME, SEGMENT_ENTRIES, Codec
from knnstore.progress import SILENT, Progress
from knnstore.search import check_keys
from knnstore.storage.arrays import map_file
from knnstore.storage.catalog import StoreFolder, commit, file_records, lay_foundation, now
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.coarse import SAMPLES_PER_LIST, Coarse, choose_nlist, load_coarse, save_coarse, train_coarse
from knnstore.storage.files import ArrayFile, disk
from knnstore.storage.jobs import job_name, other_jobs, run_job
from knnstore.storage.manifest import (
    Calibration,
    CoarseRecord,
    Manifest,
    Operation,
    SegmentContent,
    SegmentRecord,
    SpaceRecord,
    WindowRule,
)
from knnstore.storage.segment import CodesWriter, DocumentsWriter, finish_segment, read_segment_content
from knnstore.storage.space import MIN_TRAINING, ROTATIONS, Space, load_space, save_space, train_space

__all__ = ["EntryDocument", "IndexOptions", "StagedSegment", "create_from_entries", "sample_rows", "train_index"]

Keys = NDArray[np.float32]

DEFAULT_K = 1_024  # neighbours: more help perplexity more than better distances do (docs/design.md, Index)
DEFAULT_NPROBE = 32  # lists: beyond this, perplexity gains under 0.1%
SAMPLE_BYTES = 1 << 30  # bytes of sampled keys held while training
SAMPLE_MIN = 65_536  # keys: what a product quantizer is trained on at most
MEASURED_ROWS = 256  # rows of each encoded run whose distortion is measured
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


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryDocument:
    """A document, or the next stretch of the one before (same id and domain), in a batch of entries.

    n_entries: how many of the batch's entries are its. text: its decoded text as far as these entries go, with starts and ends
    (n_entries,) the character offsets of each value in the whole document; None without text.
    """

    id: str
    n_entries: int
    domain: str = "default"
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    starts: NDArray[np.int64] | None = None
    ends: NDArray[np.int64] | None = None


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


def save_index(folder: Path, space: Space, coarse: Coarse | None) -> None:
    """Stages space and coarse quantizer in a job's folder."""
    for kind in ("spaces", "coarse"):
        disk.remove_tree(folder / kind)
    save_space(space, folder / "spaces" / space.id)
    if coarse is not None:
        save_coarse(coarse, folder / "coarse" / coarse.id)
    disk.make_folder(folder / "coarse")
    disk.sync_folder(folder / "spaces")
    disk.sync_folder(folder / "coarse")
    disk.sync_folder(folder)


def load_index(folder: Path, dim: int) -> tuple[Space, Coarse | None]:
    """What `save_index` staged."""
    space_id = next((folder / "spaces").iterdir()).name
    space = load_space(folder / "spaces" / space_id, space_id)
    coarse_folder = next((folder / "coarse").iterdir(), None)
    coarse = None if coarse_folder is None else load_coarse(coarse_folder, coarse_folder.name, space=space_id, dim=dim)
    return space, coarse


def encode_rows(writer: CodesWriter, first_row: int, keys: Keys, space: Space, coarse: Coarse | None) -> None:
    """Encodes keys of consecutive rows and hands them to the writer."""
    rotated = space.rotate(keys)
    codes = space.encode(rotated)
    lists = np.zeros(len(keys), np.uint32) if coarse is None else coarse.assign(rotated)
    writer.put(first_row, codes, lists, keys)
    some = slice(None, MEASURED_ROWS)
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
    calibration: Calibration | None,
    k: int,
    nprobe: int,
) -> Manifest:
    """The first snapshot of a store from what its job staged."""
    moves = [(job / "spaces" / space.id, store.space(space.id))]
    if coarse is not None:
        moves.append((job / "coarse" / coarse.id, store.coarse(coarse.id)))
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


def begin_store(path: str | Path, arguments: Mapping[str, Any]) -> tuple[StoreFolder, str, str]:
    """Lays the foundation of a new store, or takes up the same unfinished job. Returns the store, its uuid, the job's name.

    Raises ExistsError where a finished store, another unfinished one or something else is at the path.
    """
    store = StoreFolder(Path(path))
    name = job_name(arguments)
    if store.current.exists():
        raise ExistsError(f"{store.path}: a datastore exists already. Choose another --store, or remove it first.")
    if store.path.exists() and not store.identity.exists() and (not store.path.is_dir() or _is_foreign(store.path)):
        raise ExistsError(f"{store.path}: something that is not a datastore is there. Choose another --store.")
    others = other_jobs(store, name)
    if others:
        begun, asked = _difference(others[0][1], arguments)
        raise ExistsError(
            f"{store.path}: an unfinished datastore is there, begun with {begun}; this command has {asked}. "
            "Type the first command again to finish it, or remove the folder."
        )
    return store, lay_foundation(store), name


def _is_foreign(path: Path) -> bool:
    known = {"manifests", "spaces", "coarse", "segments", "tags", "staging", "LOCK"}  # left by a create that was killed at once
    return any(child.name not in known for child in path.iterdir())


def _difference(begun: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, str]:
    names = [name for name in sorted({*begun, *asked}) if begun.get(name) != asked.get(name)]
    sides = (", ".join(f"{name} {_short(side.get(name))}" for name in names) for side in (begun, asked))
    first, second = sides
    return first, second


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def create_from_entries(
    path: str | Path,
    batches: Iterable[tuple[Any, Any, Sequence[EntryDocument]]],
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
    if (training_keys is None) != (expected_entries is None):
        raise InvalidArgumentError("training_keys and expected_entries go together: give both or none.")
    arguments = {"command": "create_from_entries", "dim": dim, "checkpoint": asdict(checkpoint), **asdict(options)}
    store, store_uuid, name = begin_store(path, arguments)
    with run_job(store, name, arguments) as job:
        for leftover in ("segments", "spaces", "coarse", "keys.spool"):
            disk.remove_tree(job / leftover)  # entries cannot be asked for again: such a job begins anew
        trained = None
        if training_keys is not None and expected_entries is not None:
            trained = train_index(check_keys(training_keys, dim), expected_entries, options)
        intake = _Intake(job, dim=dim, vocab_size=vocab_size, options=options, trained=trained)
        with progress.stage("reading entries", total=expected_entries, unit="entries") as stage:
            for keys, values, documents in batches:
                stage.advance(intake.take(check_keys(keys, dim) if len(keys) else np.zeros((0, dim), np.float32), values, documents))
        intake.end()
        if not intake.n_entries:
            raise InvalidArgumentError("no entries were given; a datastore has at least one.")
        space, coarse = intake.encode_spool(progress) if trained is None else trained
        save_index(job, space, coarse)
        staged = intake.finish(space, coarse)
        domains = sorted({domain for segment in staged for domain, _, _ in segment.runs})
        return commit_new_store(
            store,
            job,
            staged,
            space,
            coarse,
            store_uuid=store_uuid,
            operation=Operation(
                name="create_from_entries",
                arguments={"codec": CODEC_NAMES[space.codec], "domains": domains},
                counts={"documents": intake.n_documents, "entries": intake.n_entries},
            ),
            checkpoint=checkpoint,
            key=KeyLayer(layer=key_layer, dim=dim),
            tokens=None,
            calibration=None,
            k=DEFAULT_K,
            nprobe=DEFAULT_NPROBE,
        )


@dataclass(slots=True)
class _Draft:
    """A segment whose documents are being written."""

    folder: Path
    documents: DocumentsWriter
    codes: CodesWriter | None
    runs: list[tuple[str, int, int]]
    first_key: int


class _Intake:
    """Takes batches of entries: documents go to segments at once, keys to a spool (or to codes, where there is an index already)."""

    def __init__(
        self, job: Path, *, dim: int, vocab_size: int, options: IndexOptions, trained: tuple[Space, Coarse | None] | None
    ) -> None:
        self._job, self._dim, self._vocab_size, self._options, self._trained = job, dim, vocab_size, options, trained
        self._spool = ArrayFile(job / "keys.spool", row_bytes=4 * dim)
        self._drafts: list[_Draft] = []
        self._document: EntryDocument | None = None
        self._document_entries = 0  # of the open document, in this part
        self._document_tokens = 0  # of the open document, in all parts
        self._document_chars = 0
        self._part = 0
        self._seen: set[tuple[str, str]] = set()
        self.n_entries = 0
        self.n_documents = 0

    def take(self, keys: Keys, values: Any, documents: Sequence[EntryDocument]) -> int:
        """One batch; returns its number of entries."""
        tokens = np.asarray(values)
        if tokens.shape != (len(keys),) or tokens.dtype.kind not in "iu":
            raise InvalidArgumentError(f"values of shape {tokens.shape} and type {tokens.dtype}: {len(keys)} integers are expected.")
        if sum(document.n_entries for document in documents) != len(keys):
            raise InvalidArgumentError(f"the documents of a batch have {sum(d.n_entries for d in documents)} entries, its keys {len(keys)}.")
        at = 0
        for document in documents:
            if document.n_entries < 1:
                raise InvalidArgumentError(f"document {document.id!r}: {document.n_entries} entries; leave empty documents out.")
            self._take_document(document, keys[at : at + document.n_entries], tokens[at : at + document.n_entries])
            at += document.n_entries
        return len(keys)

    def _take_document(self, document: EntryDocument, keys: Keys, values: NDArray[Any]) -> None:
        same = self._document is not None and (self._document.id, self._document.domain) == (document.id, document.domain)
        if not same:
            self._end_document()
            if (document.domain, document.id) in self._seen:
                raise InvalidArgumentError(f"document {document.id!r} of domain {document.domain!r} comes twice; ids are unique.")
            self._seen.add((document.domain, document.id))
            self._document, self._part, self._document_tokens, self._document_chars = document, 0, 0, 0
            self.n_documents += 1
        starts, ends = _offsets(document)
        at = 0
        while at < len(keys):
            draft = self._open_draft()
            n = min(len(keys) - at, self._options.segment_entries - draft.documents.n_rows)
            row = draft.documents.n_rows
            if starts is None or ends is None or document.text is None:
                draft.documents.add(values[at : at + n])
            else:
                base = self._document_chars
                stop = base + len(document.text) if at + n == len(keys) else int(starts[at + n])
                begin = base if at == 0 else int(starts[at])
                piece = document.text[begin - base : stop - base]
                draft.documents.add(values[at : at + n], starts=starts[at : at + n], ends=ends[at : at + n], text=piece, text_start=begin)
            self._put_keys(draft, row, keys[at : at + n])
            self._document_entries += n
            self._document_tokens += n
            at += n
            if draft.documents.n_rows == self._options.segment_entries and at < len(keys):
                self._end_part(last=False)
        self._document_chars += len(document.text or "")

    def _put_keys(self, draft: _Draft, row: int, keys: Keys) -> None:
        if draft.codes is None or self._trained is None:
            self._spool.put(self.n_entries, keys)
        else:
            for at in range(0, len(keys), ENCODE_ROWS):
                encode_rows(draft.codes, row + at, keys[at : at + ENCODE_ROWS], *self._trained)
        self.n_entries += len(keys)

    def _open_draft(self) -> _Draft:
        if self._drafts and self._drafts[-1].documents.n_rows < self._options.segment_entries:
            return self._drafts[-1]
        self._finish_documents()
        uuid = uuid4().hex
        folder = self._job / "segments" / uuid
        documents = DocumentsWriter(folder, uuid=uuid, vocab_size=self._vocab_size)
        codes = None
        if self._trained is not None:
            codes = CodesWriter(folder, n_rows=self._options.segment_entries, space=self._trained[0], keys=self._options.keep_keys)
        self._drafts.append(_Draft(folder, documents, codes, [], self.n_entries))
        return self._drafts[-1]

    def _end_document(self) -> None:
        if self._document is not None:
            self._end_part(last=True)
            self._document = None

    def _end_part(self, *, last: bool) -> None:
        assert self._document is not None
        draft, document = self._drafts[-1], self._document
        draft.documents.end_document(
            id=document.id,
            source=document.source,
            prefix=(),
            metadata=dict(document.metadata),
            content_hash="" if last else None,
            n_chars=self._document_chars if last else None,
            part=self._part,
            last=last,
            first_token=self._document_tokens - self._document_entries,
        )
        stop = draft.documents.n_rows
        if draft.runs and draft.runs[-1][0] == document.domain:
            draft.runs[-1] = (document.domain, draft.runs[-1][1], stop)
        else:
            draft.runs.append((document.domain, stop - self._document_entries, stop))
        self._document_entries = 0
        self._part += 1

    def _finish_documents(self) -> None:
        if self._drafts:
            self._drafts[-1].documents.finish()

    def end(self) -> None:
        """No more batches."""
        self._end_document()
        self._finish_documents()

    def _spooled(self) -> Iterator[tuple[_Draft, NDArray[np.float32]]]:
        keys = map_file(self._job / "keys.spool").view("<f4").reshape(-1, self._dim)
        for draft in self._drafts:
            yield draft, keys[draft.first_key : draft.first_key + draft.documents.n_rows]

    def encode_spool(self, progress: Progress) -> tuple[Space, Coarse | None]:
        """Trains on a sample of all spooled keys, then encodes all."""
        keys = map_file(self._job / "keys.spool").view("<f4").reshape(-1, self._dim)
        sample = keys[sample_rows(self.n_entries, self._dim, self._options.seed)]
        space, coarse = train_index(sample, self.n_entries, self._options)
        with progress.stage("encoding", total=self.n_entries, unit="entries") as stage:
            for draft, of_draft in self._spooled():
                draft.codes = CodesWriter(draft.folder, n_rows=len(of_draft), space=space, keys=self._options.keep_keys)
                for at in range(0, len(of_draft), ENCODE_ROWS):
                    encode_rows(draft.codes, at, of_draft[at : at + ENCODE_ROWS], space, coarse)
                    stage.advance(len(of_draft[at : at + ENCODE_ROWS]))
        return space, coarse

    def finish(self, space: Space, coarse: Coarse | None) -> list[StagedSegment]:
        """Writes the lists of every segment."""
        self._spool.close()
        staged = []
        for draft in self._drafts:
            assert draft.codes is not None
            draft.codes.trim(draft.documents.n_rows)
            draft.codes.close()
            finish_segment(
                draft.folder,
                uuid=draft.folder.name,
                n_documents=draft.documents.n_documents,
                text=draft.documents.text,
                space=space,
                coarse=coarse,
                keys=self._options.keep_keys,
                distortion=draft.codes.distortion_sum / max(1, draft.codes.distortion_count),
                dtype=None,
                windows=None,
            )
            staged.append(StagedSegment(draft.folder, tuple(draft.runs)))
        return staged


def _offsets(document: EntryDocument) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    if document.text is None:
        return None, None
    starts, ends = np.asarray(document.starts, dtype=np.int64), np.asarray(document.ends, dtype=np.int64)
    if starts.shape != (document.n_entries,) or ends.shape != starts.shape or (ends < starts).any():
        raise InvalidArgumentError(f"document {document.id!r}: text needs starts and ends of shape ({document.n_entries},), start <= end.")
    return starts, ends
