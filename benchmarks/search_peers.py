"""Neighbours of real keys: a datastore beside faiss as the field uses it, FastScan in memory, LanceDB, usearch and the usual torch loop."""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import knnstore
from benchmarks.measuring import drop_cache, in_turn, peak_anonymous, percentiles, ratio
from benchmarks.peers import GRAPH_ENTRIES, FieldIndex, Found, LanceTable, RamLists, StoredKeys, UsearchGraph, exact_top, installed
from benchmarks.search_page import render
from benchmarks.torch_loop import mixed_rates
from benchmarks.workloads import Bench, Queries, real_queries, real_store
from knnstore.lm.fitting import FINER, LAMBDAS, TEMPERATURES, HeldOut, surface, typical_nearest
from knnstore.store import Datastore

__all__ = ["LARGE", "NAME", "render", "run"]

NAME = "search_peers"
LARGE = False

OURS, FIELD, RAM, LANCE, GRAPH = "knnstore", FieldIndex.name, RamLists.name, LanceTable.name, UsearchGraph.name
K, NPROBE = 1_024, 32  # the field's own settings
BATCHES = (1, 32, 1_024, 4_096)
NPROBES = (1, 2, 4, 8, 16, 32, 64, 128)
KS = {64: 1_024, 256: 1_024, 1_024: 1_024, 4_096: 256, 16_384: 64}  # k: queries of a batch
SCORED, RECALLED = 4_096, 128  # positions whose perplexity is taken; queries whose exact neighbours are found
MIXED = (1, 32, 1_024)  # queries whose neighbours become p together
ROUND_S = 0.7  # that a round of one work may take where one batch does not take longer
SLOWEST_S = 6.0  # of a batch: what takes longer is left out
FIRST_SINGLES = 64  # single queries after the first, in a process of its own

Keys = NDArray[np.float32]

# What a process does until it has answered one query, and some more: argv is kind, path, queries, k, nprobe.
ANSWER = """
import json, sys, time
import numpy as np
kind, path, queries = sys.argv[1:4]
k, nprobe = map(int, sys.argv[4:6])
with np.load(queries) as arrays:
    keys = arrays["keys"][:SINGLES]
import faiss, knnstore
knnstore.open
import knnstore.search
print("BEGIN")
began = time.perf_counter()
if kind == "knnstore":
    store = knnstore.open(path)
    search = lambda some: store.search(some, k=k, nprobe=nprobe)
else:
    index = faiss.read_index(path + "/index.faiss", faiss.IO_FLAG_MMAP if kind == "mapped" else 0)
    values = np.load(path + "/values.npy")
    index.nprobe = nprobe
    search = lambda some: values[index.search(some, k)[1]]
search(keys[:1])
took = [time.perf_counter() - began]
for i in range(1, len(keys)):
    began = time.perf_counter()
    search(keys[i : i + 1])
    took.append(time.perf_counter() - began)
print("END")
print(json.dumps(took))
"""


@dataclass(frozen=True, slots=True)
class Sides:
    """What is compared. searches: by name, of (keys, k, nprobe)."""

    store: Datastore
    field: FieldIndex
    searches: Mapping[str, Callable[..., Any]]
    queries: Queries


def run(bench: Bench) -> dict[str, Any]:
    """Everything of the section, on the real datastore."""
    path, queries = real_store(bench), real_queries(bench)
    with knnstore.open(path) as store:
        if len(store.segments) != 1:
            raise SystemExit(f"{path}: {len(store.segments)} segments. Bare faiss has one set of lists: compact it first.")
        stored, coarse = StoredKeys(store), store.segments[0].coarse
        nlist = 1 if coarse is None else coarse.nlist
        bench.log("building the peers (kept for the next run)")
        peers, missing = _peers(bench, stored, nlist)
        built = {name: asdict(peer.built) for name, peer in peers.items()}
        first = {"entries": len(store), "dim": store.dim, "nlist": nlist, "built": built, "missing": missing}
        bytes_of = {item.name: item.size for item in store.manifest.segments[0].content.files if not item.name.startswith("keys")}
        first["store_bytes"] = sum(bytes_of.values())
    del store, stored, peers
    gc.collect()
    bench.log("first answers, cold and warm")
    started = _started(bench, path)
    with knnstore.open(path) as store:
        stored = StoredKeys(store)
        peers, _ = _peers(bench, stored, nlist)
        ram = RamLists(store.segments[0])
        searches = {OURS: partial(_ours, store), FIELD: peers[FIELD].search, RAM: ram.search}
        searches |= {name: peer.search for name, peer in peers.items() if name != FIELD}
        sides = Sides(store, peers[FIELD], searches, queries)
        same = _same_answers(sides)
        bench.log("batches")
        batches = [_batch(bench, sides, batch) for batch in ((1, 32) if bench.smoke else BATCHES)]
        bench.log("nprobe")
        exact = _exact(bench, sides, stored)
        curve = [_at_nprobe(bench, sides, nprobe, exact) for nprobe in ((1, 4) if bench.smoke else NPROBES)]
        bench.log("k")
        by_k = [_at_k(bench, sides, k, min(n, len(queries))) for k, n in KS.items() if k <= len(store)]
        bench.log("neighbours → p")
        return {
            **first,
            "k": K,
            "nprobe": NPROBE,
            "scored": min(SCORED, len(queries)),
            "same_as_ram": same,
            "started": started,
            "batches": batches,
            "curve": curve,
            "along": {kind: along_the_curve(curve, kind) for kind in ("single", "batch")},
            "by_k": by_k,
            "graph": _graph(sides, stored) if GRAPH in searches else None,
            "exact_perplexity": exact["perplexity"],
            "lm_perplexity": float(np.exp(-_scored(queries).log_p_lm.mean())),
            "distribution": [mixed_rates(bench.rounds, store, sides.field.search, queries[:n], k=K, nprobe=NPROBE) for n in MIXED],
        }


def _peers(bench: Bench, stored: StoredKeys, nlist: int) -> tuple[dict[str, Any], list[str]]:
    """Those that are installed, by name, and the names of the others."""
    folder = bench.folder / "peers"
    peers: dict[str, Any] = {FIELD: FieldIndex(folder / "faiss", stored, nlist)}
    missing = []
    if installed("lancedb", "pyarrow"):
        peers[LANCE] = LanceTable(folder / "lance", stored, nlist)
    else:
        missing.append(LANCE)
    if installed("usearch"):
        peers[GRAPH] = UsearchGraph(folder / "usearch", stored)
    else:
        missing.append(GRAPH)
    return peers, missing


def _ours(store: Datastore, keys: Keys, *, k: int, nprobe: int) -> Found:
    found = store.search(keys, k=k, nprobe=nprobe)
    return found.distances, found.values, found.rows


def _scored(queries: Queries) -> Queries:
    """Positions from all over the text."""
    step = max(1, len(queries) // SCORED)
    at = slice(0, SCORED * step, step)
    return queries[at]


def _same_answers(sides: Sides) -> float:
    """The share of our distances that are those of FastScan over the same lists, up to the distortion that is added."""
    keys = sides.queries.keys[:256]
    ours = np.sort(sides.searches[OURS](keys, k=K, nprobe=NPROBE)[0])
    bare = np.sort(sides.searches[RAM](keys, k=K, nprobe=NPROBE)[0]) + np.float32(sides.store.stacks[0].distortion)
    same = float(np.isclose(ours, np.where(np.isfinite(ours), bare, ours), rtol=1e-3).mean())
    if same < 0.99:
        raise SystemExit(f"only {same:.4f} of the distances are those of bare faiss: not the same search.")
    return same


def _started(bench: Bench, path: Path) -> list[dict[str, Any]]:
    """Seconds to the first answer and of single queries after it, in a process of its own, with a cold and a warm page cache."""
    folders = {"knnstore": path, "read": bench.folder / "peers" / "faiss", "mapped": bench.folder / "peers" / "faiss"}
    code = ANSWER.replace("SINGLES", str(FIRST_SINGLES))
    rows = []
    for kind, folder in folders.items():
        for cold in (True, False):
            tries = []
            for number in range(min(3, bench.rounds) + (not cold)):
                stayed = drop_cache(folder) if cold else 1.0
                found = peak_anonymous(code, kind, folder, bench.folder / "real-queries.npz", K, NPROBE)
                took = json.loads(found["printed"][-1])
                if cold or number:
                    tries.append((took[0], took[1:], found["peak_bytes"] - found["at_start_bytes"], stayed))
            first, *_ = zip(*tries, strict=True)
            rows.append(
                {
                    "kind": kind,
                    "cold": cold,
                    "first_ms": 1e3 * statistics.median(first),
                    **percentiles([seconds for _, later, _, _ in tries for seconds in later]),
                    "anonymous_bytes": max(peak for _, _, peak, _ in tries),
                    "stayed_in_cache": max(stayed for *_, stayed in tries),
                }
            )
    return rows


def timed(bench: Bench, works: Mapping[str, Callable[[Keys], object]], keys: Keys, batch: int) -> dict[str, dict[str, Any]]:
    """Queries/s, latency of a batch, and how many times as long as ours each takes; in turn. Works that are too slow are left out."""
    plans: dict[str, list[Keys]] = {}
    for name, work in works.items():
        probe = keys[: min(batch, 128)]
        work(probe[:1])
        began = time.perf_counter()
        work(probe)
        each = (time.perf_counter() - began) / len(probe)
        if batch * each > SLOWEST_S:
            bench.log(f"{name}: left out, since {batch} queries take {batch * each:.0f} s")
            continue
        n = max(1, min(len(keys) // batch, round(ROUND_S / (batch * each))))
        plans[name] = [keys[at : at + batch] for at in range(0, n * batch, batch)]
    calls: dict[str, list[float]] = {name: [] for name in plans}

    def all_of(name: str) -> None:
        for some in plans[name]:
            began = time.perf_counter()
            works[name](some)
            calls[name].append(time.perf_counter() - began)

    rounds = in_turn(bench.rounds, *(partial(all_of, name) for name in plans))
    each_s = {name: [s / (batch * len(plans[name])) for s in seconds] for name, seconds in zip(plans, rounds, strict=True)}
    return {
        name: {
            "queries_per_s": 1.0 / statistics.median(seconds),
            **percentiles(calls[name][len(plans[name]) :]),
            "over_ours": ratio(seconds, each_s[OURS]),
        }
        for name, seconds in each_s.items()
    }


def _works(sides: Sides, names: Sequence[str], k: int, nprobe: int) -> dict[str, Callable[[Keys], object]]:
    return {name: partial(sides.searches[name], k=k, nprobe=1 if name == GRAPH else nprobe) for name in names}


def _batch(bench: Bench, sides: Sides, batch: int) -> dict[str, Any]:
    """The field's settings, with so many queries at a time."""
    works = _works(sides, list(sides.searches), K, NPROBE)
    works["knnstore, without places"] = lambda keys: sides.store.search(keys, k=K, nprobe=NPROBE, places=False)
    return {"batch": batch, "rows": timed(bench, works, sides.queries.keys, batch)}


def perplexity(distances: NDArray[np.float32], values: NDArray[np.int32], queries: Queries) -> float:
    """The best of a grid of λ and temperature, on the same positions for all."""
    distances = np.where(distances < 1e30, distances, np.float32(np.inf))  # faiss's largest float where nothing was found
    held = HeldOut(distances, np.where(np.isfinite(distances), values, np.int32(-1)), queries.gold, queries.log_p_lm)
    typical = typical_nearest(held)
    sparse = HeldOut(held.distances[::4], held.values[::4], held.gold[::4], held.log_p_lm[::4])
    rough = surface(sparse, typical * TEMPERATURES[::2], LAMBDAS)
    best = rough.temperatures[rough.perplexity.min(axis=1).argmin()]
    return float(surface(held, best * FINER[::2], LAMBDAS).perplexity.min())


def _exact(bench: Bench, sides: Sides, stored: StoredKeys) -> dict[str, Any]:
    """Rows of the exact neighbours of some positions, and their perplexity."""
    queries = _scored(sides.queries)[: SCORED // 8 if bench.smoke else SCORED]
    recalled = queries.keys[:RECALLED]
    k = min(K, stored.n)
    _, _, rows = exact_top(stored, recalled, k)
    distances, values, _ = exact_top(stored, queries.keys, k)
    return {"rows": rows, "perplexity": perplexity(distances, values, queries)}


def recall(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """The share of the exact neighbours that were found."""
    return statistics.mean(len(np.intersect1d(a, b)) / exact.shape[1] for a, b in zip(found, exact, strict=True))


def _at_nprobe(bench: Bench, sides: Sides, nprobe: int, exact: Mapping[str, Any]) -> dict[str, Any]:
    """Rates, perplexity and recall at one nprobe."""
    queries = _scored(sides.queries)
    names = [OURS, FIELD, RAM]
    row: dict[str, Any] = {"nprobe": nprobe, "perplexity": {}, "recall": {}}
    row["single"] = timed(bench, _works(sides, names, K, nprobe), queries.keys, 1)
    row["batch"] = timed(bench, _works(sides, names, K, nprobe), queries.keys, min(1_024, len(queries)))
    for name in (OURS, FIELD, *([LANCE] if LANCE in sides.searches and nprobe in (8, 32, 128) else [])):
        some = queries
        found = [sides.searches[name](some.keys[at : at + 512], k=K, nprobe=nprobe) for at in range(0, len(some), 512)]
        distances, values, rows = (np.concatenate(part) for part in zip(*found, strict=True))
        row["perplexity"][name] = perplexity(distances, values, some)
        row["recall"][name] = recall(rows[: len(exact["rows"])], exact["rows"])
    return row


def along_the_curve(curve: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """For each nprobe of the field's index: our rate at the same perplexity over its rate.

    Between two of our own nprobe the logarithm of the rate is taken to be straight; where the field's perplexity is worse than our worst,
    our fastest counts; where it is better than our best, there is no ratio.
    """
    ours = sorted((row["perplexity"][OURS], math.log(row[kind][OURS]["queries_per_s"])) for row in curve if OURS in row[kind])
    levels, rates = (np.array(part) for part in zip(*ours, strict=True))
    rates = np.maximum.accumulate(rates)  # a setting that is slower and worse than another is not chosen
    along = []
    for row in curve:
        level = row["perplexity"][FIELD]
        found = None
        if FIELD in row[kind] and level >= levels[0]:
            found = float(np.exp(np.interp(level, levels, rates)) / row[kind][FIELD]["queries_per_s"])
        along.append({"nprobe": row["nprobe"], "perplexity": level, "ratio": found})
    return along


def _at_k(bench: Bench, sides: Sides, k: int, batch: int) -> dict[str, Any]:
    """Rates with so many neighbours."""
    queries = _scored(sides.queries)
    rows = timed(bench, _works(sides, [OURS, FIELD, RAM], k, NPROBE), queries.keys, batch)
    some = queries[:1_024]
    found = [sides.searches[OURS](some.keys[at : at + 128], k=k, nprobe=NPROBE)[:2] for at in range(0, len(some), 128)]
    return {
        "k": k,
        "batch": batch,
        "rows": rows,
        "perplexity": perplexity(*(np.concatenate(part) for part in zip(*found, strict=True)), some),
    }


def _graph(sides: Sides, stored: StoredKeys) -> dict[str, Any]:
    """How many of the exact neighbours among its own entries the graph finds."""
    keys = _scored(sides.queries).keys[:RECALLED]
    found = sides.searches[GRAPH](keys, k=K, nprobe=1)[2]
    return {"recall": recall(found, exact_top(stored, keys, K, GRAPH_ENTRIES)[2])}
