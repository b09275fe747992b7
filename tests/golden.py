"""The golden store: made once by an early version of format 1, kept in tests/data, opened by every later one.

    python tests/golden.py      makes it anew; only while the format has not been released

Expected answers are computed from the drawn entries by brute force, and not by the code that made the store.
"""

import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"
ARCHIVE, ANSWERS = DATA / "golden-format-1.tar.gz", DATA / "golden-format-1.json"
DIM, VOCABULARY, QUERIES, K = 16, 1_000, 5, 8
WORDS = ("Marley", "was", "dead", "to", "begin", "with", "äöü", "😀")


def entries(seed: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Keys whose every number float16 holds exactly, so that kept keys are the keys, and values."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-200, 200, (n, DIM)) / 64).astype(np.float32), rng.integers(0, VOCABULARY, n)


def text_of(values: NDArray[np.int64]) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """A word for each value, with its character offsets."""
    words = [WORDS[value % len(WORDS)] for value in values.tolist()]
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    return " ".join(words), starts, starts + [len(word) for word in words]


# id, domain, seed, entries, metadata; in the order in which they were added
DOCUMENTS: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    ("a.txt", "law", 1, 2_500, {"year": 1843}),
    ("b.txt", "law", 2, 2_000, {"year": 1859, "tags": ["x"]}),
    ("a.txt", "med", 3, 700, {}),
    ("c.txt", "med", 4, 300, {"year": 1843}),
    ("d.txt", "med", 5, 40, {}),
)
DELETED = ("c.txt", "med")


def live(snapshot: int) -> list[tuple[str, str, int, int, dict[str, Any]]]:
    """The documents of a snapshot: 1 the first two, 2 two more, 3 the last one more, 4 one deleted."""
    documents = list(DOCUMENTS[: {1: 2, 2: 4, 3: 5, 4: 5}[snapshot]])
    return [document for document in documents if snapshot < 4 or (document[0], document[1]) != DELETED]


def nearest(snapshot: int, queries: NDArray[np.float32]) -> list[list[tuple[str, str, int, int, float]]]:
    """For each query the K nearest entries of a snapshot by brute force: domain, id, token index, value, squared distance."""
    rows: list[tuple[str, str, int, int]] = []
    keys = []
    for name, domain, seed, n, _ in live(snapshot):
        some, values = entries(seed, n)
        keys.append(some.astype(np.float64))
        rows += [(domain, name, index, int(value)) for index, value in enumerate(values)]
    stacked = np.concatenate(keys)
    found = []
    for query in queries.astype(np.float64):
        distances = np.square(stacked - query).sum(axis=1)
        order = np.argsort(distances, kind="stable")[:K]
        found.append([(*rows[i], float(distances[i])) for i in order.tolist()])
    return found


def make(path: Path) -> None:
    """The store of four snapshots, the second of them tagged."""
    import knnstore
    from knnstore import Checkpoint, EntryDocument, IndexOptions

    def batch(document: tuple[str, str, int, int, dict[str, Any]]) -> tuple[Any, Any, list[EntryDocument]]:
        name, domain, seed, n, metadata = document
        keys, values = entries(seed, n)
        text, starts, ends = text_of(values)
        about = EntryDocument(
            id=name, domain=domain, n_entries=n, source=f"books/{name}", metadata=metadata, text=text, starts=starts, ends=ends
        )
        return keys, values, [about]

    checkpoint = Checkpoint(name="none", revision=None, identity="ab" * 32, tokenizer=None, architecture="None", vocab_size=VOCABULARY)
    options = IndexOptions(keep_keys="f16", segment_entries=3_000)  # b.txt is cut over two segments
    first = [batch(document) for document in DOCUMENTS[:2]]
    knnstore.create_from_entries(path, first, checkpoint=checkpoint, dim=DIM, vocab_size=VOCABULARY, options=options)
    knnstore.append_entries(path, [batch(document) for document in DOCUMENTS[2:4]])
    knnstore.tag(path, "paper")
    knnstore.append_entries(path, [batch(DOCUMENTS[4])])
    knnstore.delete(path, DELETED[0], domain=DELETED[1])


def main() -> None:
    """Writes the archive and the answers."""
    DATA.mkdir(exist_ok=True)
    queries = entries(9, QUERIES)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.knn"
        make(path)
        shutil.rmtree(path / "staging")
        (path / "staging").mkdir()
        with tarfile.open(ARCHIVE, "w:gz") as archive:
            archive.add(path, "golden.knn")
    answers = {
        str(snapshot): {
            "documents": [[domain, name, n, metadata] for name, domain, _, n, metadata in live(snapshot)],
            "nearest": nearest(snapshot, queries),
        }
        for snapshot in (1, 2, 3, 4)
    }
    ANSWERS.write_text(json.dumps(answers, indent=1) + "\n")
    sys.stdout.write(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
