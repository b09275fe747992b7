"""Ways to stop a command of the model wing in the middle, and what to count of what it does after."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lms
import numpy as np
import pytest

from knnstore import build
from knnstore.lm import building, calibrate, embed
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.storage.files import Disk

READING, SAMPLE, TRAINING = "reading and tokenizing", "embedding a sample", "training the index"
EMBEDDING, FITTING = "embedding", "fitting λ and temperature"

# In place of the values for real corpora: the stages of a small one are then cut into many steps.
SMALL = (
    (calibrate, "HELD_OUT_TOKENS", 256),
    (build, "SAMPLE_MIN", 400),  # keys of the sample
    (embed, "TOKENS_PER_BATCH", {"cpu": 128}),
    (building, "SAVE_SECONDS", -1.0),  # after each batch
    (building, "SAMPLE_WINDOWS", 4),
    (building, "SAMPLE_MEMORY", 0),  # the sample is spilled
)


def take_small_steps(patch: pytest.MonkeyPatch | None = None) -> None:
    """Sets them; for good where there is no patch, in a process of its own."""
    for module, name, value in SMALL:
        (setattr if patch is None else patch.setattr)(module, name, value)


def load() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


@contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Tokens whose keys are computed inside the block, one number a batch."""
    counts: list[int] = []
    keys = embed.Embedder.keys

    def counting(self: embed.Embedder, tokens: embed.SegmentTokens, windows: np.ndarray) -> list[np.ndarray]:
        found = keys(self, tokens, windows)
        counts.append(sum(map(len, found)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed.Embedder, "keys", counting)
        yield counts


class Stopped(BaseException):
    """Nothing may catch it, as nothing catches a kill."""


def stopping(title: str, at: int) -> lms.Recorder:
    def stop(stage: str, n: int) -> None:
        if stage == title and n == at:
            raise Stopped

    return lms.Recorder(stop)


class Counting:
    """Counts what changes the disk, and stops before the nth deed, and before all after it."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.deeds: list[tuple[str, str]] = []
        self._stop_at = stop_at
        for name in ("open", "write", "pwrite", "truncate", "fsync", "make_folder", "rename", "replace", "link", "remove", "remove_folder"):
            patch.setattr(Disk, name, self._counted(name, getattr(Disk, name)))

    def _counted(self, name: str, deed: Callable[..., object]) -> Callable[..., object]:
        def counted(disk: Disk, *arguments: object) -> object:
            if self._stop_at is not None and len(self.deeds) >= self._stop_at:
                raise Stopped
            self.deeds.append((name, next(item.name for item in reversed(arguments) if isinstance(item, Path))))
            return deed(disk, *arguments)

        return counted
