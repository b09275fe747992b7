"""Tables of `knnstore tag`, `diff` and `gc`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from .page import Page
from .text import counted, shown_bytes, visible

__all__ = ["print_collected", "print_difference", "print_tags"]

_THINGS = {
    "snapshots": "snapshot",
    "segments": "segment",
    "spaces": "space",
    "coarse": "coarse quantizer",
    "jobs": "unfinished job",
    "leftovers": "leftover",
    "quarantined": "quarantined snapshot",
}
_WORDS = {"current": "the current one", "recent": "one of the last", "reader": "a process reads it"}


def print_tags(listed: Sequence[Mapping[str, Any]]) -> None:
    """listed: as `tag --json` prints them."""
    page = Page()
    table = page.table()
    for name in ("tag", "snapshot", "time"):
        table.add_column(name, justify="right" if name == "snapshot" else "left", no_wrap=name != "tag", overflow="fold")
    for item in listed:
        table.add_row(Text(item["tag"]), str(item["snapshot"]), Text(visible(item["time"])))
    page.add(table if listed else Text("no tags"))
    page.print()


def print_difference(fields: Mapping[str, Any]) -> None:
    """The documents that came, went and changed, then what each domain had and has. fields: as `diff --json` prints them."""
    page = Page()
    kinds = ("came", "went", "changed")
    counts = ", ".join(f"{len(fields[kind]):,} {kind}" for kind in kinds)
    page.add(Text(f"documents from snapshot {fields['before']} to snapshot {fields['after']}: {counts}"))
    if any(fields[kind] for kind in kinds):
        table = page.table()
        for name in ("", "entries", "domain", "document"):
            table.add_column(name, justify="right" if name == "entries" else "left", no_wrap=name in ("", "entries"), overflow="fold")
        for kind in kinds:
            for document in fields[kind]:
                table.add_row(kind, f"{document['entries']:,}", Text(visible(document["domain"])), Text(visible(document["id"])))
        page.add(Text(""), table)
    table = page.table()
    table.add_column("domain", overflow="fold")
    for name in ("documents", "entries"):
        for number in (fields["before"], fields["after"]):
            table.add_column(f"{name} at {number}", justify="right", no_wrap=True)
    for name, domain in fields["domains"].items():
        table.add_row(Text(visible(name)), *(f"{n:,}" for pair in (domain["documents"], domain["entries"]) for n in pair))
    page.add(Text(""), table)
    page.print()


def print_collected(store: str, fields: Mapping[str, Any]) -> None:
    """What was removed, and which snapshots stay and why. fields: as `gc --json` prints them."""
    page = Page()
    removed = ", ".join(counted(len(fields[name]), thing) for name, thing in _THINGS.items() if fields[name])
    would = "would be " if fields["dry_run"] else ""
    size = f"{shown_bytes(fields['freed_bytes'])} {would}freed"
    page.add(Text(f"{visible(store)}: {removed} {would}removed, {size}" if removed else f"{visible(store)}: there is nothing to remove"))
    table = page.table()
    table.add_column("snapshot", justify="right", no_wrap=True)
    table.add_column("stays, being", overflow="fold")
    for kept in fields["kept"]:
        table.add_row(str(kept["snapshot"]), Text(", ".join(_WORDS.get(why, why) for why in kept["why"])))
    page.add(Text(""), table)
    if fields["kept_jobs"]:
        page.add(Text(""), Text(f"{counted(len(fields['kept_jobs']), 'unfinished job')} stays: a process is at it, or it was to be kept"))
    if fields["history_bytes"]:
        more = "; --keep 1 frees what has no tag or reader" if any(kept["why"] == ("recent",) for kept in fields["kept"]) else ""
        page.add(Text(""), Text(f"{shown_bytes(fields['history_bytes'])} stay for snapshots before the current one{more}"))
    page.print()
