"""Text from a KnnLM: transformers' own `generate`, over the mixture of LM and datastore."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnstore.errors import InvalidArgumentError
from knnstore.lm.attaching import attached_here
from knnstore.lm.retrieval import retriever_for

if TYPE_CHECKING:
    from knnstore.lm.knnlm import KnnLM

__all__ = ["NEW_TOKENS", "generate"]

NEW_TOKENS = 40
"""How many tokens are made where neither the caller nor the model's generation config says."""

_FROM_PROMPTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
_REFUSED = {
    "assistant_early_exit": "drafts that end before the key layer have no keys. Give assistant_model, or prompt_lookup_num_tokens",
    "dola_layers": "it contrasts layers past the model's forward pass, where the datastore is not seen",
    "use_mtp": "drafting heads were not tried with a datastore. Give assistant_model, or prompt_lookup_num_tokens",
}
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")
_WITH_TOKENIZER = ("stop_strings", "token_healing", "assistant_tokenizer")

Ids = NDArray[np.int64]


def generate(lm: "KnnLM", prompts: Any, *, attribute: bool = False, **options: Any) -> Any:
    """Continues a prompt, or each of several, with text of LM and datastore.

    prompts: a text, or token ids (n,) as the model is to see them, or a list of either (which may be of unequal lengths).
    options: whatever the model's `generate` takes. Where it does not say how long to go on, NEW_TOKENS, or as many as the model has
    positions for. Scores are log p before any of transformers' processors and warpers: what is banned stays banned.
    Returns a text, prompt and continuation without special tokens; for several prompts a list of them; where num_return_sequences
    is over 1, a list for each prompt. With attribute, each is a `Trace`, which says where its tokens come from. With
    return_dict_in_generate, transformers' own output, whose logits are log p.
    Raises InvalidArgumentError for prompts that are none, what does not fit the model's positions, and decoding that goes past the
    model's forward pass; ValueError where transformers refuses its options.
    """
    single, texts, inputs = _inputs(lm, prompts)
    settings = _Options(lm.model.generation_config, options)
    _check(lm, settings, len(inputs), attribute=attribute)
    longest = max(map(len, inputs))
    settings.fill("disable_compile", True)  # compiled, a pass may not run its hooks
    settings.fill("max_new_tokens", _new_tokens(lm, settings, longest))
    eos = lm.tokenizer.eos_token_id
    settings.fill("eos_token_id", eos)
    pad: int = _first(lm.tokenizer.pad_token_id, eos, 0)
    settings.fill("pad_token_id", pad)
    if any(settings.value(name) for name in _WITH_TOKENIZER):
        settings.fill("tokenizer", lm.tokenizer)
    ids, mask = _left_padded(inputs, pad)
    device = lm.model.device
    with attached_here(lm, retriever=retriever_for(lm.store, lm.settings, places=False)) as model:
        found: Any = model.generate(  # type: ignore[operator]  # transformers has it typed for its own classes
            input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device), **settings.options
        )
    if not isinstance(found, Tensor):
        return found
    rows = found.cpu().numpy()
    each = len(rows) // len(inputs)
    results: list[Any] = []
    for i, row in enumerate(rows):
        prompt, text = inputs[i // each], texts[i // each]
        whole = _without_padding(row[longest - len(prompt) :], len(prompt), settings, alone=len(rows) == 1)
        results.append(_trace(lm, whole, len(prompt)) if attribute else _text(lm, whole, prompt, text))
    if each > 1:
        results = [results[i : i + each] for i in range(0, len(results), each)]
    return results[0] if single else results


class _Options:
    """What `generate` was told, and what it will find in the generation configs for the rest."""

    def __init__(self, defaults: Any, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        given = self.options.get("generation_config")
        # A config is not mixed with options (transformers warns): what is filled in goes into a copy of it.
        self._config = None if given is None else copy.deepcopy(given)
        if self._config is not None:
            self.options["generation_config"] = self._config
        self._defaults = defaults

    def value(self, name: str) -> Any:
        """What holds for an option; None where nobody says."""
        if name in self.options:
            return self.options[name]
        return _first(getattr(self._config, name, None), getattr(self._defaults, name, None))

    def fill(self, name: str, value: Any) -> None:
        """Sets what nobody says. An option given as None is said."""
        if name in self.options or value is None or self.value(name) is not None:
            return
        if self._config is not None and hasattr(self._config, name):
            setattr(self._config, name, value)
        else:
            self.options[name] = value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _inputs(lm: "KnnLM", prompts: Any) -> tuple[bool, list[str | None], list[Ids]]:
    """Whether one prompt was given, and of each its text, where it was given as text, and its ids."""
    items: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not items:
        raise InvalidArgumentError("no prompt was given. Give a text, token ids, or a list of them.")
    single = isinstance(prompts, str) or (not isinstance(items[0], str) and np.ndim(items[0]) == 0)
    if single and not isinstance(prompts, str):
        items = [items]
    texts = [item if isinstance(item, str) else None for item in items]
    return single, texts, [lm.check_ids(lm.encode(item) if isinstance(item, str) else np.asarray(item)) for item in items]


def _check(lm: "KnnLM", settings: _Options, n_prompts: int, *, attribute: bool) -> None:
    """Raises InvalidArgumentError for options that the mixture cannot be under, or that say the same twice."""
    for name in _FROM_PROMPTS:
        if name in settings.options:
            raise InvalidArgumentError(f"{name} is made from the prompts. Give them as text or token ids, or use `attached()`.")
    for name, reason in _REFUSED.items():
        if settings.value(name):
            raise InvalidArgumentError(f"{name} cannot be used with a datastore: {reason}.")
    if settings.value("cache_implementation") == "paged":
        raise InvalidArgumentError("cache_implementation 'paged' runs the model in a thread of its own, where the datastore is not seen.")
    if attribute and settings.value("return_dict_in_generate"):
        raise InvalidArgumentError("attribute and return_dict_in_generate both say what is returned. Give one of them.")
    assisted = [name for name in _ASSISTED if settings.value(name) is not None]
    if assisted and n_prompts > 1:
        raise InvalidArgumentError(f"{assisted[0]} takes one prompt at a time, and {n_prompts} were given.")
    if lm.settings.retrieval == "pointers":
        # Rows of a pass must be the same texts as in the pass before, each longer by one token.
        others = [name for name in (*assisted, "custom_generate") if settings.value(name) is not None]
        others += [name for name in ("num_beams", "guidance_scale") if settings.value(name) not in (None, 1, 1.0)]
        if others:
            raise InvalidArgumentError(
                f"{others[0]} cannot be used with retrieval 'pointers', which follows one text from token to token. Load with "
                "retrieval='full'."
            )


def _new_tokens(lm: "KnnLM", settings: _Options, longest: int) -> int | None:
    """How many tokens are made where nobody says. Raises InvalidArgumentError where what is asked for does not fit the model."""
    limit = lm.language_model.max_positions
    room = None if limit is None else limit - longest + 1  # the last token is not run through the model
    asked = settings.value("max_new_tokens")
    if asked is None and settings.value("max_length") is not None:
        asked = settings.value("max_length") - longest
    if room is not None and (room < 1 or (asked is not None and asked > room)):
        wanted = "" if asked is None else f" and {asked} new ones"
        raise InvalidArgumentError(
            f"a prompt of {longest} tokens{wanted}: the model has {limit} positions. Give a shorter prompt"
            + ("." if room < 1 else f", or max_new_tokens={room} at most.")
        )
    if asked is not None:
        return None
    return NEW_TOKENS if room is None else min(NEW_TOKENS, room)


def _left_padded(inputs: Sequence[Ids], pad: int) -> tuple[Ids, Ids]:
    """Ids and mask, (n, longest) int64: padded on the left, since each row goes on at its end."""
    ids = np.full((len(inputs), max(map(len, inputs))), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, tokens in enumerate(inputs):
        ids[i, ids.shape[1] - len(tokens) :] = tokens
        mask[i, ids.shape[1] - len(tokens) :] = 1
    return ids, mask


def _without_padding(ids: Ids, n_prompt: int, settings: _Options, *, alone: bool) -> Ids:
    """A sequence up to its first EOS, or without the padding after what another criterion ended."""
    eos = settings.value("eos_token_id")
    new = ids[n_prompt:]
    ends = np.flatnonzero(np.isin(new, np.atleast_1d(np.asarray(eos)))) if eos is not None else np.zeros(0, np.int64)
    if len(ends):
        return ids[: n_prompt + int(ends[0]) + 1]
    pad = settings.value("pad_token_id")
    real = np.flatnonzero((new != pad) & (new >= 0))  # beams without an EOS are filled up with -1
    if alone or not len(real):
        return ids
    return ids[: n_prompt + int(real[-1]) + 1]


def _text(lm: "KnnLM", ids: Ids, prompt_ids: Ids, prompt: str | None) -> str:
    """Prompt and continuation. The prompt is as it was given, which decoding may not give back."""
    before, whole = _decoded(lm, prompt_ids), _decoded(lm, ids)
    return prompt + whole[len(before) :] if prompt is not None and whole.startswith(before) else whole


def _decoded(lm: "KnnLM", ids: Ids) -> str:
    text = lm.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def _trace(lm: "KnnLM", ids: Ids, n_prompt: int) -> Any:
    from knnstore.lm.attribution import trace

    return trace(lm, ids, n_prompt)
