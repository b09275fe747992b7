"""Which positions go through the model together: windows over the tokens of documents, and batches of windows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnstore.errors import InvalidArgumentError

__all__ = ["WINDOWS_PER_RUN", "Windows", "batches", "plan_windows"]

# Windows sorted by length together: enough that few batches are mixed or not full, few enough that keys come nearly in order.
WINDOWS_PER_RUN = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of documents in document order: what each feeds to the model, and which entries it gives.

    All (n_windows,) int64. document: index of the document. first_entry, n_entries: the entries whose keys are computed here.
    input_start, input_stop: positions in the document's tokens (prefix, then values). With p prefix tokens, the key of entry e
    stands at position p - 1 + e, and its value is the token after.
    """

    document: npt.NDArray[np.int64]
    first_entry: npt.NDArray[np.int64]
    n_entries: npt.NDArray[np.int64]
    input_start: npt.NDArray[np.int64]
    input_stop: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Input tokens of each window, at most the context: (n_windows,) int64."""
        return self.input_stop - self.input_start


def plan_windows(n_entries: npt.ArrayLike, n_prefix: npt.ArrayLike, *, context: int, stride: int) -> Windows:
    """Windows in which each entry of each document is a target exactly once.

    n_entries, n_prefix: (n_documents,) integers >= 1. context: most input tokens of a window, >= 2. stride: entries of each
    window after the first, 1 to context. A document's first window takes as many entries as the context holds (at least
    stride of them); each later one has the full context, so its first entry sees context - stride + 1 tokens.
    Raises InvalidArgumentError for anything else.
    """
    if context < 2:
        raise InvalidArgumentError(f"context is {context}, but a window has at least 2 tokens. Give 2 or more.")
    if not 1 <= stride <= context:
        raise InvalidArgumentError(f"stride is {stride}, but must be from 1 to the context ({context}). Half of the context is usual.")
    counts, prefixes = _counts(n_entries, "n_entries"), _counts(n_prefix, "n_prefix")
    if counts.shape != prefixes.shape:
        raise InvalidArgumentError(f"n_entries is of length {len(counts)}, n_prefix of length {len(prefixes)}. Give both per document.")
    first_key = prefixes - 1
    last_key = first_key + counts - 1
    first_end = np.minimum(np.maximum(context - 1, first_key + stride - 1), last_key)
    n_windows = 1 + -(-(last_key - first_end) // stride)
    document = np.repeat(np.arange(len(counts)), n_windows)
    # 0, 1, 2 … within each document
    number = np.arange(len(document)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    end = np.minimum(first_end[document] + number * stride, last_key[document])
    begin = np.where(number == 0, first_key[document], first_end[document] + (number - 1) * stride + 1)
    return Windows(
        document=document,
        first_entry=begin - first_key[document],
        n_entries=end - begin + 1,
        input_start=np.maximum(0, end + 1 - context),
        input_stop=end + 1,
    )


def batches(lengths: npt.ArrayLike, *, tokens_per_batch: int, windows_per_run: int = WINDOWS_PER_RUN) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of windows to run together, (rows,) int64 each: longest first within each run of consecutive windows.

    lengths: (n_windows,) input tokens >= 1. In a batch, rows times its longest window is at most tokens_per_batch; a window
    longer than that is a batch by itself. The order depends on the lengths alone.
    """
    if tokens_per_batch < 1 or windows_per_run < 1:
        raise InvalidArgumentError(f"tokens_per_batch is {tokens_per_batch}, windows_per_run {windows_per_run}. Both must be 1 or more.")
    tokens = _counts(lengths, "lengths")
    for run in range(0, len(tokens), windows_per_run):
        order = run + np.argsort(-tokens[run : run + windows_per_run], kind="stable")
        begin = 0
        while begin < len(order):
            rows = max(1, tokens_per_batch // int(tokens[order[begin]]))
            yield order[begin : begin + rows]
            begin += rows


def _counts(values: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    counts = np.asarray(values)
    if counts.ndim != 1 or (len(counts) and (counts.dtype.kind not in "iu" or counts.min() < 1)):
        raise InvalidArgumentError(f"{name} must be a row of integers of 1 or more, but is {counts!r}.")
    return counts.astype(np.int64)
