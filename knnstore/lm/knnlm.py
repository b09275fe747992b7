"""`KnnLM`: a language model with a datastore beside it. context → key → neighbours → distribution."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from knnstore import filters
from knnstore.errors import InvalidArgumentError, ModelError
from knnstore.lm.checkpoint import check_same_checkpoint
from knnstore.lm.distribution import check_lambda, check_temperature, knn_log_probs, log_softmax, mix, neighbor_weights
from knnstore.lm.embed import right_padded
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.models import LanguageModel
from knnstore.lm.opening import check_width, computed_dtype, load_model_of
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.neighbors import Neighbors
from knnstore.search import check_breadth
from knnstore.store import Datastore, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KnnLM", "Settings", "Step"]

Contexts = str | Sequence[int] | NDArray[Any] | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How neighbours are searched and mixed in."""

    k: int
    nprobe: int
    lmbda: float
    temperature: float
    domains: filters.Domains | None
    exclude: tuple[str | filters.RowRange, ...]
    exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The next token after one context, or after each of n.

    p_lm, p_knn, p: (vocab,), or (n, vocab) for a batch, float64, each summing to 1 (p_knn to 0 where there is no neighbour; p is
    then p_lm). neighbors: (1, k) or (n, k). weights: (k,) or (n, k) float64, each neighbour's share of p_knn. ids: what the
    model saw, one array for each context.
    """

    p_lm: NDArray[np.float64]
    p_knn: NDArray[np.float64]
    p: NDArray[np.float64]
    weights: NDArray[np.float64]
    neighbors: Neighbors
    ids: tuple[NDArray[np.int64], ...]
    settings: Settings

    @property
    def k(self) -> int:
        return self.settings.k

    @property
    def nprobe(self) -> int:
        return self.settings.nprobe

    @property
    def lmbda(self) -> float:
        return self.settings.lmbda

    @property
    def temperature(self) -> float:
        return self.settings.temperature


class KnnLM:
    """A causal LM that reads from a datastore. Make one with `KnnLM.load`.

    store, language_model, settings: what it was loaded with; model, tokenizer: the Hugging Face objects.
    """

    def __init__(self, store: Datastore, language_model: LanguageModel, extractor: KeyExtractor, settings: Settings, context: int) -> None:
        self.store = store
        self.language_model = language_model
        self.settings = settings
        self.context = context  # tokens the model sees at most, as when the keys were made
        self.extractor = extractor
        if language_model.tokenizer is None:
            raise ModelError(f"{language_model.checkpoint.name}: it came without a tokenizer. Give one with tokenizer=.")
        eos = bool(store.manifest.tokens.get("eos", True)) if store.manifest.tokens else True
        self.document_tokenizer = DocumentTokenizer(language_model.tokenizer, eos=eos)

    @classmethod
    def load(
        cls,
        store: Datastore | str | Path,
        model: "str | Path | PreTrainedModel | LanguageModel | None" = None,
        *,
        k: int | None = None,
        nprobe: int | None = None,
        lmbda: float | None = None,
        temperature: float | None = None,
        domains: filters.Domains | None = None,
        exclude: Iterable[str | filters.RowRange] | None = None,
        exact: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        allow_model_mismatch: bool = False,
        tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """The datastore with its model: the one the manifest names, or the one given if it is the same checkpoint.

        k, nprobe, lmbda, temperature: None for the calibration's. dtype: None for what the keys were computed in, or what a model in
        memory has.
        Raises CheckpointMismatchError for another checkpoint (unless allowed, which warns), InvalidArgumentError for settings out
        of range or missing, NotFoundError, ModelError, DamageError.
        """
        store = store if isinstance(store, Datastore) else open_store(store)
        settings = _settings(store, k=k, nprobe=nprobe, lmbda=lmbda, temperature=temperature, domains=domains, exclude=exclude, exact=exact)
        base, computed = store.manifest, computed_dtype(store.manifest)
        loaded = load_model_of(
            base, model=model, dtype=dtype, revision=revision, tokenizer=tokenizer, token=token, cache_dir=cache_dir, device=device
        )
        check_same_checkpoint(base.checkpoint, loaded.checkpoint, at=str(store.path), allow_model_mismatch=allow_model_mismatch)
        extractor = KeyExtractor(loaded.model, base.key.layer)
        check_width(store.path, base, extractor)
        if computed is not None and str(loaded.dtype) != f"torch.{computed}":
            warnings.warn(
                f"{store.path}: its keys were computed in {computed}, this model runs in {str(loaded.dtype).removeprefix('torch.')}; "
                "distances will differ a little.",
                stacklevel=2,
            )
        rules = [record.content.windows for record in store.manifest.segments if record.content.windows is not None]
        longest = loaded.max_positions or 1 << 20
        context = min(longest, max(rule.context for rule in rules)) if rules else longest
        return cls(store, loaded, extractor, settings, context)

    @property
    def model(self) -> "PreTrainedModel":
        return self.language_model.model

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        assert self.language_model.tokenizer is not None
        return self.language_model.tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens included."""
        text = self.tokenizer.decode(list(ids))
        return text if isinstance(text, str) else "".join(text)

    def encode(self, text: str) -> NDArray[np.int64]:
        """A text as the model will see it: BOS where the model has one, then its tokens by the datastore's rule."""
        ids = self.document_tokenizer.encode(text).astype(np.int64)
        bos = self.document_tokenizer.bos_id
        return ids if bos is None else np.concatenate(([bos], ids))

    def search(self, keys: NDArray[np.float32], *, exclude: Iterable[str | filters.RowRange] = ()) -> Neighbors:
        """Neighbours of keys (n, dim) under these settings. exclude: rows that do not count, besides those of the settings."""
        settings = self.settings
        return self.store.search(
            keys,
            k=settings.k,
            nprobe=settings.nprobe,
            domains=settings.domains,
            exclude=[*settings.exclude, *exclude] or None,
            exact=settings.exact,
        )

    def predict(self, contexts: Contexts) -> Step:
        """Distributions of the next token after one context, or after each of several.

        contexts: a text, or token ids (n,) as the model is to see them, or a list of either. Only the last `context` tokens are
        looked at. Raises InvalidArgumentError for no tokens or ids outside the vocabulary.
        """
        single, inputs = self._inputs(contexts)
        keys, logits = self._last_positions(inputs)
        neighbors = self.search(keys)
        settings, vocab_size = self.settings, self.language_model.vocab_size
        log_p_lm = log_softmax(logits)
        log_p_knn = knn_log_probs(
            neighbors.distances,
            neighbors.values,
            vocab_size=vocab_size,
            temperature=settings.temperature,
            log_weights=neighbors.log_weights,
        )
        p_lm, p_knn, p = np.exp(log_p_lm), np.exp(log_p_knn), np.exp(mix(log_p_lm, log_p_knn, settings.lmbda))
        weights = neighbor_weights(
            neighbors.distances, neighbors.values, temperature=settings.temperature, log_weights=neighbors.log_weights
        )
        if single:
            return Step(p_lm[0], p_knn[0], p[0], weights[0], neighbors, tuple(inputs), settings)
        return Step(p_lm, p_knn, p, weights, neighbors, tuple(inputs), settings)

    def _inputs(self, contexts: Contexts) -> tuple[bool, list[NDArray[np.int64]]]:
        """Whether one context was given, and the ids of each."""
        if isinstance(contexts, str):
            return True, [self._checked(self.encode(contexts))]
        items: list[Any] = list(contexts)
        if items and not isinstance(items[0], str) and np.ndim(items[0]) == 0:
            return True, [self._checked(np.asarray(items))]
        if not items:
            raise InvalidArgumentError("no context was given. Give a text, token ids, or a list of them.")
        return False, [self._checked(self.encode(item) if isinstance(item, str) else np.asarray(item)) for item in items]

    def _checked(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise InvalidArgumentError(f"a context of shape {ids.shape} and type {ids.dtype}: give text, or a row of token ids.")
        if int(ids.min()) < 0 or int(ids.max()) >= self.language_model.vocab_size:
            raise InvalidArgumentError(f"token ids {ids.min()} to {ids.max()}: the vocabulary has {self.language_model.vocab_size}.")
        return ids[-self.context :].astype(np.int64)

    def _last_positions(self, inputs: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys (n, dim) and logits (n, vocab), float32, after each context. One pass for contexts of one length."""
        lengths = np.array([len(ids) for ids in inputs])
        keys = np.empty((len(inputs), self.store.dim), np.float32)
        logits = np.empty((len(inputs), self.language_model.vocab_size), np.float32)
        for length in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == length)
            batch = right_padded([inputs[row] for row in rows.tolist()], self.model.device)
            found_keys, found_logits = self.extractor.keys_and_logits(batch, last=1)
            keys[rows] = found_keys[:, 0].float().cpu().numpy()
            logits[rows] = found_logits[:, 0].float().cpu().numpy()
        return keys, logits


def _settings(
    store: Datastore,
    *,
    k: int | None,
    nprobe: int | None,
    lmbda: float | None,
    temperature: float | None,
    domains: filters.Domains | None,
    exclude: Iterable[str | filters.RowRange] | None,
    exact: bool,
) -> Settings:
    """What is None comes from the calibration; T = 1 is measured to do harm, so there is no constant to fall back to.

    What can be checked is checked here: a model may take long to load.
    """
    calibration = store.manifest.calibration
    if lmbda is None or temperature is None:
        if calibration is None:
            raise InvalidArgumentError(f"{store.path}: it has no calibration, so λ and temperature must be given (lmbda=, temperature=).")
        if calibration.status == "stale":
            warnings.warn(f"{store.path}: it changed after λ and temperature were fitted; they may not fit it any more.", stacklevel=3)
        lmbda = calibration.lmbda if lmbda is None else lmbda
        temperature = calibration.temperature if temperature is None else temperature
    defaults = calibration or store.manifest
    k, nprobe = defaults.k if k is None else k, defaults.nprobe if nprobe is None else nprobe
    check_breadth(k, nprobe)
    filters.domain_weights(store.segments, domains)
    if exact:
        for segment in store.segments:
            segment.check_exact()
    return Settings(
        k=k,
        nprobe=nprobe,
        lmbda=check_lambda(lmbda),
        temperature=check_temperature(temperature),
        domains=dict(domains) if isinstance(domains, Mapping) else domains,
        exclude=(exclude,) if isinstance(exclude, str | filters.RowRange) else tuple(exclude or ()),
        exact=exact,
    )
