"""How well texts are predicted, with the datastore and without: each token once, only its own p_kNN, memory whatever the texts' size."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knnstore.errors import InvalidArgumentError
from knnstore.lm.corpus import CorpusInputs, Document, list_inputs, read_documents
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.own import OwnDocuments
from knnstore.lm.predicting import Prediction, Texts
from knnstore.lm.searched import Searched
from knnstore.lm.tallies import DomainPart, FrequencyBucket, GainBin, Tally, frequency_buckets
from knnstore.lm.windows import plan_windows
from knnstore.progress import SILENT, Progress
from knnstore.store import Datastore, open_store

__all__ = ["Evaluation", "evaluate", "evaluate_text", "window_rule"]

STDIN_NAME = "standard input"

Corpora = str | Path | Sequence[str | Path] | CorpusInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a datastore did to the tokens of some texts. `lm`, `knn`, `mixed`: by the LM alone, by the neighbours alone, by both.

    tokens: predicted: all but a first one that nothing stands before. bytes: of the text they stand for, in UTF-8. documents: with any
    of them. perplexity: exp of the mean of -log p, of `lm`, `knn` and `mixed`; inf where a token has p = 0, as p_kNN often is.
    bits_per_byte: of the same, -log2 p over bytes. zero: share of tokens that no neighbour has. covered: perplexity of the others, of
    `lm` and `knn`. lmbda: mean λ. helped, hurt: shares of tokens that are more, and less, probable than by the LM alone. gain,
    loss: by how many bits on average (a loss is negative). histogram: of log2(p / p_LM). frequency: by how often a token occurs
    among the entries that are searched. domains: each one's part. searched: share of tokens that a search was made for. own: texts
    whose own documents did not count. tokens_per_s: `lm` and `mixed`, in this run. seconds: `reading` the texts, `lm`, `datastore`
    (search, p_kNN, mixing), and `report`, which is the rest. store, checkpoint: what was evaluated.
    """

    tokens: int
    bytes: int
    documents: int
    perplexity: dict[str, float]
    bits_per_byte: dict[str, float]
    zero: float
    covered: dict[str, float]
    lmbda: float
    temperature: float
    k: int
    nprobe: int
    exact: bool
    retrieval: str
    context: int
    stride: int
    helped: float
    hurt: float
    gain: float
    loss: float
    histogram: tuple[GainBin, ...]
    frequency: tuple[FrequencyBucket, ...]
    domains: dict[str, DomainPart]
    searched: float
    own: int
    tokens_per_s: dict[str, float]
    seconds: dict[str, float]
    store: dict[str, Any]
    checkpoint: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """As `knnstore evaluate --json` prints it."""
        fields = {"lambda" if name == "lmbda" else name: value for name, value in asdict(self).items()}
        for part in fields["histogram"] + fields["frequency"]:
            part["share"] = part["tokens"] / self.tokens
        for part in fields["frequency"]:
            part["perplexity"] = {name: part.pop(name) for name in ("lm", "mixed")}
        for part in fields["domains"].values():
            part["perplexity"] = {name: part.pop(name) for name in ("knn", "mixed")}
        return fields


def evaluate(
    store: KnnLM | Datastore | str | Path,
    texts: Corpora,
    *,
    context: int | None = None,
    stride: int | None = None,
    exclude_own: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> Evaluation:
    """Predicts every token of some texts from those before it, with the datastore and without.

    store: a datastore or its path, for which options are those of `KnnLM.load`; or a `KnnLM`, whose own settings hold. texts: folders,
    files, or "-" for standard input, as `create` takes them. context, stride: tokens of a window, and of what is new in the next;
    None for the datastore's. exclude_own: documents of the datastore that have a text's id, or its content, do not predict it.
    Memory: the model, one batch, some 100 MB for what is searched at a time, 8 bytes a token of the longest document.
    Raises what `KnnLM.load` does, CorpusError, NotFoundError, and InvalidArgumentError where there is nothing to predict.
    """
    inputs = texts if isinstance(texts, CorpusInputs) else list_inputs(texts, stdin_name=STDIN_NAME)  # said before a model is loaded
    for ignored in inputs.ignored:
        progress.note(f"{ignored.source}: left out ({ignored.reason})")
    if isinstance(store, str | Path):
        with open_store(store) as opened:
            lm = _load(opened, progress, options)
            return _evaluate(lm, read_documents(inputs), context, stride, exclude_own=exclude_own, progress=progress)
    if isinstance(store, KnnLM) and options:
        raise InvalidArgumentError(f"{', '.join(options)}: the KnnLM given has settings of its own. Give them to `KnnLM.load`.")
    lm = store if isinstance(store, KnnLM) else _load(store, progress, options)
    return _evaluate(lm, read_documents(inputs), context, stride, exclude_own=exclude_own, progress=progress)


def evaluate_text(
    lm: KnnLM, text: str, *, context: int | None = None, stride: int | None = None, progress: Progress = SILENT
) -> Evaluation:
    """`evaluate` of one text in memory."""
    document = Document(id="", source="the text", metadata={}, chunks=(text,) if text else ())
    return _evaluate(lm, [document], context, stride, exclude_own=False, progress=progress)


def window_rule(lm: KnnLM, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride asked for, or the datastore's; half of the context where it has no stride for this one.

    Raises InvalidArgumentError for what no window can be.
    """
    rule, longest = lm.store.manifest.windows, lm.language_model.max_positions
    context = lm.context if context is None else context
    if longest is not None and context > longest:
        raise InvalidArgumentError(f"context {context}: {lm.language_model.checkpoint.name} takes {longest} tokens at most.")
    if stride is None:
        stride = rule.stride if rule is not None and rule.context == context else max(1, context // 2)
    plan_windows([1], [1], context=context, stride=stride)  # which refuses what it cannot do
    return context, stride


def _load(store: Datastore, progress: Progress, options: dict[str, Any]) -> KnnLM:
    with progress.stage("loading the model", total=None, unit="models") as stage:
        lm = KnnLM.load(store, **options)
        stage.advance(1)
    return lm


def _evaluate(
    lm: KnnLM, documents: Iterable[Document], context: int | None, stride: int | None, *, exclude_own: bool, progress: Progress
) -> Evaluation:
    store, settings = lm.store, lm.settings
    context, stride = window_rule(lm, context, stride)
    searched = Searched(store, settings)
    with progress.stage("counting tokens of the datastore", total=searched.n_rows, unit="tokens") as stage:
        counts = searched.token_counts(max(lm.language_model.vocab_size, store.manifest.checkpoint.vocab_size), stage.advance)
    tally = Tally(frequency_buckets(counts), searched.domains)
    texts = Texts(lm, documents, OwnDocuments(store.segments) if exclude_own else None, progress)
    prediction = Prediction(lm, texts, searched, tally)
    with progress.stage("evaluating", total=None, unit="tokens") as stage:
        prediction.run(context, stride, stage.advance)
    if exclude_own and not texts.n_own:
        progress.note(f"none of the texts is in {store.path}, so nothing was left out of it")
    if not tally.tokens:
        raise InvalidArgumentError("the texts have fewer than two tokens each, so there is nothing to predict. Give a longer one.")
    (helped, gain), (hurt, loss) = tally.changed("helped"), tally.changed("hurt")
    seconds = {"reading": texts.seconds, **prediction.seconds}
    taken = {"lm": seconds["lm"], "mixed": seconds["lm"] + seconds["datastore"]}
    return Evaluation(
        tokens=tally.tokens,
        bytes=texts.n_bytes,
        documents=texts.n_documents,
        perplexity=tally.perplexity,
        bits_per_byte={name: -log_p / math.log(2.0) / texts.n_bytes for name, log_p in tally.log_p.items()},
        zero=tally.zero / tally.tokens,
        covered=tally.covered,
        lmbda=tally.lmbda,
        temperature=settings.temperature,
        k=settings.k,
        nprobe=settings.nprobe,
        exact=settings.exact,
        retrieval=settings.retrieval,
        context=context,
        stride=stride,
        helped=helped,
        hurt=hurt,
        gain=gain,
        loss=loss,
        histogram=tally.histogram(),
        frequency=tally.frequency(),
        domains=tally.domains(),
        searched=prediction.n_searched / tally.tokens,
        own=texts.n_own,
        tokens_per_s={name: tally.tokens / max(time, 1e-9) for name, time in taken.items()},
        seconds=seconds,
        store={"path": str(store.path), "snapshot": store.snapshot, "entries": len(store)},
        checkpoint=asdict(lm.language_model.checkpoint),
    )
