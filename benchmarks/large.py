"""100 million entries: opening, memory, single queries beside bare faiss, recall against exact distances over lists and probes."""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

import knnstore
from benchmarks.large_store import Plan, Truth, keys_of, made_store, relisted_store
from benchmarks.measuring import drop_cache, in_turn, peak_anonymous, percentiles, ratio
from benchmarks.page import figure, picture, save, spread, table, verdict
from benchmarks.workloads import Bench, folder_bytes
from knnstore.format import BLOCK_ENTRIES
from knnstore.storage.blocks import pack
from knnstore.storage.segment import Segment
from knnstore.store import Datastore

NAME, LARGE = "large", True

Keys = NDArray[np.float32]

ENTRIES, DIM = 100_000_000, 256
SMOKE = Plan(n_entries=100_000, dim=32, segment_entries=40_000, chunk=20_000, n_queries=16)
OTHER_NLISTS = (4_096, 65_536)  # beside the one that a store of this size chooses
NPROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH = 1_024
STAGES = ("train", "documents", "generate", "encode", "lists", "truth")  # of making the store
GRAPH_LINKS, GRAPH_SEARCH = 32, 64  # of bare faiss's graph over the centroids: IVF16384_HNSW32, as its own guide has it
LATENCY_MOST, OPEN_MOST_S, MEMORY_MOST = 1.3, 1.5, 1.5e9  # what was asked for

# In a process of its own: imports are not counted (they are in the section on starting), reading the manifest and all else is.
OPENING = """
import json, sys, time
from pathlib import Path
import numpy as np
import knnstore
from knnstore.store import open_store
queries = np.load(sys.argv[2])
k = int(sys.argv[3])

def memory(name):
    return 1024 * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

print("BEGIN")
began = time.perf_counter()
store = open_store(sys.argv[1])
opened = time.perf_counter()
store.search(queries[0], k=k)
first = time.perf_counter()
times = []
for query in queries[1:]:
    at = time.perf_counter()
    store.search(query, k=k)
    times.append(time.perf_counter() - at)
print("END")
found = {"open_s": opened - began, "first_query_s": first - opened, "next_ms": 1e3 * float(np.median(times)) if times else None}
print(json.dumps({**found, "anonymous_bytes": memory("RssAnon"), "resident_bytes": memory("VmRSS"), "queries": len(queries)}))
"""


def plan_of(bench: Bench) -> Plan:
    """What is made. KNNSTORE_BENCH_ENTRIES: another number of entries, to try it out."""
    if bench.smoke:
        return SMOKE
    return Plan(n_entries=int(os.environ.get("KNNSTORE_BENCH_ENTRIES", ENTRIES)), dim=DIM)


def run(bench: Bench) -> dict[str, Any]:
    plan = plan_of(bench)
    path, truth, seconds = made_store(bench, plan)
    queries = keys_of(plan).queries(plan.n_queries)
    queries_path = bench.folder / f"large-{plan.n_entries}" / "queries.npy"
    np.save(queries_path, queries)
    with knnstore.open(path) as store:
        nlist, nprobe, segments = store.segments[0].content.nlist, store.manifest.nprobe, len(store.segments)
    bench.log("opening")
    opened = [_opened(path, queries_path, plan.k) for _ in range(max(2, bench.rounds))]
    bench.log("beside bare faiss")
    with knnstore.open(path) as store:
        beside = _beside_bare(bench, store, queries, plan.k)
        curves = {str(nlist): _curve(store, queries, truth, plan)}
    opened_others = {str(nlist): opened[-1]}
    others = [max(64, nlist // 4), 4 * nlist] if bench.smoke else [other for other in OTHER_NLISTS if other != nlist]
    for other in others:
        relisted = relisted_store(bench, plan, path, other)
        bench.log(f"recall and speed in {other} lists")
        with knnstore.open(relisted) as store:
            curves[str(other)] = _curve(store, queries, truth, plan)
        opened_others[str(other)] = _opened(relisted, queries_path, plan.k)
    bench.log("with a cold page cache")
    stayed = drop_cache(path)
    return {
        "entries": plan.n_entries,
        "dim": plan.dim,
        "segments": segments,
        "nlist": nlist,
        "nprobe": nprobe,
        "k": plan.k,
        "queries": plan.n_queries,
        "bytes": folder_bytes(path),
        "build_s": seconds,
        "opened": opened,
        "opened_by_lists": opened_others,
        "cold": {**_opened(path, queries_path, plan.k), "stayed_in_cache": stayed},
        "beside_bare": beside,
        "curves": curves,
    }


def _opened(path: Path, queries: Path, k: int) -> dict[str, Any]:
    """A child process opens the store and asks one query after another."""
    found = peak_anonymous(OPENING, path, queries, k)
    printed: dict[str, Any] = json.loads(found["printed"][-1])
    return {**printed, "peak_anonymous_bytes": found["peak_bytes"], "before_opening_bytes": found["at_start_bytes"]}


def _bare_in_memory(store: Datastore) -> Any:
    """faiss's own index with the same centroids, codes and labels, all lists in memory, its centroids searched by a graph."""
    members = store.segments
    first = members[0]
    space, coarse = first.space, first.coarse
    assert coarse is not None, "stores of this size have lists"
    quantizer = faiss.IndexHNSWFlat(space.dim, GRAPH_LINKS)
    quantizer.hnsw.efSearch = GRAPH_SEARCH
    quantizer.add(np.ascontiguousarray(coarse.centroids))
    index = faiss.IndexIVFPQFastScan(quantizer, space.dim, coarse.nlist, space.n_sub, 4)
    index.by_residual = False
    faiss.copy_array_to_vector(np.ascontiguousarray(space.centroids).reshape(-1), index.pq.centroids)
    for number in range(coarse.nlist):
        codes, labels = _entries(members, number)
        if len(labels):
            padded = np.zeros((-(-len(labels) // BLOCK_ENTRIES) * BLOCK_ENTRIES, codes.shape[1]), np.uint8)
            padded[: len(codes)] = codes
            blocks = pack(padded)
            index.invlists.add_entries(number, len(labels), faiss.swig_ptr(labels), faiss.swig_ptr(blocks))
    index.is_trained, index.ntotal = True, len(store)
    index.referenced_objects = [quantizer]
    return index


def _entries(members: Sequence[Segment], number: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One list of all segments: codes and labels."""
    parts = [member.lists.entries(number) for member in members]
    return np.concatenate([codes for codes, _ in parts]), np.concatenate([labels for _, labels in parts])


def _beside_bare(bench: Bench, store: Datastore, queries: Keys, k: int) -> dict[str, Any]:
    """One query at a time and in batches, beside bare faiss with all lists in memory; the answers are compared first."""
    space, nprobe = store.segments[0].space, store.manifest.nprobe
    bare = _bare_in_memory(store)
    bare.nprobe = nprobe
    distances = bare.search(space.rotate(queries), k)[0]
    found = store.search(queries, k=k).distances - store.stacks[0].distortion
    agree = float(np.isclose(distances, found, rtol=1e-3, atol=1e-2).mean())
    assert bench.smoke or agree > 0.9, f"only {agree:.3f} of the distances are those of bare faiss: not the same search"
    batch = np.ascontiguousarray(np.tile(queries, (-(-BATCH // len(queries)), 1))[:BATCH])
    each: dict[str, list[float]] = {"store": [], "bare": []}

    def ours() -> None:
        for query in queries:
            at = time.perf_counter()
            store.search(query, k=k)
            each["store"].append(time.perf_counter() - at)

    def plain() -> None:
        for number in range(len(queries)):
            at = time.perf_counter()
            bare.search(space.rotate(queries[number : number + 1]), k)
            each["bare"].append(time.perf_counter() - at)

    def on_one_core() -> None:
        faiss.omp_set_num_threads(1)
        for query in queries:
            store.search(query, k=k)
        faiss.omp_set_num_threads(n_threads)

    n_threads = faiss.omp_get_max_threads()
    ours_s, bare_s = in_turn(bench.rounds, ours, plain)
    single = {name: percentiles(times[len(queries) :]) for name, times in each.items()}
    one_core_s, all_cores_s = in_turn(bench.rounds, on_one_core, ours)
    batch_s, bare_batch_s = in_turn(bench.rounds, lambda: store.search(batch, k=k), lambda: bare.search(space.rotate(batch), k))
    return {
        "same_distances": agree,
        "single_over_bare": ratio(ours_s, bare_s),
        "one_core_over_all": ratio(one_core_s, all_cores_s),
        "batch_over_bare": ratio(batch_s, bare_batch_s),
        "single": single,
        "cores": n_threads,
    }


def _curve(store: Datastore, queries: Keys, truth: Truth, plan: Plan) -> list[dict[str, float]]:
    """For each number of lists: recall of the k nearest by exact distance, time of single queries, queries a second in a batch."""
    nlist = store.segments[0].content.nlist
    points = []
    for nprobe in (some for some in NPROBES if some <= nlist):
        hits = store.search(queries, k=plan.k, nprobe=nprobe)
        places = hits.segments.astype(np.int64) * plan.segment_entries + hits.rows
        recall = [float(np.isin(right, got).mean()) for right, got in zip(truth.places, places, strict=True)]
        single = []
        for query in queries:
            began = time.perf_counter()
            store.search(query, k=plan.k, nprobe=nprobe)
            single.append(time.perf_counter() - began)
        began = time.perf_counter()
        store.search(queries, k=plan.k, nprobe=nprobe)
        rate = len(queries) / (time.perf_counter() - began)
        points.append({"nprobe": nprobe, "recall": statistics.fmean(recall), **percentiles(single), "batch_per_s": rate})
    return points


def render(result: Mapping[str, Any], plots: Path) -> str:
    n = result["entries"]
    build = [(stage, result["build_s"].get(stage, 0.0)) for stage in STAGES]
    rows = [(stage, f"{took:.0f}", f"{1e6 * took / n:.2f}") for stage, took in build]
    measured = ("recall", "p50_ms", "p99_ms", "batch_per_s")
    forms = ("{:.3f}", "{:.2f}", "{:.2f}", "{:,.0f}")
    curves = [
        (f"{int(nlist):,}", point["nprobe"], *(form.format(point[name]) for form, name in zip(forms, measured, strict=True)))
        for nlist, points in sorted(result["curves"].items(), key=lambda pair: int(pair[0]))
        for point in points
    ]
    text = (
        f"## {n / 1e6:g} million entries\n",
        _made_text(result),
        table(("stage of making it", "seconds", "µs an entry"), rows),
        "`truth` finds the exact neighbours of the queries for this benchmark; it and `generate` are no part of a datastore's making.\n",
        _opening_text(result),
        _opening_table(result),
        _beside_text(result),
        _curves_text(result),
        table(("lists", "nprobe", "recall", "single, ms", "99th percentile", "queries/s in a batch"), curves),
        _plot(result, plots / "large.svg"),
    )
    return "\n".join(text)


def _made_text(result: Mapping[str, Any]) -> str:
    n, dim, size = result["entries"], result["dim"], result["bytes"]
    return (
        f"Generated keys of {dim} dimensions with a real store's statistics, made in chunks from a seed and encoded at once: as floats "
        f"they would take {4 * n * dim / 1e9:.0f} GB. The store takes {size / 1e9:.2f} GB ({size / n:.1f} bytes an entry), in "
        f"{result['segments']} segments and {result['nlist']:,} lists.\n"
    )


def _opening_text(result: Mapping[str, Any]) -> str:
    opened, cold = result["opened"], result["cold"]
    warm = max(one["open_s"] + one["first_query_s"] for one in opened)
    memory, resident = (max(one[name] for one in opened) for name in ("peak_anonymous_bytes", "resident_bytes"))
    return (
        f"**Opening.** A process of its own, imports done: `open` and the first query take {warm:.2f} s at most of {len(opened)} runs "
        f"with a warm page cache: {verdict(warm, OPEN_MOST_S, least=False)}. Over {opened[0]['queries']} queries its anonymous "
        f"memory was {memory / 1e9:.2f} GB at most, {opened[0]['before_opening_bytes'] / 1e9:.2f} of it before opening: "
        f"{verdict(memory / 1e9, MEMORY_MOST / 1e9, least=False)}. Resident, with the pages of the lists that were read, were "
        f"{resident / 1e6:.0f} MB: {resident / result['bytes']:.0%} of the store. With a cold page cache: "
        f"{cold['open_s'] + cold['first_query_s']:.2f} s, then {cold['next_ms']:.1f} ms a query (median).\n"
    )


def _opening_table(result: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{int(nlist):,}",
            f"{one['open_s'] + one['first_query_s']:.2f}",
            f"{one['next_ms']:.2f}",
            f"{one['peak_anonymous_bytes'] / 1e9:.2f}",
        )
        for nlist, one in sorted(result["opened_by_lists"].items(), key=lambda pair: int(pair[0]))
    ]
    return table(("lists", "open and first query, s", "next ones, ms (median)", "anonymous, GB"), rows)


def _beside_text(result: Mapping[str, Any]) -> str:
    beside, single = result["beside_bare"], result["beside_bare"]["single"]
    return (
        f"**Single queries beside bare faiss**, k = {result['k']:,}, nprobe {result['nprobe']}: {spread(beside['single_over_bare'])} times "
        f"the latency of `IndexIVFPQFastScan` with the same codes in {result['nlist']:,} lists in memory and a graph over its centroids, "
        f"the rotation counted on both sides: {verdict(beside['single_over_bare']['median'], LATENCY_MOST, least=False)}. The store took "
        f"{single['store']['p50_ms']:.2f} ms (median; 99th percentile {single['store']['p99_ms']:.2f}), bare faiss "
        f"{single['bare']['p50_ms']:.2f} ms ({single['bare']['p99_ms']:.2f}). On one core the store takes "
        f"{spread(beside['one_core_over_all'])} times as long as on all {beside['cores']}. In batches of {BATCH:,} it takes "
        f"{spread(beside['batch_over_bare'])} times as long as bare faiss.\n"
    )


def _curves_text(result: Mapping[str, Any]) -> str:
    return (
        f"**Lists and probes.** Recall of the {result['k']:,} nearest by exact distance, of {result['queries']} queries. Codes of 64 "
        "bytes bound it, however many lists are searched.\n"
    )


def _plot(result: Mapping[str, Any], path: Path) -> str:
    made, (axes,) = figure()
    for nlist, points in sorted(result["curves"].items(), key=lambda pair: int(pair[0])):
        axes.plot([point["recall"] for point in points], [point["p50_ms"] for point in points], marker="o", label=f"{int(nlist):,} lists")
    axes.set_yscale("log")
    axes.set_xlabel(f"recall of the {result['k']:,} nearest")
    axes.set_ylabel("one query, ms")
    axes.legend()
    save(made, path)
    return picture(path, "Milliseconds of one query against recall, a line for each number of lists.")
