"""`knnstore evaluate`: how well texts are predicted, with the datastore and without."""

from typing import Any

import click

import knnstore

from .options import (
    ExampleCommand,
    json_option,
    loading,
    model_options,
    quiet_option,
    retrieval_options,
    search_options,
    snapshot_option,
    store_option,
)

__all__ = ["evaluate"]


@click.command(
    cls=ExampleCommand,
    example='echo "Old Marley was as dead as a door-nail." > more.txt\nknnstore evaluate more.txt',
)
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True, type=click.Path())
@store_option
@snapshot_option
@click.option("--context", metavar="TOKENS", type=int, help="Tokens of a window.  [default: the datastore's]")
@click.option("--stride", metavar="TOKENS", type=int, help="New tokens in each further window.  [default: the datastore's]")
@search_options
@click.option("--exclude-own", is_flag=True, help="Where a text is in the datastore, by its id or its content, leave its own entries out.")
@retrieval_options
@click.option("--plot", metavar="FILE", type=click.Path(dir_okay=False), help="Draw who gains and who loses: .png, .svg or .pdf.")
@model_options(model="the datastore's own", dtype="that of the datastore's keys")
@quiet_option
@json_option
def evaluate(
    texts: tuple[str, ...],
    store: str,
    snapshot: int | str | None,
    plot: str | None,
    exclude: tuple[str, ...],
    model: str | None,
    quiet: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Predict texts without the datastore and with it.

    TEXT is a folder or a file as for `create`, or - for standard input. Every token is predicted from those before it. Most lose a
    little and some gain much: the report shows how many, by how much, and for which tokens.
    """
    from .progress import shown_progress

    if plot is not None:
        from .plots import check_plot

        check_plot(plot)  # said before hours of work
    with shown_progress(starting=loading(model), quiet=quiet) as progress, knnstore.open(store, snapshot=snapshot) as opened:
        done = knnstore.evaluate(opened, list(texts), model=model, exclude=exclude or None, progress=progress, **arguments)
        fields = done.fields()
    if plot is not None:
        from .plots import evaluation_plot

        evaluation_plot(fields, plot)
    if as_json:
        from .output import print_json

        print_json(fields)
    else:
        from .evaluation_report import print_evaluation

        print_evaluation(fields)
