"""What a datastore costs where it is used: search beside bare faiss, scoring and generating beside the bare model.

    python benchmarks/decoding.py STORE TEXT [--positions 8192] [--new-tokens 128] [--repeats 5] [--k 1024]

TEXT is a file of held-out text. Prints one JSON object. Each figure is a ratio of things measured in turn in this run (median, least and
greatest of the repeats); the times beside it are the machine's mood.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch

import knnstore
from knnstore.lm.mixing import mix_gold_tokens
from knnstore.lm.predicting import CELLS
from knnstore.lm.scoring import Positions, score_documents
from knnstore.store import Datastore

PROMPT_TOKENS = 32


def in_turn(repeats: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds that each took, round by round: one after the other, so that all see the same machine. A first round is not kept."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for kept, work in zip(times, works, strict=True):
            began = time.perf_counter()
            work()
            kept.append(time.perf_counter() - began)
    return [kept[1:] for kept in times]


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of above / below, round by round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}


def bare_index(store: Datastore, nprobe: int) -> Any:
    """faiss's own index over the same lists and centroids, as one makes it by hand; keys must be rotated before."""
    assert len(store.stacks) == 1, "one index has one stack of segments"
    (stack,) = store.stacks
    assert len(stack.members) == 1, "bare faiss has one set of lists: compact the datastore first"
    segment, space = stack.members[0], stack.members[0].space
    quantizer = faiss.IndexFlatL2(space.dim)
    quantizer.add(segment.coarse.centroids)
    index = faiss.IndexIVFPQFastScan(quantizer, space.dim, segment.lists.nlist, space.n_sub, 4)
    index.by_residual = False
    faiss.copy_array_to_vector(np.ascontiguousarray(space.centroids).reshape(-1), index.pq.centroids)
    index.replace_invlists(stack.index.invlists, False)
    index.is_trained, index.ntotal, index.nprobe = True, segment.content.entries, nprobe
    index.referenced_objects = [quantizer, stack]
    return index


def pieces_of(piece: Positions, k: int) -> list[slice]:
    """Positions that `evaluate` searches together."""
    step = max(1, CELLS // k)
    return [slice(at, at + step) for at in range(0, len(piece), step)]


def find(lm: knnstore.KnnLM, keys: "np.ndarray[Any, np.dtype[np.float32]]") -> knnstore.Neighbors:
    """The search of `evaluate`: distances and values."""
    return lm.store.search(keys, k=lm.settings.k, nprobe=lm.settings.nprobe, domains=lm.settings.domains, places=False)


def mixed_in_pieces(lm: knnstore.KnnLM, piece: Positions) -> None:
    """Search, p_kNN and mixing, as `evaluate` does them."""
    for at in pieces_of(piece, lm.settings.k):
        view = None if piece.view is None else piece.view[at]
        mix_gold_tokens(piece.gold[at], piece.log_p_lm[at], view, find(lm, piece.keys[at]), lm.settings)


def searched(lm: knnstore.KnnLM, piece: Positions, repeats: int) -> dict[str, Any]:
    """Search, p_kNN and mixing beside bare faiss's search of the same keys; the answers are compared first."""
    settings = lm.settings
    bare = bare_index(lm.store, settings.nprobe)
    rotated = lm.store.segments[0].space.rotate(piece.keys)
    found, (distances, labels) = lm.search(piece.keys), bare.search(rotated, settings.k)
    same = np.isclose(np.sort(distances, axis=1) + lm.store.stacks[0].distortion, found.distances, rtol=1e-4).mean()
    assert same > 0.999, f"only {same:.4f} of the distances are those of bare faiss: not the same search"
    assert labels.shape == found.rows.shape, "as many neighbours"

    def ours() -> None:
        mixed_in_pieces(lm, piece)

    def search() -> None:
        for at in pieces_of(piece, settings.k):
            find(lm, piece.keys[at])

    def plain() -> None:
        for at in pieces_of(piece, settings.k):
            bare.search(rotated[at], settings.k)

    bare_s, search_s, all_s = in_turn(repeats, plain, search, ours)
    return {
        "positions": len(piece),
        "search_over_bare": ratio(search_s, bare_s),
        "search_p_knn_and_mixing_over_bare": ratio(all_s, bare_s),
        "bare_ms_per_query": 1e3 * statistics.median(bare_s) / len(piece),
    }


def generated(lm: knnstore.KnnLM, ids: "np.ndarray[Any, np.dtype[np.int64]]", new_tokens: int, repeats: int) -> dict[str, Any]:
    """Greedy generation of one sequence, with the datastore and without."""
    prompt = torch.from_numpy(ids[:PROMPT_TOKENS])[None]
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def plain() -> None:
        lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)

    bare_s, mixed_s = in_turn(repeats, plain, lambda: lm.generate(ids[:PROMPT_TOKENS], **options))
    return {
        "new_tokens": new_tokens,
        "rate_with_over_without": ratio(bare_s, mixed_s),
        "bare_ms_per_token": 1e3 * statistics.median(bare_s) / new_tokens,
    }


@click.command()
@click.argument("store_path", metavar="STORE", type=click.Path(exists=True))
@click.argument("text", type=click.Path(exists=True, dir_okay=False))
@click.option("--positions", default=8_192, show_default=True, help="Tokens of TEXT that are scored.")
@click.option("--new-tokens", default=128, show_default=True, help="Tokens to generate.")
@click.option("--repeats", default=5, show_default=True)
@click.option("-k", type=int, help="Neighbours.  [default: the datastore's]")
@click.option("--nprobe", type=int, help="Lists.  [default: the datastore's]")
@click.option("--model", help="[default: the datastore's own]")
def main(
    store_path: str, text: str, positions: int, new_tokens: int, repeats: int, k: int | None, nprobe: int | None, model: str | None
) -> None:
    """Prints the figures for a datastore and a text as JSON."""
    warnings.simplefilter("ignore")  # that λ was fitted for another k: no matter to a time
    with knnstore.open(store_path) as store:
        lm = knnstore.KnnLM.load(store, model, k=k, nprobe=nprobe)
        ids = lm.encode(Path(text).read_text(encoding="utf-8"))[: positions + 1]
        vocab_size = lm.language_model.vocab_size
        windows = {"vocab_size": vocab_size, "context": lm.context, "stride": lm.context // 2, "chunk": positions}
        (piece,) = score_documents(lm.extractor, [ids], views=True, **windows)

        def scored(*, views: bool) -> Positions:
            (found,) = score_documents(lm.extractor, [ids], views=views, **windows)
            return found

        def with_datastore() -> None:
            found = scored(views=lm.settings.gate is not None)
            mixed_in_pieces(lm, found)

        lm_s, mixed_s = in_turn(repeats, lambda: scored(views=False), with_datastore)
        fields = {
            "store": {"entries": len(store), "segments": len(store.segments), "dim": store.dim},
            "k": lm.settings.k,
            "nprobe": lm.settings.nprobe,
            "gate": None if lm.settings.gate is None else lm.settings.gate.kind,
            "search": searched(lm, piece, repeats),
            "scoring": {
                "tokens": len(piece),
                "rate_with_over_without": ratio(lm_s, mixed_s),
                "bare_tokens_per_s": len(piece) / statistics.median(lm_s),
            },
            "generating": generated(lm, ids, new_tokens, repeats),
        }
    print(json.dumps(fields, indent=2))


if __name__ == "__main__":
    main()
