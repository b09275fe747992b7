"""How times and memory are measured: works in turn, ratios round by round, the memory of a child process, a cold page cache."""

import ctypes
import importlib.metadata
import mmap
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["drop_cache", "in_turn", "machine", "peak_anonymous", "percentiles", "ratio", "resident_share"]

SAMPLED_EVERY_S = 0.005
DROPPED_TIMES, LITTLE = 5, 0.01  # tries to empty the page cache; the share that may stay
PACKAGES = ("knnstore", "faiss-cpu", "numpy", "torch", "transformers", "lancedb", "usearch")  # whose versions are stated
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # of a CPU, where it has them: faiss and torch use them


def in_turn(rounds: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds that each took, round by round: one after the other, so that all see the same machine. A first round is not kept."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for kept, work in zip(times, works, strict=True):
            began = time.perf_counter()
            work()
            kept.append(time.perf_counter() - began)
    return [kept[1:] for kept in times]


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of above / below, round by round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99 of single times, in milliseconds."""
    p50, p99 = np.percentile(seconds, (50, 99))
    return {"p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99)}


def machine() -> dict[str, Any]:
    """What a figure depends on: CPU, cores, memory, system, versions."""
    cpu = {}
    if (path := Path("/proc/cpuinfo")).exists():
        pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        cpu = {name.strip(): text.strip() for name, text in pairs}
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_anonymous(code: str, *arguments: object, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The most anonymous memory (RssAnon) that a child process had while it ran Python code, sampled every 5 ms.

    code: may read `sys.argv[1:]`, and print a line BEGIN before and END after what counts; flushed by the caller of print, or not:
    the child's output is not buffered. Returns peak_bytes, at_start_bytes (at BEGIN), at_end_bytes, seconds (between the two), printed
    (its other lines). Raises CalledProcessError where the child fails. Linux only.
    """
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    watch = _Watch(child.pid)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(child.stderr.read() if child.stderr else ""), daemon=True)
    reader.start()
    printed = []
    with child, watch:
        for line in child.stdout or ():
            if line.strip() == "BEGIN":
                watch.begin()
            elif line.strip() == "END":
                watch.end()
            else:
                printed.append(line.rstrip("\n"))
        child.wait()
        reader.join()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, "the child process", "\n".join(printed), "".join(said))
    return {**watch.found(), "printed": printed}


class _Watch:
    """Samples a process's RssAnon in a thread, from BEGIN to END."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._ended = False
        self._began_s = self._ended_s = time.perf_counter()
        self._start = self._peak = self._last = 0

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.end()

    def begin(self) -> None:
        self._began_s, self._start = time.perf_counter(), self._now()
        self._peak = self._last = self._start

    def end(self) -> None:
        if not self._ended:
            self._look()
            self._ended, self._ended_s = True, time.perf_counter()

    def found(self) -> dict[str, Any]:
        return {
            "peak_bytes": self._peak,
            "at_start_bytes": self._start,
            "at_end_bytes": self._last,
            "seconds": self._ended_s - self._began_s,
        }

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLED_EVERY_S):
            if not self._ended:
                self._look()

    def _look(self) -> None:
        if now := self._now():  # 0 of a process that has gone
            self._last, self._peak = now, max(self._peak, now)

    def _now(self) -> int:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return 0
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def drop_cache(path: Path) -> float:
    """Takes the files of a folder, or one file, out of the page cache; the share of their bytes that stayed there all the same.

    Pages that some process has mapped stay: close what is open there first. Needs no privileges. Linux only.
    """
    files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    stayed = 1.0
    for _ in range(DROPPED_TIMES):
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what is not yet on the disk stays
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        stayed = sum(resident_share(file) * size for file, size in zip(files, sizes, strict=True)) / max(1, sum(sizes))
        if stayed < LITTLE:
            break
        time.sleep(0.2)  # a journal may hold pages for a while after they were written
    return stayed


def resident_share(file: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    size = file.stat().st_size
    if not size:
        return 0.0
    mapped = np.memmap(file, np.uint8, "r")
    seen: NDArray[np.uint8] = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(size), seen.ctypes.data_as(ctypes.c_void_p)):
        raise OSError(ctypes.get_errno(), f"mincore: {file}")
    return float((seen & 1).mean())
