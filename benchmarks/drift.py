"""How much worse a space fits other texts than the one it was trained on: what `append` looks at before it trains another.

    python benchmarks/drift.py BASE TEXT... [--model M] [--tokens 12000]

Trains a space on the first three quarters of the keys of BASE; prints one JSON object with the mean squared distance between keys and
their codes, over that of the training sample, for the last quarter of BASE and for each TEXT.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from knnstore.format import Codec
from knnstore.lm.embed import right_padded
from knnstore.lm.keys import KeyExtractor
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.lm.tokens import DocumentTokenizer
from knnstore.sampling import mean_distortion
from knnstore.storage.space import train_space

WINDOW = 256  # tokens of a window; each key has all tokens of its window before it as context


def windows(text: str, tokenizer: DocumentTokenizer, n_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Whole windows of the first tokens of a text."""
    ids = tokenizer.encode(text[: 8 * n_tokens]).astype(np.int64)[:n_tokens]
    return (ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW))


def keys_of(path: Path, model: LanguageModel, n_tokens: int) -> NDArray[np.float32]:
    """Keys of a text, (n, dim) float32."""
    extractor = KeyExtractor(model.model, None)
    assert model.tokenizer is not None, "a model from a folder or the hub has one"
    text = path.read_text(encoding="utf-8")
    passes = (right_padded([ids], model.model.device) for ids in windows(text, DocumentTokenizer(model.tokenizer), n_tokens))
    return np.concatenate([extractor.keys(batch)[0].float().cpu().numpy() for batch in passes])


@click.command()
@click.argument("base", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("texts", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model")
@click.option("--tokens", default=12_000, show_default=True)
def main(base: Path, texts: tuple[Path, ...], model: str | None, tokens: int) -> None:
    """Compares TEXTs with BASE."""
    loaded = load_language_model(model)
    keys = keys_of(base, loaded, tokens)
    cut = 3 * len(keys) // 4
    space = train_space(keys[:cut], codec=Codec.PQ4)
    ratios = {path.name: mean_distortion(space, keys_of(path, loaded, tokens)) / space.distortion for path in texts}
    figures = {"base": base.name, "distortion": space.distortion, "held_out": mean_distortion(space, keys[cut:]) / space.distortion}
    print(json.dumps({**figures, "texts": ratios}, indent=1))


if __name__ == "__main__":
    main()
