"""`knnstore append`: more documents in a datastore, changed ones replaced."""

from typing import Any

import click

from .options import ExampleCommand, json_option, loading, model_options, quiet_option, store_option
from .text import counted

__all__ = ["append"]


@click.command(
    cls=ExampleCommand,
    example='echo "Marley was dead, to begin with." > carol.txt && knnstore create carol.txt\n'
    'echo "It was the best of times, it was the worst of times." > cities.txt\nknnstore append cities.txt',
)
@click.argument("corpora", metavar="CORPUS...", nargs=-1, required=True, type=click.Path())
@store_option
@click.option("--domain", metavar="NAME", default="default", show_default=True, help="A label for all of these documents.")
@click.option("--replace", is_flag=True, help="Put documents whose content changed in the place of the old ones.")
@click.option("--prune", is_flag=True, help="With --replace: remove documents of the domain that CORPUS does not have.")
@click.option("--name", metavar="NAME", help="What to call standard input, when a CORPUS is -.")
@model_options(model="the one the datastore was built with", dtype="what the keys were computed in")
@click.option("--allow-model-mismatch", is_flag=True, help="Use another checkpoint than the datastore's. Distances may mean nothing.")
@quiet_option
@json_option
def append(
    corpora: tuple[str, ...],
    store: str,
    domain: str,
    replace: bool,
    prune: bool,
    name: str | None,
    quiet: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Add documents to a datastore.

    CORPUS is as for `create`. A document is known by its domain and id (the file's path within CORPUS): one that is there with
    the same content is skipped, one with another content is an error unless --replace is given. Stopped before its end, the same command
    goes on where it was.
    """
    from knnstore.lm.append import append_corpus

    from .progress import shown_progress

    try:
        with shown_progress(starting=loading(arguments["model"]), quiet=quiet) as progress:
            done = append_corpus(store, corpora, domain=domain, replace=replace, prune=prune, name=name, progress=progress, **arguments)
    except KeyboardInterrupt:
        click.echo("Type the same command again to go on from here.", err=True)
        raise
    with done.store as appended:
        fields = {"changed": done.changed, "counts": done.counts, **appended.info()}
    if as_json:
        from .output import print_json

        print_json(fields)
    if not quiet:
        click.echo(_summary(fields), err=True)


def _summary(fields: dict[str, Any]) -> str:
    counts = fields["counts"]
    done = [f"{counted(counts['entries'], 'entry', 'entries')} of {counted(counts['documents'], 'document')} added"]
    if not fields["changed"]:
        done = ["nothing is new"]
    done += [f"{counts[name]:,} {word}" for name, word in _WORDS.items() if counts[name]]
    after = f"snapshot {fields['snapshot']}" + (f", {counted(fields['entries'], 'entry', 'entries')}" if fields["changed"] else " stays")
    return f"{fields['path']}: {', '.join(done)}; {after}"


_WORDS = {
    "replaced": "replaced",
    "removed": "removed, gone from the corpus",
    "repeated": "there already",
    "skipped": "left out",
}
