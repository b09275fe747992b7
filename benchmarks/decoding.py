"""What a datastore costs where it is used: predicting, scoring and generating beside the bare model, search beside bare faiss.

A section of `make bench`; by itself, for any datastore and a file of held-out text, it prints one JSON object:

    python -m benchmarks.decoding STORE TEXT [--positions 8192] [--new-tokens 128] [--rounds 5] [-k 1024]

Each figure is a ratio of things measured in turn in this run (median, least and greatest of the rounds); the times beside it are the
machine's mood.
"""

import json
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
from numpy.typing import NDArray

import knnstore
from benchmarks.measuring import in_turn, ratio
from benchmarks.page import spread, table
from benchmarks.workloads import Bench, held_out, real_store
from knnstore.lm.mixing import mix_gold_tokens
from knnstore.lm.predicting import CELLS
from knnstore.lm.scoring import Positions, score_documents
from knnstore.store import Datastore

NAME = "decoding"
LARGE = False

PROMPT_TOKENS = 32
PREDICTIONS = 64  # one after the other in a round: each takes milliseconds
FITTED = 4  # one token in so many of the text is for the gate, the rest is scored


def run(bench: Bench) -> dict[str, Any]:
    """The datastore of real text, with the gate that `tune` gives it."""
    text = held_out(bench).read_text(encoding="utf-8")
    cut = text.index("\n", len(text) // FITTED)
    first, rest = bench.folder / "decoding-first.txt", bench.folder / "decoding-rest.txt"
    first.write_text(text[:cut], encoding="utf-8")
    rest.write_text(text[cut:], encoding="utf-8")
    with knnstore.open(real_store(bench)) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a smoke run: a gate wants more text
        tuned = knnstore.tune(store.path, first, gate="logistic", dry_run=True).calibration
        lm = knnstore.KnnLM.load(store)
        lm.settings = replace(lm.settings, k=tuned.k, temperature=tuned.temperature, lmbda=tuned.lmbda, gate=tuned.gate)
        sizes = {"positions": 256, "new_tokens": 8, "predictions": 4} if bench.smoke else {"positions": 8_192, "new_tokens": 128}
        return measured(lm, rest.read_text(encoding="utf-8"), rounds=bench.rounds, **sizes)


def measured(
    lm: knnstore.KnnLM, text: str, *, rounds: int, positions: int, new_tokens: int, predictions: int = PREDICTIONS
) -> dict[str, Any]:
    """All figures of a model with a datastore. text: held out, of more than `positions` tokens."""
    ids = lm.encode(text)[: positions + 1]
    store, settings = lm.store, lm.settings
    windows = {"vocab_size": lm.language_model.vocab_size, "context": lm.context, "stride": lm.context // 2, "chunk": len(ids)}

    def scored(*, views: bool) -> Positions:
        (found,) = score_documents(lm.extractor, [ids], views=views, **windows)
        return found

    piece = scored(views=True)
    lm_s, mixed_s = in_turn(rounds, lambda: scored(views=False), lambda: mixed_in_pieces(lm, scored(views=settings.gate is not None)))
    return {
        "store": {"entries": len(store), "segments": len(store.segments), "dim": store.dim},
        "model": lm.language_model.checkpoint.name,
        "k": settings.k,
        "nprobe": settings.nprobe,
        "gate": None if settings.gate is None else settings.gate.kind,
        "search": searched(lm, piece, rounds),
        "scoring": {
            "tokens": len(piece),
            "rate_with_over_without": ratio(lm_s, mixed_s),
            "bare_tokens_per_s": len(piece) / statistics.median(lm_s),
        },
        "predicting": predicted(lm, ids, predictions, rounds),
        "generating": generated(lm, ids, new_tokens, rounds),
    }


def bare_index(store: Datastore, nprobe: int) -> Any:
    """faiss's own index over the same lists and centroids, as one makes it by hand; keys must be rotated before."""
    assert len(store.stacks) == 1, "one index has one stack of segments"
    (stack,) = store.stacks
    assert len(stack.members) == 1, "bare faiss has one set of lists: compact the datastore first"
    segment, space = stack.members[0], stack.members[0].space
    quantizer = faiss.IndexFlatL2(space.dim)
    quantizer.add(np.zeros((1, space.dim), np.float32) if segment.coarse is None else segment.coarse.centroids)  # one list, or some
    index = faiss.IndexIVFPQFastScan(quantizer, space.dim, segment.lists.nlist, space.n_sub, 4)
    index.by_residual = False
    faiss.copy_array_to_vector(np.ascontiguousarray(space.centroids).reshape(-1), index.pq.centroids)
    index.replace_invlists(stack.index(2).invlists, False)  # that of batches
    index.is_trained, index.ntotal, index.nprobe = True, segment.content.entries, nprobe
    index.referenced_objects = [quantizer, stack]
    return index


def pieces_of(piece: Positions, k: int) -> list[slice]:
    """Positions that `evaluate` searches together."""
    step = max(1, CELLS // k)
    return [slice(at, at + step) for at in range(0, len(piece), step)]


def find(lm: knnstore.KnnLM, keys: NDArray[np.float32]) -> knnstore.Neighbors:
    """The search of `evaluate`: distances and values."""
    return lm.store.search(keys, k=lm.settings.k, nprobe=lm.settings.nprobe, domains=lm.settings.domains, places=False)


def mixed_in_pieces(lm: knnstore.KnnLM, piece: Positions) -> None:
    """Search, p_kNN and mixing, as `evaluate` does them."""
    for at in pieces_of(piece, lm.settings.k):
        view = None if piece.view is None else piece.view[at]
        mix_gold_tokens(piece.gold[at], piece.log_p_lm[at], view, find(lm, piece.keys[at]), lm.settings)


def searched(lm: knnstore.KnnLM, piece: Positions, rounds: int) -> dict[str, Any]:
    """Search, p_kNN and mixing beside bare faiss's search of the same keys; the answers are compared first."""
    settings = lm.settings
    bare = bare_index(lm.store, settings.nprobe)
    rotated = lm.store.segments[0].space.rotate(piece.keys)
    found, (distances, labels) = lm.search(piece.keys), bare.search(rotated, settings.k)
    same = np.isclose(np.sort(distances, axis=1) + lm.store.stacks[0].distortion, found.distances, rtol=1e-4).mean()
    assert same > 0.9, f"only {same:.4f} of the distances are those of bare faiss: not the same search"
    assert labels.shape == found.rows.shape, "as many neighbours"

    def search() -> None:
        for at in pieces_of(piece, settings.k):
            find(lm, piece.keys[at])

    def plain() -> None:
        for at in pieces_of(piece, settings.k):
            bare.search(rotated[at], settings.k)

    bare_s, search_s, all_s = in_turn(rounds, plain, search, lambda: mixed_in_pieces(lm, piece))
    return {
        "positions": len(piece),
        "search_over_bare": ratio(search_s, bare_s),
        "search_p_knn_and_mixing_over_bare": ratio(all_s, bare_s),
        "bare_ms_per_query": 1e3 * statistics.median(bare_s) / len(piece),
    }


def predicted(lm: knnstore.KnnLM, ids: NDArray[np.int64], predictions: int, rounds: int) -> dict[str, Any]:
    """The next token after one context at a time: `predict` beside the model's pass over the same tokens, logits of the last alone."""
    contexts = [ids[at : at + PROMPT_TOKENS] for at in np.linspace(0, len(ids) - PROMPT_TOKENS, predictions).astype(int)]

    def plain() -> None:
        with torch.inference_mode():
            for context in contexts:
                lm.model(torch.from_numpy(context)[None], logits_to_keep=1, use_cache=False).logits.softmax(-1)

    def with_datastore() -> None:
        for context in contexts:
            lm.predict(context)

    bare_s, mixed_s = in_turn(rounds, plain, with_datastore)
    return {
        "context_tokens": PROMPT_TOKENS,
        "predictions": predictions,
        "rate_with_over_without": ratio(bare_s, mixed_s),
        "bare_ms": 1e3 * statistics.median(bare_s) / predictions,
    }


def generated(lm: knnstore.KnnLM, ids: NDArray[np.int64], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Greedy generation of one sequence, with the datastore and without."""
    prompt = torch.from_numpy(ids[:PROMPT_TOKENS])[None]
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def plain() -> None:
        lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)

    bare_s, mixed_s = in_turn(rounds, plain, lambda: lm.generate(ids[:PROMPT_TOKENS], **options))
    return {
        "new_tokens": new_tokens,
        "rate_with_over_without": ratio(bare_s, mixed_s),
        "bare_ms_per_token": 1e3 * statistics.median(bare_s) / new_tokens,
    }


def render(result: Mapping[str, Any], plots: Path) -> str:
    """The section of the page."""
    store, search, scoring, predicting, generating = (result[name] for name in ("store", "search", "scoring", "predicting", "generating"))
    rows = [
        ("search, p_kNN and mixing, to faiss's own search of the same keys in the same lists", "search_p_knn_and_mixing_over_bare"),
        ("of which search", "search_over_bare"),
    ]
    gate = "one λ everywhere" if result["gate"] is None else f"a {result['gate']} gate"
    text = f"""## Decoding

A datastore of {store["entries"]:,} entries of real text ({store["dim"]} dimensions, {result["model"]}), k {result["k"]:,}, nprobe \
{result["nprobe"]}, {gate}. Times to those without: lower is better.

{table(("", "time to bare faiss"), [(title, spread(search[name])) for title, name in rows])}
Rates to those of the model alone, which is as small as models are: beside a larger one the datastore weighs less. Higher is better.

"""
    rates = [
        (f"scoring {scoring['tokens']:,} tokens, as `evaluate`", scoring, f"{scoring['bare_tokens_per_s']:,.0f} tokens/s"),
        (f"`predict` after {predicting['context_tokens']} tokens", predicting, f"{predicting['bare_ms']:.1f} ms"),
        (f"`generate` of {generating['new_tokens']} tokens, greedy", generating, f"{generating['bare_ms_per_token']:.1f} ms a token"),
    ]
    shown = [(title, spread(found["rate_with_over_without"]), bare) for title, found, bare in rates]
    return text + table(("", "rate with the datastore to without", "without, on this machine"), shown)


@click.command()
@click.argument("store_path", metavar="STORE", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--positions", default=8_192, show_default=True, help="Tokens of TEXT that are scored.")
@click.option("--new-tokens", default=128, show_default=True, help="Tokens to generate.")
@click.option("--rounds", default=5, show_default=True)
@click.option("-k", type=int, help="Neighbours.  [default: the datastore's]")
@click.option("--nprobe", type=int, help="Lists.  [default: the datastore's]")
@click.option("--model", help="[default: the datastore's own]")
def main(
    store_path: str, text: Path, positions: int, new_tokens: int, rounds: int, k: int | None, nprobe: int | None, model: str | None
) -> None:
    """Prints the figures for a datastore and a text as JSON."""
    warnings.simplefilter("ignore")  # that λ was fitted for another k: no matter to a time
    with knnstore.open(store_path) as store:
        lm = knnstore.KnnLM.load(store, model, k=k, nprobe=nprobe)
        fields = measured(lm, text.read_text(encoding="utf-8"), rounds=rounds, positions=positions, new_tokens=new_tokens)
    print(json.dumps(fields, indent=2))


if __name__ == "__main__":
    main()
