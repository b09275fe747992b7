"""Keys: where in a causal LM they are taken, and how they are taken with no more of the model than they need."""

import difflib
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knnstore.errors import InvalidArgumentError, ModelError
from knnstore.storage.checkpoint import KeyLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FINAL", "KeyExtractor", "check_finite", "find_key_layer", "is_own_pass", "key_input", "keys_by_position"]

FINAL = "final"
"""Name of the key layer that is the input of the LM head."""

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block", "feedforward", "ff")
"""What decoders call the feed-forward net of a block, in the order of preference."""


def find_key_layer(model: "PreTrainedModel", name: str | None = None) -> tuple[KeyLayer, nn.Module]:
    """The module whose input is the key, and its name and width.

    name: None for the feed-forward net of the last block, whose input is the normalized hidden state (Khandelwal et al.
    2020, section 4); `final` for the LM head; else the path of a module, below the model's trunk or from its root. The
    width is read from a forward pass over two tokens, which also shows that the module is run.
    Raises ModelError, with the names that would do, where there is no such module or no hidden state enters it.
    """
    if name is None:
        layer, module = _last_feed_forward(model)
    elif name == FINAL:
        layer, module = FINAL, _lm_head(model)
    else:
        layer, module = _module_at(model, name)
    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    try:
        found = _trunk_keys(model, module, tokens, None)
    except ModelError as error:
        raise ModelError(f"{_name_of(model)}: {layer} cannot be the key layer: {error}. {_advice(model)}") from None
    return KeyLayer(layer=layer, dim=found.shape[-1]), module


class KeyExtractor:
    """Takes keys from one model at one layer.

    Nothing of the model is replaced: a hook is there during a call and gone after it, also after an error. Calls from
    several threads do not see each other's keys. Logits are the model's own, also while a KnnLM is attached to it. The model should
    be in `eval` mode. key, module: the key layer, and whose input the keys are.
    """

    def __init__(self, model: "PreTrainedModel", layer: str | None = None) -> None:
        self.model = model
        self.key, self.module = find_key_layer(model, layer)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def keys(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The key of each position; the forward pass ends where the keys are known, before the LM head.

        input_ids: (batch, length) long, on the model's device. attention_mask: (batch, length), 0 at padding; with
        padding on the right it may be left out, since no position sees the ones after it.
        Returns (batch, length, dim) in the model's dtype. Raises ModelError for a key that is not finite.
        """
        keys = _trunk_keys(self.model, self.module, input_ids, attention_mask)  # (b, t, dim)
        check_finite(keys, layer=self.key.layer, attention_mask=attention_mask)
        return keys

    def keys_and_logits(self, input_ids: Tensor, *, last: int, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and logits of the `last` positions, from one pass of the whole model.

        input_ids and attention_mask as for `keys`. Returns (batch, last, dim) and (batch, last, vocab), both in the
        model's dtype. Raises ModelError for a key that is not finite, InvalidArgumentError for a `last` out of range.
        """
        length = input_ids.shape[1]
        if not 1 <= last <= length:
            raise InvalidArgumentError(f"last = {last}: must be from 1 to the {length} positions given.")
        arguments: dict[str, Any] = {"logits_to_keep": last} if self._takes_logits_to_keep else {}
        # The LM head sees only the positions kept: there, `final` keys are as many as the logits.
        seen = last if self.key.layer == FINAL and self._takes_logits_to_keep else length
        with torch.inference_mode(), _captured(self.module, stop=False) as taken:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **arguments)
        keys = keys_by_position(taken[0], batch=input_ids.shape[0], length=seen)[:, -last:]  # (b, last, dim)
        check_finite(keys, layer=self.key.layer, attention_mask=None if attention_mask is None else attention_mask[:, -last:])
        return keys, output.logits[:, -last:]  # (b, last, vocab)


def is_own_pass() -> bool:
    """Whether this thread is in a pass that takes keys, whose logits must be the model's own."""
    return _own.passes > 0


def key_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What enters the key layer, from the arguments of its forward pre-hook: the first one given."""
    return args[0] if args else next(iter(kwargs.values()), None)


def keys_by_position(captured: Any, *, batch: int, length: int) -> Tensor:
    """The input of a key layer as (batch, length, dim); OPT, for one, hands its feed-forward net (batch * length, dim).

    Raises ModelError where it is not a hidden state for each position.
    """
    if not isinstance(captured, Tensor) or not captured.is_floating_point():
        raise ModelError("what enters it is not a hidden state")
    if captured.ndim not in (2, 3) or captured.shape[:-1].numel() != batch * length:
        raise ModelError(f"what enters it has shape {tuple(captured.shape)} for {batch} x {length} tokens, not one vector for each")
    return captured.reshape(batch, length, captured.shape[-1])


def check_finite(keys: Tensor, *, layer: str, attention_mask: Tensor | None = None) -> None:
    """Raise ModelError if a key (…, dim) is infinite or not a number, outside of what `attention_mask` (…) says is padding."""
    finite = torch.isfinite(keys)
    if bool(finite.all()):
        return
    positions = finite.all(-1)
    if attention_mask is not None:
        positions = positions | (attention_mask == 0)
        if bool(positions.all()):
            return
    advice = (
        "The checkpoint itself may be damaged: compare its files with their origin."
        if keys.dtype == torch.float32
        else "Numbers got too large for this dtype: load the model with --dtype float32 (dtype='float32' in Python)."
    )
    dtype = str(keys.dtype).removeprefix("torch.")
    raise ModelError(f"{int((~positions).sum())} of {positions.numel()} keys at layer {layer} are not finite in {dtype}. {advice}")


class _OwnPasses(threading.local):
    passes = 0


_own = _OwnPasses()


class _KeysTaken(BaseException):
    """Ends a forward pass at the key layer. Not an Exception, so that no model code catches it on the way out."""


@contextmanager
def _captured(module: nn.Module, *, stop: bool) -> Iterator[list[Any]]:
    """Collect what enters `module` during the block; with `stop`, end the forward pass there by raising _KeysTaken."""
    taken: list[Any] = []
    thread = threading.get_ident()

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # torch may call a hook that another thread is adding or removing without kwargs.
        if threading.get_ident() != thread:
            return
        taken.append(key_input(args, kwargs or {}))
        if stop:
            raise _KeysTaken

    hook = module.register_forward_pre_hook(take, with_kwargs=True)
    _own.passes += 1
    try:
        yield taken
    finally:
        _own.passes -= 1
        hook.remove()


def _trunk_keys(model: "PreTrainedModel", module: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    with torch.inference_mode(), _captured(module, stop=True) as taken:
        try:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _KeysTaken:
            return keys_by_position(taken[0], batch=input_ids.shape[0], length=input_ids.shape[1])
    raise ModelError("a forward pass does not run it")


def _last_feed_forward(model: "PreTrainedModel") -> tuple[str, nn.Module]:
    for path, blocks in _block_lists(model):
        last = blocks[len(blocks) - 1]
        parts = dict(last.named_children())
        found = [part for part in _FEED_FORWARD if part in parts]
        if not found and {"fc1", "fc2"} <= parts.keys():
            found = ["fc1"]
        if found:
            return f"{path}.{len(blocks) - 1}.{found[0]}", parts[found[0]]
    raise ModelError(f"{_name_of(model)}: no feed-forward net found in its last block. {_advice(model)}")


def _block_lists(model: "PreTrainedModel") -> list[tuple[str, nn.ModuleList]]:
    """Lists of modules in the trunk's decoder that are not inside another list, the longest first."""
    trunk = model.base_model
    decoder = model.get_decoder()
    inside = next((path for path, module in trunk.named_modules() if module is decoder), "")
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in trunk.get_submodule(inside).named_modules(prefix=inside):
        # An expert layer may hold more experts than the model has blocks: only outermost lists are blocks.
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{outer}.") for outer, _ in lists):
            lists.append((path, module))
    return sorted(lists, key=lambda item: -len(item[1]))


def _lm_head(model: "PreTrainedModel") -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(f"{_name_of(model)}: no LM head that transformers knows of, so no layer {FINAL}. {_advice(model)}")
    return head


def _module_at(model: "PreTrainedModel", name: str) -> tuple[str, nn.Module]:
    trunk = model.base_model
    below = dict(trunk.named_modules(remove_duplicate=False))  # blocks may share a part
    if name and name in below:
        return name, below[name]
    module = dict(model.named_modules()).get(name) if name else None
    if module is None:
        near = difflib.get_close_matches(name, below, n=3)
        like = f"Names like it: {', '.join(near)}. " if near else ""
        raise ModelError(f"key layer {name!r}: {_name_of(model)} has no such module. {like}{_advice(model)}")
    if module is model.get_output_embeddings():
        return FINAL, module
    return next((path for path, other in below.items() if path and other is module), name), module


def _advice(model: "PreTrainedModel") -> str:
    names = []
    for path, blocks in _block_lists(model)[:1]:
        last = f"{path}.{len(blocks) - 1}"
        names = [f"{last}.{part}" for part, _ in blocks[len(blocks) - 1].named_children()]
    return f"Choose one with --key-layer: {', '.join([FINAL, *names])}."


def _name_of(model: "PreTrainedModel") -> str:
    return type(model).__name__
