"""`knnstore completion`: scripts that make shells complete commands and options."""

import click
from click.shell_completion import get_completion_class

from .options import ExampleCommand

__all__ = ["completion"]


@click.command(cls=ExampleCommand, example='eval "$(knnstore completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    To have it in every shell, append the example to ~/.bashrc (zsh: ~/.zshrc, with zsh), or for fish write the script to
    ~/.config/fish/completions/knnstore.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    click.echo(kind(ctx.find_root().command, {}, "knnstore", "_KNNSTORE_COMPLETE").source())
