"""Stores with a past: commands that make snapshots, and what a dull list says that each of them holds."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from stores import create_store, draw_keys

import knnstore
from knnstore import EntryDocument
from knnstore.storage.catalog import StoreFolder, open_snapshot

DIM = 4
Documents = dict[tuple[str, str], int]  # (domain, id) → version: which tokens the document has


def entries_of(domain: str, name: str, version: int) -> tuple[Any, Any, EntryDocument]:
    """Keys, values and record of a document: drawn from its name and version; 3 to 12 entries, as many in each version."""
    of_name = sum(map(ord, f"{domain}/{name}"))
    seed, n = of_name * 31 + version, 3 + of_name % 10
    values = np.random.default_rng(seed).integers(0, 1_000, n)
    return draw_keys(seed, n, DIM), values, EntryDocument(id=name, n_entries=n, domain=domain)


def make(path: Path, documents: Documents, **options: Any) -> None:
    made = [entries_of(domain, name, version) for (domain, name), version in documents.items()]
    keys, values = (np.concatenate([item[i] for item in made]) for i in (0, 1))
    create_store(path, keys, values, [item[2] for item in made], **options)


def add(path: Path, domain: str, name: str, version: int = 0) -> None:
    """Appends one document, in place of the one that has its id."""
    keys, values, document = entries_of(domain, name, version)
    knnstore.append_entries(path, [(keys, values, [document])], replace=True)


def snapshot_number(path: Path) -> int:
    manifest, pin = open_snapshot(StoreFolder(path))
    pin.release()
    return manifest.snapshot


def content(path: Path, snapshot: int | str | None = None) -> dict[tuple[str, str], list[int]]:
    """The tokens of each document of a snapshot, every one of them found by a search too."""
    with knnstore.open(path, snapshot=snapshot) as store:
        found: dict[tuple[str, str], list[int]] = {}
        for document in store.documents():
            found[document.domain, document.id] = []
        if not len(store):
            return found
        hits = store.search(np.zeros(DIM), k=1_000)
        assert int(hits.n_found[0]) == len(store)
        for number in range(len(store)):
            context = hits.context(0, number, left=0, right=0)
            found[context.domain, context.document].append((context.token_index, context.token_id))
        return {key: [token for _, token in sorted(tokens)] for key, tokens in found.items()}


def expected(documents: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], list[int]]:
    """What `content` is to give for these documents."""
    return {key: entries_of(*key, version)[1].tolist() for key, version in documents.items()}


def named_files(path: Path) -> set[str]:
    """Every file that a store is to have, by what its manifests say, read as plain JSON: nothing else may be there."""
    names = {"KNNSTORE", "CURRENT", "LOCK"}
    for manifest in (path / "manifests").iterdir():
        fields = json.loads(manifest.read_text())
        names.add(f"manifests/{manifest.name}")
        for part in ("spaces", "coarse"):
            names.update(f"{part}/{item['id']}/{name}" for item in fields[part] for name in item["files"])
        for segment in fields["segments"]:
            of_segment = segment["content"]
            names.update(f"segments/{of_segment['uuid']}/{name}" for name in (*of_segment["files"], "segment.json"))
    return names | {f"tags/{tag.name}" for tag in (path / "tags").iterdir()}


def files_in(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}


def tree(path: Path) -> dict[str, bytes]:
    """Every file but LOCK, which says who had it last, and its bytes; folders and links too."""
    return {file.relative_to(path).as_posix(): _bytes(file) for file in path.rglob("*") if file.name != "LOCK"}


def _bytes(path: Path) -> bytes:
    if path.is_symlink():
        return os.fsencode(path.readlink())
    return b"" if path.is_dir() else path.read_bytes()
