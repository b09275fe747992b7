"""What a datastore remembers of the model that made its keys."""

from dataclasses import dataclass

__all__ = ["Checkpoint", "KeyLayer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A pretrained model, named by what is in it.

    name: as the user gave it (hub name, folder, file) or the model's own; for people, never compared.
    revision: hub commit, where there is one. identity: 64 hex digits over the parameters as stored in the checkpoint.
    tokenizer: 64 hex digits over the tokenizer, None where the model came without one.
    architecture: the class that transformers loads (`GPT2LMHeadModel`). vocab_size: width of the logits.
    """

    name: str
    revision: str | None
    identity: str
    tokenizer: str | None
    architecture: str
    vocab_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyLayer:
    """Where keys are taken: the input of module `layer` (path below the model's trunk; `final` for the input of the LM head)."""

    layer: str
    dim: int
