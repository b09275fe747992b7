"""What `knnstore tune` shows: what each choice bought, and what was kept."""

import math
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from .page import Page
from .text import counted, visible

__all__ = ["print_tuning"]

_GATES = {"fixed": "the same λ everywhere", "distance": "λ by the nearest distance", "logistic": "λ by a logistic gate"}


def print_tuning(fields: Mapping[str, Any]) -> None:
    """fields: as `tune --json` prints them."""
    page, calibration = Page(), fields["calibration"]
    tokens = f"{counted(calibration['tokens'], 'token')} of {counted(fields['documents'], 'document')}"
    done = "nothing was changed" if fields["snapshot"] is None else f"snapshot {fields['snapshot']} has this calibration"
    searched = "every key" if calibration["exact"] else f"nprobe {calibration['nprobe']}"
    page.add(
        Text.assemble((visible(fields["path"]), "bold"), f": {done}"),
        Text(f"fitted on {tokens}, {searched}; each fifth of them has the perplexity of what was fitted on the rest", style="dim"),
        Text(""),
        _choices(page, fields),
        Text(""),
    )
    for line in _kept(fields):
        page.add(Text(line))
    if calibration["status"] == "stale":
        page.add(Text("It is stale: domains or spaces came to the datastore while it was fitted. Run the command again.", style="yellow"))
    page.print()


def _choices(page: Page, fields: Mapping[str, Any]) -> Any:
    """Perplexity of the model alone and of everything that was tried, where it was not fitted."""
    lm = fields["calibration"]["perplexity"]["lm"]
    table = page.table()
    table.add_column("what", overflow="fold")
    for name in ("k", "perplexity", "to the model"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    table.add_row("the model alone", "", f"{lm:.2f}", "", "")
    knn = fields["calibration"]["perplexity"].get("knn", math.inf)
    table.add_row("the neighbours alone", f"{fields['calibration']['k']:,}", f"{knn:.2f}" if math.isfinite(knn) else "infinite", "", "")
    for choice in fields["choices"]:
        what = _GATES[choice["gate"]] + (", weights for domains" if choice["weights"] else "")
        change = 100.0 * (choice["perplexity"] / lm - 1.0)
        mark = Text("kept", style="bold green") if choice["kept"] else Text("")
        table.add_row(what, f"{choice['k']:,}", f"{choice['perplexity']:.2f}", f"{change:+.1f}%", mark)
    return table


def _kept(fields: Mapping[str, Any]) -> list[str]:
    calibration = fields["calibration"]
    gate = calibration.get("gate")
    lmbda = f"λ {calibration['lambda']:g}"
    if gate is not None:
        lmbda = (
            f"λ by a {gate['kind']} gate, {fields['mean_lambda']:.3f} on average ({calibration['lambda']:g} if it were the same everywhere)"
        )
    lines = [f"kept: k {calibration['k']:,}, temperature {calibration['temperature']:g}, {lmbda}"]
    if calibration.get("weights"):
        weights = ", ".join(f"{visible(name)} {weight:.3g}" for name, weight in calibration["weights"].items())
        lines.append(f"weights of domains: {weights}")
    return lines
