"""Perplexity of a causal LM on text files: windows without overlap, each token predicted once.

    python tools/measure_perplexity.py knnstore/models/default-gpt2 knnstore/samples/a-christmas-carol.txt

A text is its beginning-of-sequence token and its tokens. A window is `--context` targets; its inputs are the token before
each, so the first target of a window sees one token and the last sees `--context`. The last window may be shorter. Float32
unless --dtype says otherwise. Perplexities compare only between models of one tokenizer; bits per byte compare between any.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@torch.inference_mode()
def negative_log_likelihood(model: PreTrainedModel, ids: torch.Tensor, *, context: int, batch: int) -> float:
    """Sum of -log p (natural log) of ids[1:], (n,) int64, each given at most `context` tokens before it."""
    n_targets = len(ids) - 1
    n_full = n_targets // context
    inputs = ids[: n_full * context].view(n_full, context)
    targets = ids[1 : n_full * context + 1].view(n_full, context)
    windows = list(zip(inputs.split(batch), targets.split(batch), strict=True)) if n_full else []
    if n_full * context < n_targets:
        windows.append((ids[None, n_full * context : -1], ids[None, n_full * context + 1 :]))
    total = 0.0
    for x, y in windows:
        logits = model(x, use_cache=False).logits.float()  # (windows, context, vocab)
        total += functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total


def main() -> None:
    """Print one line for each text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder with a model and its tokenizer")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 text file")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows in one forward pass (default: %(default)s)")
    parser.add_argument("--last", type=float, default=1.0, metavar="SHARE", help="score only the last SHARE of the tokens (default: all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    if not 0 < options.last <= 1:
        parser.error(f"--last {options.last}: must be above 0 and at most 1")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in options.texts:
        decoded = text.read_text(encoding="utf-8")
        tokens = tokenizer(decoded, add_special_tokens=False, verbose=False).input_ids
        ids = torch.tensor([first, *tokens])  # (n + 1,)
        ids = ids[int(len(tokens) * (1 - options.last)) :]
        n_targets = len(ids) - 1
        if n_targets < 1:
            parser.error(f"{text}: no token to score")
        start = time.perf_counter()
        nll = negative_log_likelihood(model, ids, context=options.context, batch=options.batch)
        rate = n_targets / (time.perf_counter() - start)
        n_bytes = len(decoded.encode()) * n_targets / len(tokens)
        bits = nll / math.log(2) / n_bytes
        perplexity = math.exp(nll / n_targets)
        print(f"{text.name}: {n_targets:,} tokens, perplexity {perplexity:.2f}, {bits:.3f} bits per byte, {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
