"""Loading a causal LM from wherever it is, with its identity and what else a datastore asks of it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from knnstore.errors import InvalidArgumentError, ModelError, NotFoundError
from knnstore.lm.checkpoint import WEIGHT_FILES, identity_of_files, identity_of_module, tokenizer_identity
from knnstore.lm.dequantize import dequantized_folder
from knnstore.lm.devices import choose_device, choose_dtype
from knnstore.storage.checkpoint import Checkpoint

__all__ = ["DEFAULT_MODEL", "LanguageModel", "default_model_folder", "load_language_model"]

DEFAULT_MODEL = "default-gpt2"
"""Name of the model that ships with the package."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal LM ready to run.

    tokenizer: None where the model came without one. max_positions: the longest input its configuration allows, None
    where there is no limit or none is known. vocab_size: width of the logits, which may be more than the tokenizer has.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    max_positions: int | None
    vocab_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    identity: str


def default_model_folder() -> Path:
    """The folder of the model that ships with the package. Raises ModelError if this installation lacks it."""
    folder = Path(__file__).parent.parent / "models" / DEFAULT_MODEL
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: the model that ships with knnstore is not there. Install knnstore again, or name a model.")
    return folder


def load_language_model(
    source: str | Path | PreTrainedModel | LanguageModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a decoder-only causal LM, in `eval` mode.

    source: a hub name (`gpt2-medium`), a local folder, a GGUF file, a model in memory, or None (or `default-gpt2`) for the
    model that ships with the package. A model in memory is used as it is; it is moved or converted only where device or dtype say so.
    tokenizer: one to use in place of the model's own, or the folder or hub name of one.
    revision, token: for the hub, as transformers takes them. cache_dir: where downloads and de-quantized GGUF files are
    kept; None: the hub's and knnstore's own cache folders. device, dtype: see `choose_device` and `choose_dtype`.
    Raises NotFoundError for a path that does not exist, ModelError for a model that cannot be loaded or is no
    decoder-only causal LM, MissingExtraError for a GGUF file without the extra, InvalidArgumentError for other arguments.
    """
    cache = None if cache_dir is None else Path(cache_dir)
    hub = {"token": token, "cache_dir": cache, "trust_remote_code": trust_remote_code}
    own = _load_tokenizer(tokenizer, hub) if isinstance(tokenizer, str | Path) else tokenizer
    if isinstance(source, LanguageModel) and own is None and device is None and dtype is None:
        return source
    if isinstance(source, LanguageModel | PreTrainedModel):
        loaded = _in_memory(source, own)
        _place_in_memory(loaded.model, device, dtype)
    else:
        target = choose_device(device)
        loaded = _load(source, revision=revision, hub=hub, dtype=choose_dtype(dtype, target), own=own)
        loaded.model.requires_grad_(False)
        loaded.model.to(target)  # type: ignore[arg-type]  # transformers' wrapper of Module.to is typed for itself only
    model = loaded.model.eval()
    vocab_size = _causal_vocab_size(model, loaded.name)
    found = loaded.tokenizer
    checkpoint = Checkpoint(
        name=loaded.name,
        revision=loaded.revision,
        identity=loaded.identity,
        tokenizer=None if found is None else tokenizer_identity(found),
        architecture=type(model).__name__,
        vocab_size=vocab_size,
    )
    return LanguageModel(model, found, checkpoint, model.device, model.dtype, _max_positions(model.config), vocab_size)


def _in_memory(source: LanguageModel | PreTrainedModel, own: PreTrainedTokenizerBase | None) -> _Loaded:
    if isinstance(source, LanguageModel):
        known = source.checkpoint
        found = source.tokenizer if own is None else own
        return _Loaded(model=source.model, tokenizer=found, name=known.name, revision=known.revision, identity=known.identity)
    name = source.name_or_path or type(source).__name__
    _refuse_other_kinds(source.config, name)
    return _Loaded(model=source, tokenizer=own, name=name, revision=None, identity=identity_of_module(source))


def _place_in_memory(model: PreTrainedModel, device: str | None, dtype: str | None) -> None:
    target = model.device if device is None else choose_device(device)
    if dtype is not None:
        kind = choose_dtype(dtype, target)
        # Not model.to(dtype): it would round the rotary frequencies too, which transformers keeps in float32 when it loads.
        for stored in model.state_dict(keep_vars=True).values():
            if stored.is_floating_point():
                stored.data = stored.data.to(kind)
    if device is not None:
        model.to(target)  # type: ignore[arg-type]


def _load(
    source: str | Path | None, *, revision: str | None, hub: dict[str, Any], dtype: torch.dtype, own: PreTrainedTokenizerBase | None
) -> _Loaded:
    if source is not None and not isinstance(source, str | Path):
        raise InvalidArgumentError(f"model: a {type(source).__name__} is no hub name, path, PreTrainedModel or LanguageModel.")
    name = DEFAULT_MODEL if source is None else str(source)
    path = default_model_folder() if name == DEFAULT_MODEL else Path(name).expanduser()
    local = path.exists()
    if local and revision is not None:
        raise InvalidArgumentError(f"revision {revision!r}: {name} is on this machine, and only models on the hub have revisions.")
    if not local:
        if isinstance(source, Path) or path.suffix == ".gguf" or not _HUB_NAME.fullmatch(name) or name.startswith("."):
            raise NotFoundError(f"{name}: no such folder or GGUF file, and not the form of a hub name.")
        return _from_hub(name, revision, hub, dtype, own)
    if path.is_dir():
        return _from_folder(path, name, hub, dtype, own)
    if path.suffix != ".gguf":
        raise ModelError(f"{name}: neither a folder nor a GGUF file. Give the folder that holds the model's config.json.")
    with _no_progress_bars():
        folder, identity = dequantized_folder(path, cache_dir=hub["cache_dir"])
    advice = f"Remove {folder}, and it is made again."
    # Loading takes the folder, but the file is what the user has: it gives the identity.
    return _from_folder(folder, name, hub, dtype, own, identity=identity, advice=advice)


def _from_folder(
    folder: Path,
    name: str,
    hub: dict[str, Any],
    dtype: torch.dtype,
    own: PreTrainedTokenizerBase | None,
    *,
    identity: str | None = None,
    advice: str = "Compare the folder with the model's origin.",
) -> _Loaded:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name}: holds a PEFT adapter, not a whole model. Merge it first (merge_and_unload) and save the result.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: has no config.json. Give the folder that save_pretrained wrote, or a GGUF file.")
    with _no_progress_bars():
        model = _load_model(str(folder), name, _load_config(str(folder), name, hub, advice), hub, dtype, advice)
        found = own
        if found is None and any((folder / file).is_file() for file in _TOKENIZER_FILES):
            found = _load_tokenizer(folder, hub)
    identity = identity or identity_of_files(folder, model.base_model_prefix)
    return _Loaded(model=model, tokenizer=found, name=name, revision=None, identity=identity)


def _from_hub(name: str, revision: str | None, hub: dict[str, Any], dtype: torch.dtype, own: PreTrainedTokenizerBase | None) -> _Loaded:
    advice = (
        "Check the name and the network; log in with `hf auth login` or give a token for a model with conditions. "
        "A local folder or GGUF file needs no network, and without a model knnstore uses the one that ships with it."
    )
    config = _load_config(name, name, {**hub, "revision": revision}, advice)
    cache = hub["cache_dir"]
    place = huggingface_hub.try_to_load_from_cache(name, "config.json", cache_dir=cache, revision=revision)
    # A branch may move while its files are fetched, so the rest comes from the commit that the configuration came from.
    commit = Path(place).parent.name if isinstance(place, str) else None
    pinned = {**hub, "revision": commit or revision}
    model = _load_model(name, name, config, pinned, dtype, advice)
    found = own if own is not None else _load_tokenizer(name, pinned)
    for file in WEIGHT_FILES:
        place = huggingface_hub.try_to_load_from_cache(name, file, cache_dir=cache, revision=commit or revision)
        if isinstance(place, str):
            identity = identity_of_files(Path(place).parent, model.base_model_prefix)
            return _Loaded(model=model, tokenizer=found, name=name, revision=commit, identity=identity)
    raise ModelError(f"{name}: was loaded, but not from {', '.join(WEIGHT_FILES)}. Download it to a folder and give that.")


def _load_config(where: str, name: str, hub: dict[str, Any], advice: str) -> PreTrainedConfig:
    with _as_model_error(f"{name}: its configuration cannot be loaded", advice):
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, **hub)
    _refuse_other_kinds(config, name)
    return config


def _load_model(where: str, name: str, config: PreTrainedConfig, hub: dict[str, Any], dtype: torch.dtype, advice: str) -> PreTrainedModel:
    with _as_model_error(f"{name}: cannot be loaded", advice):
        # transformers types this as the model alone; with output_loading_info it is the model and a report.
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=dtype, output_loading_info=True, **hub)
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: the checkpoint lacks {len(missing)} parameters of {type(model).__name__}, {missing[0]} among them; "
            "they would be random. Give a checkpoint saved with its LM head."
        )
    return model


def _load_tokenizer(source: str | Path, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    with _as_model_error(f"{source}: its tokenizer cannot be loaded", "Give another with `tokenizer`."):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source), **hub)
    return tokenizer


@contextmanager
def _as_model_error(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # names, files and configurations of others: loading may fail in any way
        raise ModelError(f"{what}: {_first_line(error)}. {advice}") from error


def _refuse_other_kinds(config: PreTrainedConfig, name: str) -> None:
    architectures = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: an encoder-decoder ({config.model_type}). knnstore works with decoder-only causal LMs (GPT-2, Llama …).")
    masked = [kind for kind in architectures if kind.endswith("ForMaskedLM")]
    if masked:
        raise ModelError(f"{name}: a masked LM ({masked[0]}). knnstore works with decoder-only causal LMs (GPT-2, Llama …).")


def _causal_vocab_size(model: PreTrainedModel, name: str) -> int:
    """Width of the logits, from a pass over two texts that differ in the last token; what comes before must not depend on it.

    A model that looks ahead would put each value into its own key.
    """
    tokens = torch.tensor([[0, 1, 1], [0, 1, 0]], device=model.device)
    failure = _as_model_error(f"{name}: {type(model).__name__} does not run as a causal LM", "Give one with an LM head.")
    with failure, torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits.float()  # (2, 3, vocab)
    first, second = logits[:, :2]
    if not bool(torch.isfinite(first).all()):
        return int(logits.shape[-1])
    # bfloat16 keeps 8 bits; rows of a batch may be summed in different orders.
    tolerance = 1e-3 if model.dtype == torch.float32 else 3e-2
    if float((first - second).abs().max()) > tolerance * float(first.abs().max()):
        raise ModelError(f"{name}: {type(model).__name__} sees tokens that come later, so it is not a causal LM.")
    return int(logits.shape[-1])


def _max_positions(config: PreTrainedConfig) -> int | None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Reading files of this machine is too quick to be worth bars; downloads keep theirs."""
    if not transformers_logging.is_progress_bar_enabled() or are_progress_bars_disabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
