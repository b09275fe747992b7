"""What decoding with a datastore should give, by other means: numpy and the Hugging Face model, no code of the package.

A `Kind` is a small random model with entries of its own: keys by a hook written here, values drawn. `log_p` computes, for one text, log p
after each of its tokens from every entry: squared distances one by one, softmax, sum by value, mixture, in float64.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lms
import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import knnstore
from knnstore.entries import EntryDocument, create_from_entries
from knnstore.lm import attaching
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.knnlm import KnnLM
from knnstore.lm.models import LanguageModel, load_language_model

VOCAB, WIDTH, TEXTS, LENGTH = 400, 32, 12, 40
LMBDA = 0.45
CLOSE = {"rtol": 0, "atol": 1e-4}


@dataclass(frozen=True, eq=False)
class Kind:
    """head: whether the keys are the LM head's input. before: the module whose input they are."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    before: torch.nn.Module
    layer: str | None
    keys: np.ndarray
    values: np.ndarray
    temperature: float
    language_model: LanguageModel


def _small(config: type, **settings: object) -> PreTrainedModel:
    torch.manual_seed(3)
    shape = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    made = config(**shape, **settings, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


# OPT hands its feed-forward net (batch * length, dim); Gemma 2 makes a dictionary of masks and caps its logits; Mixtral adds to its loss.
_MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], torch.nn.Module]]] = {
    "gpt2": (lms.gpt2_model, lambda m: m.transformer.h[1].mlp),
    "llama": (lms.llama_model, lambda m: m.model.layers[1].mlp),
    "opt": (
        lambda: _small(transformers.OPTConfig, ffn_dim=48, word_embed_proj_dim=WIDTH),
        lambda m: m.model.decoder.layers[1].fc1,
    ),
    "gpt-neox": (lambda: _small(transformers.GPTNeoXConfig, intermediate_size=48), lambda m: m.gpt_neox.layers[1].mlp),
    "gemma2": (
        lambda: _small(transformers.Gemma2Config, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8),
        lambda m: m.model.layers[1].mlp,
    ),
    "mixtral": (
        lambda: _small(
            transformers.MixtralConfig, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, output_router_logits=True
        ),
        lambda m: m.model.layers[1].mlp,
    ),
}
NAMES = ("gpt2", "llama", "opt", "gpt-neox", "gemma2", "gpt2-final")


@cache
def build(name: str) -> Kind:
    """`-final`: keys are what enters the LM head."""
    base = name.removesuffix("-final")
    make, last = _MODELS[base]
    model = make()
    final = name not in _MODELS
    before = model.get_output_embeddings() if final else last(model)
    tokenizer = lms.llama_tokenizer(bos=True) if base == "llama" else lms.gpt2_tokenizer()
    rng = np.random.default_rng(5)
    keys = np.concatenate([states(model, before, rng.integers(3, VOCAB, LENGTH))[0] for _ in range(TEXTS)])
    # Few values, so that many neighbours share one; drawn apart from the model, so that the two disagree.
    values = rng.choice(rng.integers(3, VOCAB, 60), len(keys))
    some = keys[:: len(keys) // 50].astype(np.float64)
    apart = np.square(some[:, None] - some[None]).sum(axis=2)
    temperature = float(np.median(np.sort(apart, axis=1)[:, 1])) / 6
    loaded = load_language_model(model, tokenizer=tokenizer)
    return Kind(model, tokenizer, before, "final" if final else None, keys, values, temperature, loaded)


def states(model: PreTrainedModel, before: torch.nn.Module, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What enters a module, (n, dim), and logits, (n, vocab), at every position of one text."""
    seen: list[np.ndarray] = []
    hook = before.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().float().numpy()))
    with torch.no_grad():
        logits = model(torch.tensor([list(map(int, ids))]), use_cache=False, return_dict=True).logits[0].float().numpy()
    hook.remove()
    return seen[0].reshape(len(ids), -1), logits.astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def log_p(kind: Kind, ids: Sequence[int], lmbda: float = LMBDA) -> np.ndarray:
    """log p after each token of one text, (n, vocab) float64, every entry being a neighbour."""
    keys, logits = states(kind.model, kind.before, ids)
    out = np.empty(logits.shape)
    for i, (key, scores) in enumerate(zip(keys.astype(np.float64), logits, strict=True)):
        distances = np.square(kind.keys.astype(np.float64) - key).sum(axis=1)
        weights = np.exp((distances.min() - distances) / kind.temperature)
        p_knn = np.zeros(VOCAB)
        np.add.at(p_knn, kind.values, weights / weights.sum())
        out[i] = np.log(lmbda * p_knn + (1 - lmbda) * np.exp(log_softmax(scores)))
    return out


@contextmanager
def loaded(kind: Kind, folder: Path, **settings: object) -> Iterator[KnnLM]:
    """The kind's entries as a datastore, with its model, searched exactly and completely."""
    path = folder / "made.knn"
    if not path.exists():
        layer = KeyExtractor(kind.model, kind.layer).key.layer
        batch = (kind.keys, kind.values, [EntryDocument(id="one", n_entries=len(kind.keys))])
        checkpoint = kind.language_model.checkpoint
        create_from_entries(path, [batch], checkpoint=checkpoint, dim=kind.keys.shape[1], vocab_size=VOCAB, key_layer=layer)
    options = {"k": len(kind.keys), "lmbda": LMBDA, "temperature": kind.temperature, "exact": True} | settings
    with knnstore.open(path) as store:
        yield KnnLM.load(store, kind.language_model, **options)


def prompts(n: int, *, seed: int = 0) -> list[list[int]]:
    """n prompts of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).tolist() for length in rng.permutation(np.arange(3, 3 + n))]


def left_padded(rows: Sequence[Sequence[int]], pad: int = 7) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, padded on the left with a token like any other."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def forward(lm: KnnLM, ids: object, **options: object) -> Any:
    """The model's own output under the mixture."""
    with lm.attached() as model, torch.no_grad():
        return model(torch.as_tensor(ids), **options)


def bare(lm: KnnLM) -> bool:
    """No hook of the package anywhere on the model (transformers leaves some of its own), and nothing held of it."""
    hooks = [hook for module in lm.model.modules() for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
    return not any(hook.__module__.startswith("knnstore") for hook in hooks) and lm.model not in attaching._ATTACHED


def in_threads(*jobs: Callable[[], None]) -> None:
    """Runs jobs at the same time; what one raises is raised here."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
