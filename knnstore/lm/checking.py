"""`verify`: with a model, where one is asked for. Neither torch nor a model is loaded where none is."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.progress import SILENT, Progress
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.verification import datastore
from knnstore.verification.datastore import VerifyReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from knnstore.lm.models import LanguageModel

__all__ = ["verify"]


def verify(
    path: str | Path,
    *,
    level: str = "full",
    sample: int = 0,
    model: "str | Path | PreTrainedModel | LanguageModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    allow_model_mismatch: bool = False,
    seed: int | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Looks for damage in a datastore and changes nothing. May run beside readers and writers.

    level: `quick` or `full`. sample: how many windows of the newest snapshot's text are run through the model again; of the sub-codes
    stored of each segment, 99% must be those that it gives now. model: None for the one the manifest names. dtype: None for what each
    segment was computed in; in another, the share is only told. seed: of the sample, None for another each time.
    Memory: as `knnstore.verification.datastore.verify`; with a sample also the model, a batch and the codes of the windows.
    Raises NotFoundError where there is no datastore or no snapshot yet, FormatError for a store of a later format,
    CheckpointMismatchError for another model (unless allowed), ModelError, InvalidArgumentError; damage is never raised.
    """
    if sample < 0:
        raise InvalidArgumentError(f"sample {sample}: use 0 for none, or how many windows to compute again.")
    if not sample or level not in datastore.LEVELS:
        return datastore.verify(path, level=level, progress=progress)
    from knnstore.lm.recheck import Recheck

    store = StoreFolder(Path(path))
    with ExitStack() as stack:
        try:
            manifest, pin = open_snapshot(store)
        except DamageError:
            return datastore.verify(path, level=level, progress=progress)
        stack.callback(pin.release)
        recheck = Recheck(
            store,
            manifest,
            {
                "model": model,
                "tokenizer": tokenizer,
                "revision": revision,
                "token": token,
                "cache_dir": cache_dir,
                "device": device,
                "dtype": dtype,
                "allow_model_mismatch": allow_model_mismatch,
                "progress": progress,
            },
        )
        report = datastore.verify(path, level=level, progress=progress)
        damaged = frozenset("/".join(problem.path.split("/")[:2]) for problem in report.problems)
        samples, problems = recheck.run(sample, damaged=damaged, rng=np.random.default_rng(seed), progress=progress)
        return replace(report, problems=(*report.problems, *problems), samples=tuple(samples))
