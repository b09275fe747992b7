"""What `knnstore evaluate` shows: perplexities, which tokens were helped and hurt and by how much, and each domain's part."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from .page import Page
from .text import counted, visible

__all__ = ["print_evaluation"]

BAR = 40  # columns of the longest bar, however wide the terminal
EITHER_SIDE = 62  # columns that a line with a bar has beside it


def print_evaluation(fields: Mapping[str, Any]) -> None:
    """fields: as `evaluate --json` prints them."""
    page = Page()
    store = fields["store"]
    texts = f"{counted(fields['tokens'], 'token')} of {counted(fields['documents'], 'document')}"
    searched = "every key" if fields["exact"] else f"nprobe {fields['nprobe']}"
    settings = f"k {fields['k']}, {searched}, temperature {fields['temperature']:g}, windows of {fields['context']}, {fields['stride']} new"
    page.add(
        Text.assemble(f"{visible(store['path'])} ", (f"at snapshot {store['snapshot']}, ", "dim"), texts, style="bold"),
        Text(settings, style="dim"),
        Text(""),
        _perplexities(page, fields),
        Text(""),
    )
    for line in _sentences(fields):
        page.add(Text(line))
    page.add(Text(""), _histogram(page, fields["histogram"]), Text(""), _frequencies(page, fields["frequency"]))
    if len(fields["domains"]) > 1:
        page.add(Text(""), _domains(page, fields["domains"]))
    page.print()


def _perplexities(page: Page, fields: Mapping[str, Any]) -> Table:
    table = page.table()
    for name in ("", "the model", "with the datastore"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("")
    for title, name, shown in (
        ("perplexity", "perplexity", ".2f"),
        ("bits per byte", "bits_per_byte", ".4f"),
        ("tokens/s", "tokens_per_s", ",.0f"),
    ):
        before, after = fields[name]["lm"], fields[name]["mixed"]
        table.add_row(title, _number(before, shown), _number(after, shown), _change(before, after, higher_is_better=name == "tokens_per_s"))
    return table


def _change(before: float, after: float, *, higher_is_better: bool = False) -> Text:
    """`12.3% lower`, in the colour of a gain or a loss."""
    if not (math.isfinite(before) and math.isfinite(after) and before > 0):
        return Text("")
    percent = 100.0 * (after / before - 1.0)
    if round(abs(percent), 1) == 0.0:
        return Text("")
    return Text(
        f"{abs(percent):.1f}% {'higher' if percent > 0 else 'lower'}", style="green" if (percent > 0) is higher_is_better else "red"
    )


def _sentences(fields: Mapping[str, Any]) -> list[str]:
    same, covered = max(0.0, 1.0 - fields["helped"] - fields["hurt"]), fields["covered"]
    of_those = f"{_number(covered['lm'], '.2f')} by the model alone, {_number(covered['knn'], '.2f')} by the neighbours alone"
    lines = [
        f"helped: {_percent(fields['helped'])} of tokens, by {fields['gain']:.2f} bits on average",
        f"hurt: {_percent(fields['hurt'])} of tokens, by {abs(fields['loss']):.2f} bits on average",
        f"among their neighbours: {_percent(1.0 - fields['zero'])} of tokens; their perplexity is {of_those}",
        f"mean λ: {fields['lambda']:.3f}",
    ]
    if round(1000.0 * same):
        lines.insert(2, f"neither: {_percent(same)} of tokens")
    if fields["searched"] < 1.0:
        lines.append(f"searched: for {_percent(fields['searched'])} of tokens ({fields['retrieval']})")
    if fields["own"]:
        lines.append(f"in the datastore too: {counted(fields['own'], 'document')}, whose own entries were left out")
    return lines


def _histogram(page: Page, bins: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each bin from the first to the last that has tokens."""
    table = page.table()
    table.add_column("log2(p / p_LM)", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("bits/token", justify="right", no_wrap=True)
    table.add_column("")
    for item in _trimmed(bins):
        color = "red" if item["high"] <= 0 else "green" if item["low"] >= 0 else "dim"
        table.add_row(
            _between(item["low"], item["high"], "g"), _percent(item["share"]), f"{item['bits']:+.3f}", _bar(page, item, bins, color)
        )
    return table


def _frequencies(page: Page, buckets: Sequence[Mapping[str, Any]]) -> Table:
    table = page.table()
    table.add_column("per million entries", no_wrap=True)
    for name in ("tokens", "perplexity", "with it"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for item in buckets:
        if item["tokens"]:
            name = "never" if item["high"] == 0 else _between(item["low"], item["high"], ",.0f")
            lm, mixed = item["perplexity"]["lm"], item["perplexity"]["mixed"]
            table.add_row(name, _percent(item["share"]), _number(lm, ",.2f"), _number(mixed, ",.2f"), _change(lm, mixed))
    return table


def _domains(page: Page, domains: Mapping[str, Mapping[str, Any]]) -> Table:
    table = page.table()
    table.add_column("domain", overflow="fold")
    for name in ("entries", "weight", "has the token", "perplexity with it alone"):
        table.add_column(name, justify="right")
    for name, item in domains.items():
        table.add_row(
            Text(visible(name)),
            f"{item['entries']:,}",
            _percent(item["share"]),
            _percent(1.0 - item["zero"]),
            _number(item["perplexity"]["mixed"], ",.2f"),
        )
    return table


def _trimmed(bins: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    full = [number for number, item in enumerate(bins) if item["tokens"]]
    return bins[full[0] : full[-1] + 1]


def _bar(page: Page, item: Mapping[str, Any], items: Sequence[Mapping[str, Any]], color: str) -> Text:
    width = max(4, min(BAR, page.width - EITHER_SIDE))
    return Text(page.bar(item["share"] / max(other["share"] for other in items), width), style=color)


def _between(low: float, high: float, shown: str) -> str:
    if math.isinf(low):
        return f"under {high:{shown}}"
    return f"{low:{shown}} and more" if math.isinf(high) else f"{low:{shown}} to {high:{shown}}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f}%"


def _number(value: float, shown: str) -> str:
    return f"{value:{shown}}" if math.isfinite(value) else "∞" if value > 0 else "–"
