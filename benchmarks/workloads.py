"""What is measured on: a real datastore of novels with the keys of another one, and generated keys with a real store's statistics."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import knnstore

__all__ = ["Bench", "GeneratedKeys", "Queries", "corpus", "folder_bytes", "fresh_folder", "held_out", "real_queries", "real_store"]

Keys = NDArray[np.float32]

SAMPLE = Path(knnstore.__file__).parent / "samples" / "a-christmas-carol.txt"  # where there are no books
HELD_OUT = "oliver-twist.txt"
QUERIES, SMOKE_QUERIES = 16_384, 512
SMOKE_CHARACTERS = 60_000  # some 15,000 entries: enough to train a quantizer


@dataclass(frozen=True, slots=True)
class Bench:
    """How a run measures. folder: workloads are kept here. books: a folder of texts, None for the package's sample. rounds: of what is
    repeated. smoke: sizes that take seconds, whose figures mean nothing. large: what takes hours is asked for. log: prints progress."""

    folder: Path
    books: Path | None
    rounds: int
    smoke: bool
    large: bool
    log: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Queries:
    """Positions of a text that is not in the datastore. keys: (n, dim) float32; gold: (n,) int64, the token that came; log_p_lm: (n,)
    float64, of that token under the model alone."""

    keys: Keys
    gold: NDArray[np.int64]
    log_p_lm: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.gold)

    def __getitem__(self, at: slice) -> "Queries":
        return Queries(self.keys[at], self.gold[at], self.log_p_lm[at])


def _books(bench: Bench) -> list[Path]:
    """The novels, by name: those of `dickens/` where the folder has it, else all texts in it."""
    assert bench.books is not None, "asked by those who know"
    folder = bench.books / "dickens"
    files = sorted((folder if folder.is_dir() else bench.books).rglob("*.txt"))
    if len(files) < 2:
        raise SystemExit(f"{bench.books}: {len(files)} texts (*.txt). Give a folder with two or more, or leave --books out.")
    return files


def _sample(bench: Bench) -> tuple[Path, Path]:
    """The sample text cut in two, four fifths and one; a smoke run takes less of it."""
    text = SAMPLE.read_text(encoding="utf-8")[: SMOKE_CHARACTERS if bench.smoke else None]
    cut = text.rindex("\n\n", 0, len(text) * 4 // 5)
    paths = bench.folder / "sample-first.txt", bench.folder / "sample-rest.txt"
    bench.folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, (text[:cut], text[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


def corpus(bench: Bench) -> list[Path]:
    """The texts of the real datastore: novels by Dickens without Oliver Twist, or most of the sample text."""
    if bench.books is None or bench.smoke:
        return [_sample(bench)[0]]
    files = _books(bench)
    return [file for file in files if file != held_out(bench)]


def held_out(bench: Bench) -> Path:
    """A text that is not in the real datastore: Oliver Twist, the last of the books by name, or the rest of the sample text."""
    if bench.books is None or bench.smoke:
        return _sample(bench)[1]
    files = _books(bench)
    return next((file for file in files if file.name == HELD_OUT), files[-1])


def real_store(bench: Bench) -> Path:
    """A datastore of `corpus` by the default model, with kept keys (float16). Built once, and not to be changed: copy it first."""
    path = bench.folder / "real.knn"
    if not (path / "CURRENT").exists():
        bench.log(f"building {path.name} (kept for the next run)")
        knnstore.create(path, corpus(bench), domain="books", keep_keys="f16").close()
    return path


def real_queries(bench: Bench) -> Queries:
    """Keys of `held_out` by the same model, in the order of the text, as `evaluate` makes them. Computed once."""
    from knnstore.lm.scoring import score_documents  # it loads torch, which generated keys need not wait for

    path = bench.folder / "real-queries.npz"
    if not path.exists():
        bench.log(f"computing {path.name} (kept for the next run)")
        with knnstore.open(real_store(bench)) as store:
            lm = knnstore.KnnLM.load(store)
            n = SMOKE_QUERIES if bench.smoke else QUERIES
            ids = lm.encode(held_out(bench).read_text(encoding="utf-8"))[: n + 1]
            windows = {"vocab_size": lm.language_model.vocab_size, "context": lm.context, "stride": lm.context // 2}
            (found,) = score_documents(lm.extractor, [ids], views=False, chunk=n, **windows)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, keys=found.keys, gold=found.gold, log_p_lm=found.log_p_lm)
        partial.replace(path)
    with np.load(path) as arrays:
        return Queries(arrays["keys"], arrays["gold"], arrays["log_p_lm"])


class GeneratedKeys:
    """Keys with the statistics of a real store, by number: the same seed and number give the same keys on any machine.

    A mixture on two levels: centres around topics, and keys around centres, each level with its own spectrum. Measured on 3,287,443
    keys of the default model (256 dimensions): variance 215, of which 143 between 2,048 lists; median distance of the nearest
    neighbour 76, of the 1,024th 151. The shapes of the spectra are kept for other dimensions.
    """

    TOPIC_VARIANCE, CENTRE_VARIANCE, KEY_VARIANCE = 105.0, 40.0, 70.0
    BLOCK = 65_536  # keys drawn from one stream: blocks are drawn by several threads

    def __init__(self, dim: int, seed: int = 0, *, n_centres: int = 4_096, n_topics: int = 512) -> None:
        self.dim, self.seed, self.n_centres, self.n_topics = dim, seed, n_centres, min(n_topics, n_centres)

    @cached_property
    def _centres(self) -> Keys:
        rng = np.random.default_rng((self.seed, 0))
        topics = rng.standard_normal((self.n_topics, self.dim), np.float32) * self._scale(self.TOPIC_VARIANCE, 0.7, 3.0)
        offsets = rng.standard_normal((self.n_centres, self.dim), np.float32) * self._scale(self.CENTRE_VARIANCE, 0.6, 3.0)
        offsets += topics[np.arange(self.n_centres) % self.n_topics]
        return offsets

    @cached_property
    def _shares(self) -> NDArray[np.float64]:
        """Cumulated shares of keys of the centres, which are of uneven size."""
        sizes = np.random.default_rng((self.seed, 1)).lognormal(0.0, 0.7, self.n_centres)
        return np.cumsum(sizes / sizes.sum())

    def _scale(self, variance: float, power: float, fall: float) -> Keys:
        """Standard deviations of the axes, (dim,): a power of the rank that falls faster at its end, as measured."""
        rank = np.arange(self.dim)
        shape = (rank + 1.0) ** -power * np.exp(-fall * rank / self.dim)
        return np.sqrt(variance * shape / shape.sum()).astype(np.float32)

    def chunk(self, number: int, n: int) -> Keys:
        """n keys, (n, dim) float32; another number, other keys."""
        return self._draw((self.seed, 2, number), n)

    def queries(self, n: int) -> Keys:
        """Keys of the same distribution that are in no chunk."""
        return self._draw((self.seed, 3), n)

    def _draw(self, stream: tuple[int, ...], n: int) -> Keys:
        keys = np.empty((n, self.dim), np.float32)
        scale, centres, shares = self._scale(self.KEY_VARIANCE, 0.5, 2.5), self._centres, self._shares

        def fill(block: int) -> None:
            rng = np.random.default_rng((*stream, block))
            part = keys[block * self.BLOCK : (block + 1) * self.BLOCK]
            rng.standard_normal(out=part, dtype=np.float32)
            part *= scale
            part *= np.exp(0.35 * rng.standard_normal((len(part), 1), np.float32))  # some contexts are rarer than others
            chosen = np.searchsorted(shares, rng.random(len(part)))
            for at in range(0, len(part), 4_096):
                part[at : at + 4_096] += centres[np.minimum(chosen[at : at + 4_096], self.n_centres - 1)]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(-(-n // self.BLOCK))))
        return keys


def fresh_folder(bench: Bench, name: str) -> Path:
    """An empty folder for what a section writes; what an earlier run left in it is gone."""
    path = bench.folder / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def folder_bytes(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
