"""The command `knnstore`: the group of all commands, in the order in which they are used."""

from typing import Any

import click

from knnstore import __version__

from .append import append
from .compaction import compact
from .completion import completion
from .create import create
from .delete import delete
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .history import diff, gc, restore, tag
from .inspection import info, repair, snapshots, verify
from .merge import merge
from .options import write_example
from .query import query
from .reporting import watched
from .tune import tune

__all__ = ["cli"]


class KnnstoreGroup(click.Group):
    """Lists commands in the order they were added, and ends every failure with its message and exit code."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with watched(ctx):
            if not args and not ctx.resilient_parsing:
                click.echo(ctx.get_help(), err=True)
                ctx.exit(2)
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with watched(ctx):
            return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(formatter, "knnstore demo")


@click.group("knnstore", cls=KnnstoreGroup, context_settings={"help_option_names": ["--help", "-h"]}, no_args_is_help=False)
@click.version_option(__version__, "--version", prog_name="knnstore", message="%(prog)s %(version)s")
def cli() -> None:
    """A datastore for nearest-neighbour language models: every token of a corpus with the context it stood in,
    searched to help a language model predict the next one.

    Exit codes: 0 well, 1 unexpected, 2 usage, 3 not found, 4 exists already, 5 conflict or locked, 6 checkpoint mismatch,
    7 format not supported, 8 damage found, 9 input/output error or no space, 130 interrupted.
    """


for command in (
    create,
    append,
    merge,
    query,
    generate,
    tune,
    evaluate,
    delete,
    compact,
    info,
    verify,
    repair,
    snapshots,
    tag,
    restore,
    diff,
    gc,
    demo,
    completion,
):
    cli.add_command(command)
