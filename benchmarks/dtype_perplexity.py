"""Does perplexity hold when keys are computed in bfloat16? Exact search, keys and queries in each dtype.

    python benchmarks/dtype_perplexity.py TEXT [--model M] [--tokens N]

The first four fifths of the text are the datastore, the last fifth is predicted. λ and temperature are the best of a grid for each
row. Prints one JSON object a row; the first rows give the trunk's rate as a ratio to float32.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from knnstore.lm.calibrate import HeldOut, fit
from knnstore.lm.embed import keys_and_gold
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.lm.windows import plan_windows

K = 1_024


@dataclass(frozen=True)
class Part:
    """Entries of one text: keys (n, dim) float32, values (n,), log p_LM of the values (n,)."""

    keys: NDArray[np.float32]
    values: NDArray[np.int64]
    log_p_lm: NDArray[np.float64]


def embed(model: LanguageModel, ids: NDArray[np.int64]) -> Part:
    """Keys and log-probabilities of all tokens after the first, in windows of 512 with a stride of 256."""
    extractor = KeyExtractor(model.model)
    windows = plan_windows([len(ids) - 1], [1], context=512, stride=256)
    keys, log_p = [], []
    for start, stop, n in zip(windows.input_start.tolist(), windows.input_stop.tolist(), windows.n_entries.tolist(), strict=True):
        found, log_p_gold = keys_and_gold(extractor, ids[start:stop], ids[stop - n + 1 : stop + 1])
        keys.append(found)
        log_p.append(log_p_gold)
    return Part(np.concatenate(keys), ids[1:], np.concatenate(log_p))


def trunk_rate(model: LanguageModel) -> float:
    """Tokens a second of the trunk up to the key layer, best of 5 batches of 8 x 512."""
    extractor = KeyExtractor(model.model)
    ids = torch.zeros((8, 512), dtype=torch.long)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        extractor.keys(ids)
        best = max(best, ids.numel() / (time.perf_counter() - began))
    return best


def mixed_perplexity(store: Part, queries: Part) -> dict[str, Any]:
    """The best mixed perplexity of a grid, with exact search."""
    index = faiss.IndexFlatL2(store.keys.shape[1])
    index.add(store.keys)
    distances, rows = index.search(queries.keys, min(K, len(store.keys)))
    lmbda, temperature, mixed = fit(HeldOut(distances, store.values[rows].astype(np.int32), queries.values, queries.log_p_lm))
    return {"lm": round(float(np.exp(-queries.log_p_lm.mean())), 3), "mixed": round(mixed, 3), "lambda": lmbda, "temperature": temperature}


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default=None, help="As for `knnstore create`.")
@click.option("--tokens", default=None, type=int, help="Of the text at most.")
def main(text: Path, model: str | None, tokens: int | None) -> None:
    """Compare bfloat16 with float32."""
    parts: dict[str, tuple[Part, Part]] = {}
    rates: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_language_model(model, dtype=dtype, device="cpu")
        assert loaded.tokenizer is not None
        tokenizer = DocumentTokenizer(loaded.tokenizer)
        ids = tokenizer.encode(text.read_text(encoding="utf-8")).astype(np.int64)[:tokens]
        cut = len(ids) * 4 // 5
        rates[dtype] = trunk_rate(loaded)
        parts[dtype] = (embed(loaded, ids[:cut]), embed(loaded, ids[cut:]))
        click.echo(json.dumps({"dtype": dtype, "trunk_rate_to_float32": round(rates[dtype] / rates["float32"], 2), "entries": cut - 1}))
    for keys, queries in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        click.echo(json.dumps({"keys": keys, "queries": queries, **mixed_perplexity(parts[keys][0], parts[queries][1])}))


if __name__ == "__main__":
    main()
