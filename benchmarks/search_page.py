"""The page of `search_peers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.page import COLORS, figure, picture, save, spread, table, verdict
from benchmarks.peers import LANCE_ITERATIONS, N_SUB, FieldIndex, LanceTable, RamLists, UsearchGraph

__all__ = ["render"]

OURS, FIELD, RAM, LANCE, GRAPH = "knnstore", FieldIndex.name, RamLists.name, LanceTable.name, UsearchGraph.name
NO_PLACES = "knnstore, without places"
LEAST_BATCH, LEAST_SINGLE, LEAST_ALONG = 5.0, 4.0, 3.5  # times the field's rate
MOST_BATCH, MOST_SINGLE = 1.1, 1.25  # times the seconds of FastScan in memory
KINDS = {"knnstore": "knnstore", "read": f"{FIELD}, read_index", "mapped": f"{FIELD}, mapped (IO_FLAG_MMAP)"}


def render(result: Mapping[str, Any], plots: Path) -> str:
    """The section: rates, curves, first answers, p."""
    parts = [
        "## Search, beside what one would use instead\n",
        _head(result),
        _batches(result),
        _limit(result),
        _curves(result, plots),
        _by_k(result),
        _started(result),
        _distribution(result),
        _built(result),
    ]
    return "\n".join(parts)


def _head(result: Mapping[str, Any]) -> str:
    missing = f" Not installed, and so not measured: {', '.join(result['missing'])}." if result["missing"] else ""
    graph = result["built"].get(GRAPH, {}).get("n_entries", 0)
    return (
        f"{result['entries']:,} entries of {result['dim']} dimensions (default model), keys of held-out text as queries, k {result['k']:,} "
        f"and nprobe {result['nprobe']} in {result['nlist']:,} lists unless another is said. knnstore searches a mapped store.\n\n"
        f"- `{FIELD}`: the field's usual index, residuals in {N_SUB} x 8 bits, as many lists, read whole; values in an array.\n"
        f"- `{RAM}`: the limit of what a store around it can reach. The rotation of the queries is counted.\n"
        f"- `{LANCE}`: as many lists, {N_SUB} x 8 bits, {LANCE_ITERATIONS} iterations of its k-means; answers as an Arrow table.\n"
        f"- `{GRAPH}`: float16 keys, expansion {result['k']:,}; the first {graph:,} entries only, since a graph of all takes an hour "
        f"to build: its rate is flattered by that.{missing}\n"
    )


def _batches(result: Mapping[str, Any]) -> str:
    names = [OURS, NO_PLACES, RAM, FIELD, LANCE, GRAPH]
    rows = []
    for item in result["batches"]:
        for name in names:
            if (row := item["rows"].get(name)) is None:
                continue
            latency = f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}"
            rows.append((f"{item['batch']:,}", name, f"{row['queries_per_s']:,.0f}", *latency, spread(row["over_ours"])))
    return (
        "### At the field's settings\n\n"
        + table(("queries at a time", "", "queries/s", "p50 of a batch, ms", "p99, ms", "seconds over knnstore's"), rows)
        + "\nThe last column: how many times as long as `Datastore.search` each takes. A row that is missing took too long.\n"
    )


def _row(result: Mapping[str, Any], batch: int) -> Mapping[str, Any]:
    """The batch of this size, or the largest that was measured."""
    return next((item for item in result["batches"] if item["batch"] == batch), result["batches"][-1])["rows"]  # type: ignore[no-any-return]


def _limit(result: Mapping[str, Any]) -> str:
    rows = []
    for title, batch, least, most in (
        ("batches of 1,024", 1_024, LEAST_BATCH, MOST_BATCH),
        ("single queries", 1, LEAST_SINGLE, MOST_SINGLE),
    ):
        found = _row(result, batch)
        field, ram = found[FIELD]["over_ours"], found[RAM]["over_ours"]
        over_ram = {"median": 1 / ram["median"], "least": 1 / ram["greatest"], "greatest": 1 / ram["least"]}
        rows.append((f"{title}: rate over {FIELD}", spread(field), verdict(field["median"], least, least=True)))
        rows.append((f"{title}: seconds over FastScan in RAM", spread(over_ram), verdict(over_ram["median"], most, least=False)))
    for kind, title in (("batch", "batches of 1,024"), ("single", "single queries")):
        along = result["along"][kind]
        if ratios := [item["ratio"] for item in along if item["ratio"] is not None]:
            beyond = "" if len(ratios) == len(along) else f" ({len(along) - len(ratios)} points are better than knnstore's best)"
            said = f"{min(ratios):.2f} to {max(ratios):.2f}{beyond}"
            rows.append((f"{title}: rate at the same perplexity", said, verdict(min(ratios), LEAST_ALONG, least=True)))
    return table(("", "", ""), rows)


def _curves(result: Mapping[str, Any], plots: Path) -> str:
    made, (left, right) = figure(10.0, 4.2, columns=2)
    for axes, kind, title in ((left, "batch", "batches of 1,024"), (right, "single", "one query at a time")):
        for name, color, marker in ((OURS, COLORS[0], "o"), (FIELD, COLORS[1], "s")):
            some = [row for row in result["curve"] if name in row[kind]]
            levels, rates = [row["perplexity"][name] for row in some], [row[kind][name]["queries_per_s"] for row in some]
            axes.plot(levels, rates, marker=marker, color=color, label=name)
            for row, level, rate in zip(some, levels, rates, strict=True):
                axes.annotate(str(row["nprobe"]), (level, rate), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.axvline(result["exact_perplexity"], color="#808080", linestyle="dashed")
        axes.set_yscale("log")
        axes.set_xlabel("perplexity (dashed: exact search)")
        axes.set_ylabel("queries/s")
        axes.set_title(f"{title}; numbers: nprobe")
        axes.legend()
    save(made, plots / "search-perplexity.svg")
    names = [name for name in (OURS, FIELD, LANCE) if any(name in row["perplexity"] for row in result["curve"])]
    heads = ["nprobe", *(f"perplexity, {name}" for name in names), *(f"recall, {name}" for name in names)]
    rows = []
    for row, batch, single in zip(result["curve"], result["along"]["batch"], result["along"]["single"], strict=True):
        levels = [_number(row["perplexity"].get(name), 3) for name in names]
        recalls = [_number(row["recall"].get(name), 3) for name in names]
        rows.append((row["nprobe"], *levels, *recalls, _number(batch["ratio"], 2), _number(single["ratio"], 2)))
    return (
        "### Rate against perplexity\n\n"
        + picture(plots / "search-perplexity.svg", "Queries per second against perplexity, for nprobe 1 to 128")
        + "\n"
        + table((*heads, "rate at its perplexity, batches", "single"), rows)
        + f"\nPerplexity of {result['scored']:,} tokens with the best λ and temperature of a grid for each row; "
        f"{result['lm_perplexity']:.3f} without neighbours, {result['exact_perplexity']:.3f} with those of an exact search. "
        f"Recall: the share of the {result['k']:,} exact neighbours that were found. "
        f"The last columns: at the perplexity that {FIELD} has with this nprobe, knnstore's rate (with the nprobe "
        "that it needs for that, interpolated) over its rate.\n" + _graph_said(result)
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _graph_said(result: Mapping[str, Any]) -> str:
    if result["graph"] is None:
        return ""
    return f"The graph finds {result['graph']['recall']:.3f} of the exact neighbours among its own entries.\n"


def _by_k(result: Mapping[str, Any]) -> str:
    rows = []
    for item in result["by_k"]:
        found = item["rows"]
        ram = found.get(RAM, {}).get("over_ours")
        over = "" if ram is None else spread({"median": 1 / ram["median"], "least": 1 / ram["greatest"], "greatest": 1 / ram["least"]})
        times = spread(found[FIELD]["over_ours"]) if FIELD in found else ""
        rows.append(
            (f"{item['k']:,}", f"{item['batch']:,}", f"{found[OURS]['queries_per_s']:,.0f}", times, over, f"{item['perplexity']:.3f}")
        )
    return "### By k\n\n" + table(
        (
            "k",
            "queries at a time",
            "knnstore, queries/s",
            f"rate over {FIELD}",
            "seconds over FastScan in RAM",
            "perplexity of 1,024 tokens",
        ),
        rows,
    )


def _started(result: Mapping[str, Any]) -> str:
    rows = []
    for item in result["started"]:
        cache = "cold" if item["cold"] else "warm"
        times = f"{item['first_ms']:,.0f}", f"{item['p50_ms']:.2f}", f"{item['p99_ms']:.2f}"
        rows.append((KINDS[item["kind"]], cache, *times, f"{item['anonymous_bytes'] / 1e6:,.0f}"))
    stayed = max(item["stayed_in_cache"] for item in result["started"] if item["cold"])
    return (
        "### First answers\n\n"
        + table(("", "page cache", "open and first query, ms", "next queries, p50 ms", "p99 ms", "anonymous memory, MB"), rows)
        + "\nIn a process of its own, imports left out. Cold: the files were taken out of the page cache before (at most "
        f"{100 * stayed:.1f}% of them stayed). Anonymous memory is what it grew by at most (RssAnon).\n"
    )


def _distribution(result: Mapping[str, Any]) -> str:
    rows = [
        (f"{row['n']:,}", f"{row['ms']:.2f}", *(spread(row[name]) for name in ("all_tokens", "gold_tokens", "with_search")))
        for row in result["distribution"]
    ]
    vocab = result["distribution"][0]["vocab"]
    return (
        "### Neighbours → p\n\n"
        + table(
            ("queries at a time", "log p of all tokens, ms", "rate: all tokens", "rate: one token", "rate: search and all tokens"), rows
        )
        + "\nRates over those of the usual torch loop, which scatters the weights of the neighbours into an (n, vocab) matrix "
        f"(here {vocab:,} tokens) and mixes that; with search: `Datastore.search` beside {FIELD}.\n"
    )


def _built(result: Mapping[str, Any]) -> str:
    rows = [("knnstore, without kept keys", "", f"{result['store_bytes'] / result['entries']:.1f}", f"{result['entries']:,}")]
    rows += [
        (name, f"{item['seconds']:,.0f}", f"{item['n_bytes'] / item['n_entries']:.1f}", f"{item['n_entries']:,}")
        for name, item in result["built"].items()
    ]
    return (
        "### What was built\n\n"
        + table(("", "seconds to build from keys", "bytes an entry", "entries"), rows)
        + "\nSeconds as they were when each was built, one after the other. LanceDB keeps the keys too.\n"
    )
