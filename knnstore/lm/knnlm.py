"""`KnnLM`: a language model with a datastore beside it. context → key → neighbours → distribution."""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from knnstore import filters
from knnstore.errors import InvalidArgumentError, ModelError
from knnstore.lm.attaching import attached
from knnstore.lm.checkpoint import check_same_checkpoint
from knnstore.lm.embed import right_padded
from knnstore.lm.generation import generate
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.mixing import mix_gold_tokens, mix_logits, view_of
from knnstore.lm.models import LanguageModel
from knnstore.lm.opening import check_width, computed_dtype, load_model_of
from knnstore.lm.retrieval import Found, retriever_for
from knnstore.lm.scoring import score_documents
from knnstore.lm.settings import Settings, settings_of
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.neighbors import Neighbors
from knnstore.store import Datastore, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KnnLM", "Score", "Step"]

Contexts = str | Sequence[int] | NDArray[Any] | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The next token after one context, or after each of n.

    p_lm, p_knn, p: (vocab,), or (n, vocab) for a batch, float64, each summing to 1 (p_knn to 0 where there is no neighbour; p is
    then p_lm). lmbda: a number, or (n,) float64: the weight of p_knn in p. neighbors: (1, k) or (n, k). weights: (k,) or (n, k)
    float64, each neighbour's share of p_knn. ids: what the model saw, one array for each context.
    """

    p_lm: NDArray[np.float64]
    p_knn: NDArray[np.float64]
    p: NDArray[np.float64]
    lmbda: float | NDArray[np.float64]
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
    def temperature(self) -> float:
        return self.settings.temperature


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """How probable each token of a text is. ids: (n + 1,) int64, what the model saw; the rest is (n,) float64, of ids[1:].

    log_p_lm, log_p_knn, log_p: natural logs; log_p_knn is -inf for a token that no neighbour has. lmbda: the weight of p_knn in p.
    """

    ids: NDArray[np.int64]
    log_p_lm: NDArray[np.float64]
    log_p_knn: NDArray[np.float64]
    log_p: NDArray[np.float64]
    lmbda: NDArray[np.float64]


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
        retrieval: str = "full",
        min_knns: int | None = None,
        threshold: float | None = None,
        device: str | None = None,
        dtype: str | None = None,
        allow_model_mismatch: bool = False,
        tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """The datastore with its model: the one the manifest names, or the one given if it is the same checkpoint.

        k, nprobe, lmbda, temperature, domains: None for the calibration's; with a lmbda of one's own its gate is not used. retrieval:
        `full` searches at every position, `pointers` follows the neighbours of the step before while min_knns of them are left,
        `confident` searches where that pays with a probability of threshold or more. dtype: None for what the keys were computed in,
        or what a model in memory has.
        Raises CheckpointMismatchError for another checkpoint (unless allowed, which warns), InvalidArgumentError for settings out
        of range or missing, NotFoundError, ModelError, DamageError.
        """
        store = store if isinstance(store, Datastore) else open_store(store)
        settings = settings_of(
            store,
            k=k,
            nprobe=nprobe,
            lmbda=lmbda,
            temperature=temperature,
            domains=domains,
            exclude=exclude,
            exact=exact,
            retrieval=retrieval,
            min_knns=min_knns,
            threshold=threshold,
        )
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

    def _found(self, keys: NDArray[np.float32], logits: torch.Tensor, came: NDArray[np.int64]) -> Found:
        """Neighbours of positions that have nothing to do with each other."""
        view = view_of(torch.log_softmax(logits, -1)) if self.settings.retrieval == "confident" else None
        return retriever_for(self.store, self.settings).find(keys, view, sequence=np.arange(len(keys)), came=came)

    def predict(self, contexts: Contexts) -> Step:
        """Distributions of the next token after one context, or after each of several.

        contexts: a text, or token ids (n,) as the model is to see them, or a list of either. Only the last `context` tokens are
        looked at. Raises InvalidArgumentError for no tokens or ids outside the vocabulary.
        """
        single, inputs = self._inputs(contexts)
        keys, logits = self._last_positions(inputs)
        scores = torch.from_numpy(logits)
        neighbors = self._found(keys, scores, came=np.array([ids[-1] for ids in inputs])).neighbors
        mixed = mix_logits(scores, neighbors, self.settings, dtype=torch.float64)
        p_lm, p = mixed.log_p_lm.exp().numpy(), mixed.log_p.exp().numpy()
        p_knn = mixed.sums.dense(self.language_model.vocab_size)
        if single:
            return Step(p_lm[0], p_knn[0], p[0], float(mixed.lmbda[0]), mixed.weights[0], neighbors, tuple(inputs), self.settings)
        return Step(p_lm, p_knn, p, mixed.lmbda, mixed.weights, neighbors, tuple(inputs), self.settings)

    def score(self, text: str | Sequence[int] | NDArray[Any]) -> Score:
        """How probable each token of a text is, after those before it: with the LM alone, the neighbours alone, and both.

        text: a text, or token ids (n,) as the model is to see them. Every token but the first is scored, in windows as the datastore's own
        (its context, half of it new). Raises InvalidArgumentError for fewer than two tokens.
        """
        ids = self.check_ids(self.encode(text) if isinstance(text, str) else np.asarray(text))
        if len(ids) < 2:
            raise InvalidArgumentError("the text has fewer than two tokens, so there is nothing to predict. Give a longer one.")
        stride = max(1, self.context // 2)
        pieces = score_documents(
            self.extractor, [ids], vocab_size=self.language_model.vocab_size, context=self.context, stride=stride, views=True
        )
        retriever, parts = retriever_for(self.store, self.settings, places=False), []
        for piece in pieces:
            found = retriever.find(piece.keys, piece.view, sequence=piece.window, came=piece.before)
            mixed = mix_gold_tokens(piece.gold, piece.log_p_lm, piece.view, found.neighbors, self.settings)
            parts.append((piece.log_p_lm, mixed.log_p_knn, mixed.log_p, mixed.lmbda))
        return Score(ids, *(np.concatenate(part) for part in zip(*parts, strict=True)))

    def generate(self, prompts: Any, *, attribute: bool = False, **options: Any) -> Any:
        """A prompt (text or token ids) and its continuation as text; for a list of prompts, a list.

        options: anything the model's own `generate` takes, such as max_new_tokens, num_beams, do_sample, num_return_sequences (over 1: a
        list for each prompt). attribute: a `Trace` for each text, which says where its tokens come from. See `generation.generate`.
        """
        return generate(self, prompts, attribute=attribute, **options)

    def attached(self) -> "AbstractContextManager[PreTrainedModel]":
        """While it lasts, the model's own forward pass gives log p of LM and datastore, whoever calls it. Gives the model.

        All is undone on exit. See `attaching.attached`.
        """
        return attached(self)

    def _inputs(self, contexts: Contexts) -> tuple[bool, list[NDArray[np.int64]]]:
        """Whether one context was given, and the ids of each."""
        if isinstance(contexts, str):
            return True, [self._seen(self.encode(contexts))]
        items: list[Any] = list(contexts)
        if items and not isinstance(items[0], str) and np.ndim(items[0]) == 0:
            return True, [self._seen(np.asarray(items))]
        if not items:
            raise InvalidArgumentError("no context was given. Give a text, token ids, or a list of them.")
        return False, [self._seen(self.encode(item) if isinstance(item, str) else np.asarray(item)) for item in items]

    def _seen(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        return self.check_ids(ids)[-self.context :]

    def check_ids(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        """Token ids (n,) as int64. Raises InvalidArgumentError for no tokens, another shape, or ids outside the vocabulary."""
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise InvalidArgumentError(f"a context of shape {ids.shape} and type {ids.dtype}: give text, or a row of token ids.")
        if int(ids.min()) < 0 or int(ids.max()) >= self.language_model.vocab_size:
            raise InvalidArgumentError(f"token ids {ids.min()} to {ids.max()}: the vocabulary has {self.language_model.vocab_size}.")
        return ids.astype(np.int64)

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
