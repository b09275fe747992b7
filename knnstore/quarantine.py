"""`quarantine/`: where `repair` puts what is damaged, each thing at its path below the number of a snapshot, and what it writes down."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from knnstore.errors import DamageError
from knnstore.format import QUARANTINE
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.files import disk, replace_file
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import parse_json_bytes, parse_object, parse_size, parse_text, read_small

__all__ = ["Losses", "LostDocument", "Moved", "Quarantine", "unfinished_losses"]

LOST_FILE = "lost.jsonl"  # what a repair lost, one thing a line
_UNFINISHED = "unfinished.jsonl"  # the same, until the repair has ended


@dataclass(frozen=True, kw_only=True, slots=True)
class LostDocument:
    """A document that a repair loses. domain: None where only a damaged manifest knew it. entries: of its parts that can be read."""

    domain: str | None
    id: str
    entries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What a repair loses. documents: by name. unnamed: by domain, how many more, whose names cannot be read. snapshots: numbers of
    those newer than the one gone on from."""

    documents: tuple[LostDocument, ...]
    unnamed: dict[str, int]
    snapshots: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.documents or self.unnamed or self.snapshots)

    def and_also(self, other: "Losses") -> "Losses":
        """Both together; what is in both once."""
        known = set(self.documents)
        more = tuple(document for document in other.documents if document not in known)
        unnamed = {
            domain: max(self.unnamed.get(domain, 0), other.unnamed.get(domain, 0)) for domain in sorted({*self.unnamed, *other.unnamed})
        }
        snapshots = tuple(sorted({*self.snapshots, *other.snapshots}))
        return Losses(documents=self.documents + more, unnamed=unnamed, snapshots=snapshots)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What is put aside. path, to: in the store; why: in words."""

    path: str
    to: str
    why: str


class Quarantine:
    """The place in a store for what one repair puts aside. dry_run: nothing is moved, only told."""

    def __init__(self, store: StoreFolder, number: int, *, dry_run: bool) -> None:
        self._store, self._dry_run = store, dry_run
        self.folder = store.path / QUARANTINE / str(number)
        self.moved: list[Moved] = []

    def take(self, path: Path, why: str) -> None:
        """Moves a file, folder or link, at once durable; nothing where there is none."""
        target = self._target(path, why)
        if target is not None:
            disk.rename(path, target)
            disk.sync_folder(target.parent)  # first: a power cut may leave both names, but not none
            disk.sync_folder(path.parent)

    def take_copy(self, path: Path, why: str) -> None:
        """The same for a file that is about to be replaced: it keeps its name until then."""
        if path.is_symlink() or not path.is_file():
            self.take(path, why)
            return
        target = self._target(path, why)
        if target is not None:
            disk.link(path, target)
            disk.sync_folder(target.parent)

    def _target(self, path: Path, why: str) -> Path | None:
        """Where a thing goes, its folder made; None where there is nothing to move, or nothing is to be moved."""
        if not os.path.lexists(path):
            return None
        name, number = path.relative_to(self._store.path), 0
        target = self.folder / name
        while os.path.lexists(target):  # an earlier repair of this snapshot put another one there
            number += 1
            target = self.folder / name.with_name(f"{name.name}.{number}")
        self.moved.append(Moved(path=name.as_posix(), to=target.relative_to(self._store.path).as_posix(), why=why))
        if self._dry_run:
            return None
        self._make(target.parent)
        return target

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            disk.make_folder(folder)
            while folder != self._store.path:
                folder = folder.parent
                disk.sync_folder(folder)

    def write_down(self, losses: Losses) -> None:
        """What is lost, before it is: so that a kill does not take the knowledge of it away."""
        if losses and not self._dry_run:
            self._make(self.folder)
            lines = [{"domain": item.domain, "entries": item.entries, "id": item.id} for item in losses.documents]
            lines += [{"domain": domain, "documents": n} for domain, n in losses.unnamed.items()]
            lines += [{"snapshot": number} for number in losses.snapshots]
            replace_file(self.folder / _UNFINISHED, b"".join(map(canonical, lines)))

    def finish(self) -> None:
        """Marks what was written down, now or by repairs that were killed, as what came to pass."""
        for path in [] if self._dry_run else _unfinished(self._store):
            disk.rename(path, path.with_name(LOST_FILE))
            disk.sync_folder(path.parent)


def unfinished_losses(store: StoreFolder) -> Losses:
    """What repairs that were killed had written down."""
    losses = Losses(documents=(), unnamed={}, snapshots=())
    for path in _unfinished(store):
        with contextlib.suppress(DamageError):
            losses = losses.and_also(_read(path))
    return losses


def _unfinished(store: StoreFolder) -> list[Path]:
    folder = store.path / QUARANTINE
    return sorted(folder.glob(f"*/{_UNFINISHED}")) if folder.is_dir() else []


def _read(path: Path) -> Losses:
    documents, unnamed, snapshots, at = [], {}, [], str(path)
    for line in read_small(path).splitlines():
        names = ("domain", "documents", "entries", "id", "snapshot")
        fields = parse_object(parse_json_bytes(line, at), at, required=(), optional=names)
        domain = None if fields["domain"] is None else parse_text(fields["domain"], f"{at}.domain")
        if fields["id"] is not None:
            name = parse_text(fields["id"], f"{at}.id")
            documents.append(LostDocument(domain=domain, id=name, entries=parse_size(fields["entries"], f"{at}.entries")))
        elif fields["snapshot"] is not None:
            snapshots.append(parse_size(fields["snapshot"], f"{at}.snapshot"))
        elif domain is not None:
            unnamed[domain] = parse_size(fields["documents"], f"{at}.documents")
    return Losses(documents=tuple(documents), unnamed=unnamed, snapshots=tuple(snapshots))
