"""The tokenizers library's object behind a transformers tokenizer, copied and set so that text is text and nothing else.

Added, removed or moved by it in ordinary use: BOS and EOS (post-processor), tokens beyond a length (truncation), padding,
random splits (BPE dropout), spaces trimmed from offsets, and special tokens wherever their names stand in a text.
"""

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from knnstore.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextEncoders", "text_encoders"]

_COMPOSING = frozenset({"NFC", "NFKC", "Precompiled"})


@dataclass(frozen=True, slots=True)
class TextEncoders:
    """first: for the beginning of a text. rest: for what follows, without the space that some tokenizers put before a text.

    composes: whether the normalizer makes one character out of several.
    """

    first: "Tokenizer"
    rest: "Tokenizer"
    composes: bool


def text_encoders(tokenizer: "PreTrainedTokenizerBase") -> TextEncoders:
    """Encoders made from a fast tokenizer, which stays as it is. Raises ModelError if it has no tokenizers backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__}: not a fast tokenizer, so it does not say which characters a token comes from. "
            "Give one with a tokenizer.json (AutoTokenizer makes one for most models)."
        )
    try:
        first = _plain(copy.deepcopy(backend))
    except Exception as error:  # the library raises bare Exception, for parts written in Python
        name = type(tokenizer).__name__
        raise ModelError(f"{name}: its backend cannot be copied: {error}. Give a tokenizer without custom Python parts.") from error
    first = _without_special_pieces(first, also=getattr(tokenizer, "all_special_ids", []))
    parts = {name: _as_json(getattr(first, name)) for name in ("normalizer", "pre_tokenizer")}
    bare = {name: _without_prefix(part) for name, part in parts.items()}
    rest = first
    if bare != parts:
        rest = _plain(copy.deepcopy(first))
        made = _from_parts(bare)
        rest.normalizer, rest.pre_tokenizer = made.normalizer, made.pre_tokenizer
    return TextEncoders(first, rest, composes=_has_type(parts["normalizer"], _COMPOSING))


def _plain(encoder: "Tokenizer") -> "Tokenizer":
    encoder.no_truncation()
    encoder.no_padding()
    encoder.post_processor = None
    if getattr(encoder.model, "dropout", None) is not None:
        encoder.model.dropout = None
    encoder.encode_special_tokens = True  # not kept by a copy
    return encoder


def _without_special_pieces(encoder: "Tokenizer", *, also: list[int]) -> "Tokenizer":
    """The encoder, with special tokens renamed where their names are found all the same.

    Unigram models have them as pieces like any other; some files do not mark as special what the tokenizer's settings (`also`) do.
    """
    added = encoder.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special or i in also}
    # A BPE or word model looks its unknown token up by name.
    named = getattr(encoder.model, "unk_token", None)
    found = {i for i, text in special.items() if text != named and i in encoder.encode(text, add_special_tokens=False).ids}
    if not found:
        return encoder
    fields = json.loads(encoder.to_str())
    # Private-use characters, which no text that means anything has in this order.
    renamed = {special[i]: f"\ue000\uf8ff{i}\uf8ff\ue000" for i in found}
    model = fields["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    for token in fields["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    return _plain(type(encoder).from_str(json.dumps(fields)))


def _without_prefix(part: object) -> object:
    """A normalizer or pre-tokenizer, as JSON, that puts nothing before a text."""
    if isinstance(part, list):
        return [_without_prefix(p) for p in part if not (isinstance(p, dict) and p.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    bare = {name: _without_prefix(value) for name, value in part.items()}
    if bare.get("type") == "Metaspace":
        bare["prepend_scheme"] = "never"
    if "add_prefix_space" in bare:
        bare["add_prefix_space"] = False
    return bare


def _has_type(part: object, types: frozenset[str]) -> bool:
    if isinstance(part, list):
        return any(_has_type(p, types) for p in part)
    return isinstance(part, dict) and (part.get("type") in types or any(_has_type(p, types) for p in part.values()))


def _as_json(part: object) -> object:
    # A part's pickled state is its JSON.
    return None if part is None else json.loads(cast("bytes", part.__getstate__()))


def _from_parts(parts: dict[str, object]) -> "Tokenizer":
    """A tokenizer of nothing but these parts: the library has no other way to make a part from its JSON."""
    from tokenizers import Tokenizer

    absent = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    model = {"type": "BPE", "vocab": {}, "merges": []}
    return Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | absent | parts))
