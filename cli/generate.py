"""`knnstore generate`: a text by model and datastore, and where each of its tokens comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import knnstore

from .options import (
    ExampleCommand,
    json_option,
    loading,
    model_options,
    quiet_option,
    read_text,
    retrieval_options,
    search_options,
    snapshot_option,
    store_option,
)
from .text import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from knnstore import KnnLM
    from knnstore.lm.attribution import Trace

__all__ = ["generate", "generation_fields"]

SEEDS = 1 << 32
SAMPLING = {"top_k": "--top-k", "top_p": "--top-p", "sampling_temperature": "--sampling-temperature", "seed": "--seed"}


@click.command(cls=ExampleCommand, example='knnstore generate "Marley was" --html marley.html')
@click.argument("prompt", callback=read_text)
@store_option
@snapshot_option
@click.option("--max-new-tokens", metavar="N", type=click.IntRange(min=1), help="Tokens to add at most.  [default: 40]")
@click.option("--num-beams", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Beams to search with.")
@click.option("--sample", is_flag=True, help="Draw each token instead of taking the most probable one.")
@click.option(
    "--top-k",
    metavar="N",
    type=click.IntRange(min=0),
    help="Draw from the N most probable tokens only; 0 for all.  [default: the model's, or 50]",
)
@click.option(
    "--top-p",
    metavar="P",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    help="Draw from the most probable tokens that together have this probability.  [default: the model's, or 1]",
)
@click.option(
    "--sampling-temperature",
    metavar="T",
    type=click.FloatRange(min=0.0, min_open=True),
    help="Of drawing: under 1 for safer tokens.  [default: the model's, or 1]",
)
@click.option("--seed", metavar="N", type=click.IntRange(0, SEEDS - 1), help="Of drawing.  [default: another each time; it is told]")
@click.option("--num-return-sequences", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Texts to make.")
@search_options
@retrieval_options
@model_options(model="the datastore's own", dtype="that of the datastore's keys")
@click.option("--html", "page", metavar="FILE", help="Also write a page of HTML; a file of that name is replaced.")
@quiet_option
@json_option
def generate(
    prompt: str,
    store: str,
    snapshot: int | str | None,
    max_new_tokens: int | None,
    num_beams: int,
    sample: bool,
    top_k: int | None,
    top_p: float | None,
    sampling_temperature: float | None,
    seed: int | None,
    num_return_sequences: int,
    exclude: tuple[str, ...],
    model: str | None,
    page: str | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Go on from PROMPT, and show what each token comes from.

    PROMPT may be - for standard input. The text is marked by what it owes to the datastore: of a token's probability p, the share
    λ p_kNN / p. Under it stand the documents with their shares, and the passages that were nearest. The page of --html is one file that
    needs no network, with the sources of each token.
    """
    from .output import check_file, print_json, write_whole
    from .progress import shown_progress

    if page is not None:
        check_file(page)
    drawing = {"top_k": top_k, "top_p": top_p, "sampling_temperature": sampling_temperature, "seed": seed}
    decoding = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "sample": sample, **drawing}
    _check(decoding, num_return_sequences)
    with (
        shown_progress(starting=loading(model), quiet=quiet, transient=True) as progress,
        knnstore.open(store, snapshot=snapshot) as opened,
    ):
        lm = knnstore.KnnLM.load(opened, model, exclude=exclude or None, **settings)
        if sample:
            decoding |= _drawing(lm, drawing)
        with progress.stage("generating", total=None, unit=""):
            found = lm.generate(prompt, attribute=True, num_return_sequences=num_return_sequences, **_options(decoding))
        fields = generation_fields(lm, found if isinstance(found, list) else [found], prompt, decoding)
    if page is not None:
        from .pages import generation_page
        from .reporting import say

        html = generation_page(fields)
        write_whole(page, html)
        if not quiet:
            say("note", f"{page}: {shown_bytes(len(html.encode()))} of HTML; open it in a browser.")
    if as_json:
        print_json(fields)
    else:
        from .generation_report import print_generation

        print_generation(fields)


def generation_fields(lm: KnnLM, traces: Sequence[Trace], prompt: str, decoding: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate --json` prints."""
    from knnstore.lm.attribution import trace_fields

    settings, end = lm.settings, lm.tokenizer.eos_token_id
    sequences = [{**trace_fields(found), "ended": found.tokens[-1].id == end} for found in traces]
    return {
        "prompt": prompt,
        "store": str(lm.store.path),
        "snapshot": lm.store.snapshot,
        "model": lm.store.manifest.checkpoint.name,
        "k": settings.k,
        "nprobe": settings.nprobe,
        "exact": settings.exact,
        "lambda": settings.lmbda,
        "gate": None if settings.gate is None else settings.gate.kind,
        "temperature": settings.temperature,
        "retrieval": settings.retrieval,
        "decoding": dict(decoding),
        "sequences": [{name: value for name, value in sequence.items() if name != "prompt"} for sequence in sequences],
    }


def _check(decoding: Mapping[str, Any], n_texts: int) -> None:
    """Raises UsageError for options that say nothing together."""
    useless = [option for name, option in SAMPLING.items() if decoding[name] is not None and not decoding["sample"]]
    if useless:
        raise click.UsageError(f"{useless[0]} is about drawing tokens. Give --sample too.")
    if n_texts > 1 and not decoding["sample"] and decoding["num_beams"] < n_texts:
        raise click.UsageError(f"{n_texts} texts need --sample, or --num-beams {n_texts}: the most probable tokens are one text.")


def _drawing(lm: KnnLM, given: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are drawn: as was said, else as the model's own settings say, else as transformers does."""
    import secrets

    own = lm.model.generation_config
    defaults = {"top_k": (own.top_k, 50), "top_p": (own.top_p, 1.0), "sampling_temperature": (own.temperature, 1.0)}
    first = {name: next(value for value in (given[name], *values) if value is not None) for name, values in defaults.items()}
    return {**first, "seed": secrets.randbelow(SEEDS) if given["seed"] is None else given["seed"]}


def _options(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """What `KnnLM.generate` is told. Sets torch's seed for drawing."""
    options = {"do_sample": decoding["sample"], "num_beams": decoding["num_beams"]}
    if decoding["max_new_tokens"] is not None:
        options["max_new_tokens"] = decoding["max_new_tokens"]
    if decoding["sample"]:
        import torch

        torch.manual_seed(decoding["seed"])
        options |= {"top_k": decoding["top_k"], "top_p": decoding["top_p"], "temperature": decoding["sampling_temperature"]}
    return options
