"""Work on arrays block by block: each small enough for a core's cache, several at once. numpy lets other threads run while it computes."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import faiss

__all__ = ["BLOCK_CELLS", "at_once", "over_blocks", "without_omp"]

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


@contextmanager
def without_omp() -> Iterator[int]:
    """This thread's faiss calls start no threads of their own, which would go on turning after each call. Gives how many it would start."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield threads
    finally:
        faiss.omp_set_num_threads(threads)


_lock = threading.Lock()
_helpers: tuple[int, ThreadPoolExecutor] | None = None  # the process whose they are


def at_once(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each gives, in order; the first is done by this thread, the others by threads that wait for such work."""
    if len(works) == 1:
        return [works[0]()]
    global _helpers
    with _lock:
        if _helpers is None or _helpers[0] != os.getpid():
            _helpers = (
                os.getpid(),
                ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), initializer=faiss.omp_set_num_threads, initargs=(1,)),
            )
        begun = [_helpers[1].submit(work) for work in works[1:]]
    return [works[0](), *(work.result() for work in begun)]
