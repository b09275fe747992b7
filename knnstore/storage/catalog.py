"""Snapshots: how one is found, opened and pinned. How a new one is committed is in `commits`.

`CURRENT` names the newest manifest and its sha256; replacing it is the commit. A reader holds a shared flock on the manifest
it opened, so that nothing the snapshot needs is removed under it. Nothing is replayed when a store is opened.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from knnstore.errors import ConflictError, DamageError, FormatError, InvalidArgumentError, KnnstoreError, NotFoundError, StorageError
from knnstore.format import (
    COARSE,
    CURRENT_FILE,
    FORMAT_VERSION,
    LOCK_FILE,
    MANIFESTS,
    MOVES_FILE,
    SEGMENTS,
    SPACES,
    STAGING,
    STORE_FILE,
    TAGS,
)
from knnstore.storage.files import sha256_file
from knnstore.storage.manifest import FileRecord, Manifest
from knnstore.storage.manifest_json import canonical, parse_manifest
from knnstore.storage.parse import NOT_PLAIN, parse_hex, parse_json_bytes, parse_object, parse_size, read_small
from knnstore.storage.tags import TAG_PREFIX, list_tags, resolve

__all__ = [
    "Pin",
    "StoreFolder",
    "file_records",
    "folders_of",
    "identity_bytes",
    "list_manifests",
    "newest_sound_snapshot",
    "now",
    "open_snapshot",
    "read_current",
    "read_identity",
    "read_manifest",
    "read_newest",
]

_CURRENT = re.compile(rb"([1-9][0-9]{0,17}) ([0-9a-f]{64})\n")
_TRIES = 100  # a reader that loses the race against gc this often has another problem
_SHOWN = 10  # snapshots without a tag that a message lists


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """The paths of a datastore."""

    path: Path

    @property
    def current(self) -> Path:
        return self.path / CURRENT_FILE

    @property
    def lock(self) -> Path:
        return self.path / LOCK_FILE

    @property
    def identity(self) -> Path:
        return self.path / STORE_FILE

    @property
    def manifests(self) -> Path:
        return self.path / MANIFESTS

    @property
    def staging(self) -> Path:
        return self.path / STAGING

    def tag(self, name: str) -> Path:
        return self.path / TAGS / f"{name}.json"

    def manifest(self, number: int) -> Path:
        return self.manifests / f"{number}.json"

    def space(self, space_id: str) -> Path:
        return self.path / SPACES / space_id

    def coarse(self, coarse_id: str) -> Path:
        return self.path / COARSE / coarse_id

    def segment(self, segment_id: str) -> Path:
        return self.path / SEGMENTS / segment_id


class Pin:
    """A shared lock on a manifest: while it is held, the snapshot's files stay."""

    _close = staticmethod(os.close)  # at the end of a script `os` may be gone before the last pin

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            self._close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.release()


def now() -> str:
    """This moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def identity_bytes(store_uuid: str) -> bytes:
    """The content of the file KNNSTORE."""
    return canonical({"format": FORMAT_VERSION, "magic": "knnstore", "uuid": store_uuid})


def read_identity(store: StoreFolder) -> str:
    """The store's uuid. Raises NotFoundError where there is no datastore, DamageError, FormatError."""
    if not store.path.exists():
        raise NotFoundError(f"{store.path}: no such datastore. Name one with --store, or make one with `knnstore create`.")
    if not store.identity.exists():
        if store.current.exists() or store.manifests.is_dir():
            raise DamageError(f"{store.identity}: the file is missing. Run `knnstore verify`.")
        raise NotFoundError(f"{store.path}: not a datastore (it has no {STORE_FILE} file). Check the path.")
    at = str(store.identity)
    raw = read_small(store.identity, 4096)
    fields = parse_object(parse_json_bytes(raw, at), at, required=("format", "magic", "uuid"))
    number = parse_size(fields["format"], f"{at}.format")
    if number > FORMAT_VERSION and fields["magic"] == "knnstore":
        raise FormatError(f"{at}: format {number}; this knnstore reads up to {FORMAT_VERSION}. Install a newer one.")
    store_uuid = parse_hex(fields["uuid"], f"{at}.uuid", 32)
    if raw != identity_bytes(store_uuid):
        raise DamageError(f"{at}: its content is not what was written. Run `knnstore verify`.")
    return store_uuid


def read_current(store: StoreFolder) -> tuple[int, str]:
    """Number and sha256 of the newest manifest. Raises NotFoundError where no snapshot was ever committed, DamageError."""
    if not store.current.exists():
        if list_manifests(store) and not _is_unfinished(store):
            raise _lost(store, f"{store.current}: the file is missing")
        raise NotFoundError(f"{store.path}: no snapshot yet; its creation was not finished. Type the same `knnstore create` again.")
    current = _parse_current(read_small(store.current, 4096))
    if current is None:
        raise _lost(store, f"{store.current}: its content is damaged")
    return current


def _parse_current(raw: bytes) -> tuple[int, str] | None:
    match = _CURRENT.fullmatch(raw)
    return None if match is None else (int(match[1]), match[2].decode())


def _is_unfinished(store: StoreFolder) -> bool:
    """Whether a store without CURRENT is one whose creation was cut off between its manifest and CURRENT.

    Its job is there then, to continue it, and either says that it moved what the manifest names, or has taken that back.
    """
    if list_manifests(store) != [1] or not (store.staging.is_dir() and any(store.staging.iterdir())):
        return False
    moved = b""
    for path in store.staging.glob(f"*/{MOVES_FILE}"):
        with contextlib.suppress(DamageError):
            moved += read_small(path)
    try:
        names = [record.content.uuid for record in read_manifest(store, 1).segments]
    except KnnstoreError:
        return True
    return any(name.encode() in moved or not store.segment(name).exists() for name in names)


def _lost(store: StoreFolder, what: str) -> DamageError:
    sound = newest_sound_snapshot(store)
    advice = "no other snapshot verifies"
    if sound is not None:
        advice = f"snapshot {sound} verifies: open it by --at {sound}, or go back to it by `knnstore restore {sound}`"
    return DamageError(f"{what}. Nothing was changed; {advice}.")


def list_manifests(store: StoreFolder) -> list[int]:
    """Numbers of all manifest files, ascending, whether sound or not."""
    try:
        names = [entry.name for entry in os.scandir(store.manifests)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{store.manifests}: cannot read: {error.strerror}. Check the path and its permissions.") from error
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[1-9][0-9]{0,17}\.json", name))


def newest_sound_snapshot(store: StoreFolder) -> int | None:
    """The highest number whose manifest is whole, of those that count (all, where CURRENT does not say)."""
    current = None
    with contextlib.suppress(DamageError):
        current = _parse_current(read_small(store.current, 4096))
    for number in reversed(list_manifests(store)):
        if current is not None and number > current[0]:
            continue  # an attempt that never counted
        with contextlib.suppress(KnnstoreError):  # also NotFoundError: of a link that leads nowhere
            read_manifest(store, number)
            return number
    return None


def read_manifest(store: StoreFolder, number: int, sha256: str | None = None) -> Manifest:
    """One manifest. sha256: of its bytes, where known. Raises NotFoundError, DamageError, FormatError."""
    path = store.manifest(number)
    if not path.exists():
        raise NotFoundError(f"{store.path}: no snapshot {number}. Kept: {_kept(store)}.")
    raw = read_small(path)
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise DamageError(f"{path}: its content does not match {CURRENT_FILE}. Run `knnstore verify`.")
    manifest = parse_manifest(raw, str(path))
    if manifest.snapshot != number or manifest.uuid != read_identity(store):
        raise DamageError(f"{path}: it belongs to another snapshot or store. Run `knnstore verify`.")
    return manifest


def read_newest(store: StoreFolder, number: int, sha256: str) -> Manifest:
    """The manifest that CURRENT names. Raises DamageError also where it is missing, FormatError."""
    try:
        return read_manifest(store, number, sha256)
    except NotFoundError as error:
        raise _lost(store, f"{store.manifest(number)}: the file is missing") from error


def _kept(store: StoreFolder) -> str:
    """The snapshots there are, with their tags, for a message: `1, 4 (tag:paper), 7`."""
    tags: dict[int, list[str]] = {}
    with contextlib.suppress(KnnstoreError):
        for name, tag in list_tags(store).items():
            tags.setdefault(tag.snapshot, []).append(f"{TAG_PREFIX}{name}")
    numbers = list_manifests(store)
    shown = [number for number in numbers if number in tags or number in numbers[-_SHOWN:]]
    texts = [f"{number} ({', '.join(tags[number])})" if number in tags else str(number) for number in shown]
    return (f"{len(numbers)}, among them " if len(shown) < len(numbers) else "") + (", ".join(texts) or "none")


def open_snapshot(store: StoreFolder, snapshot: int | str | None = None) -> tuple[Manifest, Pin]:
    """A snapshot (the newest where none is named) and the pin that keeps it. snapshot: a number, or `tag:NAME`.

    Raises NotFoundError, FormatError, DamageError, InvalidArgumentError; never falls back to another snapshot.
    """
    read_identity(store)
    for _ in range(_TRIES):
        number, sha256 = _find_manifest(store, snapshot)
        path = store.manifest(number)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            if _is_newest(store, number):
                raise _lost(store, f"{path}: the file is missing") from error
            if isinstance(snapshot, int):
                read_manifest(store, snapshot)  # says which are kept
            continue
        except OSError as error:
            if error.errno in NOT_PLAIN:
                raise _lost(store, f"{path}: not a plain file") from error
            raise StorageError(f"{path}: cannot read: {error.strerror}. Check the path and its permissions.") from error
        pin = Pin(fd)
        with contextlib.suppress(OSError):  # a file system without locks has no gc beside us either
            fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            try:
                return read_manifest(store, number, sha256), pin
            except DamageError as error:
                pin.release()
                raise _lost(store, str(error).rstrip(".")) from error
        pin.release()
    raise ConflictError(f"{store.path}: snapshots were removed as fast as they could be opened. Try again.")


def _is_newest(store: StoreFolder, number: int) -> bool:
    try:
        return read_current(store)[0] == number
    except DamageError:
        return False


def _find_manifest(store: StoreFolder, snapshot: int | str | None) -> tuple[int, str | None]:
    """Number of a snapshot's manifest, and its sha256 where CURRENT led to it. One that is named can be opened while CURRENT is damaged."""
    if snapshot is None:
        return read_current(store)
    if isinstance(snapshot, str):
        if not snapshot.startswith(TAG_PREFIX):
            raise InvalidArgumentError(f"snapshot {snapshot!r}: use a number, or {TAG_PREFIX}NAME.")
        number = resolve(store, snapshot.removeprefix(TAG_PREFIX)).snapshot
    else:
        number = snapshot
    try:
        newest, _ = read_current(store)
    except DamageError:
        return number, None
    if number > newest:
        raise NotFoundError(f"{store.path}: no snapshot {number}; the newest is {newest}.")  # or an attempt that was cut off
    return number, None  # its own `check` says whether it is whole


def folders_of(store: StoreFolder, manifest: Manifest) -> Iterator[tuple[Path, tuple[FileRecord, ...]]]:
    """The folders that a snapshot names, each with its files (of a segment those beside segment.json)."""
    for space in manifest.spaces:
        yield store.space(space.id), space.files
    for coarse in manifest.coarse:
        yield store.coarse(coarse.id), coarse.files
    for segment in manifest.segments:
        yield store.segment(segment.content.uuid), segment.content.files


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Name, size and sha256 of each file in a folder, by name."""
    records = []
    for path in sorted(folder.iterdir()):
        size, sha256 = sha256_file(path)
        records.append(FileRecord(name=path.name, size=size, sha256=sha256))
    return tuple(records)
