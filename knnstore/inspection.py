"""What a datastore is: its sizes and settings, as `info` and `snapshots` show them.

From manifests alone: nothing that takes long to import is needed (a test looks).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnstore.errors import NotFoundError
from knnstore.format import CODEC_NAMES, CONTEXTS_FILE, DIRECTORY_FILE, FORMAT_VERSION, IDS_FILE, KEYS_FILE, LISTS_FILE, VALUES_FILE
from knnstore.storage.calibration import calibration_fields
from knnstore.storage.catalog import StoreFolder, list_manifests, open_snapshot, read_current, read_manifest
from knnstore.storage.manifest import Manifest, SegmentRecord
from knnstore.storage.rows import count, subtract
from knnstore.storage.tags import list_tags

__all__ = ["domain_counts", "read_info", "snapshot_list", "store_info"]


def domain_counts(records: Sequence[SegmentRecord]) -> dict[str, int]:
    """Live entries of each domain."""
    entries: Counter[str] = Counter()
    for record in records:
        dead = record.dead_ranges()
        for domain in {name for name, _, _ in record.runs}:
            entries[domain] += count(subtract(record.domain_ranges(domain), dead))
    return dict(entries)


def store_info(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The fields of `knnstore info --json`, from the manifest alone."""
    parts = {"lists": (LISTS_FILE, DIRECTORY_FILE), "values": (VALUES_FILE,), "contexts": (CONTEXTS_FILE, IDS_FILE), "keys": (KEYS_FILE,)}
    sizes = {part: sum(segment.content.size_of(name) for segment in manifest.segments for name in names) for part, names in parts.items()}
    files = [file for space in manifest.spaces for file in space.files] + [file for coarse in manifest.coarse for file in coarse.files]
    centroids = sum(file.size for file in files)
    entries = domain_counts(manifest.segments)
    n_entries = sum(entries.values())
    total = sum(sizes.values()) + centroids
    without_keys = total - sizes["keys"]
    return {
        "path": str(path),
        "format": FORMAT_VERSION,
        "snapshot": manifest.snapshot,
        "time": manifest.time,
        "entries": n_entries,
        "documents": sum(manifest.documents.values()),
        "domains": {domain: {"entries": entries.get(domain, 0), "documents": n} for domain, n in sorted(manifest.documents.items())},
        "segments": len(manifest.segments),
        "spaces": [
            {
                "id": record.id,
                "codec": CODEC_NAMES[record.codec],
                "n_sub": record.n_sub,
                "rotation": record.rotation,
                "distortion": record.distortion,
                "nlist": sorted({segment.content.nlist for segment in manifest.segments if segment.content.space == record.id}),
            }
            for record in manifest.spaces
        ],
        "bytes": {"total": total, **sizes, "quantizers": centroids},
        "bytes_per_entry": round(without_keys / max(1, n_entries), 3),
        "checkpoint": asdict(manifest.checkpoint),
        "key": asdict(manifest.key),
        "windows": _windows(manifest),
        "defaults": {"k": manifest.k, "nprobe": manifest.nprobe},
        "calibration": None if manifest.calibration is None else calibration_fields(manifest.calibration),
    }


def read_info(path: Path, snapshot: int | str | None = None) -> dict[str, Any]:
    """The fields of `knnstore info --json`, of a datastore that is not open. snapshot, errors: as `open_store`."""
    manifest, pin = open_snapshot(StoreFolder(path), snapshot)
    pin.release()
    return store_info(path, manifest)


def _windows(manifest: Manifest) -> dict[str, Any] | None:
    if manifest.windows is None:
        return None
    computed = [segment.content.dtype for segment in manifest.segments if segment.content.dtype is not None]
    return {**asdict(manifest.windows), "dtype": computed[0] if computed else None}


def snapshot_list(path: Path) -> list[dict[str, Any]]:
    """All kept snapshots, oldest first: number, time, operation, entries, tags, whether it is the current one."""
    store = StoreFolder(path)
    current, sha256 = read_current(store)
    tags = list_tags(store)
    listed = []
    for number in list_manifests(store):
        if number > current:
            continue  # an attempt that never counted
        try:
            manifest = read_manifest(store, number, sha256 if number == current else None)
        except NotFoundError:
            if number == current:
                raise
            continue  # a gc removed it meanwhile
        listed.append(
            {
                "snapshot": number,
                "time": manifest.time,
                "operation": manifest.operation.name,
                "counts": manifest.operation.counts,
                "entries": sum(segment.n_live() for segment in manifest.segments),
                "segments": len(manifest.segments),
                "tags": [name for name, tag in tags.items() if tag.snapshot == number],
                "current": number == current,
            }
        )
    return listed
