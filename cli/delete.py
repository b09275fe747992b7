"""`knnstore delete`: documents taken out of a datastore."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

import knnstore

from .options import ExampleCommand, json_option, quiet_option, store_option
from .text import counted, shown_bytes, visible

__all__ = ["delete"]


def _conditions(_ctx: click.Context, _param: click.Parameter, given: Sequence[str]) -> dict[str, Any] | None:
    """`KEY=VALUE` as {key: value}; a value that is JSON is taken as that, anything else as a string."""
    where: dict[str, Any] = {}
    for item in given:
        name, has_value, value = item.partition("=")
        if not name or not has_value or name in where:
            raise click.BadParameter(f"{item!r}: write each condition once, as KEY=VALUE.")
        try:
            where[name] = json.loads(value)
        except ValueError:
            where[name] = value
    return where or None


@click.command(
    cls=ExampleCommand,
    example='echo "Marley was dead, to begin with." > carol.txt && echo "It was the best of times." > cities.txt\n'
    "knnstore create carol.txt cities.txt\nknnstore delete cities.txt",
)
@click.argument("documents", metavar="DOCUMENT...", nargs=-1)
@store_option
@click.option("--domain", metavar="NAME", help="All documents of a domain; with DOCUMENT or --where, only those of this domain.")
@click.option(
    "--where",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_conditions,
    help="Documents whose metadata has this value, as JSON (2026, true) or a string. Quote a string of digits: 'year=\"2026\"'.",
)
@click.option("--purge", is_flag=True, help="Write the touched segments again without them, so that gc leaves no byte of them.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@quiet_option
@json_option
def delete(
    documents: tuple[str, ...],
    store: str,
    domain: str | None,
    where: dict[str, Any] | None,
    purge: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Take documents out of a datastore.

    They stop answering at once; their bytes go with `compact` or --purge, and then `gc`. Snapshots from before keep them until gc.
    """
    from .progress import shown_progress

    with shown_progress(starting="looking for documents", quiet=quiet, transient=True) as progress:
        receipt = knnstore.delete(store, documents or None, domain=domain, where=where, purge=purge, dry_run=dry_run, progress=progress)
    if as_json:
        from .output import print_json

        print_json({"dry_run": dry_run, **asdict(receipt)})
    elif not quiet or dry_run:
        click.echo(_summary(store, receipt, dry_run))


def _summary(store: str, receipt: Any, dry_run: bool) -> str:
    n = sum(receipt.documents.values())
    if not n:
        return f"{store}: no document is like that; nothing was changed"
    what = f"{counted(n, 'document')} of {', '.join(visible(domain) for domain in sorted(receipt.documents))}"
    size = f"{counted(receipt.entries, 'entry', 'entries')}, {shown_bytes(receipt.bytes)}"
    if dry_run:
        return f"{store}: would delete {what}: {size}"
    after = "`knnstore compact` and `knnstore gc --keep 1` give the space back"
    if receipt.purged:
        after = "run `knnstore gc --keep 1` to give the space back"
    return f"{store}: deleted {what}: {size}; snapshot {receipt.snapshot}; {after}"
