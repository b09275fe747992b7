"""How fast a datastore is built: `create` beside the bare trunk and beside the usual loop, encoding and commit beside faiss's `add`.

A section of `make bench`. KNNSTORE_BENCH_MODEL names a second model (hub name, folder or GGUF file; SmolLM2-135M where the limit is
stated for it), without it that part is left out. By itself it prints one JSON object for any text and model:

    python -m benchmarks.building TEXT [--model M] [--dtype D] [--rounds 3] [--characters N]
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import faiss
import numpy as np
import torch
from numpy.typing import NDArray

import knnstore
from benchmarks.measuring import ratio
from benchmarks.page import picture, save, spread, table, verdict
from benchmarks.usual_loop import BITS, CONTEXT, N_SUB, STRIDE, usual_loop
from benchmarks.workloads import Bench, GeneratedKeys, corpus, fresh_folder
from knnstore.lm.embed import Embedder, SegmentTokens, right_padded
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.progress import Stage
from knnstore.storage.coarse import choose_nlist

NAME = "building"
LARGE = False

SECOND_MODEL = "KNNSTORE_BENCH_MODEL"
CHARACTERS, SECOND_CHARACTERS = 1_200_000, 120_000  # of text: some 300,000 tokens, and some 30,000 for a larger model
SMOKE_CHARACTERS, SMOKE_SECOND_CHARACTERS = 20_000, 4_000
ROUNDS = 3  # at most: one takes minutes
LIMITS = {"default": 0.75, "second": 0.9}  # of the trunk's rate
LIMIT_USUAL = 1.5
ENTRIES, SMOKE_ENTRIES = 500_000, 10_000  # generated keys that are encoded
DIM = 256
DOCUMENT = 1_000  # entries of each document of theirs
TRAINING = 65_536
FITTING = "fitting λ and temperature"

Seconds = NDArray[np.float64]


class StageClock:
    """A Progress that adds up the seconds of each stage, on the wall and of all cores."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}

    @contextmanager
    def stage(self, title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator[Stage]:
        began = clocks()
        yield _NoStage()
        self.seconds[title] = self.seconds.get(title, np.zeros(2)) + clocks() - began

    def note(self, message: str) -> None:
        pass


class _NoStage:
    def advance(self, n: int) -> None:
        pass


def clocks() -> Seconds:
    """Seconds on the wall, and of all cores that this process had."""
    return np.array([time.perf_counter(), time.process_time()])


def timed(work: Callable[[], object]) -> Seconds:
    began = clocks()
    work()
    return clocks() - began


def run(bench: Bench) -> dict[str, Any]:
    """All of it; a second model where one is named."""
    rounds = min(bench.rounds, ROUNDS)
    folder = fresh_folder(bench, "building")
    small = bench.smoke or bench.books is None
    text = _beginning(bench, folder / "text.txt", SMOKE_CHARACTERS if bench.smoke else CHARACTERS)
    model = load_language_model(None)
    bench.log("create beside the trunk")
    found: dict[str, Any] = {"beside_trunk": {"default": beside_trunk(text, model, folder, rounds=rounds)}}
    if (name := os.environ.get(SECOND_MODEL)) is not None:
        bench.log("create beside the trunk, second model")
        part = _beginning(bench, folder / "second.txt", SMOKE_SECOND_CHARACTERS if small else SECOND_CHARACTERS)
        found["beside_trunk"]["second"] = beside_trunk(part, load_language_model(name), folder, rounds=rounds)
    bench.log("create beside the usual loop")
    found["beside_usual"] = beside_usual(text, folder, rounds=rounds)
    bench.log("encoding beside faiss add")
    found["beside_add"] = beside_add(SMOKE_ENTRIES if bench.smoke else ENTRIES, folder, rounds=rounds)
    shutil.rmtree(folder)
    return found


def _beginning(bench: Bench, path: Path, characters: int) -> Path:
    """A file with the first characters of the real datastore's texts."""
    text, left = "", characters
    for file in corpus(bench):
        text += file.read_text(encoding="utf-8")[:left]
        left = characters - len(text)
        if left <= 0:
            break
    path.write_text(text, encoding="utf-8")
    return path


def beside_trunk(text: Path, model: LanguageModel, folder: Path, *, rounds: int) -> dict[str, Any]:
    """`create`, without model loading and calibration, and the bare trunk over the same batches of windows in the same dtype."""
    created, bare, entries = [], [], 0
    clock = StageClock()
    for number in range(rounds):
        clock = StageClock()
        store, seconds = _created(folder / f"{text.stem}-{number}.knn", text, model, clock)
        created.append(seconds)
        bare.append(trunk_seconds(store, model))
        entries = len(store)
        store.close()
    return {
        "model": model.checkpoint.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "entries": entries,
        "entries_per_s": entries / statistics.median(float(wall) for wall, _ in created),
        "stages_s": {title: round(float(seconds[0]), 2) for title, seconds in clock.seconds.items()},
        "wall": _ratio(bare, created, 0),
        "cores": _ratio(bare, created, 1),
    }


def _created(path: Path, text: Path, model: LanguageModel, clock: StageClock) -> tuple[knnstore.Datastore, Seconds]:
    """A datastore, and the seconds it took without calibration."""
    began = clocks()
    store = knnstore.create(path, text, model=model, progress=clock)
    return store, clocks() - began - clock.seconds[FITTING]


def trunk_seconds(store: knnstore.Datastore, model: LanguageModel) -> Seconds:
    """Seconds of the bare trunk over all windows of a store, without hooks, codes or files."""
    embedder = Embedder(model, store.manifest.key.layer)
    trunk, seconds = model.model.base_model, np.zeros(2)
    for segment in store.segments:
        rule = segment.content.windows
        assert rule is not None, "a store of a text has one"
        tokens = SegmentTokens(segment.values, segment.contexts, context=rule.context, stride=rule.stride)
        for batch in embedder.batches(tokens, np.arange(len(tokens.windows))):
            ids = right_padded([tokens.inputs(int(window)) for window in batch], model.device)
            began = clocks()
            with torch.inference_mode():
                trunk(input_ids=ids, use_cache=False)
            seconds += clocks() - began
    return seconds


def beside_usual(text: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """`create` in float32 and in the machine's own dtype, and the usual loop in float32, of the same text, model and number of lists."""
    plain, own = load_language_model(None, dtype="float32"), load_language_model(None)
    embedder = Embedder(plain, None)
    assert plain.tokenizer is not None, "it comes with the package"
    ids = np.asarray(plain.tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"], np.int64)
    tokens_per_batch, dim = embedder.tokens_per_batch, embedder.extractor.key.dim
    nlist = choose_nlist(len(ids) - 1)

    def create(model: LanguageModel, name: str) -> Seconds:
        store, seconds = _created(folder / name, text, model, StageClock())
        store.close()
        return seconds

    def usual(name: str) -> None:
        loop = folder / name
        loop.mkdir()
        index = usual_loop(loop, plain.model, embedder.extractor.module, ids, dim=dim, nlist=nlist, tokens_per_batch=tokens_per_batch)
        assert index.ntotal == len(ids) - 1, "every token has a key"

    float32, in_own, loop = [], [], []
    for number in range(rounds):
        float32.append(create(plain, f"float32-{number}.knn"))
        loop.append(timed(lambda: usual(f"loop-{number}")))  # noqa: B023 - called at once
        if own.dtype != plain.dtype:
            in_own.append(create(own, f"own-{number}.knn"))
    found = {
        "entries": len(ids) - 1,
        "nlist": nlist,
        "float32": {"wall": _ratio(loop, float32, 0), "cores": _ratio(loop, float32, 1)},
        "usual_entries_per_s": (len(ids) - 1) / statistics.median(float(wall) for wall, _ in loop),
    }
    if in_own:
        found["own"] = {"dtype": str(own.dtype).removeprefix("torch."), "wall": _ratio(loop, in_own, 0), "cores": _ratio(loop, in_own, 1)}
    return found


def beside_add(n: int, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Entries/s of `create_from_entries` from the first batch to the end, and of faiss's `add` of the same keys to trained indexes."""
    made = GeneratedKeys(DIM)
    keys, training = made.chunk(0, n), made.chunk(1, TRAINING)
    nlist = choose_nlist(n)
    centroids = training[np.random.default_rng(0).choice(len(training), nlist, replace=False)]
    peers = {
        "fastscan": lambda quantizer: faiss.IndexIVFPQFastScan(quantizer, DIM, nlist, 2 * N_SUB, 4),
        "ivfpq": lambda quantizer: faiss.IndexIVFPQ(quantizer, DIM, nlist, N_SUB, BITS),
    }
    trained = {name: _trained(make, centroids, training) for name, make in peers.items()}
    times: dict[str, list[Seconds]] = {"knnstore": [], **{name: [] for name in peers}}
    for number in range(rounds):
        times["knnstore"].append(_entries_seconds(folder / f"add-{number}.knn", keys, training))
        for name, index in trained.items():
            times[name].append(timed(lambda: index.add(keys)))  # noqa: B023 - called at once
            index.reset()
    return {
        "entries": n,
        "dim": DIM,
        "nlist": nlist,
        "entries_per_s": n / statistics.median(float(wall) for wall, _ in times["knnstore"]),
        **{name: {"wall": _ratio(times[name], times["knnstore"], 0), "cores": _ratio(times[name], times["knnstore"], 1)} for name in peers},
    }


@dataclass(slots=True)
class _Batches:
    """Batches of documents without text. began: when the first was asked for, once the index was trained."""

    keys: NDArray[np.float32]
    began: Seconds | None = None

    def __iter__(self) -> Iterator[tuple[Any, Any, list[knnstore.EntryDocument]]]:
        self.began = clocks()
        for at in range(0, len(self.keys), 64 * DOCUMENT):
            some = self.keys[at : at + 64 * DOCUMENT]
            sizes = [min(DOCUMENT, len(some) - first) for first in range(0, len(some), DOCUMENT)]
            documents = [knnstore.EntryDocument(id=f"{at + i * DOCUMENT}", n_entries=size) for i, size in enumerate(sizes)]
            yield some, np.arange(len(some)) % DIM, documents


def _entries_seconds(path: Path, keys: NDArray[np.float32], training: NDArray[np.float32]) -> Seconds:
    batches = _Batches(keys)
    checkpoint = knnstore.Checkpoint(
        name="generated", revision=None, identity="0" * 64, tokenizer=None, architecture="none", vocab_size=DIM
    )
    knnstore.create_from_entries(
        path, batches, checkpoint=checkpoint, dim=DIM, vocab_size=DIM, training_keys=training, expected_entries=len(keys)
    )
    assert batches.began is not None, "they were taken"
    return clocks() - batches.began


def _trained(make: Callable[[Any], Any], centroids: NDArray[np.float32], training: NDArray[np.float32]) -> Any:
    """An index with these centroids, its product quantizer trained."""
    quantizer = faiss.IndexFlatL2(DIM)
    quantizer.add(centroids)
    index = make(quantizer)
    index.referenced_objects = [quantizer]
    index.train(training)
    return index


def _ratio(above: Sequence[Seconds], below: Sequence[Seconds], at: int) -> dict[str, float]:
    return ratio([float(seconds[at]) for seconds in above], [float(seconds[at]) for seconds in below])


TRUNK_TEXT = """`create`, model loading and calibration left out, as a share of the rate of the bare trunk: the model without its LM head
over the same batches of windows in the same dtype, without hooks, codes or files. Training the index is counted, so short texts do worse.
Ending the forward pass at the key layer saves the last feed-forward net, so a share may be over 1. `cores` compares seconds of all cores,
which other work on a machine disturbs less.
"""
USUAL_TEXT = """The usual loop, written again in plain torch and faiss (`benchmarks/usual_loop.py`): windows of {context} tokens at every
{stride}, the whole model, float16 keys in a memmap, `IndexIVFPQ` {n_sub} x {bits} trained on them and filled from them, all in float32.
Default model, {entries:,} tokens, {nlist:,} lists on both sides. Entries/s of `create` over those of the loop ({rate:,.0f}):
"""
ADD_TEXT = """Encoding and commit alone: `create_from_entries` of {entries:,} generated keys of {dim} dimensions in memory, from the first
batch to the end of the commit, as a share of the rate of faiss's `add` of the same keys to a trained index in memory ({nlist:,} lists).
`add` rotates nothing, keeps no values and documents, hashes nothing and writes nothing.
"""


def render(result: dict[str, Any], plots: Path) -> str:
    """Its part of docs/benchmarks.md."""
    trunk, usual, add = result["beside_trunk"], result["beside_usual"], result["beside_add"]
    path = plots / "building.svg"
    _plot(trunk, path)
    peers = {"fastscan": f"`IndexIVFPQFastScan.add` {2 * N_SUB} x 4", "ivfpq": f"`IndexIVFPQ.add` {N_SUB} x {BITS}"}
    of_usual = {"float32": usual["float32"]} | ({usual["own"]["dtype"]: usual["own"]} if "own" in usual else {})
    limits = [f"- {part['model']}: {verdict(part['wall']['median'], LIMITS[name], least=True)}" for name, part in trunk.items()]
    if "second" not in trunk:
        limits.append(f"- No second model was measured: `{SECOND_MODEL}` was not set.")
    return "\n".join(
        (
            "## Building\n",
            TRUNK_TEXT,
            table(
                ("model", "dtype", "entries", "of the trunk's rate", "cores", "entries/s"),
                (
                    (
                        part["model"],
                        part["dtype"],
                        f"{part['entries']:,}",
                        spread(part["wall"]),
                        spread(part["cores"]),
                        f"{part['entries_per_s']:,.0f}",
                    )
                    for part in trunk.values()
                ),
            ),
            *limits,
            "",
            picture(path, "Share of the time of create that each of its stages takes, for each model"),
            USUAL_TEXT.format(
                context=CONTEXT,
                stride=STRIDE,
                n_sub=N_SUB,
                bits=BITS,
                entries=usual["entries"],
                nlist=usual["nlist"],
                rate=usual["usual_entries_per_s"],
            ),
            table(
                ("`create` in", "times its rate", "cores"),
                ((dtype, spread(found["wall"]), spread(found["cores"])) for dtype, found in of_usual.items()),
            ),
            f"In float32: {verdict(usual['float32']['wall']['median'], LIMIT_USUAL, least=True)}\n",
            ADD_TEXT.format(**{name: add[name] for name in ("entries", "dim", "nlist")}),
            table(
                ("beside", "share of its rate", "cores"),
                ((peers[key], spread(add[key]["wall"]), spread(add[key]["cores"])) for key in peers),
            ),
        )
    )


def _plot(trunk: dict[str, Any], path: Path) -> None:
    from benchmarks.page import figure

    titles = ("reading and tokenizing", "embedding a sample", "training the index", "embedding")
    made, (axes,) = figure(height=1.2 + 0.6 * len(trunk))
    left = np.zeros(len(trunk))
    names = [part["model"] for part in trunk.values()]
    for title in titles:
        widths = np.array([part["stages_s"].get(title, 0.0) / sum(part["stages_s"].get(t, 0.0) for t in titles) for part in trunk.values()])
        axes.barh(names, widths, left=left, label=title, height=0.6)
        left += widths
    axes.set_xlabel("share of the time")
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(made, path)


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default=None, help="As for `knnstore create`.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--characters", default=None, type=int, help="Of the text at most.")
@click.option("--dtype", default=None)
def main(text: Path, model: str | None, rounds: int, characters: int | None, dtype: str | None) -> None:
    """`create` beside the bare trunk, for any text and model."""
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "text.txt"
        corpus.write_text(text.read_text(encoding="utf-8")[:characters], encoding="utf-8")
        found = beside_trunk(corpus, load_language_model(model, dtype=dtype), Path(folder), rounds=rounds)
    click.echo(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
