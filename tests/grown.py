"""What a datastore holds and answers, in a form in which one that grew step by step can be compared with one made in one go."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import living
import lms
import numpy as np
from numpy.typing import NDArray

import knnstore
from knnstore.lm.append import append
from knnstore.lm.create import create
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.store import Datastore

WINDOWS = {"context": 32, "stride": 16}


def load(seed: int = 0) -> LanguageModel:
    """A small random GPT-2 with its tokenizer."""
    return load_language_model(lms.gpt2_model(seed=seed), tokenizer=lms.gpt2_tokenizer())


def texts(first: int, n: int, size: int = 300) -> dict[str, str]:
    """Documents [first, first + n): stretches of the sample book, by file name."""
    return {f"{i}.txt": lms.book()[i * size : (i + 1) * size] for i in range(first, first + n)}


def make(path: Path, corpus: Mapping[str, str], model: LanguageModel, **options: Any) -> Datastore:
    """A store of these texts, whose keys are kept."""
    folder = lms.write_texts(path.with_suffix(".corpus"), corpus)
    return create(path, folder, model=model, **{**WINDOWS, "keep_keys": "f32", **options})


def grow(path: Path, corpus: Mapping[str, str], model: LanguageModel, **options: Any) -> Datastore:
    """The store with these texts appended, from a folder that holds nothing else."""
    number = len(list(path.parent.glob(f"{path.stem}.added*")))
    folder = lms.write_texts(path.with_suffix(f".added{number}"), corpus)
    return append(path, folder, model=model, **options)


@dataclass(frozen=True)
class Held:
    """A document of a store. keys: (n, dim) float32 as they were kept."""

    values: tuple[int, ...]
    text: str
    spans: tuple[tuple[int, int], ...]
    metadata: dict[str, Any]
    keys: NDArray[np.float32]


def held(store: Datastore) -> dict[tuple[str, str], Held]:
    """Everything that lives in a store, by domain and id. Keys are read past the 64 bytes of header of their files."""
    parts: dict[tuple[str, str], dict[int, NDArray[np.float32]]] = {}
    for segment in store.segments:
        kept = np.fromfile(segment.folder / "keys.bin", "<f4", segment.content.entries * store.dim, offset=64).reshape(-1, store.dim)
        for place in living._places(segment):
            parts.setdefault(place.key, {})[place.first_token] = kept[place.first_row : place.first_row + place.n]
    found = {}
    for key, (values, text, spans, metadata) in living.contents(store).items():
        keys = np.concatenate([parts[key][first] for first in sorted(parts[key])])
        found[key] = Held(values, text, spans, metadata, keys)
    return found


def check_same(store: Datastore, other: Datastore, *, tolerance: float = 1e-4, keys: bool = True) -> None:
    """The same documents with the same content and keys; the same nearest entries to every kind of query, up to ties.

    keys: False where documents are cut at other places, so that the model saw other windows.
    """
    one, two = held(store), held(other)
    assert one.keys() == two.keys()
    for key, wanted in two.items():
        found = one[key]
        assert (found.values, found.text, found.spans, found.metadata) == (wanted.values, wanted.text, wanted.spans, wanted.metadata)
        assert len(found.keys) == len(found.values)
        if keys:
            np.testing.assert_allclose(found.keys, wanted.keys, atol=tolerance)
    assert store.manifest.documents == other.manifest.documents
    assert len(store) == len(other) == sum(len(item.values) for item in one.values())
    if not keys:
        return
    every = np.concatenate([item.keys for item in two.values()])
    rng = np.random.default_rng(0)
    near = every[rng.integers(0, len(every), 6)] + rng.normal(scale=0.1, size=(6, store.dim))
    check_same_answers(store, other, np.concatenate((every[:2], near, np.zeros((1, store.dim)))), k=min(20, len(store)))


def check_same_answers(store: Datastore, other: Datastore, queries: NDArray[Any], *, k: int) -> None:
    """Exact search finds entries at the same distances, and the same ones but for those that tie with the k-th."""
    hits, wanted = store.search(queries, k=k, exact=True), other.search(queries, k=k, exact=True)
    np.testing.assert_allclose(hits.distances, wanted.distances, rtol=1e-3, atol=1e-2)
    for query in range(len(queries)):
        last = wanted.distances[query, -1]
        sides = [
            {
                (context.domain, context.document, context.token_index, context.token_id, context.char_start)
                for j in range(k)
                if found.distances[query, j] < last - 0.02 - 2e-3 * last
                for context in [found.context(query, j)]
            }
            for found in (hits, wanted)
        ]
        assert sides[0] == sides[1]


def check_whole(store: Datastore, *, killed: bool = False) -> None:
    """Every byte is what was written, nothing lies about, and the counts of the manifest are those of the documents.

    killed: a command was, perhaps while it removed its folder, so that what is left of that waits for a gc.
    """
    report = knnstore.verify(store.path, level="full")
    assert not report.problems, report.problems
    assert not report.orphans
    assert [folder for folder in (store.path / "staging").iterdir() if not (killed and folder.suffix == ".tmp")] == []
    found = held(store)
    assert len(store) == sum(len(item.values) for item in found.values())
    domains = [domain for domain, _ in found]
    assert store.manifest.documents == {domain: domains.count(domain) for domain in domains}


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store with its content, but for locks."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "LOCK"}
