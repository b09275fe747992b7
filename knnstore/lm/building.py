"""The stages between a corpus and finished segments, for `create` and `append`. Each can be taken up after a kill."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnstore.build import Index, encode_runs, load_index, sample_size, save_index, train_index
from knnstore.errors import CorpusError
from knnstore.format import CONTEXTS_FILE, SEGMENT_FILE, VALUES_FILE, Kind
from knnstore.growth import Ground
from knnstore.lm.corpus import CorpusFile, CorpusInputs
from knnstore.lm.decoding import BLOCK_BYTES
from knnstore.lm.drafts import DraftSegment, Reading
from knnstore.lm.embed import Embedder, SegmentTokens
from knnstore.lm.heap import kept_heap
from knnstore.lm.models import LanguageModel
from knnstore.lm.reading import Known, read_corpus
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.progress import Progress, Stage
from knnstore.storage.arrays import MappedArray
from knnstore.storage.coarse import Coarse
from knnstore.storage.contexts import ContextsReader
from knnstore.storage.files import disk
from knnstore.storage.manifest import IndexOptions, WindowRule
from knnstore.storage.segment_writer import CodesWriter, finish_segment, tidy_segment, written_codes
from knnstore.storage.space import Space, raw_space

__all__ = ["Building", "dtype_name", "fingerprint", "short_list"]

SAMPLE_WINDOWS = 64  # windows of the sample that are encoded at a time
SAVE_SECONDS = 20.0  # of work that a kill may cost while keys are computed
SAMPLE_MEMORY = 1 << 24  # bytes of a sample's keys that wait in memory; beyond, they are spilled, and a kill does not lose them


def short_list(names: list[str]) -> list[str]:
    """Some names for a person."""
    return names if len(names) <= 4 else [*names[:3], f"and {len(names) - 3} more"]


def fingerprint(file: CorpusFile) -> list[str | int]:
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


def dtype_name(model: LanguageModel) -> str:
    return str(model.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class _Sample:
    """Windows whose keys train the index. windows: numbers of them, one array a segment; starts: place of the first key of each
    window in the sample, likewise; n: keys in all."""

    windows: list[NDArray[np.int64]]
    starts: list[NDArray[np.int64]]
    n: int


@dataclass(slots=True)
class Building:
    """The stages of one job. Each can be taken up after a kill."""

    job: Path
    tokenizer: DocumentTokenizer
    embedder: Embedder
    rule: WindowRule
    options: IndexOptions
    progress: Progress
    held: NDArray[np.float32] | None = None  # keys of a small sample

    def read(self, inputs: CorpusInputs, known: Known | None = None) -> Reading:
        """Documents to tokens. Raises CorpusError where a file changed meanwhile, or nothing came of it."""
        reading = read_corpus(
            self.job,
            inputs,
            tokenizer=self.tokenizer,
            vocab_size=self.embedder.model.vocab_size,
            prefix_tokens=self.rule.context - self.rule.stride + 1,
            segment_entries=self.options.segment_entries,
            progress=self.progress,
            known=known,
        )
        for file in inputs:
            if not _is_unchanged(file):
                raise CorpusError(f"{file.source}: the file was changed while it was read. Run the command again.")
        for skipped in reading.skipped:
            self.progress.note(f"{skipped.source}: left out ({skipped.reason})")
        return reading

    def index(self, reading: Reading, ground: Ground | None = None) -> Index:
        """The space and lists, trained on a sample of windows from the whole corpus; those of the ground where they serve it."""
        dim = self.embedder.extractor.key.dim
        if not (self.job / "index").exists():
            with ExitStack() as stack:
                tokens = self._open_tokens(reading, stack)
                sample = self._sample(tokens, reading.entries)
                with kept_heap():
                    keys = self._sampled_keys(tokens, sample, dim)
            with self.progress.stage("training the index", total=1, unit="index") as stage:
                if ground is None:
                    save_index(self.job, *train_index(keys, reading.entries, self.options))
                else:
                    save_index(self.job, *ground.choose_index(keys, reading.entries), known=ground.known_index())
                stage.advance(1)
        return load_index(self.job, dim) if ground is None else load_index(self.job, dim, ground.spaces, ground.coarse)

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
        """Keys of the sample, (n, dim) float32. Many are spilled to the job, mapped, and not computed again after a kill."""
        if sample.n * dim * 4 <= SAMPLE_MEMORY:
            self.held = np.empty((sample.n, dim), np.float32)
            with self.progress.stage("embedding a sample", total=sample.n, unit="tokens") as stage:
                for of_segment, windows, starts in zip(tokens, sample.windows, sample.starts, strict=True):
                    place_of = dict(zip(windows.tolist(), starts.tolist(), strict=True))
                    for batch in self.embedder.batches(of_segment, windows):
                        for window, keys in zip(batch, self.embedder.keys(of_segment, batch), strict=True):
                            self.held[place_of[int(window)] : place_of[int(window)] + len(keys)] = keys
                            stage.advance(len(keys))
            return self.held
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

    def _known_keys(self, sample: _Sample, dim: int) -> tuple[_Sample, NDArray[np.float32]]:
        """The sample's keys for encoding; an empty sample where they were in the memory of a process that was killed."""
        if self.held is not None:
            return sample, self.held
        if (self.job / "sample").exists():
            return sample, self._spilled(sample, dim)
        none = [np.zeros(0, np.int64) for _ in sample.windows]
        return _Sample(none, none, 0), np.zeros((0, dim), np.float32)

    def encode(self, reading: Reading, space: Space, coarse: Coarse | None) -> None:
        """Keys, codes and lists of every segment."""
        with ExitStack() as stack:
            tokens = self._open_tokens(reading, stack)
            sample, sampled = self._known_keys(self._sample(tokens, reading.entries), space.dim)
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
            with kept_heap():
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
            dtype=dtype_name(self.embedder.model),
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
