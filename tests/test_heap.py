"""Memory between batches: kept while they run, given back after."""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from knnstore.lm.heap import kept_heap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator and /proc are Linux")

BLOCK = 2 << 20  # bytes: below what is mapped by itself
N_BLOCKS = 60  # more together than glibc keeps on its own
PAGES = BLOCK * N_BLOCKS // 4096


def faults_of_a_batch() -> int:
    """Pages that the system had to clear for 120 MiB that were taken, written to and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(BLOCK, np.uint8) for _ in range(N_BLOCKS)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_the_next_batch_takes_the_pages_of_the_one_before() -> None:
    """Within the block only the first batch costs page faults; after it, the memory is the system's again."""
    before = anonymous_bytes()
    with kept_heap():
        faults_of_a_batch()
        assert sum(faults_of_a_batch() for _ in range(3)) < PAGES // 4
    assert anonymous_bytes() - before < BLOCK * N_BLOCKS // 4


@kept_heap()
def failing_batch() -> None:
    faults_of_a_batch()
    raise KeyError


def test_an_error_ends_it_too() -> None:
    """The memory is given back also where the work fails."""
    before = anonymous_bytes()
    with pytest.raises(KeyError):
        failing_batch()
    assert anonymous_bytes() - before < BLOCK * N_BLOCKS // 4
