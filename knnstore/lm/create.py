"""corpus → windows → entries → segments → commit: a datastore from text and a language model."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from knnstore.build import (
    StagedSegment,
    begin_store,
    blank_manifest,
    check_vacant,
    encode_runs,
    index_staged,
    load_index,
    sample_size,
    save_index,
    segment_record,
    staged_segment,
    take_back,
    train_index,
)
from knnstore.changes import Change, commit_change
from knnstore.errors import CorpusError, InvalidArgumentError, ModelError
from knnstore.format import CONTEXTS_FILE, SEGMENT_ENTRIES, SEGMENT_FILE, VALUES_FILE, Kind
from knnstore.lm.calibrate import calibrate
from knnstore.lm.corpus import CorpusFile, CorpusInputs, list_inputs
from knnstore.lm.decoding import BLOCK_BYTES
from knnstore.lm.embed import Embedder, SegmentTokens
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.lm.reading import DraftSegment, Reading, read_corpus
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.progress import SILENT, Progress, Stage
from knnstore.storage.arrays import MappedArray
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.coarse import Coarse
from knnstore.storage.contexts import ContextsReader
from knnstore.storage.files import disk
from knnstore.storage.jobs import job_name, run_job
from knnstore.storage.manifest import IndexOptions, Operation, WindowRule
from knnstore.storage.segment import Segment
from knnstore.storage.segment_writer import CodesWriter, finish_segment, tidy_segment, written_codes
from knnstore.storage.space import Space, raw_space
from knnstore.store import Datastore, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["create"]

DEFAULT_CONTEXT = 512  # tokens: longer contexts cost more and, with a stride of half, change perplexity little
SAMPLE_WINDOWS = 64  # windows of the sample that are encoded at a time
SAVE_SECONDS = 20.0  # of work that a kill may cost while keys are computed


def create(
    path: str | Path,
    corpora: "str | Path | Sequence[str | Path] | CorpusInputs",
    *,
    model: "str | Path | PreTrainedModel | LanguageModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    domain: str = "default",
    key_layer: str | None = None,
    codec: str = "pq4",
    rotation: str = "random",
    keep_keys: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    eos: bool = True,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    segment_entries: int = SEGMENT_ENTRIES,
    progress: Progress = SILENT,
) -> Datastore:
    """Makes a datastore of a corpus: every token becomes an entry, with the model's hidden state before it as its key.

    corpora: folders, files, or "-" for standard input (named by `name`). model: hub name, folder, GGUF file, a model in memory,
    or None for the small one that ships with the package. key_layer: None for the input of the last feed-forward net.
    keep_keys: `f16`, `bf16` or `f32` to allow exact search (2 or 4 bytes times the key's width an entry). context, stride: tokens of
    a window, and of what is new in the next. Called again after a kill with the same arguments, it goes on where it was.
    Memory: the model, one batch, 1 GiB for the sample, 12 bytes an entry of one segment, some 150 bytes a document.
    Returns the datastore, open at snapshot 1. Raises NotFoundError, CorpusError, ModelError, InvalidArgumentError,
    StorageError, LockedError.
    """
    options = IndexOptions(codec=codec, rotation=rotation, keep_keys=keep_keys, seed=seed, segment_entries=segment_entries)
    if not domain:
        raise InvalidArgumentError("domain: an empty name. Give one, or leave the option out.")
    check_vacant(StoreFolder(Path(path)))  # said before a model is loaded
    inputs = corpora if isinstance(corpora, CorpusInputs) else list_inputs(corpora, stdin_name=name)
    for ignored in inputs.ignored:
        progress.note(f"{ignored.source}: left out ({ignored.reason})")
    with progress.stage("loading the model", total=None, unit="models") as stage:
        loaded = load_language_model(
            model, tokenizer=tokenizer, revision=revision, token=token, cache_dir=cache_dir, device=device, dtype=dtype
        )
        stage.advance(1)
    if loaded.tokenizer is None:
        raise ModelError(f"{loaded.checkpoint.name}: it came without a tokenizer. Give one with tokenizer=.")
    windows = _window_rule(loaded, context, stride)
    embedder = Embedder(loaded, key_layer)
    arguments: dict[str, Any] = {
        "command": "create",
        "corpora": _short_list([file.source for file in inputs]),
        "content": job_name({"files": [_fingerprint(file) for file in inputs]})[:12],
        "domain": domain,
        "model": loaded.checkpoint.identity,
        "model_name": loaded.checkpoint.name,
        "tokenizer": loaded.checkpoint.tokenizer,
        "dtype": _dtype_name(loaded),
        "key_layer": embedder.extractor.key.layer,
        "eos": eos,
        **asdict(windows),
        **asdict(options),
    }
    store, store_uuid, job_id = begin_store(path, arguments)
    with run_job(store, job_id, arguments) as job:
        take_back(store, job)
        work = _Creation(job, DocumentTokenizer(loaded.tokenizer, eos=eos), embedder, windows, options, progress)
        reading = work.read(inputs)
        space, coarse = work.index(reading)
        work.encode(reading, space, coarse)
        staged = [StagedSegment(draft.folder, ((domain, 0, draft.n_rows),)) for draft in reading.segments]
        with ExitStack() as stack:
            segments = [Segment(item.folder, segment_record(item.folder, item.runs), space, coarse) for item in staged]
            for segment in segments:
                stack.callback(segment.close)
            tokens = [SegmentTokens(segment.values, segment.contexts, **asdict(windows)) for segment in segments]
            calibration = calibrate(segments, tokens, embedder, domains=[domain], seed=seed, progress=progress)
        start = blank_manifest(
            store_uuid,
            checkpoint=loaded.checkpoint,
            key=embedder.extractor.key,
            tokens=work.tokenizer.rule,
            index=options,
            calibration=calibration,
        )
        change = Change(
            operation=Operation(
                name="create",
                arguments={"corpora": _short_list([file.source for file in inputs]), "domain": domain, "codec": codec, "seed": seed},
                counts={
                    "documents": reading.documents,
                    "entries": reading.entries,
                    "repeated": reading.repeated,
                    "skipped": len(reading.skipped),
                },
            ),
            **index_staged(job, space, coarse),
            segments=[staged_segment(segment) for segment in staged],
            documents={domain: reading.documents},
        )
        commit_change(store, start, change, job=job)
    return open_store(path)


def _short_list(names: list[str]) -> list[str]:
    """Some names for a person."""
    return names if len(names) <= 4 else [*names[:3], f"and {len(names) - 3} more"]


def _fingerprint(file: CorpusFile) -> list[str | int]:
    """What makes a job's input another one: a file's size and time, the content of a stream."""
    if file.stream is None:
        return [file.id, file.source, file.size, file.mtime_ns]
    digest = hashlib.sha256()
    file.stream.seek(0)
    while block := file.stream.read(BLOCK_BYTES):
        digest.update(block)
    file.stream.seek(0)
    return [file.id, file.source, file.size, digest.hexdigest()]


def _is_unchanged(file: CorpusFile) -> bool:
    if file.path is None:
        return True
    try:
        status = file.path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns)


def _dtype_name(model: LanguageModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _window_rule(model: LanguageModel, context: int | None, stride: int | None) -> WindowRule:
    """Context and stride asked for, or 512 (less where the model takes less) and half of it."""
    longest = model.max_positions
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if stride is None:
        stride = max(1, context // 2)
    if longest is not None and context > longest:
        raise InvalidArgumentError(f"context {context}: {model.checkpoint.name} takes {longest} tokens at most.")
    if context < 2 or not 1 <= stride <= context:
        raise InvalidArgumentError(f"context {context}, stride {stride}: use a context of 2 or more and a stride from 1 to it.")
    return WindowRule(context=context, stride=stride)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Windows whose keys train the index. windows: numbers of them, one array a segment; starts: place of the first key of each
    window in the sample, likewise; n: keys in all."""

    windows: list[NDArray[np.int64]]
    starts: list[NDArray[np.int64]]
    n: int


@dataclass(slots=True)
class _Creation:
    """The stages of one job. Each can be taken up after a kill."""

    job: Path
    tokenizer: DocumentTokenizer
    embedder: Embedder
    rule: WindowRule
    options: IndexOptions
    progress: Progress

    def read(self, inputs: CorpusInputs) -> Reading:
        """Documents to tokens. Raises CorpusError where a file changed meanwhile, or nothing came of it."""
        reading = read_corpus(
            self.job,
            inputs,
            tokenizer=self.tokenizer,
            vocab_size=self.embedder.model.vocab_size,
            prefix_tokens=self.rule.context - self.rule.stride + 1,
            segment_entries=self.options.segment_entries,
            progress=self.progress,
        )
        for file in inputs:
            if not _is_unchanged(file):
                raise CorpusError(f"{file.source}: the file was changed while it was read. Run the command again.")
        for skipped in reading.skipped:
            self.progress.note(f"{skipped.source}: left out ({skipped.reason})")
        if reading.repeated:
            self.progress.note(f"{reading.repeated} documents came twice with the same content; each is kept once")
        if not reading.entries:
            raise CorpusError("no entries: every document is empty. Give a corpus with text.")
        return reading

    def index(self, reading: Reading) -> tuple[Space, Coarse | None]:
        """The space and lists, trained on a sample of windows from the whole corpus."""
        dim = self.embedder.extractor.key.dim
        if not (self.job / "index").exists():
            with ExitStack() as stack:
                tokens = self._open_tokens(reading, stack)
                sample = self._sample(tokens, reading.entries)
                keys = self._sampled_keys(tokens, sample, dim)
            with self.progress.stage("training the index", total=1, unit="index") as stage:
                save_index(self.job, *train_index(keys, reading.entries, self.options))
                stage.advance(1)
        return load_index(self.job, dim)

    def _open_tokens(self, reading: Reading, stack: ExitStack) -> list[SegmentTokens]:
        tokens = []
        for draft in reading.segments:
            contexts = ContextsReader(draft.folder / CONTEXTS_FILE, n_rows=draft.n_rows)
            stack.callback(contexts.close)
            owner = bytes.fromhex(draft.folder.name)
            values = MappedArray(draft.folder / VALUES_FILE, kind=Kind.VALUES, owner=owner, n_rows=draft.n_rows)
            tokens.append(SegmentTokens(values, contexts, context=self.rule.context, stride=self.rule.stride))
        return tokens

    def _sample(self, tokens: Sequence[SegmentTokens], n_entries: int) -> _Sample:
        """Windows drawn at random from all, until they hold as many keys as are to be trained on. The same after a kill."""
        counts = [of_segment.windows.n_entries for of_segment in tokens]
        every = np.concatenate(counts)
        order = np.random.default_rng(self.options.seed).permutation(len(every))
        wanted = sample_size(n_entries, self.embedder.extractor.key.dim)
        n_windows = int(np.searchsorted(np.cumsum(every[order]), wanted)) + 1
        chosen = np.zeros(len(every), dtype=bool)
        chosen[order[:n_windows]] = True
        windows, starts, n, at = [], [], 0, 0
        for of_segment in counts:
            numbers = np.flatnonzero(chosen[at : at + len(of_segment)])
            ends = np.cumsum(of_segment[numbers])
            starts.append(n + ends - of_segment[numbers])
            windows.append(numbers)
            n += int(ends[-1]) if len(ends) else 0
            at += len(of_segment)
        return _Sample(windows, starts, n)

    def _sampled_keys(self, tokens: Sequence[SegmentTokens], sample: _Sample, dim: int) -> NDArray[np.float32]:
        """Keys of the sample, (n, dim) float32, mapped; they are spilled to the job's folder and not computed again."""
        folder = self.job / "sample"
        disk.make_folder(folder)
        with (
            CodesWriter(folder, n_rows=sample.n, space=raw_space(dim), keys=None) as writer,
            self.progress.stage("embedding a sample", total=sample.n, unit="tokens", done=int(writer.done.sum())) as stage,
        ):
            for of_segment, windows, starts in zip(tokens, sample.windows, sample.starts, strict=True):
                missing = ~writer.done[starts]
                self._embed(of_segment, windows[missing], starts[missing], stage, writer, None)
            writer.save()
        return self._spilled(sample, dim)

    def _spilled(self, sample: _Sample, dim: int) -> NDArray[np.float32]:
        space = raw_space(dim)
        return space.decode(written_codes(self.job / "sample", space=space, n_rows=sample.n))

    def encode(self, reading: Reading, space: Space, coarse: Coarse | None) -> None:
        """Keys, codes and lists of every segment."""
        with ExitStack() as stack:
            tokens = self._open_tokens(reading, stack)
            sample = self._sample(tokens, reading.entries)
            sampled = self._spilled(sample, space.dim)
            finished = sum(draft.n_rows for draft in reading.segments if (draft.folder / SEGMENT_FILE).exists())
            with self.progress.stage("embedding", total=reading.entries, unit="tokens", done=finished) as stage:
                for i, draft in enumerate(reading.segments):
                    if (draft.folder / SEGMENT_FILE).exists():
                        tidy_segment(draft.folder)
                    else:
                        self._encode_segment(draft, tokens[i], sample.windows[i], sample.starts[i], sampled, space, coarse, stage)

    def _encode_segment(
        self,
        draft: DraftSegment,
        tokens: SegmentTokens,
        sample_windows: NDArray[np.int64],
        sample_starts: NDArray[np.int64],
        sampled: NDArray[np.float32],
        space: Space,
        coarse: Coarse | None,
        stage: Stage,
    ) -> None:
        with CodesWriter(draft.folder, n_rows=draft.n_rows, space=space, keys=self.options.keep_keys) as writer:
            stage.advance(int(writer.done.sum()))
            rows = tokens.window_rows
            todo = ~writer.done[rows[sample_windows]]
            ends = sample_starts + tokens.windows.n_entries[sample_windows]
            for group in _groups(sample_windows[todo], SAMPLE_WINDOWS):
                at = np.searchsorted(sample_windows, group)
                keys = [sampled[start:stop] for start, stop in zip(sample_starts[at].tolist(), ends[at].tolist(), strict=True)]
                encode_runs(writer, rows[group].tolist(), keys, space, coarse)
                stage.advance(sum(map(len, keys)))
            writer.save()
            missing = np.flatnonzero(~writer.done[rows])
            self._embed(tokens, missing, rows[missing], stage, writer, coarse)
            writer.save()
            distortion = writer.distortion_sum / max(1, writer.distortion_count)
        finish_segment(
            draft.folder,
            uuid=draft.folder.name,
            n_documents=draft.n_documents,
            text=True,
            space=space,
            coarse=coarse,
            keys=self.options.keep_keys,
            distortion=distortion,
            dtype=_dtype_name(self.embedder.model),
            windows=self.rule,
        )

    def _embed(
        self,
        tokens: SegmentTokens,
        windows: NDArray[np.int64],
        places: NDArray[np.int64],
        stage: Stage,
        writer: CodesWriter,
        coarse: Coarse | None,
    ) -> None:
        """Runs the model over windows and puts the codes of their keys at their places; saves now and then."""
        saved = time.monotonic()
        place_of = dict(zip(windows.tolist(), places.tolist(), strict=True))
        for batch in self.embedder.batches(tokens, windows):
            keys = self.embedder.keys(tokens, batch)
            encode_runs(writer, [place_of[int(window)] for window in batch], keys, writer.space, coarse)
            stage.advance(sum(map(len, keys)))
            if time.monotonic() - saved > SAVE_SECONDS:
                writer.save()
                saved = time.monotonic()


def _groups(numbers: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (numbers[at : at + size] for at in range(0, len(numbers), size))
