"""`knnstore compact`: small segments joined, deleted rows dropped, lists renewed, or all keys in a new space."""

from typing import Any

import click

import knnstore

from .options import ExampleCommand, json_option, loading, model_options, quiet_option, store_option
from .text import counted, shown_bytes

__all__ = ["compact"]


@click.command(
    cls=ExampleCommand,
    example='echo "Marley was dead, to begin with." > carol.txt && echo "It was the best of times." > cities.txt\n'
    "knnstore create carol.txt cities.txt\nknnstore delete cities.txt\nknnstore compact",
)
@store_option
@click.option("--retrain", is_flag=True, help="Bring all entries into one new space, trained on a sample of all.")
@click.option("--lossy", is_flag=True, help="With --retrain: where keys were not kept, from codes instead of running the model.")
@model_options(model="the one the datastore was built with; loaded only if --retrain needs it", dtype="what the keys were computed in")
@click.option("--allow-model-mismatch", is_flag=True, help="Use another checkpoint than the datastore's. Distances may mean nothing.")
@quiet_option
@json_option
def compact(store: str, retrain: bool, lossy: bool, quiet: bool, as_json: bool, **arguments: Any) -> None:
    """Write segments again where that helps.

    Small segments are joined, deleted rows dropped, raw keys encoded where there are enough, and codes listed anew where the datastore has
    outgrown its lists. Needs as much free space as what is written again; `knnstore gc` removes what was there before.
    """
    from .progress import shown_progress

    with knnstore.open(store) as opened:
        before = opened.info()
    starting = loading(arguments["model"]) if retrain and not lossy else "reading the datastore"
    with (
        shown_progress(starting=starting, quiet=quiet) as progress,
        knnstore.compact(store, retrain=retrain, lossy=lossy, progress=progress, **arguments) as compacted,
    ):
        after = compacted.info()
    fields = {"changed": after["snapshot"] != before["snapshot"], "before": _size(before), **after}
    if as_json:
        from .output import print_json

        print_json(fields)
    elif not quiet:
        click.echo(_summary(fields))


def _size(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in ("snapshot", "segments", "entries", "bytes")}


def _summary(fields: dict[str, Any]) -> str:
    if not fields["changed"]:
        return f"{fields['path']}: nothing to compact; snapshot {fields['snapshot']} stays"
    sides = [
        f"{counted(side['segments'], 'segment')}, {counted(side['entries'], 'entry', 'entries')}, {shown_bytes(side['bytes']['total'])}"
        for side in (fields["before"], fields)
    ]
    return f"{fields['path']}: {' → '.join(sides)}; snapshot {fields['snapshot']}; run `knnstore gc --keep 1` to give the space back"
