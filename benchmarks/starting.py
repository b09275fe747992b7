"""What it takes until a command answers: help and `info` beside the import of click, and what of a `query` is the datastore's."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import knnstore
from benchmarks.measuring import in_turn, ratio
from benchmarks.page import spread, table, verdict
from benchmarks.workloads import Bench, real_store
from knnstore.format import CONTEXTS_FILE

NAME = "starting"
LARGE = False

TEXT = "Marley was"
STARTS = 3  # of a short command for each of a query
MOST_HELP, MOST_INFO, MOST_SHARE = 4.0, 8.0, 0.1  # the limits: of click's import, of a whole query

# The steps of `knnstore query`, with the time of each: import, model (loading), pass (of the model), and what is ours.
QUERY = """
import json, sys, time

took, last = {}, time.perf_counter()
def done(name):
    global last
    now = time.perf_counter()
    took[name] = took.get(name, 0.0) + now - last
    last = now

import knnstore
from knnstore_cli import progress, query, render
from knnstore.lm import models
knnstore.open, knnstore.KnnLM
done("imports")
store = knnstore.open(sys.argv[1])
done("open")
loaded = models.load_language_model(dtype=sys.argv[3])
done("model")
lm = knnstore.KnnLM.load(store, loaded)
done("open")
model_pass = lm.extractor.keys_and_logits
def timed(*arguments, **options):
    done("search")
    found = model_pass(*arguments, **options)
    done("pass")
    return found
lm.extractor.keys_and_logits = timed
step = lm.predict(sys.argv[2])
done("search")
fields = query.query_fields(lm, step, sys.argv[2], query.TOP)
done("contexts")
render.print_query(fields, lm.decode)
done("render")
print(json.dumps(took), file=sys.stderr)
"""
STEPS = {
    "imports": "imports: torch, transformers, faiss, numpy, ours",
    "model": "loading the model",
    "pass": "its pass over the text",
    "open": "open the datastore, and what is set up between it and the model",
    "search": "tokens, search, p_kNN and mixing",
    "contexts": "contexts of the neighbours",
    "render": "showing them",
}
OURS = ("open", "search", "contexts", "render")


def python(code: str, *arguments: object) -> str:
    """Runs a Python program, and gives what it wrote to stderr."""
    # Threads of two OpenMP pools that spin while they wait take each other's cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment).stderr


def command(*arguments: object) -> None:
    """Runs `knnstore`."""
    python("import sys; from knnstore_cli.main import cli; cli(sys.argv[1:])", *arguments)


def run(bench: Bench) -> dict[str, Any]:
    """The commands as processes, in turn; then `query` and a program that does the same and times its steps."""
    path = real_store(bench)
    click_s, help_s, info_s = in_turn(
        STARTS * bench.rounds,
        lambda: python("import click"),
        lambda: command("--help"),
        lambda: command("info", "--store", path),
    )
    with knnstore.open(path) as store:
        entries, contexts = len(store), sum(segment.content.size_of(CONTEXTS_FILE) for segment in store.segments)
        dtype = store.manifest.segments[0].content.dtype
    steps: list[dict[str, float]] = []
    query_s, whole_s = in_turn(
        bench.rounds,
        lambda: command("query", "--store", path, "--quiet", TEXT),
        lambda: steps.append(json.loads(python(QUERY, path, TEXT, dtype).splitlines()[-1])),
    )
    del steps[0]  # of the round that is not kept
    ours = [sum(step[name] for name in OURS) for step in steps]
    return {
        "entries": entries,
        "contexts_bytes": contexts,
        "help_over_click": ratio(help_s, click_s),
        "info_over_click": ratio(info_s, click_s),
        "click_ms": 1e3 * statistics.median(click_s),
        "query_ms": 1e3 * statistics.median(query_s),
        "steps_over_query": ratio(whole_s, query_s),
        "ours_over_query": ratio(ours, whole_s),
        "steps_ms": {name: 1e3 * statistics.median(step[name] for step in steps) for name in steps[0]},
    }


def render(result: Mapping[str, Any], plots: Path) -> str:
    """The section of the page."""
    asked = [
        ("`knnstore --help`, to `python -c 'import click'`", result["help_over_click"], MOST_HELP, 2),
        ("`knnstore info`, likewise", result["info_over_click"], MOST_INFO, 2),
        ("what is ours in `knnstore query`, of its whole", result["ours_over_query"], MOST_SHARE, 4),
    ]
    rows = [(title, spread(found, digits), verdict(found["median"], most, least=False)) for title, found, most, digits in asked]
    steps, click_ms = result["steps_ms"], result["click_ms"]
    whole = sum(steps.values())
    parts = [(title, *(f"{steps[name]:,.1f}", f"{100 * steps[name] / whole:.2f}%")) for name, title in STEPS.items()]
    return f"""## Starting

How long a command takes from the shell on, with warm files; a datastore of {result["entries"]:,} entries. Importing click takes \
{click_ms:.0f} ms here, a whole query {result["query_ms"] / 1e3:.1f} s.

{table(("", "ratio", ""), rows)}
The steps of a query, from a program that does what the command does (its time to the command's: \
{spread(result["steps_over_query"])}). The interpreter's own start is not among them.

{table(("", "ms", "of all steps"), parts)}
Ours are the last four. The first look at contexts takes the sha256 of their file, {result["contexts_bytes"] / 1e6:,.1f} MB here: it grows \
with the datastore, by about a second a gigabyte.
"""
