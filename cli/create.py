"""`knnstore create`: a datastore from a corpus."""

from itertools import pairwise
from typing import Any

import click

import knnstore

from .options import ExampleCommand, json_option, loading, model_options, quiet_option, store_option
from .text import counted, shown_bytes

__all__ = ["create"]

KEPT_KEYS = ("f16", "bf16", "f32")


class CreateCommand(ExampleCommand):
    """`--keep-keys` may stand without a value; what follows it is then not taken for one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        followed = [*pairwise(args), (args[-1], "")] if args else []
        return super().parse_args(
            ctx, ["--keep-keys=f16" if arg == "--keep-keys" and after not in KEPT_KEYS else arg for arg, after in followed]
        )


@click.command(
    cls=CreateCommand,
    example='echo "Marley was dead, to begin with. There is no doubt whatever about that." > carol.txt\nknnstore create carol.txt',
)
@click.argument("corpora", metavar="CORPUS...", nargs=-1, required=True, type=click.Path())
@store_option
@model_options(model="the small one that ships with knnstore", dtype="auto: bfloat16 where the device computes in it, else float32")
@click.option("--domain", metavar="NAME", default="default", show_default=True, help="A label for all of these documents.")
@click.option("--name", metavar="NAME", help="What to call standard input, when a CORPUS is -.")
@click.option(
    "--codec", type=click.Choice(["pq4", "pq8"]), default="pq4", show_default=True, help="Codes of 4 bits, searched faster, or of 8."
)
@click.option(
    "--rotation",
    type=click.Choice(["random", "opq", "none"]),
    default="random",
    show_default=True,
    help="Of keys before they become codes. opq is fitted to them and takes longer.",
)
@click.option(
    "--keep-keys",
    metavar="[f16|bf16|f32]",
    type=click.Choice(KEPT_KEYS),
    help="Keep the keys themselves too, for exact search; f16 if no type is named.",
)
@click.option(
    "--key-layer", metavar="NAME", help="The module whose input is the key.  [default: the last feed-forward net, found by structure]"
)
@click.option("--context", metavar="TOKENS", type=int, help="Tokens of a window.  [default: 512, or what the model takes if that is less]")
@click.option("--stride", metavar="TOKENS", type=int, help="New tokens in each further window.  [default: half the context]")
@click.option("--no-eos", is_flag=True, help="No entry for the end of each document.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the rotation, the training sample and the clustering.")
@quiet_option
@json_option
def create(
    corpora: tuple[str, ...],
    store: str,
    domain: str,
    name: str | None,
    codec: str,
    rotation: str,
    keep_keys: str | None,
    key_layer: str | None,
    context: int | None,
    stride: int | None,
    no_eos: bool,
    seed: int,
    quiet: bool,
    as_json: bool,
    **model_arguments: Any,
) -> None:
    """Build a datastore from a corpus.

    CORPUS is a folder, a file or - for standard input: .txt, .md, .rst, or .jsonl with a text in each line; plain, .gz or
    .zst. Stopped before its end, the same command goes on where it was.
    """
    from .progress import shown_progress

    try:
        with shown_progress(starting=loading(model_arguments["model"]), quiet=quiet) as progress:
            built = knnstore.create(
                store,
                corpora,
                domain=domain,
                name=name,
                codec=codec,
                rotation=rotation,
                keep_keys=keep_keys,
                key_layer=key_layer,
                context=context,
                stride=stride,
                eos=not no_eos,
                seed=seed,
                progress=progress,
                **model_arguments,
            )
    except KeyboardInterrupt:
        click.echo("Type the same command again to go on from here.", err=True)
        raise
    with built:
        fields = built.info()
    if as_json:
        from .output import print_json

        print_json(fields)
    if not quiet:
        click.echo(_summary(fields), err=True)


def _summary(fields: dict[str, Any]) -> str:
    calibration = fields["calibration"] or {}
    fitted = f", λ {calibration['lambda']:g}, temperature {calibration['temperature']:g}" if calibration else ""
    entries, documents = counted(fields["entries"], "entry", "entries"), counted(fields["documents"], "document")
    return f"{fields['path']}: {entries} of {documents}, {shown_bytes(fields['bytes']['total'])}{fitted}"
