"""corpus → windows → entries → segments → commit: a datastore from text and a language model."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnstore.build import (
    StagedSegment,
    begin_store,
    blank_manifest,
    check_vacant,
    segment_record,
    staged_index,
    staged_segment,
    take_back,
)
from knnstore.changes import Change, commit_change
from knnstore.errors import CorpusError, InvalidArgumentError, ModelError
from knnstore.format import SEGMENT_ENTRIES
from knnstore.lm.building import Building, dtype_name, fingerprint, short_list
from knnstore.lm.calibrate import calibrate
from knnstore.lm.corpus import CorpusInputs, list_inputs
from knnstore.lm.embed import Embedder, SegmentTokens
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.progress import SILENT, Progress
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.coarse import choose_nprobe
from knnstore.storage.jobs import job_name, run_job
from knnstore.storage.manifest import IndexOptions, Operation, WindowRule
from knnstore.storage.segment import Segment
from knnstore.store import Datastore, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["create"]

DEFAULT_CONTEXT = 512  # tokens: longer contexts cost more and, with a stride of half, change perplexity little


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
    Memory: the model, one batch, 1 GiB for the sample, 4 bytes an entry of one segment, some 150 bytes a document.
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
        "corpora": short_list([file.source for file in inputs]),
        "content": job_name({"files": [fingerprint(file) for file in inputs]})[:12],
        "domain": domain,
        "model": loaded.checkpoint.identity,
        "model_name": loaded.checkpoint.name,
        "tokenizer": loaded.checkpoint.tokenizer,
        "dtype": dtype_name(loaded),
        "key_layer": embedder.extractor.key.layer,
        "eos": eos,
        **asdict(windows),
        **asdict(options),
    }
    store, store_uuid, job_id = begin_store(path, arguments)
    with run_job(store, job_id, arguments) as job:
        take_back(store, job)
        work = Building(job, DocumentTokenizer(loaded.tokenizer, eos=eos), embedder, windows, options, progress)
        reading = work.read(inputs)
        if reading.repeated:
            progress.note(f"{reading.repeated} documents came twice with the same content; each is kept once")
        if not reading.entries:
            raise CorpusError("no entries: every document is empty. Give a corpus with text.")
        space, coarse = work.index(reading)
        work.encode(reading, space, coarse)
        staged = [StagedSegment(draft.folder, ((domain, 0, draft.n_rows),)) for draft in reading.segments]
        with ExitStack() as stack:
            segments = [Segment(item.folder, segment_record(item.folder, item.runs), space, coarse) for item in staged]
            for segment in segments:
                stack.callback(segment.close)
            tokens = [SegmentTokens(segment.values, segment.contexts, **asdict(windows)) for segment in segments]
            nprobe = choose_nprobe(reading.entries, 1 if coarse is None else coarse.nlist)
            calibration = calibrate(segments, tokens, embedder, nprobe=nprobe, domains=[domain], seed=seed, progress=progress)
        start = blank_manifest(
            store_uuid,
            checkpoint=loaded.checkpoint,
            key=embedder.extractor.key,
            tokens=work.tokenizer.rule,
            windows=windows,
            index=options,
            calibration=calibration,
            nprobe=nprobe,
        )
        change = Change(
            operation=Operation(
                name="create",
                arguments={"corpora": short_list([file.source for file in inputs]), "domain": domain, "codec": codec, "seed": seed},
                counts={
                    "documents": reading.documents,
                    "entries": reading.entries,
                    "repeated": reading.repeated,
                    "skipped": len(reading.skipped),
                },
            ),
            **staged_index(job, space.dim),
            segments=[staged_segment(segment) for segment in staged],
            documents={domain: reading.documents},
        )
        commit_change(store, start, change, job=job)
    return open_store(path)


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
