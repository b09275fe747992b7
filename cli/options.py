"""Options that several commands share, and how their values are read."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "ExampleCommand",
    "domain_weights",
    "json_option",
    "loading",
    "model_options",
    "quiet_option",
    "read_snapshot",
    "read_text",
    "retrieval_options",
    "search_options",
    "snapshot_option",
    "store_option",
    "write_example",
]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORE = "store.knn"
STORE_VARIABLE = "KNNSTORE"
DTYPES = ("auto", "float32", "bfloat16", "float16")
RETRIEVALS = ("full", "pointers", "confident")


class ExampleCommand(click.Command):
    """A command whose help ends with an example that works as typed."""

    def __init__(self, *args: Any, example: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(formatter, self.example)


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    """The example at the end of a help page, its lines as they are."""
    with formatter.section("Example"):
        for line in example.splitlines():
            formatter.write(f"{' ' * formatter.current_indent}{line}\n")


store_option = click.option(
    "--store",
    "-s",
    metavar="PATH",
    default=DEFAULT_STORE,
    envvar=STORE_VARIABLE,
    show_default=True,
    show_envvar=True,
    help="The datastore.",
)


def read_snapshot(_ctx: click.Context, _param: click.Parameter, given: str | None) -> int | str | None:
    """A snapshot's number, or `tag:NAME` as it is; None where none was given."""
    if given is None or given.startswith("tag:"):
        return given
    if not re.fullmatch(r"-?[0-9]{1,18}", given):
        raise click.BadParameter(f"{given!r} is no snapshot. Give its number, or tag:NAME.")
    return int(given)


snapshot_option = click.option(
    "--at",
    "snapshot",
    metavar="SNAPSHOT",
    callback=read_snapshot,
    help="An earlier snapshot, by number or tag:NAME.  [default: the newest]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress and no notes; warnings and errors remain.")


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; the help lists them in this order."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def model_options(*, model: str, dtype: str) -> Callable[[F], F]:
    """--model and what goes with loading it. model, dtype: what their defaults are, in words."""
    return _together(
        click.option("--model", "-m", metavar="MODEL", help=f"A hub name, a local folder or a GGUF file.  [default: {model}]"),
        click.option("--revision", metavar="REVISION", help="Branch, tag or commit of a model from the hub."),
        click.option("--token", metavar="TOKEN", help="Access token for the hub.  [default: that of `hf auth login`, or $HF_TOKEN]"),
        click.option("--cache-dir", metavar="PATH", help="Where downloaded models are kept.  [default: the hub's cache folder]"),
        click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps.  [default: the best there is]"),
        click.option("--dtype", type=click.Choice(DTYPES), help=f"What the model computes in.  [default: {dtype}]"),
    )


def loading(model: str | None) -> str | None:
    """What progress calls the loading of a model; None where it may be downloaded, which draws bars of its own."""
    return "loading the model" if model is None or Path(model).exists() else None


def domain_weights(_ctx: click.Context, _param: click.Parameter, given: Sequence[str]) -> dict[str, float] | None:
    """`NAME` and `NAME=WEIGHT` as {name: weight}; None where none was given."""
    weights: dict[str, float] = {}
    for item in given:
        name, has_weight, number = item.rpartition("=")
        try:
            weight = float(number) if has_weight else 1.0
        except ValueError:
            raise click.BadParameter(f"{item!r}: the weight {number!r} is not a number. Write NAME or NAME=WEIGHT.") from None
        name = name if has_weight else item
        if not name or name in weights:
            raise click.BadParameter(
                f"{item!r}: {'given twice' if name else 'the domain has no name'}. Write each domain once, as NAME=WEIGHT."
            )
        weights[name] = weight
    return weights or None


def search_options(command: F) -> F:
    """How neighbours are searched and mixed in: the arguments of `KnnLM.load` from k to exact."""
    return _together(
        click.option("-k", metavar="K", type=int, help="Neighbours to search.  [default: the datastore's]"),
        click.option("--nprobe", metavar="N", type=int, help="Lists to search for them.  [default: the datastore's]"),
        click.option(
            "--lambda",
            "lmbda",
            metavar="WEIGHT",
            type=float,
            help="Weight of p_kNN in p, 0 to 1, the same everywhere.  [default: the datastore's, or its gate]",
        ),
        click.option("--temperature", metavar="T", type=float, help="Of the softmax over -distance.  [default: the datastore's]"),
        click.option(
            "--domain",
            "domains",
            metavar="NAME[=WEIGHT]",
            multiple=True,
            callback=domain_weights,
            help="Search this domain, and no other that is not named too.  [default: all, at the datastore's weights]",
        ),
        click.option("--exclude", metavar="DOC", multiple=True, help="Leave out the document with this id."),
        click.option("--exact", is_flag=True, help="Compare with every kept key instead of searching codes (see create --keep-keys)."),
        click.option("--allow-model-mismatch", is_flag=True, help="Only warn when the model is not the one the datastore was built with."),
    )(command)


def retrieval_options(command: F) -> F:
    """When a search is made, where many tokens follow each other: the arguments of `KnnLM.load` from retrieval on."""
    return _together(
        click.option(
            "--retrieval",
            type=click.Choice(RETRIEVALS),
            default=RETRIEVALS[0],
            show_default=True,
            help="Search for every token; or go on from the neighbours of the token before; or only where the gate expects a gain.",
        ),
        click.option("--min-knns", metavar="N", type=int, help="pointers: search again where fewer of them go on.  [default: 4]"),
        click.option(
            "--threshold", metavar="P", type=float, help="confident: search where it pays with this probability.  [default: 0.25]"
        ),
    )(command)


def read_text(_ctx: click.Context, _param: click.Parameter, text: str) -> str:
    """The argument itself; for `-` all of standard input as UTF-8, without the newline at its end that shells add."""
    try:
        if text != "-":
            # Bytes of an argument that are not in the locale's encoding come as lone surrogates.
            return os.fsencode(text).decode("utf-8") if any("\udc80" <= char <= "\udcff" for char in text) else text
        read = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"not UTF-8: {error.reason} at byte {error.start:,}. Convert the text first.") from None
    return read.removesuffix("\n").removesuffix("\r")
