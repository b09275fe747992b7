"""A store that lives: what append, merge, compact, delete, open and verify cost, what an entry takes on the disk, and memory."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

import knnstore
from benchmarks.measuring import drop_cache, in_turn, peak_anonymous, ratio
from benchmarks.page import spread, table, verdict
from benchmarks.workloads import Bench, folder_bytes, fresh_folder, real_store
from knnstore import EntryDocument, IndexOptions
from knnstore.storage.contexts import FRAME, ContextsReader
from knnstore.storage.manifest import FileRecord
from knnstore.storage.segment import Segment

NAME = "living"
LARGE = False

PIECE = 30_000  # entries of a document of the stores made here: novels are cut, so that there is something to delete
TRAINING = 131_072  # keys the index is trained on
SMALL = 64  # entries of a small document
APPENDS, SMOKE_APPENDS = 500, 6  # of small documents, one after the other
LIMITS = {"append": 0.02, "merge": 0.7, "compact": 0.3, "verify": 0.6, "overhead": 6.0}  # asked for


class Entries:
    """The entries of the real store, with their kept keys and their text, as documents of at most 30,000."""

    def __init__(self, store: knnstore.Datastore) -> None:
        self._store = store
        self.pieces: list[tuple[Segment, int, int]] = []
        for segment in store.segments:
            edges = [*segment.contexts.first_rows.tolist(), segment.content.entries]
            for first, stop in pairwise(edges):
                n = -(-(stop - first) // PIECE)
                cuts = np.linspace(first, stop, n + 1).astype(int).tolist()
                self.pieces += [(segment, *cut) for cut in pairwise(cuts)]
        self.n = sum(stop - first for _, first, stop in self.pieces)

    def training_keys(self) -> Any:
        """Keys drawn evenly, (m, dim) float32."""
        step = max(1, self.n // TRAINING)
        return np.concatenate([segment.exact_keys(first, stop)[::step] for segment, first, stop in self.pieces])

    def batches(self, first: int, stop: int, name: str = "") -> Iterator[tuple[Any, Any, list[EntryDocument]]]:
        """The entries [first, stop) of all."""
        at = 0
        for number, (segment, begin, end) in enumerate(self.pieces):
            low, high = max(begin, begin + first - at), min(end, begin + stop - at)
            if low < high:
                yield (
                    segment.exact_keys(low, high),
                    segment.values.rows(low, high)[:, 0],
                    [_document(segment, low, high, f"{name}{number}")],
                )
            at += end - begin


def _document(segment: Segment, first: int, stop: int, name: str) -> EntryDocument:
    span = segment.contexts.span(first, stop)
    if span is None:
        return EntryDocument(id=name, n_entries=stop - first)
    begin, ends = int(span.starts[0]), np.maximum.accumulate(span.ends)
    starts = np.maximum.accumulate(span.starts)
    return EntryDocument(id=name, n_entries=stop - first, text=span.cut(begin, int(ends[-1])), starts=starts - begin, ends=ends - begin)


def _make(path: Path, store: knnstore.Datastore, entries: Entries, training: Any, first: int, stop: int, name: str) -> float:
    """A store of some entries without keys; seconds of encoding and committing them, training apart."""
    began = 0.0

    def batches() -> Iterator[Any]:
        nonlocal began
        began = time.perf_counter()  # asked for when the index is trained
        yield from entries.batches(first, stop, name)

    knnstore.create_from_entries(
        path,
        batches(),
        checkpoint=store.manifest.checkpoint,
        dim=store.dim,
        vocab_size=store.manifest.checkpoint.vocab_size,
        training_keys=training[: max(4_096, min(len(training), stop - first))],
        expected_entries=stop - first,
        options=IndexOptions(keep_keys=None),
    )
    return time.perf_counter() - began


def _copy(source: Path, target: Path) -> Path:
    """A copy to be changed, of which all is on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    os.sync()
    return target


def _copying(folder: Path, *stores: Path) -> Callable[[], float]:
    """Seconds of `cp -r` of stores and `sync -f`."""

    def copied() -> float:
        out = folder / "copied"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
        began = time.perf_counter()
        subprocess.run(["cp", "-r", *map(str, stores), str(out)], check=True)
        subprocess.run(["sync", "-f", str(out)], check=True)
        return time.perf_counter() - began

    return copied


def _rounds(rounds: int, **works: Callable[[], float]) -> dict[str, list[float]]:
    """What each work says it took, in turn, without a first round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            seconds[name].append(work())
    return {name: found[1:] for name, found in seconds.items()}


def _timed(prepare: Callable[[], Any], work: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        prepare()
        began = time.perf_counter()
        made = work()
        took = time.perf_counter() - began
        if isinstance(made, knnstore.Datastore):
            made.close()
        return took

    return once


def bytes_by_part(path: Path) -> dict[str, float]:
    """Bytes an entry of each part of a store, kept keys left out."""
    with knnstore.open(path) as store:
        n, parts = len(store), dict.fromkeys(("code", "label", "padding and directory", "value", "text", "offsets", "documents"), 0.0)
        parts |= {"LMDB": 0.0, "ids": 0.0, "checksums and headers": 0.0, "centroids of lists": 0.0, "space": 0.0, "other": 0.0}

        def size_of(files: tuple[FileRecord, ...]) -> int:
            return sum(file.size for file in files)

        for segment in store.segments:
            content, m = segment.content, segment.content.entries
            codes, values = m * segment.space.code_size, m * (2 if content.values == "u16" else 4)
            parts["code"] += codes
            parts["label"] += 8 * m
            parts["padding and directory"] += content.size_of("lists.bin") - codes - 8 * m + content.size_of("lists.dir")
            parts["value"] += values
            parts["ids"] += 16 * content.documents
            parts["checksums and headers"] += content.size_of("values.bin") - values + content.size_of("ids.bin") - 16 * content.documents
            text, offsets, documents = _packed_sizes(segment.contexts, m)
            parts["text"] += text
            parts["offsets"] += offsets
            parts["documents"] += documents
            parts["LMDB"] += content.size_of("contexts.lmdb") - text - offsets - documents
        parts["centroids of lists"] += sum(size_of(record.files) for record in store.manifest.coarse)
        parts["space"] += sum(size_of(record.files) for record in store.manifest.spaces)
        keys = sum(segment.content.size_of("keys.bin") for segment in store.segments)
        parts["other"] = folder_bytes(path) - keys - sum(parts.values())
    return {name: size / n for name, size in parts.items()}


def _packed_sizes(contexts: ContextsReader, n_rows: int) -> tuple[float, float, float]:
    """Bytes of text, of the offsets of tokens in it, and of document records, as they are packed. Text: what it takes without offsets."""
    pack, unpack = zstandard.ZstdCompressor(level=12), zstandard.ZstdDecompressor()
    text = offsets = 0
    for _, frame in contexts.packed_frames(0, n_rows):
        raw = unpack.decompress(frame)
        n_bytes = FRAME.unpack(raw[: FRAME.size])[1]
        alone = len(pack.compress(raw[len(raw) - n_bytes :])) if n_bytes else 0
        text += alone
        offsets += len(frame) - alone
    return text, offsets, sum(len(record) for _, record in contexts.packed_records(0, n_rows))


def run(bench: Bench) -> dict[str, Any]:
    """Works on stores made of the entries of the real one, with codes and text and without keys."""
    folder = fresh_folder(bench, "living")
    whole, other = folder / "whole.knn", folder / "other.knn"
    with knnstore.open(real_store(bench)) as store:
        entries = Entries(store)
        n_added, n_other = max(SMALL, entries.n // 100), entries.n // 10
        n_whole = entries.n - n_added
        bench.log(f"stores of {n_whole} and {n_other} entries")
        training = entries.training_keys()
        build_s = _make(whole, store, entries, training, 0, n_whole, "")
        _make(other, store, entries, training, 0, n_other, "other ")
        del training
        added = list(entries.batches(n_whole, entries.n, "added "))
        bench.log("append")
        work = folder / "work.knn"
        append_s = _rounds(bench.rounds, append=_timed(lambda: _copy(whole, work), lambda: knnstore.append_entries(work, added)))["append"]
        appended = _copy(work, folder / "appended.knn")
    rounds = bench.rounds
    result: dict[str, Any] = {
        "entries": {"whole": n_whole, "other": n_other, "added": n_added},
        "bytes": folder_bytes(whole),
        "parts": bytes_by_part(whole),
        "append": {
            "build_s": build_s,
            "append_s": statistics.median(append_s),
            "share": ratio(append_s, [build_s] * len(append_s)),
        },
    }
    bench.log("merge")
    out, copied = folder / "out.knn", _copying(folder, whole, other)

    def vacate() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()

    merged = _rounds(
        rounds,
        copy=copied,
        merge=_timed(vacate, lambda: knnstore.merge([whole, other], out)),
        link=_timed(vacate, lambda: knnstore.merge([whole, other], out, link=True)),
    )
    result["merge"] = _beside_copy(merged, "merge", "link")
    bench.log("delete, compact")
    with knnstore.open(whole) as store:
        document = next(iter(store.documents())).id
    deleted = _copy(whole, folder / "deleted.knn")
    knnstore.delete(deleted, document)
    compacted = _rounds(
        rounds,
        copy=_copying(folder, whole),
        deleted=_timed(lambda: _copy(deleted, work), lambda: knnstore.compact(work)),
        appended=_timed(lambda: _copy(appended, work), lambda: knnstore.compact(work)),
        purge=_timed(lambda: _copy(whole, work), lambda: knnstore.delete(work, document, purge=True)),
        delete=_timed(lambda: _copy(whole, work), lambda: knnstore.delete(work, document)),
    )
    result["compact"] = _beside_copy(compacted, "deleted", "appended", "purge")
    result["delete_s"] = statistics.median(compacted["delete"])
    bench.log("verify, open")
    files = [str(path) for path in sorted(whole.rglob("*")) if path.is_file()]
    sums, full, quick = in_turn(
        rounds,
        lambda: subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL),
        lambda: knnstore.verify(whole),
        lambda: knnstore.verify(whole, level="quick"),
    )
    result["verify"] = {"rate": ratio(sums, full), "full_s": statistics.median(full), "quick_s": statistics.median(quick)}
    result["open"] = _opened(rounds, whole, other)
    bench.log("small appends")
    result["small"] = _small_appends(bench, folder, whole, other)
    bench.log("memory")
    result["memory"] = {path.stem: _memory(path, folder, smoke=bench.smoke) for path in (whole, other)}
    shutil.rmtree(folder)
    return result


def _beside_copy(seconds: dict[str, list[float]], *names: str) -> dict[str, Any]:
    found: dict[str, Any] = {"copy_s": statistics.median(seconds["copy"])}
    for name in names:
        found[name] = {"s": statistics.median(seconds[name]), "rate": ratio(seconds["copy"], seconds[name])}
    return found


def _opened(rounds: int, whole: Path, other: Path) -> dict[str, float]:
    """Milliseconds of opening a store and closing it: the large one, the small one, and the large one without page cache."""

    def opening(path: Path) -> Callable[[], None]:
        return lambda: knnstore.open(path).close()

    def cold() -> float:
        drop_cache(whole)
        began = time.perf_counter()
        knnstore.open(whole).close()
        return time.perf_counter() - began

    large, small = in_turn(4 * rounds, opening(whole), opening(other))
    return {
        "whole_ms": 1e3 * statistics.median(large),
        "other_ms": 1e3 * statistics.median(small),
        "cold_ms": 1e3 * statistics.median(cold() for _ in range(rounds + 1)),
    }


def _small_document(name: str) -> EntryDocument:
    words = [f"word{i % 97}" for i in range(SMALL)]
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    return EntryDocument(id=name, n_entries=SMALL, text=" ".join(words), starts=starts, ends=starts + [len(word) for word in words])


def _small_appends(bench: Bench, folder: Path, whole: Path, other: Path) -> dict[str, Any]:
    """Documents of 64 entries appended to a large and a small store in turn; then many to the large one, searched beside the compacted."""
    rng = np.random.default_rng(0)
    with knnstore.open(whole) as store:
        vocab_size, dim = store.manifest.checkpoint.vocab_size, store.dim
        segment = store.segments[0]
        codes, _ = segment.lists.entries(int(segment.lists.sizes.argmax()))
        near = segment.space.decode(codes[:SMALL])
    number = 0

    def append_one(path: Path) -> None:
        nonlocal number
        number += 1
        keys = near[rng.integers(0, len(near), SMALL)] + rng.standard_normal((SMALL, dim), np.float32)
        knnstore.append_entries(path, [(keys, rng.integers(0, vocab_size, SMALL), [_small_document(f"small {number}")])])

    large, small = _copy(whole, folder / "large.knn"), _copy(other, folder / "small.knn")
    of_large, of_small = in_turn(4 * bench.rounds, lambda: append_one(large), lambda: append_one(small))
    n = SMOKE_APPENDS if bench.smoke else APPENDS
    began, most = time.perf_counter(), 0
    for _ in range(n):
        append_one(large)
        with knnstore.open(large) as store:
            most = max(most, len(store.manifest.segments))
    seconds = time.perf_counter() - began
    compacted = _copy(large, folder / "one.knn")
    knnstore.compact(compacted).close()
    with knnstore.open(large) as many, knnstore.open(compacted) as one:
        queries = np.asarray(near[rng.integers(0, len(near), 64 if bench.smoke else 2_048)])
        queries = queries + rng.standard_normal(queries.shape, np.float32)
        of_many, of_one = in_turn(2 * bench.rounds, lambda: many.search(queries), lambda: one.search(queries))
        segments = len(many.manifest.segments), len(one.manifest.segments)
    return {
        "entries": SMALL,
        "beside_tenth": ratio(of_large, of_small),
        "appends": n,
        "append_ms": 1e3 * seconds / n,
        "segments": segments[0],
        "segments_at_most": most,
        "segments_compacted": segments[1],
        "search_rate": ratio(of_one, of_many),
    }


MEASURED = """
import sys
from pathlib import Path
import numpy as np
import knnstore, knnstore.lm.retrain, knnstore.merging, knnstore.entries, knnstore.verification.datastore
act, path, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
with knnstore.open(path) as store:
    dim, vocab_size, document = store.dim, store.manifest.checkpoint.vocab_size, next(iter(store.documents())).id
rng = np.random.default_rng(0)
keys, values = rng.standard_normal((4_096, dim), np.float32), rng.integers(0, vocab_size, 4_096)
works = {
    "open and search": lambda: knnstore.open(path).search(keys[:1]),
    "append of 4,096": lambda: knnstore.append_entries(path, [(keys, values, [knnstore.EntryDocument(id="new", n_entries=4_096)])]),
    "merge": lambda: knnstore.merge([path], out),
    "delete": lambda: knnstore.delete(path, document),
    "delete --purge": lambda: knnstore.delete(path, document, purge=True),
    "compact": lambda: knnstore.compact(path),
    "verify": lambda: knnstore.verify(path),
}
if act == "compact":
    knnstore.delete(path, document)
print("BEGIN")
works[act]()
print("END")
"""
SMOKE_ACTS = ("delete", "compact")
ACTS = ("open and search", "append of 4,096", "merge", "delete", "delete --purge", "compact", "verify")


def _memory(path: Path, folder: Path, *, smoke: bool) -> dict[str, dict[str, int]]:
    """Anonymous memory of each act in a process of its own: at its peak, and before it began (the interpreter, numpy and faiss)."""
    found = {}
    for act in SMOKE_ACTS if smoke else ACTS:
        copy, out = _copy(path, folder / "memory.knn"), folder / "memory-out.knn"
        shutil.rmtree(out, ignore_errors=True)
        seen = peak_anonymous(MEASURED, act, copy, out)
        found[act] = {"peak_bytes": seen["peak_bytes"], "at_start_bytes": seen["at_start_bytes"]}
    return found


def render(result: dict[str, Any], plots: Path) -> str:
    """The section of the page."""
    n, parts, compact, small = result["entries"], result["parts"], result["compact"], result["small"]
    append, merge, verify, opened = result["append"], result["merge"], result["verify"], result["open"]
    overhead = sum(parts.values()) - parts["code"] - parts["label"] - parts["value"]
    percent = {name: 100 * share for name, share in append["share"].items()}
    sizes = [(name, f"{size:.3f}") for name, size in parts.items() if size >= 0.0005]
    acts = [
        (
            f"append of {n['added']:,} entries (1%)",
            f"{append['append_s']:.2f} s",
            f"their build: {append['build_s']:.0f} s to encode and commit",
            f"{spread(percent)}%",
            verdict(percent["median"], 100 * LIMITS["append"], least=False),
        ),
        _rate_row("merge of both", merge["merge"], merge["copy_s"], LIMITS["merge"]),
        _rate_row("merge of both, `--link`", merge["link"], merge["copy_s"], None),
        _rate_row("compact, after a document was deleted", compact["deleted"], compact["copy_s"], LIMITS["compact"]),
        _rate_row("compact, after 1% was appended", compact["appended"], compact["copy_s"], LIMITS["compact"]),
        _rate_row("delete --purge of a document", compact["purge"], compact["copy_s"], None),
        (
            "verify --level full",
            f"{verify['full_s']:.2f} s",
            "`sha256sum` of all files",
            spread(verify["rate"]),
            verdict(verify["rate"]["median"], LIMITS["verify"], least=True),
        ),
    ]
    memory = [(act, *(_grown(result["memory"][name][act]) for name in ("whole", "other"))) for act in result["memory"]["whole"]]
    return f"""## A store that lives

Stores of {n["whole"]:,} and {n["other"]:,} entries, made of the real store's keys, values and text, without keys (the larger:
{result["bytes"] / 1e6:.0f} MB).

### Bytes an entry

{table(("part", "bytes an entry"), [*sizes, ("**all**", f"**{sum(parts.values()):.2f}**")])}
Beside code, label and value an entry takes {overhead:.2f} bytes: {verdict(overhead, LIMITS["overhead"], least=False)}. Padding comes with
lists of whole blocks of 32; offsets are what text frames take more than their text alone; space is the rotation and the product quantizer.

### Changes

{table(("what", "takes", "beside", "ratio", "asked for"), acts)}
A ratio of rates is the seconds of what stands beside it over those of the act, in turn; above 1 the act is faster. `cp` is `cp -r` of the
same stores with `sync -f`.

`delete` of a document takes {1e3 * result["delete_s"]:.0f} ms, `verify --level quick` {1e3 * verify["quick_s"]:.0f} ms. Opening takes
{opened["whole_ms"]:.1f} ms, {opened["other_ms"]:.1f} ms at a tenth of the size, and {opened["cold_ms"]:.1f} ms when none of it is in the
page cache.

A document of {small["entries"]} entries takes {spread(small["beside_tenth"])} times as long to append as it does at a tenth of the size.
After {small["appends"]} such documents, {small["append_ms"]:.0f} ms each, there are {small["segments"]} segments (at most
{small["segments_at_most"]} on the way), searched at {spread(small["search_rate"])} of the rate of the compacted store
({small["segments_compacted"]} segments).

### Memory of changes

{table(("anonymous memory, MB", f"{n['whole']:,} entries", f"{n['other']:,} entries"), memory)}
What each act adds at its peak to the process that has imported it (RssAnon, sampled every 5 ms; mapped files are not in it). Of what it
consists: [design.md](design.md#memory).
"""


def _rate_row(name: str, found: dict[str, Any], copy_s: float, limit: float | None) -> tuple[str, ...]:
    asked = "" if limit is None else verdict(found["rate"]["median"], limit, least=True)
    return name, f"{found['s']:.2f} s", f"`cp`: {copy_s:.2f} s", spread(found["rate"]), asked


def _grown(found: dict[str, int]) -> str:
    return f"{(found['peak_bytes'] - found['at_start_bytes']) / 1e6:.0f}"
