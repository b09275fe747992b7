"""Stores that contradict themselves, or hold what nobody wrote, with every checksum right: as a faulty or hostile writer leaves them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import xxhash
import zstandard
from damage import files_by_role

from knnstore.format import HEADER_SIZE
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.manifest import FileRecord, Manifest
from knnstore.storage.manifest_json import canonical, manifest_bytes, segment_content_fields


def resign(path: Path, change: Callable[[Manifest], Manifest] | None = None) -> None:
    """Gives every checksum above the segments' files its right value again: segment.json, manifest, CURRENT."""
    store = StoreFolder(path)
    manifest, pin = open_snapshot(store)
    pin.release()
    segments = []
    for segment in manifest.segments:
        folder = store.segment(segment.content.uuid)
        files = tuple(file_record(folder / file.name) for file in segment.content.files)
        content = dataclasses.replace(segment.content, files=files)
        raw = canonical(segment_content_fields(content))
        (folder / "segment.json").write_bytes(raw)
        segments.append(dataclasses.replace(segment, content=content, sha256=hashlib.sha256(raw).hexdigest()))
    write_manifest(path, (change or (lambda same: same))(dataclasses.replace(manifest, segments=tuple(segments))))


def file_record(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(name=path.name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(path: Path, manifest: Manifest) -> None:
    raw = manifest_bytes(manifest)
    (path / "manifests" / f"{manifest.snapshot}.json").write_bytes(raw)
    (path / "CURRENT").write_text(f"{manifest.snapshot} {hashlib.sha256(raw).hexdigest()}\n")


def sealed(raw: bytes) -> bytes:
    """An array file with the right checks in its header: of its body, then of the header."""
    head = raw[:48] + xxhash.xxh3_64_intdigest(raw[HEADER_SIZE:]).to_bytes(8, "little")
    return head + xxhash.xxh3_64_intdigest(head).to_bytes(8, "little") + raw[HEADER_SIZE:]


@contextmanager
def contexts_of(path: Path, file: Path | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A write transaction on a contexts.lmdb, the first segment's if none is named, and its databases."""
    file = file or files_by_role(path)["contexts.lmdb"]
    with lmdb.open(str(file), subdir=False, lock=False, max_dbs=2, map_size=1 << 26) as environment:
        databases = {name: environment.open_db(name.encode()) for name in ("documents", "text")}
        with environment.begin(write=True) as transaction:
            yield transaction, databases
    resign(path)


def records(file: Path, database: str) -> list[tuple[bytes, bytes]]:
    """What is in a database of a contexts.lmdb, in order."""
    with (
        lmdb.open(str(file), subdir=False, lock=False, readonly=True, max_dbs=2) as environment,
        environment.begin() as transaction,
        transaction.cursor(environment.open_db(database.encode(), transaction)) as cursor,
    ):
        return [(bytes(key), bytes(value)) for key, value in cursor]


def rewritten(packed: bytes, change: Callable[[bytearray], None]) -> bytes:
    raw = bytearray(zstandard.decompress(packed))
    change(raw)
    return zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(bytes(raw))


def replaced(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        assert raw.count(old) == 1
        raw[:] = raw.replace(old, new)

    return change


def set_byte(at: int, value: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        assert raw[at] != value
        raw[at] = value

    return change
