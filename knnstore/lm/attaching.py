"""While a KnnLM is attached to its Hugging Face model, the model's own forward pass gives log p of the mixture.

A pre-hook on the key layer takes the keys of a pass, a hook on the model replaces its logits: transformers' own processors, warpers
and losses then see the mixture. (A `LogitsProcessor` would be too late: banned tokens would come back to life.) Nothing of the model is
replaced; the hooks are gone on exit, also after an exception.
"""

import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knnstore.errors import InvalidArgumentError, ModelError
from knnstore.lm.keys import FINAL, check_finite, is_own_pass, key_input, keys_by_position
from knnstore.lm.mixing import mix_logits, view_of
from knnstore.lm.retrieval import Retriever, retriever_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from knnstore.lm.knnlm import KnnLM

__all__ = ["attached", "attached_here"]

SEARCH_POSITIONS = 4_096  # searched together: each list is then read once for many queries
SEARCH_CELLS = 1 << 22  # (position, neighbour) cells of one search at most: 130 MB
MIX_BYTES = 1 << 27  # of the logits mixed together, in float32: what is held twice for a moment

Numbers = NDArray[np.int64]


@contextmanager
def attached(lm: "KnnLM") -> Iterator["PreTrainedModel"]:
    """Within it, a forward pass of the model gives log p of LM and datastore, for every position whose logits were asked for.

    In any thread, and whoever calls the model: `generate`, a Trainer, an evaluation harness, a loop of one's own. `logits` become log p,
    float32 whatever the model computes in (bfloat16 would keep two digits of a log-probability), natural log, each position's
    exp summing to 1, detached from the graph; a `loss` becomes that of the mixture. Where `attention_mask` (batch, length) says padding,
    nothing is searched and p is p_LM. `predict`, `score` and whatever else of knnstore runs the model are not changed by it.
    Gives the model. Nested, it does nothing more. A compiled pass may leave hooks out: give `generate` disable_compile=True where the
    cache is static and the device a GPU (`KnnLM.generate` does).
    Raises InvalidArgumentError where another KnnLM is attached to the same model. A forward pass raises ModelError where the model is
    in training mode, does not run the key layer (early exit), or a key is not finite.
    """
    with _held(lm, None, None):
        yield lm.model


@contextmanager
def attached_here(lm: "KnnLM", *, retriever: Retriever | None = None) -> Iterator["PreTrainedModel"]:
    """As `attached`, for passes of this thread alone. retriever: goes on from pass to pass, where each gives one more token."""
    with _held(lm, threading.get_ident(), retriever):
        yield lm.model


@contextmanager
def _held(lm: "KnnLM", thread: int | None, retriever: Retriever | None) -> Iterator[None]:
    attachment = _enter(lm, thread)
    before, attachment.here.following = attachment.here.following, retriever
    try:
        yield
    finally:
        attachment.here.following = before
        _leave(attachment, thread)


_ATTACHED: "weakref.WeakKeyDictionary[nn.Module, list[_Attachment]]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _enter(lm: "KnnLM", thread: int | None) -> "_Attachment":
    with _LOCK:
        there = _ATTACHED.setdefault(lm.model, [])
        other = next((item for item in there if item.lm is not lm and item.meets(thread)), None)
        if other is not None:
            raise InvalidArgumentError(
                f"{lm.store.path}: its model has another KnnLM attached to it, of {other.lm.store.path}. Leave that one first "
                "(the end of its `with` block), or load the model once more for this one."
            )
        mine = next((item for item in there if item.lm is lm), None)
        if mine is None:
            mine = _Attachment(lm)
            there.append(mine)
        mine.threads[thread] += 1
        return mine


def _leave(attachment: "_Attachment", thread: int | None) -> None:
    with _LOCK:
        attachment.threads[thread] -= 1
        attachment.threads += Counter()  # threads are many in the life of a server: zeros are dropped
        if not attachment.threads:
            attachment.remove()
            there = _ATTACHED[attachment.lm.model]
            there.remove(attachment)
            if not there:
                del _ATTACHED[attachment.lm.model]


class _Pass(threading.local):
    """The forward pass that a thread is in. key: what entered the key layer first, which is what the datastore's keys are.

    following: the retriever of a text that grows from pass to pass; beginning: that of other passes.
    """

    running = False
    key: Any = None
    following: Retriever | None = None
    beginning: Retriever | None = None


class _Attachment:
    """One KnnLM at its model. threads: how often it was attached, for each thread and for all (None)."""

    def __init__(self, lm: "KnnLM") -> None:
        self.lm = lm
        self.threads: Counter[int | None] = Counter()
        self.here = _Pass()
        self._arguments = inspect.signature(lm.model.forward)
        begin, take, end = self._hooks()
        self._handles = [
            lm.model.register_forward_pre_hook(begin, with_kwargs=True),
            lm.extractor.module.register_forward_pre_hook(take, with_kwargs=True),
            lm.model.register_forward_hook(end, with_kwargs=True),
        ]

    def meets(self, thread: int | None) -> bool:
        """Whether some pass would be both this attachment's and one's for a thread (None: for all)."""
        return thread is None or bool(self.threads[None] or self.threads[thread])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _acts(self) -> bool:
        return bool(self.threads[None] or self.threads[threading.get_ident()]) and not is_own_pass()

    def _hooks(self) -> tuple[Callable[..., None], Callable[..., None], Callable[..., Any]]:
        """Functions, not methods: a copy of the model may be made, and must not copy the datastore with its hooks.

        torch may call a hook that another thread is adding or removing without kwargs; such a one does not act here.
        """

        def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if not self._acts():
                return
            if model.training:
                raise ModelError(
                    "the model is in training mode, where dropout changes its keys, and a mixture cannot be trained through. Call "
                    "model.eval() first."
                )
            self.here.running, self.here.key = True, None

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if self.here.running and self.here.key is None and self._acts():
                self.here.key = key_input(args, kwargs or {})

        def end(model: nn.Module, args: tuple[Any, ...], *given: Any) -> Any:
            if not self._acts() or not self.here.running:  # not running: it was attached in the middle of the pass
                return None
            kwargs, output = given
            key, self.here.running, self.here.key = self.here.key, False, None
            if key is None:
                raise ModelError(
                    f"a forward pass did not run the key layer {self.lm.extractor.key.layer} (an early exit?), so there is nothing to "
                    "search with. Run the whole model."
                )
            with torch.no_grad():
                return self._mixed(self._named(args, kwargs), key, output)

        return begin, take, end

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pass by name, with those that `forward` takes as **kwargs among them."""
        named = dict(self._arguments.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._arguments.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        return named

    def _mixed(self, named: Mapping[str, Any], key: Any, output: Any) -> Any:
        """The output with log p for its logits, and the mixture's loss for its loss."""
        logits, place = _logits_of(output, self.lm.language_model.vocab_size)
        vocab_size = logits.shape[-1]
        tokens = named.get("input_ids")
        given = named.get("inputs_embeds") if tokens is None else tokens
        if given is None:
            raise ModelError("a forward pass had neither input_ids nor inputs_embeds, so its positions are not known. Give one of them.")
        batch, length = given.shape[:2]
        keep = named.get("logits_to_keep")
        keep = 0 if keep is None else keep
        n = logits.shape[:-1].numel()
        keys = self._keys_of(key, batch, length, keep, n).to(logits.device)  # (n, dim)
        mask = named.get("attention_mask")
        # 4-D masks, and dictionaries of them, are made for static caches and windows: what is padding is not told apart there.
        real = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
            real = _kept(mask[:, -length:].to(keys.device), keep).reshape(-1) != 0
        check_finite(keys, layer=self.lm.extractor.key.layer, attention_mask=real)
        rows = torch.arange(batch, device=keys.device)[:, None].expand(batch, length)
        sequence = _kept(rows, keep).reshape(-1).cpu().numpy()
        came = np.full(n, -1, np.int64) if tokens is None else _kept(tokens, keep).reshape(-1).cpu().numpy()
        at = np.arange(n) if real is None else np.flatnonzero(real.cpu().numpy())
        log_p = self._log_p(keys, logits.reshape(n, vocab_size), sequence, came, at, one_more=length == 1).reshape(logits.shape)
        loss = self._loss_of(named, logits, log_p, output, place)
        if isinstance(place, int):
            items = list(output)
            items[place] = log_p
            if loss is not None:
                items[0] = loss
            return tuple(items)
        output.logits = log_p
        if loss is not None:
            output.loss = loss
        return output

    def _keys_of(self, key: Any, batch: int, length: int, keep: int | Tensor, n: int) -> Tensor:
        """The keys of the n positions whose logits there are, (n, dim), in the model's dtype."""
        seen = key.shape[:-1].numel() if isinstance(key, Tensor) else 0
        if self.lm.extractor.key.layer == FINAL or (seen == n and seen != batch * length):
            # The LM head sees the positions kept, and no others.
            return keys_by_position(key, batch=1, length=n)[0]
        keys = keys_by_position(key, batch=batch, length=length)
        return _kept(keys, keep).reshape(n, keys.shape[-1])

    def _log_p(self, keys: Tensor, logits: Tensor, sequence: Numbers, came: Numbers, at: Numbers, *, one_more: bool) -> Tensor:
        """log p (n, vocab) float32: of the mixture at the positions `at`, of the LM at the others. Searched and mixed piece by piece."""
        n, vocab_size = logits.shape
        settings, everywhere = self.lm.settings, len(at) == n
        log_p = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        if not everywhere:
            others = torch.from_numpy(np.setdiff1d(np.arange(n), at)).to(logits.device)
            log_p[others] = logits[others].float().log_softmax(-1)
        retriever = self._retriever(one_more=one_more)
        wants_view = settings.retrieval == "confident"
        n_mixed = max(1, MIX_BYTES // (4 * vocab_size))
        n_searched = max(1, min(SEARCH_POSITIONS, SEARCH_CELLS // settings.k, n_mixed if wants_view else SEARCH_POSITIONS))

        def some(begin: int, stop: int) -> slice | Tensor:
            # A slice is a view: decoding goes through here once a token.
            return slice(begin, stop) if everywhere else torch.from_numpy(at[begin:stop]).to(logits.device)

        for begin in range(0, len(at), n_searched):
            stop = min(begin + n_searched, len(at))
            rows = some(begin, stop)
            view = view_of(logits[rows].float().log_softmax(-1)) if wants_view else None
            queries = keys[rows].float().cpu().numpy()
            neighbors = retriever.find(queries, view, sequence=sequence[at[begin:stop]], came=came[at[begin:stop]]).neighbors
            for first in range(begin, stop, n_mixed):
                last = min(first + n_mixed, stop)
                rows = some(first, last)
                log_p[rows] = mix_logits(logits[rows], neighbors[first - begin : last - begin], settings).log_p
        return log_p

    def _retriever(self, *, one_more: bool) -> Retriever:
        """one_more: whether the pass may go on from the one before, by one token of each sequence."""
        here = self.here
        if here.following is not None and one_more:
            return here.following
        if here.following is None and here.beginning is None:
            here.beginning = retriever_for(self.lm.store, self.lm.settings, places=False)
        found = here.following or here.beginning
        assert found is not None, "made above"
        found.reset()
        return found

    def _loss_of(self, named: Mapping[str, Any], logits: Tensor, log_p: Tensor, output: Any, place: int | str) -> Tensor | None:
        """The loss of log p, which are logits like any others; None where there are no labels."""
        if named.get("labels") is None:
            return None
        model = self.lm.model
        own = set(self._arguments.parameters) | {"return_dict", "logits", "vocab_size"}
        others = {name: value for name, value in named.items() if name not in own}  # num_items_in_batch, shift_labels …

        def loss_of(scores: Tensor) -> Tensor:
            loss: Tensor = model.loss_function(logits=scores, labels=named["labels"], vocab_size=scores.shape[-1], **others)
            return loss

        loss = loss_of(log_p)
        # A mixture of experts adds to its loss: that stays. In a tuple, it stands between loss and logits.
        if place > 1 if isinstance(place, int) else getattr(output, "aux_loss", None) is not None:
            given = output[0] if isinstance(place, int) else output.loss
            loss = loss + (given - loss_of(logits))
        return loss


def _logits_of(output: Any, vocab_size: int) -> tuple[Tensor, int | str]:
    """The logits of an output, and where they stand in it: a number for a tuple, a name for the rest."""
    if not isinstance(output, tuple):
        logits, place = getattr(output, "logits", None), "logits"
        if isinstance(logits, Tensor):
            return logits, place
    else:
        for i, item in enumerate(output):
            if isinstance(item, Tensor) and item.ndim >= 2 and item.shape[-1] == vocab_size and item.is_floating_point():
                return item, i
    raise ModelError(f"a forward pass gave a {type(output).__name__} without logits, so there is nothing to mix with.")


def _kept(values: Tensor, keep: int | Tensor) -> Tensor:
    """The positions of (batch, length, …) that `logits_to_keep` keeps, as transformers has it: (batch, kept, …), or (kept, …) by a mask."""
    if isinstance(keep, Tensor) and keep.ndim == 2:
        if keep.dtype == torch.bool:
            return values[keep]
        return torch.take_along_dim(values, keep.reshape(keep.shape + (1,) * (values.ndim - 2)), dim=1)
    return values[:, keep if isinstance(keep, Tensor) else slice(-keep, None)]
