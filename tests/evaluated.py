"""Datastores and texts for the tests of `evaluate`, and the comparison of what it reports with what the oracle says (evaluations.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluations
import lms
import numpy as np
import pytest
from evaluations import CONTEXT, STRIDE, Entries, Kind, entries_of, expected, predicted

import knnstore
from knnstore.lm import calibrate
from knnstore.lm.evaluate import Evaluation
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import load_language_model
from knnstore.store import Datastore

SETTINGS = {"lmbda": 0.3, "temperature": 8.0, "k": 2_000}  # more than there are entries


def dickens() -> dict[str, str]:
    book = lms.book()
    return {"carol/one.txt": book[:700], "carol/two.txt": book[30_000:30_500], "gone.txt": book[40_000:40_400]}


def law() -> dict[str, str]:
    return {"act.txt": lms.random_words(1, 60), "bill.txt": lms.random_words(2, 40), "cities.txt": lms.book()[50_000:50_300]}


def texts() -> dict[str, str]:
    """Long, short, of one character, empty, of characters of several tokens, and some that share much with the store."""
    book = lms.book()
    return {
        "a/long.txt": book[80_000:80_600],
        "a/known.txt": book[100:400],
        "b.txt": "Ærø 漢字 😀👩‍👩‍👧 naïve\r\n\r\n" + book[60_000:60_100],
        "empty.txt": "",
        "one.txt": "x",
        "z.txt": "Scrooge",
    }


@dataclass(frozen=True, eq=False)
class Made:
    """Three segments in two domains, a document of which was deleted. entries: that count, in row order."""

    kind: Kind
    store: Datastore
    entries: Entries
    texts: Path

    def lm(self, **options: Any) -> KnnLM:
        return KnnLM.load(self.store, self.kind.model, tokenizer=self.kind.tokenizer, **{**SETTINGS, **options})

    def n_bytes(self, given: Mapping[str, str]) -> int:
        """Of all texts; without BOS, less the first token, which nothing stands before, unless it is a part of a character."""
        n = 0
        for text in given.values():
            ids = self.kind.ids(text)
            first = self.kind.tokenizer.decode(ids[:1])
            n += len(text.encode()) if len(ids) > 1 else 0
            n -= len(first.encode()) if len(ids) > 1 and not self.kind.bos and text.startswith(first) else 0
        return n

    def check(self, evaluation: Evaluation, given: Mapping[str, str], **settings: Any) -> None:
        """All numbers are the oracle's. settings: as of `evaluations.predicted`; exclude may be {id of text: documents}."""
        settings = {**SETTINGS, **settings}
        exclude = settings.pop("exclude", ())
        tokens = []
        for name, text in sorted(given.items()):
            out = exclude.get(name, ()) if isinstance(exclude, dict) else exclude
            tokens += predicted(self.kind, text, self.entries, exclude=out, **settings)
        weights = settings.get("weights")
        domains = evaluations.searched_domains(self.entries, weights)
        always = () if isinstance(exclude, dict) else exclude
        counts = np.isin(self.entries.domains, domains) & ~np.isin(self.entries.documents, list(always))
        entries = {name: int((self.entries.domains[counts] == name).sum()) for name in domains}
        agree(evaluation.fields(), expected(tokens, self.entries.values[counts], self.n_bytes(given), entries))


def agree(found: Any, right: Any, at: str = "") -> None:
    """Numbers to 1e-6 of their size; only what the oracle has is compared."""
    if isinstance(right, dict):
        for name in right:
            agree(found[name], right[name], f"{at}.{name}")
    elif isinstance(right, list | tuple):
        assert len(found) == len(right), at
        for i, item in enumerate(right):
            agree(found[i], item, f"{at}[{i}]")
    elif isinstance(right, str | None):
        assert found == right, at
    else:
        assert found == pytest.approx(right, rel=1e-6, abs=1e-7, nan_ok=True), at


def make(kind: Kind, folder: Path) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 256)  # λ and T are given here
        options = {"model": load_language_model(kind.model, tokenizer=kind.tokenizer)}
        first, more, other = dickens(), {"hymn.txt": "God rest you merry, gentlemen; let nothing you dismay! " * 3}, law()
        path = folder / "made.knn"
        knnstore.create(path, lms.write_texts(folder / "c", first), domain="dickens", context=CONTEXT, stride=STRIDE, **options).close()
        knnstore.append(path, lms.write_texts(folder / "d", other), domain="law", **options).close()
        knnstore.append(path, lms.write_texts(folder / "e", more), domain="dickens", **options).close()
        knnstore.delete(path, "gone.txt")
    del first["gone.txt"]
    entries = entries_of(kind, [("dickens", first), ("law", other), ("dickens", more)])
    return Made(kind, knnstore.open(path), entries, lms.write_texts(folder / "texts", texts()))


def same(one: Evaluation, other: Evaluation) -> None:
    """But for what was left out, and the time it took."""
    names = ("tokens", "bytes", "perplexity", "zero", "lambda", "helped", "hurt", "gain", "loss", "histogram")
    agree({name: one.fields()[name] for name in names}, {name: other.fields()[name] for name in names})
    assert one.perplexity["mixed"] != one.perplexity["lm"]
