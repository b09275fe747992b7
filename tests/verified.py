"""What the tests of `verify` share: stores, what is found in them, progress that acts, snapshots with right checksums."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from damage import text_documents
from stores import create_store, draw_keys, draw_values

import knnstore
from knnstore.verification.datastore import Problem


def make(path: Path, *n_entries: int, dim: int = 6, text: bool = True, **options: Any) -> Path:
    """A store of documents of so many entries each, in domains a and b by turns."""
    documents = text_documents(n_entries, domains=("a", "b"))
    if not text:
        documents = [dataclasses.replace(document, text=None, starts=None, ends=None) for document in documents]
    total = sum(n_entries)
    vocab_size = options.get("vocab_size", 1_000)
    create_store(path, draw_keys(1, total, dim), draw_values(1, total, vocab_size), documents, **options)
    return path


def problems_of(path: Path, level: str = "full") -> list[Problem]:
    report = knnstore.verify(path, level=level)
    assert report.ok is (not report.problems)
    assert report.checked_bytes > 0
    return list(report.problems)


def assert_clean(path: Path) -> None:
    for level in ("quick", "full"):
        report = knnstore.verify(path, level=level)
        assert (report.ok, report.problems, report.orphans) == (True, (), ()), level


class Told:
    """Progress that counts, and does something when the stage begins."""

    def __init__(self, deed: Callable[[], None] = lambda: None) -> None:
        self.deed, self.n, self.total = deed, 0, 0
        self.units: set[str] = set()
        self.notes: list[str] = []

    @contextmanager
    def stage(self, _title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator["Told"]:
        self.total += total or 0
        self.units.add(unit)
        self.deed()
        yield self

    def advance(self, n: int) -> None:
        self.n += n

    def note(self, message: str) -> None:
        self.notes.append(message)
