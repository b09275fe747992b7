"""What changes of a store hold in memory does not grow with the store, but for what is named (docs/design.md, Memory)."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from stores import create_store, draw_keys, draw_values

from knnstore import EntryDocument

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]

DIM = 64
SMALL, LARGE = 100_000, 900_000  # entries: of 32 bytes of code and 8 of label each
DOCUMENT = 10_000
SLACK = 6 << 20  # bytes by which two runs of the same work differ: the allocator's, and threads'
SAMPLED_EVERY_S = 0.002

WORK = """
import sys
import numpy as np
import knnstore, knnstore.entries, knnstore.lm.retrain, knnstore.merging, knnstore.verification.datastore
act, path, out = sys.argv[1:]
rng = np.random.default_rng(5)
keys, values = rng.standard_normal((5_000, 64), np.float32), rng.integers(0, 1_000, 5_000)
new = knnstore.EntryDocument(id="new", n_entries=5_000)
acts = {
    "search": lambda: knnstore.open(path).search(keys[:8]),
    "append": lambda: knnstore.append_entries(path, [(keys, values, [new])]),
    "merge": lambda: knnstore.merge([path], out),
    "delete": lambda: knnstore.delete(path, "document 3"),
    "purge": lambda: knnstore.delete(path, "document 3", purge=True),
    "compact": lambda: knnstore.compact(path),
    "verify": lambda: knnstore.verify(path),
}
if act == "compact":
    knnstore.delete(path, "document 3")
print("BEGIN", flush=True)
sys.stdin.readline()
acts[act]()
print("END", flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Stores:
    small: Path
    large: Path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Two stores of the same kind with the same number of lists, one nine times as large."""
    folder = tmp_path_factory.mktemp("memory")
    keys = draw_keys(1, SMALL, DIM)
    paths = []
    for name, times in (("small", 1), ("large", LARGE // SMALL)):
        documents = [EntryDocument(id=f"document {i}", n_entries=DOCUMENT) for i in range(times * SMALL // DOCUMENT)]
        path = folder / f"{name}.knn"
        many = np.concatenate([keys] * times)
        create_store(path, many, draw_values(2, len(many)), documents, batch=1, training_keys=keys, expected_entries=LARGE)
        paths.append(path)
    return Stores(*paths)


def grown(act: str, path: Path, parent: Path) -> int:
    """Bytes of anonymous memory that a process of its own has more at the peak of an act than before it."""
    copy, out = parent / "copy.knn", parent / "out.knn"
    subprocess.run(["rm", "-rf", str(copy), str(out)], check=True)
    subprocess.run(["cp", "-r", str(path), str(copy)], check=True)
    command = [sys.executable, "-c", WORK, act, str(copy), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "BEGIN\n"
        before = peak = anonymous_bytes(child.pid)
        os.set_blocking(child.stdout.fileno(), False)
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None and not child.stdout.readline():
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(SAMPLED_EVERY_S)
        peak = max(peak, anonymous_bytes(child.pid))
        child.stdin.close()
    assert child.returncode == 0
    return peak - before


def anonymous_bytes(pid: int) -> int:
    """What a process holds beside the files that it maps; 0 where it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def least(act: str, path: Path, parent: Path) -> int:
    """The least of three runs."""
    return min(grown(act, path, parent) for _ in range(3))


@pytest.mark.parametrize(
    ("act", "per_entry", "most"),
    [("search", 0, 10), ("append", 0, 50), ("merge", 0, 10), ("delete", 0, 10), ("purge", 0, 40), ("compact", 0, 40), ("verify", 8, 20)],
)
def test_memory_of_a_change_does_not_grow_with_the_store(stores, tmp_path, act, per_entry, most):
    """Nine times as many entries add what is named for each entry (none, or 8 bytes), where codes and labels alone have 40.

    most: megabytes that the act takes on the large store, at all.
    """
    of_small, of_large = least(act, stores.small, tmp_path), least(act, stores.large, tmp_path)
    assert of_large - of_small <= per_entry * (LARGE - SMALL) + SLACK, (of_small, of_large)
    assert of_large <= most << 20, of_large
