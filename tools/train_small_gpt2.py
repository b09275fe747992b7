"""Train a small GPT-2-architecture LM on plain-text books, on a CPU, for a given wall time.

    python tools/train_small_gpt2.py --books books/general --out out --minutes 54

This command, with its defaults (seed 0), made the model in knnstore/models/default-gpt2, on 2 cores. `books/general` held
34 public-domain books in Standard Ebooks editions, one text file each (listed in docs/model-card.md); Barchester Towers is
the validation book and is never trained on. The tokenizer and the order of the batches follow from the data and the seed;
the weights also follow from how many steps the machine makes in the time given, because the learning rate falls with time.

Writes OUT as transformers loads it: config.json, model.safetensors (float16), tokenizer.json; and log.jsonl, a line for
each 100 steps: step, tokens, seconds, share of the full learning rate, training loss, and at each 500 validation perplexity.
Needs what the package needs, nothing more.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOT = "<|endoftext|>"
EOT_ID = 0
VALIDATION_BOOK = "anthony-trollope_barchester-towers.txt"
WARM_UP_STEPS = 50
HOLD_SHARE = 0.4  # of the time: the learning rate is held until here, then falls in a straight line to 0
AVERAGE_SHARE = 0.5  # of the time: from here on the weights that are kept are an average over steps
AVERAGE_DECAY = 0.99
WINDOWS_PER_FORWARD = 8  # in validation
LOG_STEPS = 100
VALIDATION_STEPS = 500
VALIDATION_TOKENS = 32_768  # while training; the whole book at the end

Ids = NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line gives. minutes: wall time of the training loop, without tokenizing."""

    books: Path
    valid: str
    out: Path
    minutes: float
    vocab: int
    dim: int
    layers: int
    heads: int
    context: int
    batch: int
    optimizer: str
    lr: float
    adam_lr: float
    seed: int


def parse_options(arguments: list[str] | None) -> Options:
    """Options from the command line; ends the process with status 2 where they make no sense together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files, UTF-8, one book each")
    parser.add_argument("--valid", default=VALIDATION_BOOK, help="file in BOOKS that is never trained on (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon for the matrices; AdamW uses --adam-lr")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = Options(**vars(parser.parse_args(arguments)))
    if not 257 <= options.vocab <= 65_536:
        parser.error(f"--vocab {options.vocab}: must be 257 (every byte and {EOT}) to 65,536 (ids are kept as u16)")
    if options.dim % options.heads:
        parser.error(f"--dim {options.dim}: must be a multiple of --heads {options.heads}")
    if not (options.books / options.valid).is_file():
        parser.error(f"--valid {options.valid}: no such file in {options.books}")
    return options


def train_tokenizer(files: list[Path], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens, learnt from the files; id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT, model_max_length=context)


def encode(tokenizer: PreTrainedTokenizerFast, file: Path) -> Ids:
    """Token ids of a book, (n,) u16, the end-of-text token first."""
    text = file.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.array([EOT_ID, *ids], dtype=np.uint16)


def stack_spans(ids: Ids, starts: list[int], context: int) -> torch.Tensor:
    """Spans of context + 1 tokens, (len(starts), context + 1) int64: inputs are all but the last, targets all but the first."""
    return torch.from_numpy(np.stack([ids[start : start + context + 1].astype(np.int64) for start in starts]))


@torch.inference_mode()
def perplexity(model: GPT2LMHeadModel, ids: Ids, context: int, limit: int) -> float:
    """Perplexity over windows of `context` tokens without overlap, in the first `limit` tokens; a shorter last window is left out."""
    n_windows = min(len(ids) - 1, limit) // context
    total = 0.0
    for first in range(0, n_windows, WINDOWS_PER_FORWARD):
        starts = [window * context for window in range(first, min(n_windows, first + WINDOWS_PER_FORWARD))]
        x = stack_spans(ids, starts, context)
        logits = model(x[:, :-1]).logits.float()  # (windows, context, vocab)
        total += functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (n_windows * context))


def make_optimizers(model: GPT2LMHeadModel, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for all else, or AdamW for everything."""
    if options.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and ".h." in name]
    others = [parameter for name, parameter in named if not (parameter.ndim == 2 and ".h." in name)]
    return [
        torch.optim.Muon(matrices, lr=options.lr, weight_decay=0.01, momentum=0.95, nesterov=True),
        torch.optim.AdamW(others, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate_share(step: int, done: float) -> float:
    """Share of the full learning rate at a step and a share `done` of the time: warm up, hold, then straight down to 0."""
    fall = 1.0 if done < HOLD_SHARE else max(0.0, (1 - done) / (1 - HOLD_SHARE))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * fall


def span_starts(n_tokens: int, context: int, rng: np.random.Generator) -> Callable[[int], list[int]]:
    """A function that returns the next n starts of spans: each epoch takes every span once, from a new offset."""
    order: list[int] = []

    def take(n: int) -> list[int]:
        if len(order) < n:
            offset = int(rng.integers(context))
            order.extend(int(start) for start in offset + context * rng.permutation((n_tokens - offset - 1) // context))
        return [order.pop() for _ in range(n)]

    return take


def train(model: GPT2LMHeadModel, ids: Ids, valid: Ids, options: Options) -> tuple[dict[str, torch.Tensor], int]:
    """Train in place for the time given. Returns the averaged weights and the number of tokens trained on."""
    optimizers = make_optimizers(model, options)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    average = {name: weight.detach().clone().float() for name, weight in model.state_dict().items()}
    take = span_starts(len(ids), options.context, np.random.default_rng(options.seed))
    start, step, n_tokens, limit_s = time.time(), 0, 0, options.minutes * 60
    with (options.out / "log.jsonl").open("w", encoding="utf-8") as log:
        while (elapsed_s := time.time() - start) < limit_s:
            done = elapsed_s / limit_s
            share = learning_rate_share(step, done)
            for group, rate in zip(groups, full_rates, strict=True):
                group["lr"] = rate * share
            x = stack_spans(ids, take(options.batch), options.context)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(x[:, :-1]).logits  # (batch, context, vocab)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, n_tokens = step + 1, n_tokens + x[:, 1:].numel()
            decay = 0.0 if done < AVERAGE_SHARE else AVERAGE_DECAY
            with torch.no_grad():
                for name, weight in model.state_dict().items():
                    average[name].mul_(decay).add_(weight, alpha=1 - decay)
            if step % LOG_STEPS == 0:
                seconds = time.time() - start
                row = {"step": step, "tokens": n_tokens, "seconds": round(seconds), "lr": share, "loss": round(loss.item(), 4)}
                if step % VALIDATION_STEPS == 0:
                    row["valid_ppl"] = round(perplexity(model, valid, options.context, VALIDATION_TOKENS), 2)
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, int(n_tokens / seconds), "tokens/s", flush=True)
    return average, n_tokens


def check_length(part: str, n_tokens: int, n_needed: int) -> None:
    """End the process where there are fewer tokens than one batch, or one validation window, needs."""
    if n_tokens < n_needed:
        sys.exit(f"{n_tokens} {part} tokens, {n_needed} are needed. Add text, or lower --context or --batch.")


def main(arguments: list[str] | None = None) -> None:
    """Tokenizer, training, both validation perplexities, and the model in float16."""
    options = parse_options(arguments)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    files = sorted(file for file in options.books.glob("*.txt") if file.name != options.valid)
    if not files:
        sys.exit(f"{options.books}: no .txt file to train on beside {options.valid}. Add books.")
    tokenizer = train_tokenizer(files, options.vocab, options.context)
    tokenizer.save_pretrained(options.out)
    ids = np.concatenate([encode(tokenizer, file) for file in files])
    valid = encode(tokenizer, options.books / options.valid)
    check_length("training", len(ids), options.context * (options.batch + 1) + 1)
    check_length("validation", len(valid), options.context + 1)
    config = GPT2Config(
        vocab_size=options.vocab,
        n_positions=options.context,
        n_embd=options.dim,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOT_ID,
        eos_token_id=EOT_ID,
    )
    model = GPT2LMHeadModel(config)
    print(f"{len(files)} books, {len(ids):,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    average, n_tokens = train(model, ids, valid, options)
    last = perplexity(model, valid, options.context, len(valid))
    model.load_state_dict(average)
    averaged = perplexity(model, valid, options.context, len(valid))
    print("validation perplexity: last weights", last, "averaged", averaged, "tokens", n_tokens)
    model.half().save_pretrained(options.out)


if __name__ == "__main__":
    main()
