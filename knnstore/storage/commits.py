"""How a store begins, and how a snapshot is added to it: whole and durable, or not at all.

The manifest is linked under its number, then `CURRENT` is replaced: that is the commit. Both happen under LOCK.
"""

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from knnstore.errors import ConflictError, DamageError, FormatError, InvalidArgumentError, NotFoundError
from knnstore.format import COARSE, MANIFEST_MAX, MANIFESTS, SEGMENTS, SPACES, STAGING, TAGS, WRITER_FEATURES
from knnstore.storage.catalog import StoreFolder, identity_bytes, list_manifests, read_current, read_identity, read_newest
from knnstore.storage.files import disk, hold_lock, replace_file, write_file
from knnstore.storage.manifest import Manifest
from knnstore.storage.manifest_json import SNAPSHOT_MAX, manifest_bytes

__all__ = ["check_features", "commit", "commit_over_damage", "lay_foundation", "write_snapshot"]

Build = Callable[[int, tuple[int, str] | None, Manifest | None], Manifest]


def lay_foundation(store: StoreFolder) -> str:
    """Makes the folders and the identity of a new store; where that was begun before, takes it up. Returns the store's uuid."""
    disk.make_folder(store.path)
    disk.sync_folder(store.path.absolute().parent)
    if not store.identity.exists():
        replace_file(store.identity, identity_bytes(uuid.uuid4().hex))
    for name in (MANIFESTS, SPACES, COARSE, SEGMENTS, TAGS, STAGING):
        disk.make_folder(store.path / name)
    disk.sync_folder(store.path)
    return read_identity(store)


def check_features(store: StoreFolder, manifest: Manifest) -> None:
    """Raises FormatError where a snapshot may only be changed, or taken over, by a later version."""
    unknown = sorted(set(manifest.writer_features) - WRITER_FEATURES)
    if unknown:
        names = ", ".join(unknown)[:80]
        raise FormatError(f"{store.path}: changing it needs {names}, which this knnstore does not have. Install a newer one.")


def commit(
    store: StoreFolder,
    build: Build,
    *,
    staged: Iterable[tuple[Path, Path]] = (),
) -> Manifest:
    """Makes one snapshot of what was staged: durable and visible, or not at all.

    build: (number, its parent's number and sha256, the newest snapshot or None) → the manifest; called while nobody else commits, and
    free to raise ConflictError. staged: (from, to) folders whose content is synced already; one that is at its place already stays.
    Raises FormatError where the newest snapshot has features unknown here, StorageError where the disk fails (the store is then as
    before, or, if it failed in the last step, as after).
    """
    with hold_lock(store.lock, purpose="committing to this store", wait=True):
        parent = None
        with contextlib.suppress(NotFoundError):
            parent = read_current(store)
        current = read_newest(store, *parent) if parent else None  # nothing is built on a damaged one
        if current is not None:
            check_features(store, current)
        number = parent[0] if parent else 0
        for dead in [n for n in list_manifests(store) if n > number]:
            disk.remove(store.manifest(dead))  # an attempt that was cut off before it counted
        manifest = build(number + 1, parent, current)
        _place(staged)
        write_snapshot(store, manifest)
    return manifest


def commit_over_damage(store: StoreFolder, build: Build, parent: tuple[int, str]) -> Manifest:
    """As `commit`, where CURRENT or the manifest that it names is damaged: the new snapshot becomes the newest, and nothing is removed.

    parent: number and sha256 of the manifest that it continues. Its number is above that of every manifest there is, since it is not
    known which of them counted. Raises ConflictError where another command has put the store right meanwhile, StorageError.
    """
    with hold_lock(store.lock, purpose="committing to this store", wait=True):
        numbers = [number for number in list_manifests(store) if number < SNAPSHOT_MAX]  # a file that is called so is no manifest
        with contextlib.suppress(DamageError, NotFoundError):
            current = read_current(store)
            numbers += [current[0]] if current[0] < SNAPSHOT_MAX else []
            read_newest(store, *current)
            raise ConflictError(
                f"{store.path}: snapshot {current[0]} is whole; another command has restored it. Look at it, then try again."
            )
        manifest = build(max(numbers) + 1, parent, None)
        write_snapshot(store, manifest)
    return manifest


def write_snapshot(store: StoreFolder, manifest: Manifest) -> None:
    """A manifest, and CURRENT naming it: the commit itself. The caller holds LOCK, and what the manifest names is in its place."""
    raw = manifest_bytes(manifest)
    if len(raw) > MANIFEST_MAX:
        raise InvalidArgumentError(
            f"{store.path}: its manifest would have {len(raw)} bytes, {MANIFEST_MAX} are the most. `knnstore compact` takes the rows out "
            "that are dead, which it lists."
        )
    target = store.manifest(manifest.snapshot)
    temporary = target.with_suffix(".json.tmp")
    write_file(temporary, raw)
    disk.link(temporary, target)
    disk.remove(temporary)
    disk.sync_folder(store.manifests)
    replace_file(store.current, f"{manifest.snapshot} {hashlib.sha256(raw).hexdigest()}\n".encode())


def _place(staged: Iterable[tuple[Path, Path]]) -> None:
    parents = set()
    for source, target in staged:
        if not target.parent.exists():  # empty folders are lost in some ways of copying
            disk.make_folder(target.parent)
            disk.sync_folder(target.parent.parent)
        if not target.exists():
            disk.rename(source, target)
        parents.add(target.parent)
    for parent in sorted(parents):
        disk.sync_folder(parent)
