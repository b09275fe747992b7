"""`knnstore query`: the next token after a text, with and without the datastore, and the neighbours it comes from."""

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
    search_options,
    snapshot_option,
    store_option,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from knnstore import KnnLM, Step

__all__ = ["query", "query_fields"]

TOP = 10  # tokens of each distribution and neighbours that are shown


@click.command(cls=ExampleCommand, example='knnstore query "Marley was"')
@click.argument("text", callback=read_text)
@store_option
@snapshot_option
@search_options
@click.option("--top", metavar="N", type=click.IntRange(min=1), default=TOP, show_default=True, help="Tokens and neighbours to show.")
@model_options(model="the datastore's own", dtype="that of the datastore's keys")
@quiet_option
@json_option
def query(
    text: str,
    store: str,
    snapshot: int | str | None,
    top: int,
    exclude: tuple[str, ...],
    model: str | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Predict the next token after TEXT (- for standard input).

    Shows the distribution of the model alone (p_LM), of the neighbours alone (p_kNN) and of both (p), then the nearest neighbours.
    """
    from .progress import shown_progress

    with shown_progress(starting=loading(model), quiet=quiet, transient=True), knnstore.open(store, snapshot=snapshot) as opened:
        lm = knnstore.KnnLM.load(opened, model, exclude=exclude or None, **settings)
        fields = query_fields(lm, lm.predict(text), text, top)
    if as_json:
        from .output import print_json

        print_json(fields)
    else:
        from .render import print_query

        print_query(fields, lm.decode)


def query_fields(lm: KnnLM, step: Step, text: str, top: int) -> dict[str, Any]:
    """What `query --json` prints."""
    return {
        "text": text,
        "snapshot": lm.store.snapshot,
        "k": step.k,
        "nprobe": step.nprobe,
        "exact": step.settings.exact,
        "lambda": step.lmbda,
        "temperature": step.temperature,
        "p_lm": _most_probable(lm, step.p_lm, top),
        "p_knn": _most_probable(lm, step.p_knn, top),
        "p": _most_probable(lm, step.p, top),
        "neighbors": [_neighbor(lm, step, i) for i in range(min(top, int(step.neighbors.n_found[0])))],
    }


def _most_probable(lm: KnnLM, p: NDArray[Any], top: int) -> list[dict[str, Any]]:
    """The most probable tokens first, by id where equal; none of probability 0. p: (vocab,) float64."""
    order = (-p).argsort(kind="stable")[:top].tolist()
    return [{"id": token, "token": lm.decode([token]), "p": float(p[token])} for token in order if p[token] > 0.0]


def _neighbor(lm: KnnLM, step: Step, number: int) -> dict[str, Any]:
    context = step.neighbors.context(0, number)
    return {
        "distance": float(step.neighbors.distances[0, number]),
        "weight": float(step.weights[number]),
        "id": context.token_id,
        "token": lm.decode([context.token_id]) if context.token is None else context.token,
        "left": lm.decode(context.left_ids) if context.left is None else context.left,
        "right": lm.decode(context.right_ids) if context.right is None else context.right,
        "document": context.document,
        "token_index": context.token_index,
        "domain": context.domain,
        "source": context.source,
        "char_start": context.char_start,
        "char_end": context.char_end,
        "metadata": dict(context.metadata),
    }
