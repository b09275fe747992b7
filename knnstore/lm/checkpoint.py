"""Which model this is: an identity over its parameters, one over its tokenizer, and the check that two are the same."""

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from knnstore.errors import CheckpointMismatchError, ModelError, StorageError
from knnstore.lm.file_digests import TensorDigest, tensor_digest, tensor_digests
from knnstore.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["WEIGHT_FILES", "check_same_checkpoint", "identity_of_files", "identity_of_module", "tokenizer_identity"]

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files a checkpoint's parameters are in, in the order in which transformers looks for them."""

# Buffers that older versions of transformers stored, and newer ones compute from the configuration.
_BUFFER = re.compile(r"(^|\.)(masked_bias|causal_mask|position_ids|(original_)?inv_freq)$|(^|\.)rotary_emb\.")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|crossattention)\.bias$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")


def identity_of_files(folder: Path, base_prefix: str) -> str:
    """Identity of the checkpoint in a folder: 64 hex digits over name, dtype, shape and bytes of each parameter as stored.

    base_prefix: the name transformers puts before a trunk's parameters (`transformer` for GPT-2), left out of the names
    here since some checkpoints have it and some do not. Buffers that follow from the configuration do not count; a
    persistent buffer that training fills (the expert bias of DeepSeek) does. An LM head equal to another parameter is
    tied to it and does not count. The same under another path, sharding, file format or compute dtype.
    Raises ModelError for a folder without parameters, StorageError for a file that is missing or cannot be read.
    """
    digests: dict[str, TensorDigest] = {}
    for path, names in _weight_files(folder).items():
        found = tensor_digests(path)
        missing = sorted((names or found.keys()) - found.keys())
        if missing:
            raise ModelError(f"{path}: does not hold {missing[0]}, which the index says is there. Fetch or save the model again.")
        digests |= found if names is None else {name: found[name] for name in names}
    return _identity(digests, base_prefix)


def identity_of_module(model: "PreTrainedModel") -> str:
    """Identity of a model in memory, as it is now: that of the checkpoint which `save_pretrained` would write.

    Parameters count with the dtype they have: a checkpoint loaded in another dtype than its own has another identity here.
    Raises ModelError where parameters are not in memory (offloaded by accelerate).
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = {name.removesuffix(".") for name in getattr(model, "all_tied_weights_keys", None) or {}}
    # state_dict leaves out buffers that are not persistent.
    stored: dict[str, Tensor] = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    places = Counter(_place(tensor) for tensor in stored.values())
    parameters = {name: tensor for name, tensor in stored.items() if not (name in tied and places[_place(tensor)] > 1)}
    # transformers may hold parameters in another form than checkpoints do (experts fused into one tensor).
    parameters = revert_weight_conversion(model, parameters)
    return _identity({name: tensor_digest(tensor) for name, tensor in parameters.items()}, model.base_model_prefix)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Identity of a tokenizer: 64 hex digits over what decides which tokens a text has, and the ids of BOS and EOS.

    That is the vocabulary model, normalizer, pre-tokenizer and added tokens of the fast tokenizer; how it would cut or
    pad a batch and how it decodes do not count. Raises ModelError for a tokenizer without a fast version.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__}: not a fast tokenizer, and only those say which characters a token stands for. "
            "Save one with a tokenizer.json (transformers converts most kinds)."
        )
    try:
        stored: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # the library raises bare Exception, for parts written in Python
        name = type(tokenizer).__name__
        raise ModelError(f"{name}: its backend cannot be written down: {error}. Give a tokenizer without custom Python parts.") from error
    parts = {part: _without_defaults(stored.get(part)) for part in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    parts |= {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return _sha256("knnstore tokenizer 1", parts)


def check_same_checkpoint(built: Checkpoint, given: Checkpoint, *, at: str, allow_model_mismatch: bool = False) -> None:
    """Raise CheckpointMismatchError unless the model given is the one a datastore was built with.

    at: the datastore's path, for the message. With allow_model_mismatch a UserWarning says the same. A tokenizer that one
    of the two lacks is not compared.
    """
    if built.identity != given.identity:
        what = f"checkpoint {built.identity[:12]} ({built.name}), but the model given is {given.identity[:12]} ({given.name})"
        advice = "Load the first checkpoint, or create a datastore for the second."
    elif built.tokenizer is not None and given.tokenizer is not None and built.tokenizer != given.tokenizer:
        what = f"tokenizer {built.tokenizer[:12]} ({built.name}), but the tokenizer given is {given.tokenizer[:12]} ({given.name})"
        advice = "The checkpoints are the same: load the first one's tokenizer, or create a datastore for the second."
    else:
        return
    if not allow_model_mismatch:
        raise CheckpointMismatchError(f"{at}: built with {what}. {advice}")
    warnings.warn(f"{at}: built with {what}. Its neighbours may mean nothing to this model.", UserWarning, stacklevel=2)


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Files that hold the parameters, each with the names to take from it (None: all)."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(f"{folder}: no parameters found. Expected one of {', '.join(WEIGHT_FILES)}.")
    if found.suffix != ".json":
        return {found: None}
    try:
        places = json.loads(found.read_bytes())["weight_map"]
        if not all(isinstance(name, str) and isinstance(file, str) and Path(file).name == file for name, file in places.items()):
            raise TypeError("weight_map must give a file name for each parameter")
    except OSError as error:
        raise StorageError(f"{found}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{found}: not an index of parameters ({error!r}). Fetch or save the model again.") from error
    files: dict[Path, set[str] | None] = {folder / file: set() for file in places.values()}
    for name, file in places.items():
        names = files[folder / file]
        if names is not None:
            names.add(name)
    return files


def _identity(digests: Mapping[str, TensorDigest], base_prefix: str) -> str:
    parameters: dict[str, TensorDigest] = {}
    for name, digest in digests.items():
        short = name.removeprefix(f"{base_prefix}.") if base_prefix else name
        if not _is_buffer(short, digest):
            parameters[short if short not in parameters else name] = digest
    equal = Counter(parameters.values())
    counted = [
        [name, digest.dtype, list(digest.shape), digest.sha256]
        for name, digest in sorted(parameters.items())
        if not (_HEAD.search(name) and equal[digest] > 1)
    ]
    return _sha256("knnstore checkpoint 1", counted)


def _is_buffer(name: str, digest: TensorDigest) -> bool:
    # Old checkpoints hold the causal mask, (1, 1, n, n), under the name that a bias vector would have.
    return _BUFFER.search(name) is not None or (_CAUSAL_MASK.search(name) is not None and len(digest.shape) > 1)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (id(tensor),)


def _without_defaults(value: Any) -> Any:
    """Leave out what is null or false: later versions of tokenizers add such fields for what was the case before."""
    if isinstance(value, dict):
        # Vocabulary and merges are by far the most of it and have no such fields.
        kept = {key: item for key, item in value.items() if item is not None and item is not False}
        return {key: item if key in ("vocab", "merges") else _without_defaults(item) for key, item in kept.items()}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _sha256(kind: str, value: Any) -> str:
    return hashlib.sha256(f"{kind}\n{json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(',', ':'))}".encode()).hexdigest()
