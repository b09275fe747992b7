"""The usual way to a kNN-LM datastore, written again in plain torch and faiss, to be measured beside `create`.

As knn-transformers and knnlm do it: windows of 256 tokens at every 128, a forward pass of the whole model with its LM head and a hook
that takes the input of the last feed-forward net, float16 keys and int32 values in memmaps, then `IndexIVFPQ` with 64 bytes of code,
trained on a sample and filled from the memmap, and written to a file. Both sides take keys in batches of as many tokens.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["usual_loop"]

CONTEXT, STRIDE = 256, 128
N_SUB, BITS = 64, 8
SAMPLE_MAX = 1_000_000  # keys that are trained on at most, as there
ADDED = 500_000  # keys added at a time, likewise


def usual_loop(
    folder: Path, model: Any, module: torch.nn.Module, ids: NDArray[np.int64], *, dim: int, nlist: int, tokens_per_batch: int
) -> Any:
    """Builds a datastore of consecutive tokens in an empty folder. module: whose input is the key. Returns the index."""
    n = len(ids) - 1
    keys = np.memmap(folder / "keys.npy", np.float16, "w+", shape=(n, dim))
    values = np.memmap(folder / "values.npy", np.int32, "w+", shape=(n,))
    taken: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    starts = np.arange(0, max(1, n - CONTEXT + STRIDE), STRIDE)
    rows = tokens_per_batch // CONTEXT
    try:
        for at in range(0, len(starts), rows):
            some = starts[at : at + rows]
            inputs = np.zeros((len(some), CONTEXT), np.int64)
            for row, start in zip(inputs, some.tolist(), strict=True):
                row[: min(CONTEXT, n - start)] = ids[start : min(start + CONTEXT, n)]
            taken.clear()
            with torch.no_grad():
                model(input_ids=torch.from_numpy(inputs), use_cache=False)
            for found, start in zip(taken[0], some.tolist(), strict=True):
                first = 0 if start == 0 else CONTEXT - STRIDE  # of each later window what is new
                stop = min(CONTEXT, n - start)
                keys[start + first : start + stop] = found[first:stop].float().numpy().astype(np.float16)
                values[start + first : start + stop] = ids[start + first + 1 : start + stop + 1]
    finally:
        hook.remove()
    keys.flush()
    values.flush()
    quantizer = faiss.IndexFlatL2(dim)
    index = faiss.IndexIVFPQ(quantizer, dim, nlist, N_SUB, BITS)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # a smoke run has few, which faiss says 64 times
    chosen = np.random.default_rng(0).choice(n, min(n, SAMPLE_MAX), replace=False)
    index.train(keys[np.sort(chosen)].astype(np.float32))
    for at in range(0, n, ADDED):
        index.add_with_ids(keys[at : at + ADDED].astype(np.float32), np.arange(at, min(n, at + ADDED)))
    faiss.write_index(index, str(folder / "index.faiss"))
    return index
