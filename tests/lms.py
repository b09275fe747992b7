"""Small language models with tokenizers, corpora and progress that tests of the model wing share."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from knnstore.store import Datastore

SAMPLE = Path(__file__).parents[1] / "knnstore" / "samples" / "a-christmas-carol.txt"
END = "<|endoftext|>"
POSITIONS = 64


@cache
def book() -> str:
    """A Christmas Carol, from its first chapter on."""
    return SAMPLE.read_text(encoding="utf-8")[2_000:]


@cache
def byte_level_backend() -> str:
    """A byte-level BPE tokenizer (GPT-2 kind), trained on the sample book, as JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([book()], trainer)
    return backend.to_str()


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """One token is BOS and EOS, as in GPT-2."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level_backend()), bos_token=END, eos_token=END)


def llama_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """With BOS: pieces with ▁ for spaces and bytes for unknown characters (Llama 2). Without: byte level (Qwen)."""
    if not bos:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level_backend()), eos_token=END)
    letters = sorted({character for character in book() if character.isascii() and not character.isspace()})
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("i", "n"), ("e", "r"), ("o", "u"), ("a", "n"), ("an", "d")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt2_model(*, width: int = 32, seed: int = 0) -> PreTrainedModel:
    """A random GPT-2 in float32."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=400, n_positions=POSITIONS, n_embd=width, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama_model(*, width: int = 32, seed: int = 0) -> PreTrainedModel:
    """A random Llama in float32."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text by transformers' own call, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def write_texts(folder: Path, texts: Mapping[str, str]) -> Path:
    """One file for each name and text, byte for byte (no newline translation)."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def random_words(seed: int, n: int) -> str:
    """Words of random letters: text that nothing predicts."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return " ".join("".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(n))


class Recorder:
    """A progress that counts what each stage advanced, keeps its notes, and may do something after an advance.

    then: called with the stage's title and the number of advances it has had, after each.
    """

    def __init__(self, then: Callable[[str, int], None] = lambda title, n: None) -> None:
        self.advanced: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.totals: dict[str, int | None] = {}
        self.notes: list[str] = []
        self._then = then

    @contextmanager
    def stage(self, title: str, *, total: int | None, unit: str, done: int = 0) -> Iterator["_Stage"]:
        self.advanced[title], self.done[title], self.totals[title] = 0, done, total
        yield _Stage(self, title, self._then)

    def note(self, message: str) -> None:
        self.notes.append(message)


class _Stage:
    def __init__(self, recorder: Recorder, title: str, then: Callable[[str, int], None]) -> None:
        self._recorder, self._title, self._then, self._n = recorder, title, then, 0

    def advance(self, n: int) -> None:
        self._recorder.advanced[self._title] += n
        self._n += 1
        self._then(self._title, self._n)


def killing(title: str, at: int) -> Recorder:
    """A progress that kills its own process with SIGKILL at the nth advance of a stage."""

    def kill(stage: str, n: int) -> None:
        if stage == title and n == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return Recorder(kill)


# --- what a store holds, read from its files by hand


@dataclass(frozen=True)
class Content:
    """documents: (id, source, entries, metadata), in row order; texts: of each; values, keys: of all rows; spans: (rows, 2) characters."""

    documents: list[tuple[str, str, int, dict]]
    texts: list[str]
    values: np.ndarray
    keys: np.ndarray | None
    spans: np.ndarray


def content_of(store: Datastore) -> Content:
    """Everything a store holds. Values and keys are read past the 64-byte headers of their files; text by way of the reader."""
    values, keys, spans, texts, ids = [], [], [], [], []
    for segment in store.segments:
        kind = {"u16": "<u2", "u32": "<u4"}[segment.content.values]
        n = segment.content.entries
        values.append(np.fromfile(segment.folder / "values.bin", kind, n, offset=64).astype(np.int64))
        if segment.content.keys == "f32":
            flat = np.fromfile(segment.folder / "keys.bin", "<f4", n * store.dim, offset=64)
            keys.append(flat.reshape(n, store.dim))
        for record in segment.contexts.documents():
            span = segment.contexts.span(record.first_row, record.first_row + record.n_entries)
            spans.append(np.stack([span.starts, span.ends], axis=1))
            if record.part == 0:
                texts.append(span.text)
                ids.append(record.id)
            else:  # a character that tokens of both parts share stands in both
                assert record.id == ids[-1]
                texts[-1] = texts[-1][: span.base] + span.text
    documents = [(found.id, found.source, found.entries, found.metadata) for found in store.documents()]
    assert [found[0] for found in documents] == ids
    return Content(documents, texts, np.concatenate(values), np.concatenate(keys) if keys else None, np.concatenate(spans))


# --- processes of their own


def in_child(function: Callable[..., None], *arguments: object) -> "multiprocessing.process.BaseProcess":
    """Starts a function of a test module in another process: one that libraries were loaded into before, and no thread was started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["knnstore.lm.create", "knnstore.lm.knnlm", "transformers.models.gpt2.modeling_gpt2"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process
