"""What each thing costs at other sizes and other widths of keys, and with which power of the size it grows."""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import peak_anonymous
from benchmarks.page import figure, picture, save, table
from benchmarks.workloads import Bench, folder_bytes, fresh_folder

__all__ = ["ACTS", "LARGE", "NAME", "render", "run", "run_act"]

NAME, LARGE = "growth", False

SIZES = (30_000, 100_000, 300_000, 1_000_000, 3_000_000)
LARGE_SIZES = (*SIZES, 10_000_000)
SMOKE_SIZES = (5_000, 10_000)
DIMS, DIM_ENTRIES, LARGE_DIM_ENTRIES = (256, 512, 1_024, 2_048, 4_096), 100_000, 1_000_000
SMOKE_DIM, SMOKE_DIMS = 16, (32, 64)
APPENDED = 1_000
FITTED_FROM = 100_000  # entries: below, a store is one flat list, and other things count

# Each act in a process of its own, so that its memory can be seen. What it prints at the end is its result.
COMMON = """
import json, sys, time
from pathlib import Path
import numpy as np
import knnstore
from benchmarks.large_store import CHECKPOINT, VOCABULARY
from benchmarks.workloads import GeneratedKeys
from knnstore import EntryDocument
from knnstore.entries import append_entries, create_from_entries
from knnstore.build import sample_size
from knnstore.store import open_store
path, n, dim = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
source = GeneratedKeys(dim)

def batches(number, n, name):
    step = (1 << 24) // dim
    for at in range(0, n, step):
        m = min(step, n - at)
        began = time.perf_counter()
        keys = source.chunk(number + at // step, m)
        values = np.random.default_rng((number, at)).integers(0, VOCABULARY, m)
        spent[0] += time.perf_counter() - began
        lengths = [min(4096, m - first) for first in range(0, m, 4096)]
        yield keys, values, [EntryDocument(id=f"{name}/{at}/{i}", n_entries=length) for i, length in enumerate(lengths)]

spent = [0.0]
def begin():
    print("BEGIN")
    return time.perf_counter()

def end(began, **more):
    seconds = time.perf_counter() - began - spent[0]
    print("END")
    print(json.dumps({"seconds": seconds, **more}))
"""
ACTS = {
    "create": """
training = source.chunk(1 << 40, sample_size(n, dim))
began = begin()
options = {"checkpoint": CHECKPOINT, "dim": dim, "vocab_size": VOCABULARY, "training_keys": training, "expected_entries": n}
create_from_entries(path, batches(0, n, "made"), **options)
end(began)
""",
    "open": """
query = source.queries(1)
began = begin()
store = open_store(path)
store.search(query)
end(began)
""",
    "search": """
queries = source.queries(1024)
store = open_store(path)
store.search(queries)
began = begin()
single, batch = [], []
for query in queries[:256]:
    at = time.perf_counter()
    store.search(query)
    single.append(time.perf_counter() - at)
for _ in range(3):
    at = time.perf_counter()
    store.search(queries)
    batch.append((time.perf_counter() - at) / len(queries))
end(began, single=float(np.median(single)), batch=float(np.median(batch)), nprobe=store.manifest.nprobe)
""",
    "append": f"""
number = time.time_ns()
began = begin()
append_entries(path, batches(number, {APPENDED}, f"added {{number}}"))
end(began)
""",
    "compact": """
began = begin()
knnstore.compact(path)
end(began)
""",
    "verify": """
began = begin()
knnstore.verify(path)
end(began)
""",
}
COSTS = {  # what is shown: the act, the field, its name
    "create": ("create", "seconds", "create"),
    "open": ("open", "seconds", "open and first query"),
    "single": ("search", "single", "one query"),
    "batch": ("search", "batch", "a query in a batch of 1,024"),
    "append": ("append", "seconds", f"append {APPENDED:,} entries"),
    "compact": ("compact", "seconds", "compact"),
    "verify": ("verify", "seconds", "verify"),
}


def run(bench: Bench) -> dict[str, Any]:
    sizes = SMOKE_SIZES if bench.smoke else LARGE_SIZES if bench.large else SIZES
    dims = SMOKE_DIMS if bench.smoke else DIMS
    n_dims = SMOKE_SIZES[0] if bench.smoke else LARGE_DIM_ENTRIES if bench.large else DIM_ENTRIES
    folder = fresh_folder(bench, "growth")
    by_size = {str(n): _costs(bench, folder, n, SMOKE_DIM if bench.smoke else 256) for n in sizes}
    by_dim = {str(dim): _costs(bench, folder, n_dims, dim) for dim in dims}
    shutil.rmtree(folder)
    fitted_from = 0 if bench.smoke else FITTED_FROM
    return {
        "appended": APPENDED,
        "by_size": by_size,
        "by_dim": by_dim,
        "dim_entries": n_dims,
        "exponents": _exponents(by_size, fitted_from),
        "dim_exponents": _exponents(by_dim, 0),
    }


def _costs(bench: Bench, folder: Path, n: int, dim: int) -> dict[str, dict[str, float]]:
    """Each act on a store of n entries: its seconds and the most anonymous memory beyond what its process began with."""
    bench.log(f"{n:,} entries of {dim} dimensions")
    path, costs = folder / "store.knn", {}
    for name, code in ACTS.items():
        times = 1 if name in ("create", "compact") else bench.rounds
        found = [run_act(code, path, n, dim) for _ in range(times)]
        costs[name] = {field: statistics.median(one[field] for one in found) for field in found[0]}
        if name == "create":
            costs[name]["bytes"] = folder_bytes(path)
    shutil.rmtree(path)
    return costs


def run_act(code: str, path: Path, n: int, dim: int) -> dict[str, float]:
    """One of ACTS in a child process: seconds, what else it prints, and peak_bytes beyond what the process began with."""
    found = peak_anonymous(COMMON + code, path, n, dim)
    printed: dict[str, float] = json.loads(found["printed"][-1])
    return {**printed, "peak_bytes": found["peak_bytes"] - found["at_start_bytes"]}


def _exponents(by: Mapping[str, Mapping[str, Mapping[str, float]]], least: int) -> dict[str, float]:
    """The power of the size that fits each cost best, by least squares of logarithms; and that of the memory of each act."""
    sizes = [size for size in by if int(size) >= least]
    logs = np.log([float(size) for size in sizes])

    def fit(costs: Sequence[float]) -> float:
        return float(np.polyfit(logs, np.log(np.maximum(costs, 1e-9)), 1)[0])

    found = {name: fit([by[size][act][field] for size in sizes]) for name, (act, field, _) in COSTS.items()}
    return found | {f"memory of {act}": fit([max(by[size][act]["peak_bytes"], 1 << 20) for size in sizes]) for act in ACTS}


def render(result: Mapping[str, Any], plots: Path) -> str:
    text = (
        "## Growth\n",
        _growth_text(result),
        _times(result["by_size"], result["exponents"], "entries"),
        "Most anonymous memory of each act beyond what its process began with, MB:\n",
        _memory(result["by_size"], result["exponents"], "entries"),
        _plot(result, plots / "growth.svg"),
        _dims_text(result),
        _times(result["by_dim"], result["dim_exponents"], "dimensions"),
    )
    return "\n".join(text)


def _growth_text(result: Mapping[str, Any]) -> str:
    return (
        "Generated keys; each act in a process of its own, imports not counted. The last column is the power of the number of entries "
        f"that fits the times best ({FITTED_FROM:,} entries and more): 1 is in proportion, 0 does not grow. Lists become more with the "
        "square root of the entries and a query looks into 8 to 32 of them, so 0.5 is the most that a query may grow by. An append of "
        f"{result['appended']:,} entries joins small segments now and then; `compact` joins what was appended with the rest, so it "
        "writes the whole store.\n"
    )


def _dims_text(result: Mapping[str, Any]) -> str:
    return (
        f"The same over the dimensions of the keys, {result['dim_entries']:,} entries. A rotation takes dim² steps an entry, choosing "
        "lists and finding codes take dim; a code has 64 bytes at any of them.\n"
    )


def _times(by: Mapping[str, Any], exponents: Mapping[str, float], what: str) -> str:
    sizes = sorted(by, key=int)
    rows = [
        (title, *(_seconds(by[size][act][field]) for size in sizes), f"{exponents[name]:.2f}")
        for name, (act, field, title) in COSTS.items()
    ]
    return table((what, *(f"{int(size):,}" for size in sizes), "power"), rows)


def _memory(by: Mapping[str, Any], exponents: Mapping[str, float], what: str) -> str:
    sizes = sorted(by, key=int)
    rows = [(act, *(f"{by[size][act]['peak_bytes'] / 1e6:.0f}" for size in sizes), f"{exponents[f'memory of {act}']:.2f}") for act in ACTS]
    return table((what, *(f"{int(size):,}" for size in sizes), "power"), rows)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2f} ms"


def _plot(result: Mapping[str, Any], path: Path) -> str:
    made, (axes,) = figure()
    by = result["by_size"]
    sizes = sorted(by, key=int)
    for name, (act, field, title) in COSTS.items():
        costs = [by[size][act][field] for size in sizes]
        axes.plot([int(size) for size in sizes], costs, marker="o", label=f"{title} ({result['exponents'][name]:.2f})")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("entries")
    axes.set_ylabel("seconds")
    axes.legend(fontsize="small")
    save(made, path)
    return picture(path, "Seconds of each act against the number of entries, with the power that fits.")
