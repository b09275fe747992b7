"""KNNSTORE, CURRENT and the manifests, as `verify` looks at them."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from knnstore.errors import ConflictError, DamageError, FormatError, NotFoundError
from knnstore.format import MANIFEST_MAX
from knnstore.storage.catalog import StoreFolder, list_manifests, read_current, read_identity
from knnstore.storage.manifest import Manifest
from knnstore.storage.manifest_json import canonical, parse_manifest
from knnstore.storage.parse import parse_json_bytes
from knnstore.verification.files import PIECE, FindingError, Findings, check_plain, open_plain

__all__ = ["CatalogCheck"]

_PINNED = 128  # manifests held while their files are read; of more than these, a file that a gc removed is told by its manifest
_TRIES = 20  # times that the newest snapshot may be replaced and removed while it is looked for


class CatalogCheck:
    """kept: paths of the manifests that count, whether sound or not. n_damaged: how many are not. newest: of the sound ones.

    sound: numbers of those that are whole, descending. current: what CURRENT says, None where it is damaged; believed: whether the
    manifest that it names is there and the one it means. Where it is not, every manifest counts.
    """

    def __init__(self, store: StoreFolder, findings: Findings, pins: contextlib.ExitStack) -> None:
        """pins: what holds the manifests, so that no gc removes what they name."""
        self._store, self._findings, self._pins = store, findings, pins
        self._n_pinned = 0
        self.kept: set[Path] = set()
        self.n_damaged = 0
        self.newest: Manifest | None = None
        self.sound: list[int] = []
        self.current: tuple[int, str] | None = None
        self.believed = False
        self._parents: dict[int, tuple[int, str]] = {}  # snapshot → its child, and the sha256 that the child gives
        self._uuids: dict[int, str] = {}  # of the store, in each sound manifest

    def manifests(self) -> Iterator[Manifest]:
        """Every sound manifest, newest first. Raises NotFoundError where there is no snapshot, FormatError for a later format."""
        store = self._store
        if not store.path.is_dir():
            raise NotFoundError(f"{store.path}: no such datastore. Name one with --store, or make one with `knnstore create`.")
        if not any(map(os.path.lexists, (store.identity, store.current, store.manifests))):
            raise NotFoundError(f"{store.path}: not a datastore (it has no {store.identity.name} file). Check the path.")
        identity, later = None, None
        try:
            identity = self._read_identity()
        except FormatError as error:
            later = error
        yield from self._read_manifests(identity)
        if later is not None:
            if self.newest is None:
                raise later
            self._findings.add("identity", store.identity, f"it names a later format; snapshot {self.newest.snapshot} does not")
        self._compare_uuids(identity)

    def _read_identity(self) -> str | None:
        """The store's uuid; None where KNNSTORE is damaged. Raises FormatError."""
        path = self._store.identity
        identity: str | None = None
        with self._findings.of(path, "identity"):
            size = check_plain(path).st_size
            identity = read_identity(self._store)
            self._findings.checked(size)
        return identity

    def _read_current(self) -> tuple[int, str] | None:
        """Number and sha256 of the newest snapshot; None where CURRENT is damaged. Raises NotFoundError where there is no snapshot."""
        path = self._store.current
        current: tuple[int, str] | None = None
        try:
            with self._findings.of(path, "current"):
                there = os.path.lexists(path)
                size = check_plain(path).st_size if there else 0
                try:
                    current = read_current(self._store)
                except DamageError as error:
                    if there:
                        raise
                    raise FindingError("missing", self._findings.plain_detail(error, path)) from error
                self._findings.checked(size)
        except NotFoundError:
            if not self._findings.problems:
                raise
        return current

    def _load_manifest(self, number: int) -> bytes | None:
        """A manifest's bytes, and a pin on it; None where it was removed since it was listed. Raises FindingError, OSError."""
        with contextlib.ExitStack() as stack:
            pins = self._pins if self._n_pinned < _PINNED else stack
            try:
                fd = pins.enter_context(open_plain(self._store.manifest(number)))
            except FindingError as finding:
                if finding.kind == "missing":
                    return None
                raise
            except FileNotFoundError:
                return None
            self._n_pinned += 1
            with contextlib.suppress(OSError):  # a file system without locks has no gc beside us either
                fcntl.flock(fd, fcntl.LOCK_SH)
            status = os.fstat(fd)
            if not status.st_nlink:
                return None
            if status.st_size > MANIFEST_MAX:
                raise FindingError("size", f"{status.st_size} bytes, {MANIFEST_MAX} are the most such a file may have")
            raw = b"".join(iter(lambda: os.read(fd, PIECE), b""))
            self._findings.checked(len(raw))
            return raw

    def _newest_manifest(self) -> tuple[tuple[int, str] | None, bytes | None]:
        """What CURRENT says and the bytes of the manifest it names; None for what is damaged."""
        for _ in range(_TRIES):
            current = self._read_current()
            if current is None:
                return None, None
            raw: bytes | None = None
            with self._findings.of(self._store.manifest(current[0])) as outcome:
                raw = self._load_manifest(current[0])
                if raw is None and self._read_current() == current:
                    raise FindingError("missing", "CURRENT names this file, and it is not there")
            if raw is not None or not outcome.sound:
                return current, raw
        raise ConflictError(f"{self._store.path}: snapshots were removed as fast as they could be opened. Try again.")

    def _read_manifests(self, identity: str | None) -> Iterator[Manifest]:
        """The sound ones of all kept manifests, newest first, each compared with what its child says of it."""
        current, newest = self._newest_manifest()
        self.current = current
        self.believed = current is not None and newest is not None and hashlib.sha256(newest).hexdigest() == current[1]
        self.n_damaged += current is not None and newest is None
        for number in reversed(list_manifests(self._store)):
            if self.believed and current is not None and number > current[0]:
                continue  # an attempt that never counted
            path, manifest = self._store.manifest(number), None
            self.kept.add(path)
            is_current = current is not None and number == current[0]
            with self._findings.of(path, "manifest") as outcome:
                raw = newest if is_current else self._load_manifest(number)
                if raw is not None:
                    manifest = self._parse_manifest(number, raw, identity, current[1] if current is not None and is_current else None)
            if manifest is not None and outcome.sound:
                self.newest = self.newest or manifest
                self.sound.append(number)
                yield manifest
            self.n_damaged += not outcome.sound

    def _parse_manifest(self, number: int, raw: bytes, identity: str | None, named: str | None) -> Manifest:
        """identity: uuid of the store, if known. named: the sha256 that CURRENT gives, if it names this manifest.

        Raises FindingError, DamageError; FormatError where the newest snapshot is of a later format.
        """
        path, sha256 = self._store.manifest(number), hashlib.sha256(raw).hexdigest()
        try:
            manifest = parse_manifest(raw, str(path))
        except FormatError as error:
            if sha256 == named:
                raise
            raise FindingError("manifest", self._findings.plain_detail(error, path)) from error
        if canonical(parse_json_bytes(raw, str(path))) != raw:
            raise FindingError("manifest", "it is not the canonical JSON that was written")
        child, given = self._parents.get(number, (0, sha256))
        if manifest.snapshot != number or given != sha256:
            of = f"snapshot {manifest.snapshot}, sha256 {sha256[:16]}…"
            raise FindingError("manifest", f"it is {of}" + (f"; snapshot {child} names {given[:16]}… as its parent" if child else ""))
        if (manifest.parent is None) != (number == 1) or (manifest.parent is not None and manifest.parent[0] >= number):
            raise FindingError(
                "manifest", f"it names {'no parent' if manifest.parent is None else f'snapshot {manifest.parent[0]} as its parent'}"
            )
        if named not in (None, sha256):
            if manifest.uuid != identity:
                raise FindingError("manifest", f"it is of store {manifest.uuid}, and not the one whose sha256 CURRENT gives")
            self._findings.add("current", self._store.current, f"it gives sha256 {named}, but {path.name} is whole and has {sha256}")
        self._uuids[number] = manifest.uuid
        if manifest.parent is not None and identity in (None, manifest.uuid):  # one of another store says nothing of this one's past
            self._parents[manifest.parent[0]] = (number, manifest.parent[1])
        return manifest

    def _compare_uuids(self, identity: str | None) -> None:
        """KNNSTORE and all manifests name the same store."""
        found = set(self._uuids.values())
        if identity is not None and len(found) == 1 and identity not in found:
            self._findings.add("identity", self._store.identity, f"it is of store {identity}, its snapshots are of {found.pop()}")
            return
        expected = identity or (self.newest.uuid if self.newest is not None else None)
        for number, uuid in self._uuids.items():
            if uuid != expected:
                self._findings.add("manifest", self._store.manifest(number), f"it is of store {uuid}, this is {expected}")
