"""`knnstore merge`: several datastores as one."""

from collections.abc import Sequence

import click

import knnstore

from .options import ExampleCommand, json_option, quiet_option, store_option
from .text import counted, shown_bytes, visible

__all__ = ["merge"]


def _names(_ctx: click.Context, _param: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """`STORE=NAME` as {store: name}."""
    names: dict[str, str] = {}
    for item in given:
        store, _, name = item.rpartition("=")
        if not store or not name or store in names:
            raise click.BadParameter(f"{item!r}: write each store once, as STORE=NAME.")
        names[store] = name
    return names


@click.command(
    cls=ExampleCommand,
    example='echo "Marley was dead, to begin with." > carol.txt && knnstore create carol.txt --store carol.knn\n'
    'echo "It was the best of times." > cities.txt && knnstore create cities.txt --store cities.knn\n'
    "knnstore merge carol.knn cities.knn --store both.knn",
)
@click.argument("sources", metavar="STORE...", nargs=-1, required=True, type=click.Path())
@store_option
@click.option(
    "--domain",
    "domains",
    metavar="STORE=NAME",
    multiple=True,
    callback=_names,
    help="What a store's domain `default` is called in the merged one.  [default: the store's file name]",
)
@click.option(
    "--on-conflict",
    type=click.Choice(["keep-first", "keep-last"]),
    help="Which content stays where stores have a document with different ones.  [default: an error that lists them]",
)
@click.option("--link", is_flag=True, help="Hard links instead of copies; on one file system only.")
@quiet_option
@json_option
def merge(
    sources: tuple[str, ...],
    store: str,
    domains: dict[str, str],
    on_conflict: str | None,
    link: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make one datastore of several that have the same model.

    The STOREs stay as they are; --store names the new one, or one there is, to which they are added. No model is needed. λ and the
    temperature are those of the largest store, marked stale.
    """
    from .progress import shown_progress

    with (
        shown_progress(starting="reading manifests", quiet=quiet) as progress,
        knnstore.merge(sources, store, domains=domains, on_conflict=on_conflict, link=link, progress=progress) as merged,
    ):
        fields = {"counts": merged.manifest.operation.counts, **merged.info()}
    if as_json:
        from .output import print_json

        print_json(fields)
    if not quiet:
        entries, documents = counted(fields["entries"], "entry", "entries"), counted(fields["documents"], "document")
        names = ", ".join(map(visible, fields["domains"]))
        click.echo(f"{store}: {entries} of {documents} in {names}, {shown_bytes(fields['bytes']['total'])}", err=True)
