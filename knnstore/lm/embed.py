"""tokens of documents → windows → batches → keys."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from knnstore.lm.keys import KeyExtractor
from knnstore.lm.mixing import gold_log_probs
from knnstore.lm.models import LanguageModel
from knnstore.lm.windows import Windows, batches, plan_windows
from knnstore.storage.arrays import MappedArray
from knnstore.storage.contexts import ContextsReader

__all__ = ["Embedder", "SegmentTokens", "keys_and_gold", "right_padded"]

# Tokens in one forward pass: enough to fill the arithmetic units, few enough that activations stay in reach.
TOKENS_PER_BATCH = {"cpu": 4_096, "cuda": 16_384, "mps": 8_192}


class SegmentTokens:
    """The documents of a segment as the model sees them, cut into windows."""

    def __init__(self, values: MappedArray, contexts: ContextsReader, *, context: int, stride: int) -> None:
        self._values = values
        records = list(contexts.documents())
        self.first_rows = np.array([record.first_row for record in records], np.int64)
        self.n_entries = np.array([record.n_entries for record in records], np.int64)
        self.ids = [record.id for record in records]
        self._prefixes = [np.array(record.prefix, np.int64) for record in records]
        prefixes = np.array([len(prefix) for prefix in self._prefixes], np.int64)
        self.windows: Windows = plan_windows(self.n_entries, prefixes, context=context, stride=stride)

    @cached_property
    def window_rows(self) -> NDArray[np.int64]:
        """First row of each window's entries in the segment, (n_windows,)."""
        return self.first_rows[self.windows.document] + self.windows.first_entry

    def inputs(self, window: int) -> NDArray[np.int64]:
        """Token ids that go into the model for one window."""
        document = int(self.windows.document[window])
        prefix = self._prefixes[document]
        start, stop = int(self.windows.input_start[window]), int(self.windows.input_stop[window])
        first = int(self.first_rows[document]) - len(prefix)
        tokens = self._values.rows(first + max(start, len(prefix)), first + stop)[:, 0] if stop > len(prefix) else ()
        return np.concatenate((prefix[start:stop], np.asarray(tokens, np.int64)))

    def targets(self, window: int) -> NDArray[np.int64]:
        """The values of one window's entries: what follows the last of its inputs, and those before."""
        row = int(self.window_rows[window])
        return self._values.rows(row, row + int(self.windows.n_entries[window]))[:, 0].astype(np.int64)


class Embedder:
    """Runs a model over windows. Memory: one batch of TOKENS_PER_BATCH tokens."""

    def __init__(self, model: LanguageModel, key_layer: str | None) -> None:
        self.model = model
        self.extractor = KeyExtractor(model.model, key_layer)
        self.tokens_per_batch = TOKENS_PER_BATCH.get(model.device.type, TOKENS_PER_BATCH["cpu"])

    def batches(self, tokens: SegmentTokens, windows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The windows (numbers of them, any order) in batches of like length."""
        for batch in batches(tokens.windows.lengths[windows], tokens_per_batch=self.tokens_per_batch):
            yield windows[batch]

    def keys(self, tokens: SegmentTokens, windows: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        """Keys of each window's entries, (n_entries, dim) float32 each, from one forward pass of the trunk."""
        inputs = [tokens.inputs(int(window)) for window in windows]
        keys = self.extractor.keys(right_padded(inputs, self.model.device))  # (b, t, dim)
        counts = tokens.windows.n_entries[windows]
        return [keys[i, len(ids) - int(n) : len(ids)].float().cpu().numpy() for i, (ids, n) in enumerate(zip(inputs, counts, strict=True))]


def keys_and_gold(
    extractor: KeyExtractor, ids: NDArray[np.int64], gold: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Keys of the last n positions of one input, and log p_LM of the token after each.

    ids: (t,) what the model sees. gold: (n,) what follows its last n positions. Returns (n, dim) float32 and (n,) float64.
    """
    keys, logits = extractor.keys_and_logits(torch.from_numpy(ids)[None].to(extractor.model.device), last=len(gold))
    return keys[0].float().cpu().numpy(), gold_log_probs(logits[0], gold, views=False)[0]


def right_padded(inputs: Sequence[NDArray[np.int64]], device: torch.device) -> torch.Tensor:
    """(b, longest) token ids on a device, padded on the right, where no position before sees it."""
    ids = np.zeros((len(inputs), max(map(len, inputs))), np.int64)
    for row, tokens in zip(ids, inputs, strict=True):
        row[: len(tokens)] = tokens
    return torch.from_numpy(ids).to(device)
