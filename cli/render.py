"""What people read on stdout: tables with colour on a terminal, the same without either where stdout is piped."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from .page import GAP, Page, cut_left, cut_right, padded
from .text import counted, shown_bytes, visible, visible_token

if TYPE_CHECKING:
    from knnstore.store import DocumentEntry

__all__ = ["print_demo", "print_documents", "print_info", "print_query", "print_snapshots", "print_verification"]

MIN_CONTEXT = 20  # columns that a neighbour's context keeps, however narrow the terminal
MAX_GROUP = 44  # columns of one distribution, however wide the terminal

DISTRIBUTIONS = (("p_lm", "p_LM: the model", "blue"), ("p_knn", "p_kNN: the neighbours", "green"), ("p", "p: both", "magenta"))

Decode = Callable[[Sequence[int]], str]


def print_query(fields: Mapping[str, Any], decode: Decode) -> None:
    """The three distributions side by side, then the nearest neighbours. fields: as `query --json` prints them."""
    page = Page()
    _add_query(page, fields, decode)
    page.print()


def _add_query(page: Page, fields: Mapping[str, Any], decode: Decode) -> None:
    label = "next token after: "
    page.add(Text.assemble((label, "dim"), (cut_left(visible(fields["text"]), page.width - len(label)), "bold")))
    searched = "every key" if fields["exact"] else f"nprobe {fields['nprobe']}"
    settings = f"snapshot {fields['snapshot']}, k {fields['k']}, {searched}, λ {fields['lambda']:g}, temperature {fields['temperature']:g}"
    page.add(Text(settings, style="dim"), Text(""), _distributions(page, fields), Text(""))
    if fields["neighbors"]:
        page.add(_neighbors(page, fields["neighbors"], decode))
    else:
        page.add(Text("no neighbours: nothing that is searched has an entry"))


def _distributions(page: Page, fields: Mapping[str, Any]) -> Table:
    group = min(MAX_GROUP, (page.width - 2 * GAP - 2) // 3)
    tokens = [visible_token(item["token"]) for name, _, _ in DISTRIBUTIONS for item in fields[name]]
    token_width = min(max(map(cell_len, tokens), default=1), max(6, group - 14))
    bar_width = max(0, group - token_width - 8)
    most = max((item["p"] for name, _, _ in DISTRIBUTIONS for item in fields[name]), default=0.0) or 1.0
    table = page.table()
    columns = []
    for name, title, color in DISTRIBUTIONS:
        table.add_column(Text(cut_right(title, group)), width=group, no_wrap=True)
        columns.append(
            [
                Text.assemble(
                    padded(cut_right(visible_token(item["token"]), token_width), token_width),
                    f" {item['p']:.4f} ",
                    (page.bar(item["p"] / most, bar_width), color),
                )
                for item in fields[name]
            ]
        )
    for row in range(max(map(len, columns))):
        table.add_row(*(column[row] if row < len(column) else Text("") for column in columns))
    return table


def _neighbors(page: Page, neighbors: Sequence[Mapping[str, Any]], decode: Decode) -> Table:
    """One line each: the token in the middle, between what stood before and after it."""
    documents = [visible(hit["document"]) for hit in neighbors]
    domains = [visible(hit["domain"]) for hit in neighbors]
    decimals = 2 if max(hit["distance"] for hit in neighbors) >= 1.0 else 5
    distances = [f"{hit['distance']:.{decimals}f}" for hit in neighbors]
    tokens = [visible(hit["token"]) or visible(decode([hit["id"]])) for hit in neighbors]
    if page.plain:
        tokens = [f"[{token}]" for token in tokens]
    widths = {
        "distance": max(8, *map(cell_len, distances)),
        "weight": 6,
        "document": min(max(8, *map(cell_len, documents)), max(8, page.width // 6)),
        "domain": min(max(6, *map(cell_len, domains)), max(7, page.width // 10)),
    }
    context = max(MIN_CONTEXT, page.width - sum(widths.values()) - GAP * len(widths) - 1)
    token_width = min(max(map(cell_len, tokens)), context // 3)
    left_width = (context - token_width) * 3 // 5
    right_width = context - token_width - left_width
    table = page.table()
    for name in ("distance", "weight"):
        table.add_column(name, width=widths[name], justify="right", no_wrap=True)
    table.add_column(padded("", left_width) + "context", width=context, no_wrap=True)
    for name in ("document", "domain"):
        table.add_column(name, width=widths[name], no_wrap=True)
    for hit, token, document, domain, distance in zip(neighbors, tokens, documents, domains, distances, strict=True):
        left = cut_left(visible(hit["left"]), left_width)
        token = cut_right(token, token_width)
        right = cut_right(visible(hit["right"]), right_width + token_width - cell_len(token))
        line = Text.assemble(
            " " * (left_width - cell_len(left)), (left, "dim"), (token, "bold green" if token.strip() else "reverse"), (right, "dim")
        )
        table.add_row(
            distance,
            f"{hit['weight']:.4f}",
            line,
            Text(cut_left(document, widths["document"])),
            Text(cut_right(domain, widths["domain"])),
        )
    return table


def print_info(fields: Mapping[str, Any]) -> None:
    """fields: as `info --json` prints them."""
    page = Page()
    _add_info(page, fields)
    page.print()


def _add_info(page: Page, fields: Mapping[str, Any]) -> None:
    sizes, checkpoint, calibration = fields["bytes"], fields["checkpoint"], fields["calibration"]
    parts = ", ".join(f"{name} {shown_bytes(size)}" for name, size in sizes.items() if name != "total" and size)
    rows = [
        ("datastore", visible(fields["path"])),
        ("snapshot", f"{fields['snapshot']} ({fields['time']}), format {fields['format']}"),
        ("entries", f"{fields['entries']:,} in {counted(fields['segments'], 'segment')}"),
        ("documents", f"{fields['documents']:,} in {counted(len(fields['domains']), 'domain')}"),
        ("size", f"{shown_bytes(sizes['total'])}: {parts}"),
        ("per entry", f"{fields['bytes_per_entry']:g} bytes" + (", kept keys not counted" if sizes["keys"] else "")),
        ("model", f"{visible(checkpoint['name'])}, {checkpoint['identity'][:12]}"),
        ("key", f"{fields['key']['layer']}, {fields['key']['dim']} dimensions"),
    ]
    for space in fields["spaces"]:
        lists = ", ".join(f"{n:,}" for n in space["nlist"])
        codes = f"{space['codec']} with {space['n_sub']} sub-quantizers, rotation {space['rotation']}, lists: {lists}"
        rows.append(("index", codes if space["n_sub"] else "the keys themselves: too few to train codes on"))
    rows.append(("search", f"k {fields['defaults']['k']}, nprobe {fields['defaults']['nprobe']}"))
    if calibration is None:
        rows.append(("calibration", "none: give --lambda and --temperature to query"))
    else:
        gate = calibration.get("gate")
        lmbda = f"λ {calibration['lambda']:g}" if gate is None else f"λ by a {gate['kind']} gate ({calibration['lambda']:g} without)"
        fitted = f"{lmbda}, temperature {calibration['temperature']:g}"
        origin = f"{calibration['status']}; by {calibration['made_by']} on {calibration['tokens']:,} tokens"
        if calibration["status"] == "default":
            origin = f"default; {calibration['tokens']:,} tokens are too few to fit on"
        rows.append(("calibration", f"{fitted} ({origin})"))
    table = page.table(headers=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    domains = page.table()
    domains.add_column("domain", overflow="fold")
    domains.add_column("documents", justify="right")
    domains.add_column("entries", justify="right")
    for name, count in fields["domains"].items():
        domains.add_row(Text(visible(name)), f"{count['documents']:,}", f"{count['entries']:,}")
    page.add(table, Text(""), domains)


def print_documents(documents: "Iterable[DocumentEntry]") -> None:
    """One line each, as they are read: there may be millions."""
    sys.stdout.write(f"\n{'entries':>12}  domain  document  (source)\n")
    for document in documents:
        source = "" if document.source == document.id else f"  ({visible(document.source)})"
        sys.stdout.write(f"{document.entries:>12,}  {visible(document.domain)}  {visible(document.id)}{source}\n")


def print_snapshots(listed: Sequence[Mapping[str, Any]]) -> None:
    """listed: as `snapshots --json` prints them."""
    page = Page()
    table = page.table()
    for name in ("snapshot", "time", "operation", "entries", "segments"):
        table.add_column(name, justify="left" if name in ("time", "operation") else "right", no_wrap=name != "operation")
    table.add_column("")
    for item in listed:
        counts = ", ".join(f"{name} {n:,}" for name, n in item["counts"].items() if n and isinstance(n, int) and name != "entries")
        done = f"{item['operation']} ({counts})" if counts else item["operation"]
        table.add_row(
            str(item["snapshot"]),
            item["time"],
            Text(visible(done)),
            f"{item['entries']:,}",
            str(item["segments"]),
            Text(", ".join(["current"] * item["current"] + [f"tag:{name}" for name in item["tags"]])),
        )
    page.add(table)
    page.print()


def print_verification(store: str, fields: Mapping[str, Any]) -> None:
    """fields: as `verify --json` prints them."""
    page, problems, checked = Page(), fields["problems"], shown_bytes(fields["checked_bytes"])
    if not problems:
        page.add(Text.assemble(f"{visible(store)}: ", ("no damage", "green"), f" in {checked} checked"))
    else:
        page.add(Text.assemble(f"{visible(store)}: ", (counted(len(problems), "problem"), "bold red"), f", {checked} checked"))
        for problem in problems:
            page.add(Text(f"  {problem['kind']}: {visible(problem['path'])}: {visible(problem['detail'])}", overflow="fold"))
        page.add(Text("What to do: bring these files back from a copy, or let `knnstore repair` go on from the rest."))
    for sample in fields["samples"]:
        told = f"{counted(sample['windows'], 'window')} of {counted(sample['entries'], 'entry', 'entries')} computed again"
        dtype = sample["dtype"] if sample["dtype"] == sample["recorded"] else f"{sample['dtype']}, stored were {sample['recorded']}"
        page.add(Text(f"  segment {sample['segment']}: {told} ({dtype}): {100 * sample['equal']:.2f}% of sub-codes equal"))
    page.print()


def print_demo(fields: Mapping[str, Any], decode: Decode, *, kept: str | None) -> None:
    """The datastore in one line, a query, and the perplexities."""
    page = Page()
    store, perplexity = fields["store"], fields["perplexity"]
    page.add(
        Text(
            f"datastore: the first four fifths of A Christmas Carol, {store['entries']:,} entries, {shown_bytes(store['bytes']['total'])}"
        ),
        Text(""),
    )
    _add_query(page, fields["query"], decode)
    gain = perplexity["gain_percent"]
    page.add(
        Text(""),
        Text(f"the last fifth of the book, {perplexity['tokens']:,} tokens:"),
        Text(f"  perplexity without the datastore: {perplexity['without']:.2f}"),
        Text.assemble(
            f"  perplexity with the datastore:    {perplexity['with']:.2f}",
            (f"  ({abs(gain):.1f}% {'lower' if gain >= 0 else 'higher'})", "bold green" if gain > 0 else "bold red"),
        ),
        Text(f"  tokens that became more probable: {100 * perplexity['helped']:.0f}%"),
    )
    if kept:
        page.add(Text(""), Text(f'The datastore was kept: try  knnstore query "Marley was" --store {visible(kept)}'))
    page.print()
