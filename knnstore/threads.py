"""Work on arrays block by block: each small enough for a core's cache, several at once. numpy lets other threads run while it computes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import faiss

__all__ = ["BLOCK_CELLS", "over_blocks"]

BLOCK_CELLS = 1 << 16  # cells of a block: a few arrays of them stay in a core's cache, which is several times faster than memory

T = TypeVar("T")


def over_blocks(work: Callable[[slice], T], n: int, *, width: int) -> list[T]:
    """What `work` gives for each block of n rows, in order; for one block at least. width: cells of a row.

    As many threads as faiss has (`faiss.omp_set_num_threads`).
    """
    step = max(1, BLOCK_CELLS // max(1, width))
    blocks = [slice(first, min(n, first + step)) for first in range(0, max(1, n), step)]
    threads = min(faiss.omp_get_max_threads(), len(blocks))
    if threads == 1:
        return [work(block) for block in blocks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, blocks))
