"""`knnstore tune`: λ or a gate, temperature, k and domain weights, fitted on text that the datastore does not have."""

from typing import Any

import click

import knnstore

from .options import ExampleCommand, json_option, loading, model_options, quiet_option, store_option

__all__ = ["tune"]


@click.command(
    cls=ExampleCommand,
    example='seq -f "Chapter %g. Marley was dead, to begin with: there is no doubt whatever about that." 30 > more.txt\n'
    "knnstore tune more.txt",
)
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True, type=click.Path())
@store_option
@click.option(
    "-k", metavar="K", type=int, help="Neighbours to search; fewer are kept where they do.  [default: the datastore's, 1024 at least]"
)
@click.option("--nprobe", metavar="N", type=int, help="Lists to search for them.  [default: the datastore's]")
@click.option("--exact", is_flag=True, help="Compare with every kept key instead of searching codes (see create --keep-keys).")
@click.option(
    "--tokens", metavar="N", type=int, default=16_384, show_default=True, help="Tokens to fit on at most, from places drawn in TEXT."
)
@click.option(
    "--gate",
    type=click.Choice(["auto", "fixed", "distance", "logistic"]),
    default="auto",
    show_default=True,
    help="λ the same everywhere, by the nearest distance, or by that and more; auto: the best on text it was not fitted on.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the places in TEXT.")
@click.option("--dry-run", is_flag=True, help="Change nothing.")
@click.option("--plot", metavar="FILE", type=click.Path(dir_okay=False), help="Draw perplexity over λ and temperature: .png, .svg or .pdf.")
@click.option("--name", metavar="NAME", help="What to call standard input, when a TEXT is -.")
@model_options(model="the datastore's own", dtype="that of the datastore's keys")
@click.option("--allow-model-mismatch", is_flag=True, help="Only warn when the model is not the one the datastore was built with.")
@quiet_option
@json_option
def tune(texts: tuple[str, ...], store: str, plot: str | None, quiet: bool, as_json: bool, **arguments: Any) -> None:
    """Fit a datastore's calibration on text that it does not have.

    TEXT is a folder, a file or - for standard input, as for `create`, and of the kind that is to be predicted. λ or a gate, the
    temperature, k and the weights of domains are chosen by what they make of it, and committed as a new snapshot.
    """
    from .progress import shown_progress

    if plot is not None:
        from .plots import check_plot

        check_plot(plot)
    with shown_progress(starting=loading(arguments["model"]), quiet=quiet) as progress:
        fields = {"path": store, **knnstore.tune(store, texts, progress=progress, **arguments).fields()}
    if plot is not None:
        from .plots import surface_plot

        surface_plot(fields, plot)
    if as_json:
        from .output import print_json

        print_json(fields)
    else:
        from .tuning_report import print_tuning

        print_tuning(fields)
