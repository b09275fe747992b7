"""The model of a datastore: the one it names, or the one given if it is the same checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnstore.errors import CheckpointMismatchError, ModelError
from knnstore.lm.checkpoint import check_same_checkpoint
from knnstore.lm.embed import Embedder
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.models import DEFAULT_MODEL, LanguageModel, load_language_model
from knnstore.progress import Progress
from knnstore.storage.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_width", "computed_dtype", "load_model_of", "open_embedder"]


def open_embedder(
    path: str | Path,
    base: Manifest,
    *,
    model: "str | Path | PreTrainedModel | LanguageModel | None",
    dtype: str | None,
    revision: str | None,
    allow_model_mismatch: bool,
    progress: Progress,
    **options: Any,
) -> Embedder:
    """The embedder of a store's keys: with the model given, or the one that the store names.

    dtype: None for what its newest segment was computed in. options: of `load_language_model`. Raises ModelError,
    CheckpointMismatchError.
    """
    with progress.stage("loading the model", total=None, unit="models") as stage:
        loaded = load_model_of(base, model=model, dtype=dtype, revision=revision, **options)
        stage.advance(1)
    if loaded.tokenizer is None:
        raise ModelError(f"{loaded.checkpoint.name}: it came without a tokenizer. Give one with tokenizer=.")
    check_same_checkpoint(base.checkpoint, loaded.checkpoint, at=str(path), allow_model_mismatch=allow_model_mismatch)
    embedder = Embedder(loaded, base.key.layer)
    check_width(path, base, embedder.extractor)
    return embedder


def load_model_of(
    base: Manifest,
    *,
    model: "str | Path | PreTrainedModel | LanguageModel | None",
    dtype: str | None,
    revision: str | None,
    **options: Any,
) -> LanguageModel:
    """The model given, or the one that a store names. dtype: None for `computed_dtype`, or what a model in memory has."""
    built = base.checkpoint
    if model is None:
        model = None if built.name == DEFAULT_MODEL else built.name
        revision = revision or built.revision
    if dtype is None and (model is None or isinstance(model, str | Path)):
        dtype = computed_dtype(base)  # a model in memory is the caller's: it stays as it is
    return load_language_model(model, revision=revision, dtype=dtype, **options)


def computed_dtype(base: Manifest) -> str | None:
    """What the newest keys of a store were computed in, where a model gave them."""
    return next((record.content.dtype for record in reversed(base.segments) if record.content.dtype is not None), None)


def check_width(path: str | Path, base: Manifest, extractor: KeyExtractor) -> None:
    """Raises CheckpointMismatchError where a model's keys have another width than the store's."""
    if extractor.key.dim != base.key.dim:
        raise CheckpointMismatchError(
            f"{path}: its keys have {base.key.dim} dimensions, layer {extractor.key.layer} of this model has {extractor.key.dim}. "
            "Load the model it was built with, or create a datastore for this one."
        )
