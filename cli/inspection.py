"""`knnstore info`, `verify`, `repair` and `snapshots`: what a datastore is, whether it is whole, and what it was before."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import knnstore

from .options import ExampleCommand, json_option, loading, model_options, quiet_option, snapshot_option, store_option

if TYPE_CHECKING:
    from knnstore.store import DocumentEntry

__all__ = ["info", "repair", "snapshots", "verify"]

EXIT_DAMAGE = 8


@click.command(cls=ExampleCommand, example="knnstore info")
@store_option
@snapshot_option
@click.option("--documents", is_flag=True, help="List the documents too.")
@json_option
def info(store: str, snapshot: int | str | None, documents: bool, as_json: bool) -> None:
    """Show sizes, domains, model and settings of a datastore."""
    from knnstore.inspection import read_info

    listed: list[DocumentEntry] = []
    if documents:  # they need what a search needs too, which takes long to import
        with knnstore.open(store, snapshot=snapshot) as opened:
            fields, listed = opened.info(), list(opened.documents())
    else:
        fields = read_info(Path(store), snapshot)
    if as_json:
        from .output import print_json

        print_json({**fields, "document_list": [asdict(document) for document in listed]} if documents else fields)
    else:
        from .render import print_documents, print_info

        print_info(fields)
        if documents:
            print_documents(listed)


@click.command(cls=ExampleCommand, example="knnstore verify")
@store_option
@click.option(
    "--level",
    type=click.Choice(["quick", "full"]),
    default="full",
    show_default=True,
    help="quick: manifests, and the size of every file. full: every byte.",
)
@click.option(
    "--sample",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Run N windows of the text through the model again, and compare the codes.",
)
@model_options(model="the datastore's own", dtype="that of the datastore's keys")
@click.option("--allow-model-mismatch", is_flag=True, help="Only warn when the model is not the one the datastore was built with.")
@quiet_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context, /, store: str, level: str, sample: int, model: str | None, quiet: bool, as_json: bool, **model_settings: Any
) -> None:
    """Look for damage; exit code 8 where there is any.

    The model is used with --sample only.
    """
    from .progress import shown_progress

    if not sample and (model is not None or any(model_settings.values())):
        raise click.UsageError("a model is used with --sample N only. Give it, or leave the options of the model out.")
    starting = loading(model) if sample else "opening"
    with shown_progress(starting=starting, quiet=quiet, transient=True) as progress:
        report = knnstore.verify(store, level=level, sample=sample, model=model, **model_settings, progress=progress)
    fields = asdict(report)
    if as_json:
        from .output import print_json

        print_json({"ok": report.ok, **fields})
    else:
        from .render import print_verification

        print_verification(store, fields)
    if not report.ok:
        ctx.exit(EXIT_DAMAGE)


@click.command(cls=ExampleCommand, example="knnstore repair --dry-run")
@store_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@quiet_option
@json_option
@click.pass_context
def repair(ctx: click.Context, store: str, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Put what is damaged aside, and go on from what is sound.

    Nothing is deleted: what is damaged moves to the folder quarantine/ in the datastore, and a snapshot of the rest is committed. The
    documents that were lost are listed; append them again. Exit code 8 where there are any, or where damage must stay for now because a
    process reads it; else 0.
    """
    from .progress import shown_progress

    with shown_progress(starting="opening", quiet=quiet, transient=True) as progress:
        report = knnstore.repair(store, dry_run=dry_run, progress=progress)
    fields = asdict(report)
    if as_json:
        from .output import print_json

        print_json({"path": store, "lossless": report.lossless, **fields})
    else:
        from .repair_report import print_repair

        print_repair(store, fields)
    if report.held or not report.lossless:
        ctx.exit(EXIT_DAMAGE)


@click.command(cls=ExampleCommand, example="knnstore snapshots")
@store_option
@json_option
def snapshots(store: str, as_json: bool) -> None:
    """List the snapshots of a datastore, oldest first."""
    from knnstore.inspection import snapshot_list

    listed = snapshot_list(Path(store))
    if as_json:
        from .output import print_json

        print_json({"path": store, "snapshots": listed})
    else:
        from .render import print_snapshots

        print_snapshots(listed)
