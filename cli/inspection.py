"""`knnstore info`, `verify` and `snapshots`: what a datastore is, whether it is whole, and what it was before."""

import click

import knnstore

from .options import ExampleCommand, json_option, quiet_option, snapshot_option, store_option

__all__ = ["info", "snapshots", "verify"]

EXIT_DAMAGE = 8


@click.command(cls=ExampleCommand, example="knnstore info")
@store_option
@snapshot_option
@click.option("--documents", is_flag=True, help="List the documents too.")
@json_option
def info(store: str, snapshot: int | str | None, documents: bool, as_json: bool) -> None:
    """Show sizes, domains, model and settings of a datastore."""
    with knnstore.open(store, snapshot=snapshot) as opened:
        fields = opened.info()
        if as_json:
            from dataclasses import asdict

            from .output import print_json

            print_json({**fields, "document_list": [asdict(document) for document in opened.documents()]} if documents else fields)
        else:
            from .render import print_documents, print_info

            print_info(fields)
            if documents:
                print_documents(opened.documents())


@click.command(cls=ExampleCommand, example="knnstore verify")
@store_option
@click.option(
    "--level",
    type=click.Choice(["quick", "full"]),
    default="full",
    show_default=True,
    help="quick: manifests, and the size of every file. full: every byte.",
)
@quiet_option
@json_option
@click.pass_context
def verify(ctx: click.Context, store: str, level: str, quiet: bool, as_json: bool) -> None:
    """Look for damage; exit code 8 where there is any."""
    from .progress import shown_progress

    with shown_progress(starting="opening", quiet=quiet, transient=True) as progress:
        report = knnstore.verify(store, level=level, progress=progress)
    problems = [{"kind": problem.kind, "path": str(problem.path), "detail": problem.detail} for problem in report.problems]
    if as_json:
        from .output import print_json

        print_json({"ok": report.ok, "checked_bytes": report.checked_bytes, "problems": problems, "orphans": list(report.orphans)})
    else:
        from .render import print_verification

        print_verification(store, report.checked_bytes, problems)
    if not report.ok:
        ctx.exit(EXIT_DAMAGE)


@click.command(cls=ExampleCommand, example="knnstore snapshots")
@store_option
@json_option
def snapshots(store: str, as_json: bool) -> None:
    """List the snapshots of a datastore, oldest first."""
    from pathlib import Path

    from knnstore.inspection import snapshot_list

    listed = snapshot_list(Path(store))
    if as_json:
        from .output import print_json

        print_json({"path": store, "snapshots": listed})
    else:
        from .render import print_snapshots

        print_snapshots(listed)
