"""`knnstore tag`, `restore`, `diff` and `gc`: names for snapshots, the way back, what came and went, and what is not needed any more."""

from dataclasses import asdict

import click

import knnstore

from .options import ExampleCommand, json_option, quiet_option, read_snapshot, snapshot_option, store_option
from .text import counted

__all__ = ["diff", "gc", "restore", "tag"]


@click.command(cls=ExampleCommand, example="knnstore tag paper")
@click.argument("name", required=False)
@store_option
@snapshot_option
@click.option("--move", is_flag=True, help="Also where another snapshot has the name.")
@click.option("--remove", is_flag=True, help="Take the name away; its snapshot stays until gc.")
@json_option
def tag(name: str | None, store: str, snapshot: int | str | None, move: bool, remove: bool, as_json: bool) -> None:
    """Give a snapshot a NAME, or list the names there are.

    A snapshot that has a name is opened by it (--at tag:NAME), and gc keeps it.
    """
    if name is None and (snapshot is not None or move or remove):
        raise click.UsageError("a NAME is missing. Give one, or no option, which lists the tags there are.")
    if remove and (snapshot is not None or move):
        raise click.UsageError("--remove takes a name away. Leave --at and --move out.")
    if name is not None:
        if remove:
            knnstore.untag(store, name)
            done = f"{store}: no snapshot is tag:{name} any more"
        else:
            done = f"{store}: snapshot {knnstore.tag(store, name, snapshot, move=move).snapshot} is tag:{name}"
        if not as_json:
            click.echo(done)
            return
    listed = [{"tag": name, **asdict(item)} for name, item in knnstore.tags(store).items()]
    if as_json:
        from .output import print_json

        print_json({"path": store, "tags": listed})
    else:
        from .history_tables import print_tags

        print_tags(listed)


@click.command(cls=ExampleCommand, example="knnstore restore 1")
@click.argument("snapshot", metavar="SNAPSHOT", callback=read_snapshot)
@store_option
@quiet_option
@json_option
def restore(snapshot: int | str, store: str, quiet: bool, as_json: bool) -> None:
    """Make an earlier SNAPSHOT the newest again.

    SNAPSHOT is a number or tag:NAME. A new snapshot is committed with its content; those between stay, and can be restored too.
    """
    made = knnstore.restore(store, snapshot)
    entries, documents = made.operation.counts["entries"], made.operation.counts["documents"]
    if as_json:
        from .output import print_json

        print_json({"path": store, "snapshot": made.snapshot, **made.operation.arguments, "documents": documents, "entries": entries})
    elif not quiet:
        content = f"{counted(documents, 'document')}, {counted(entries, 'entry', 'entries')}"
        click.echo(f"{store}: snapshot {made.snapshot} is what snapshot {made.operation.arguments['restored']} was: {content}")


@click.command(cls=ExampleCommand, example="knnstore diff 1 2")
@click.argument("before", metavar="A", callback=read_snapshot)
@click.argument("after", metavar="[B]", callback=read_snapshot, required=False)
@store_option
@json_option
def diff(before: int | str, after: int | str | None, store: str, as_json: bool) -> None:
    """List the documents that came and went between snapshots.

    From snapshot A to snapshot B, which are numbers or tag:NAME; without B, to the newest.
    """
    fields = asdict(knnstore.diff(store, before, after))
    if as_json:
        from .output import print_json

        print_json({"path": store, **fields})
    else:
        from .history_tables import print_difference

        print_difference(fields)


@click.command(cls=ExampleCommand, example="knnstore gc --dry-run")
@store_option
@click.option(
    "--keep", metavar="N", type=int, default=10, show_default=True, help="The last snapshots, which stay. 1: only the current one."
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--keep-jobs", is_flag=True, help="Leave unfinished jobs, so that their commands can be typed again.")
@click.option("--quarantine", is_flag=True, help="Remove too what repair put aside.")
@quiet_option
@json_option
def gc(store: str, keep: int, dry_run: bool, keep_jobs: bool, quarantine: bool, quiet: bool, as_json: bool) -> None:
    """Remove old snapshots, and every file that only they needed.

    The current snapshot stays, those with a tag, and those that a running process reads. What killed commands left is removed too.
    """
    from .progress import shown_progress

    with shown_progress(starting="waiting for other commands", quiet=quiet, transient=True) as progress:
        collected = knnstore.gc(store, keep=keep, dry_run=dry_run, keep_jobs=keep_jobs, quarantine=quarantine, progress=progress)
    fields = asdict(collected)
    if as_json:
        from .output import print_json

        print_json({"path": store, **fields})
    elif not quiet or dry_run:
        from .history_tables import print_collected

        print_collected(store, fields)
