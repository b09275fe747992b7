"""GGUF files, de-quantized once into a folder that transformers loads in a second."""

import importlib.util
import io
import os
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from knnstore.errors import MissingExtraError, ModelError, StorageError
from knnstore.lm.file_digests import cache_folder, file_digest

__all__ = ["dequantized_folder"]

_VERSION = 1
"""Raised when the folder written for a file changes."""

_ABANDONED_S = 24 * 3600
"""An unfinished folder older than this was left by a process that died."""


def dequantized_folder(path: Path, *, cache_dir: Path | None = None) -> tuple[Path, str]:
    """The folder with the model and tokenizer of a GGUF file, made at first use, and the sha256 of the file.

    cache_dir: where such folders are kept; None: the user's cache folder. Matrices are written as float16 (a block of a
    quantized matrix holds float16 scales itself), vectors as float32, so the folder takes two bytes a parameter.
    Raises MissingExtraError without the extra `gguf`, ModelError for a file transformers cannot load, StorageError where
    the folder cannot be written.
    """
    identity = file_digest(path)
    parent = cache_dir if cache_dir is not None else cache_folder() / "gguf"
    folder = parent / f"gguf-{_VERSION}-{identity}"
    if folder.is_dir():
        return folder, identity
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f'{path}: reading a GGUF file needs {" and ".join(missing)}. Install with: pip install "knnstore[gguf]"')
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
        try:
            _dequantize(path, unfinished)
            # Another process may have finished first: its folder holds the same.
            with suppress(OSError):
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{parent}: cannot keep the de-quantized model there: {error}. Give another folder with cache_dir.") from error
    if not folder.is_dir():
        raise StorageError(f"{folder}: could not be put in place. Give another folder with cache_dir.")
    return folder, identity


def _dequantize(path: Path, folder: Path) -> None:
    arguments: dict[str, Any] = {"gguf_file": path.name}
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):
        # Otherwise weights stay in their blocks where a kernel for them is installed, and cannot be saved.
        unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    # The reader draws a progress bar of its own, which only a terminal should see.
    progress = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with progress:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **arguments, **unpacked)
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, **arguments)
    except Exception as error:  # a reader of damaged files may fail in any way
        raise ModelError(
            f"{path}: transformers {transformers.__version__} cannot load this GGUF file: {error}. "
            "Its architecture may be unknown to it, or the file incomplete; the same model as a folder of safetensors would do."
        ) from error
    # save_pretrained takes these for a model that is still quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with torch.no_grad():
        for parameter in model.parameters():
            half = parameter.to(torch.float16)
            if parameter.ndim >= 2 and bool(torch.isfinite(half).all()):
                parameter.data = half
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The rename may reach the disk before the files do: without this, a power cut could leave empty ones in its place.
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(".unfinished-*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder)
