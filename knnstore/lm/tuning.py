"""`tune`: a datastore's calibration, fitted on text that it does not have. texts → keys → one search → fit → a new snapshot."""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from knnstore.changes import Change, commit_change
from knnstore.errors import InvalidArgumentError
from knnstore.filters import RowRange
from knnstore.lm.building import short_list
from knnstore.lm.corpus import CorpusInputs, list_inputs, read_documents
from knnstore.lm.fitting import GATES, MOST_DOMAINS, Choice, Fitted, HeldOut, Surface, fit, joined
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.own import OwnDocuments
from knnstore.lm.scoring import Positions, score_documents
from knnstore.lm.searched import Searched
from knnstore.lm.texts import Text, read_texts
from knnstore.progress import SILENT, Progress
from knnstore.search import check_breadth
from knnstore.storage.calibration import Calibration, calibration_fields
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.commits import check_features
from knnstore.storage.manifest import Operation
from knnstore.store import open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from knnstore.lm.models import LanguageModel

__all__ = ["Tuning", "tune"]

MOST_TOKENS = 16_384  # to fit on: gates are then stable to a tenth of a percent of perplexity
LEAST_TOKENS = 256  # fewer tell too little
LEAST_K = 1_024  # neighbours searched at least: fewer may be chosen, not more
STRETCH = 1_024  # tokens of a text that are taken together where not all of it is: many places, and little run for context alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What was fitted, on what, and what each choice bought.

    snapshot: that has it; None where nothing was to be changed. documents: how many texts tokens were taken from. stored: those of
    them that the datastore has too, which were not predicted from themselves. mean_lambda: over the tokens. choices, surface: what was
    tried.
    """

    snapshot: int | None
    calibration: Calibration
    documents: int
    stored: tuple[str, ...]
    mean_lambda: float
    choices: tuple[Choice, ...]
    surface: Surface

    def fields(self) -> dict[str, Any]:
        """The fields of `knnstore tune --json`."""
        return {
            "snapshot": self.snapshot,
            "documents": self.documents,
            "stored": list(self.stored),
            "mean_lambda": self.mean_lambda,
            "calibration": calibration_fields(self.calibration),
            "choices": [asdict(choice) for choice in self.choices],
            "surface": {name: getattr(self.surface, name).tolist() for name in ("temperatures", "lambdas", "perplexity")},
        }


def tune(
    path: str | Path,
    texts: "str | Path | Sequence[str | Path] | CorpusInputs",
    *,
    k: int | None = None,
    nprobe: int | None = None,
    exact: bool = False,
    tokens: int = MOST_TOKENS,
    gate: str = "auto",
    seed: int = 0,
    dry_run: bool = False,
    name: str | None = None,
    model: "str | Path | PreTrainedModel | LanguageModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    allow_model_mismatch: bool = False,
    progress: Progress = SILENT,
) -> Tuning:
    """Fits temperature, λ or a gate, k and domain weights on held-out text, and commits them as the datastore's calibration.

    texts: folders, files, or "-" for standard input (named by `name`). k: neighbours searched, of which the nearest may do; None for the
    datastore's, 1,024 at least. tokens: at most so many are taken, from places drawn by seed. gate: `fixed`, `distance` or `logistic`;
    `auto` for the one that is best on folds it was not fitted on. dry_run: commits nothing.
    A text that the datastore has too, by id or content, is not predicted from itself, and a note says so. Other options: as `KnnLM.load`.
    Memory: the model, 20 bytes for each of tokens times k neighbours, and 8 bytes for each token of the longest text.
    Raises InvalidArgumentError where there is too little text or no neighbour, CheckpointMismatchError, NotFoundError, CorpusError,
    ModelError, FormatError, DamageError, ConflictError, StorageError.
    """
    if gate not in GATES:
        raise InvalidArgumentError(f"gate {gate!r}: use {', '.join(GATES)}.")
    if tokens < LEAST_TOKENS:
        raise InvalidArgumentError(f"tokens {tokens}: use {LEAST_TOKENS} or more; fewer tell too little.")
    if seed < 0:
        raise InvalidArgumentError(f"seed {seed}: use 0 or more.")
    check_breadth(1 if k is None else k, 1 if nprobe is None else nprobe)
    folder = StoreFolder(Path(path))
    with open_store(path) as store:
        check_features(folder, store.manifest)
        if not len(store):
            raise InvalidArgumentError(f"{path}: it has no entries, so there is nothing to fit to. Append text first.")
        inputs = texts if isinstance(texts, CorpusInputs) else list_inputs(texts, stdin_name=name)
        for ignored in inputs.ignored:
            progress.note(f"{ignored.source}: left out ({ignored.reason})")
        defaults = store.manifest.calibration or store.manifest
        k = max(LEAST_K, store.manifest.k) if k is None else k
        with progress.stage("loading the model", total=None, unit="models") as stage:
            lm = KnnLM.load(
                store,
                model,
                k=min(k, len(store)),
                nprobe=defaults.nprobe if nprobe is None else nprobe,
                lmbda=0.0,
                temperature=1.0,
                exact=exact,
                device=device,
                dtype=dtype,
                allow_model_mismatch=allow_model_mismatch,
                tokenizer=tokenizer,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
            )
            stage.advance(1)
        held_out, n_texts, stored = _hold_out(lm, inputs, tokens, seed, progress)
        if not (held_out.values[:, 0] >= 0).any():
            raise InvalidArgumentError(
                f"{path}: no neighbour was found for any token: all of its entries are the text's own. Give other text."
            )
        with progress.stage("fitting", total=None, unit=""):
            fitted = fit(held_out, gate=gate)
        if fitted.k == lm.settings.k:  # all that were searched, also where the datastore has fewer by now
            fitted = replace(fitted, k=k)
        calibration = _calibration(lm, fitted, len(held_out))
        snapshot = None
        if not dry_run:
            arguments: dict[str, Any] = {
                "texts": short_list([file.source for file in inputs]),
                "gate": gate,
                "k": lm.settings.k,
                "seed": seed,
            }
            if allow_model_mismatch:
                arguments["allow_model_mismatch"] = True
            operation = Operation(name="tune", arguments=arguments, counts={"tokens": len(held_out)})
            made = commit_change(folder, store.manifest, Change(operation=operation, calibration=calibration))
            assert made.calibration is not None, "it was just given one"
            snapshot, calibration = made.snapshot, made.calibration
    return Tuning(
        snapshot=snapshot,
        calibration=calibration,
        documents=n_texts,
        stored=tuple(stored),
        mean_lambda=fitted.mean_lambda,
        choices=fitted.choices,
        surface=fitted.surface,
    )


def _calibration(lm: KnnLM, fitted: Fitted, n_tokens: int) -> Calibration:
    manifest = lm.store.manifest
    return Calibration(
        lmbda=fitted.lmbda,
        temperature=fitted.temperature,
        k=fitted.k,
        nprobe=lm.settings.nprobe,
        exact=lm.settings.exact,
        spaces=tuple(sorted({record.content.space for record in manifest.segments})),
        domains=tuple(manifest.domains()),
        status="fresh",
        made_by="tune",
        tokens=n_tokens,
        perplexity={name: score for name, score in fitted.perplexity.items() if np.isfinite(score)},
        gate=fitted.gate,
        before=fitted.before,
        weights=fitted.weights,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    """Consecutive tokens of a text. text: the text without its ids, number: of it. ids: (t,), of which the first `lead` stand before the
    stretch, for context alone. place: of the first that is predicted, in the text."""

    text: Text
    number: int
    place: int
    ids: NDArray[np.int64]
    lead: int

    def __len__(self) -> int:
        """Tokens that are predicted."""
        return len(self.ids) - self.lead


class _Sample:
    """Stretches of texts as they pass by: all of them while they are few, then some, each as probable as any other.

    n_tokens: that could be predicted, in all texts.
    """

    def __init__(self, most: int, lead: int, seed: int) -> None:
        self._most, self._lead = most, lead
        self._random = np.random.default_rng(seed)
        self._heap: list[tuple[float, int, _Stretch]] = []  # (-draw, a number that no other has, stretch): the largest draw goes first
        self._n_held = self._n_seen = self.n_tokens = 0

    def take(self, number: int, text: Text) -> None:
        for at in range(1, len(text.ids), STRETCH):
            first = max(0, at - self._lead)
            stretch = _Stretch(replace(text, ids=text.ids[:0].copy()), number, at, text.ids[first : at + STRETCH].copy(), at - first)
            self.n_tokens += len(stretch)
            self._n_seen += 1
            heapq.heappush(self._heap, (-float(self._random.random()), self._n_seen, stretch))
            self._n_held += len(stretch)
            while self._n_held - len(self._heap[0][2]) >= self._most:
                self._n_held -= len(heapq.heappop(self._heap)[2])

    def stretches(self) -> list[_Stretch]:
        """Those that are held, in the order of the texts, cut to `most` tokens to predict."""
        held = [stretch for _, _, stretch in self._heap]
        if self._n_held > self._most:  # by less than one of them has: the next that would have gone
            held[0] = replace(held[0], ids=held[0].ids[: len(held[0].ids) - (self._n_held - self._most)])
        return sorted(held, key=lambda stretch: (stretch.number, stretch.place))


def _hold_out(lm: KnnLM, inputs: CorpusInputs, most: int, seed: int, progress: Progress) -> tuple[HeldOut, int, list[str]]:
    """Positions to fit on, how many texts they are of, and the sources of those that the datastore has too."""
    lead = min(max(1, lm.context // 2), STRETCH)  # as many as the first of a window sees at least
    sample = _Sample(most, lead, seed)
    with progress.stage("reading and tokenizing", total=None, unit="tokens") as stage:
        for number, text in enumerate(read_texts(lm.document_tokenizer, read_documents(inputs))):
            sample.take(number, text)
            stage.advance(len(text.ids))
    stretches = sample.stretches()
    n = sum(map(len, stretches))
    if n < LEAST_TOKENS:
        raise InvalidArgumentError(f"the text has {n} tokens to predict; {LEAST_TOKENS} are the least to fit on. Give more of it.")
    if n < sample.n_tokens:
        progress.note(f"{n:,} of {sample.n_tokens:,} tokens are fitted on, in {len(stretches)} places drawn with seed {seed}")
    documents = OwnDocuments(lm.store.segments)
    texts = {stretch.number: stretch.text for stretch in stretches}
    own = {number: rows for number, text in texts.items() if (rows := documents.rows_of(text))}
    stored = [texts[number].source for number in own]
    for source in stored:
        progress.note(f"{source}: the datastore has it too; its own entries do not count in predicting it")
    searched = Searched(lm.store, lm.settings)
    names = tuple(searched.domains)
    parts = []
    with progress.stage("searching", total=n, unit="tokens") as stage:
        for piece in score_documents(
            lm.extractor,
            [stretch.ids for stretch in stretches],
            vocab_size=lm.language_model.vocab_size,
            context=lm.context,
            stride=max(1, lm.context // 2),
            views=True,
        ):
            leads, numbers = (np.array([getattr(item, name) for item in stretches])[piece.document] for name in ("lead", "number"))
            kept = np.flatnonzero(piece.index >= leads)
            excluded = [own.get(number, ()) for number in numbers[kept].tolist()]
            for ranges in dict.fromkeys(excluded):  # one search for all that have the same to leave out, which mostly is nothing
                alike = kept[[item == ranges for item in excluded]]
                parts.append(_search(lm, piece, alike, ranges, searched if 2 <= len(names) <= MOST_DOMAINS else None))
            stage.advance(len(kept))
    return joined(parts, names), len(texts), stored


def _search(lm: KnnLM, piece: Positions, rows: NDArray[np.intp], exclude: tuple[RowRange, ...], searched: Searched | None) -> HeldOut:
    hits = lm.search(piece.keys[rows], exclude=exclude)
    assert piece.view is not None, "it was asked for"
    return HeldOut(
        distances=hits.distances,
        values=hits.values,
        gold=piece.gold[rows],
        log_p_lm=piece.log_p_lm[rows],
        view=piece.view[rows],
        domains=None if searched is None else searched.numbers_of(hits).astype(np.int16),
    )
