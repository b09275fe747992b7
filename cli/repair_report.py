"""What `knnstore repair` shows: what was damaged, where it went, what was lost, and what to do next."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from .page import Page
from .text import counted, visible

__all__ = ["print_repair"]

_SHOWN = 20  # documents that are listed; all are in the file that is named


def print_repair(store: str, fields: Mapping[str, Any]) -> None:
    """fields: as `repair --json` prints them."""
    page, problems = Page(), fields["problems"]
    name, dry_run = visible(store), fields["dry_run"]
    if not problems and not fields["lost"]:
        page.add(Text.assemble(f"{name}: ", ("no damage", "green"), "; nothing to repair"))
        page.print()
        return
    page.add(Text.assemble(f"{name}: ", (counted(len(problems), "problem"), "bold red")))
    for problem in problems:
        page.add(Text(f"  {problem['kind']}: {visible(problem['path'])}: {visible(problem['detail'])}", overflow="fold"))
    if fields["moved"]:
        table = page.table()
        for header in ("put aside", "why"):
            table.add_column(header, overflow="fold")
        for item in fields["moved"]:
            table.add_row(Text(visible(item["path"])), item["why"])
        folder = "/".join(fields["moved"][0]["to"].split("/")[:2])
        page.add(
            Text(""),
            table,
            Text(f"It {'would go to' if dry_run else 'went to'} {folder}/; nothing {'would be' if dry_run else 'was'} deleted."),
        )
    page.add(Text(""), Text(_newest(fields)))
    _add_losses(page, fields)
    page.print()


def _newest(fields: Mapping[str, Any]) -> str:
    content = f"{counted(fields['documents'], 'document')}, {counted(fields['entries'], 'entry', 'entries')}"
    if fields["snapshot"] == fields["base"]:
        return f"snapshot {fields['snapshot']} is the newest and is whole: {content}"
    deed = "would be" if fields["dry_run"] else "was"
    return f"snapshot {fields['snapshot']} {deed} committed, from what is sound of snapshot {fields['base']}: {content}"


def _add_losses(page: Page, fields: Mapping[str, Any]) -> None:
    lost, unnamed, lost_snapshots = fields["lost"], fields["unnamed"], fields["lost_snapshots"]
    for number in fields["held"]:
        page.add(Text(f"snapshot {number} names what is damaged, and a process has it open. Run repair again when that has ended."))
    for number in lost_snapshots:
        page.add(Text(f"snapshot {number} is lost: what it says cannot be read. Do again what made it.", style="bold red"))
    if lost:
        page.add(Text(f"{counted(len(lost), 'document')} lost:", style="bold red"))
        table = page.table()
        table.add_column("entries", justify="right", no_wrap=True)
        for header in ("domain", "document"):
            table.add_column(header, overflow="fold")
        for item in lost[:_SHOWN]:
            domain = "(not known)" if item["domain"] is None else visible(item["domain"])
            table.add_row(f"{item['entries']:,}", Text(domain), Text(visible(item["id"])))
        page.add(table)
        if len(lost) > _SHOWN and not fields["dry_run"]:
            page.add(Text(f"and {len(lost) - _SHOWN:,} more: all are in quarantine/{fields['snapshot']}/lost.jsonl"))
    for domain, n in unnamed.items():
        page.add(Text(f"{counted(n, 'document')} of domain {visible(domain)} lost whose names cannot be read", style="bold red"))
    if lost or unnamed:
        page.add(Text("What to do: append them again; documents that are there already are left out."))
