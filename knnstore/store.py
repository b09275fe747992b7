"""`Datastore`: one snapshot of a datastore, open for reading. It delegates; the work is done in the modules it names."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import ArrayLike

from knnstore import filters, inspection
from knnstore.errors import InvalidArgumentError, NotFoundError
from knnstore.neighbors import Neighbors
from knnstore.search import check_keys, search
from knnstore.storage.catalog import Pin, StoreFolder, open_snapshot
from knnstore.storage.manifest import Manifest
from knnstore.storage.segment import Segment, open_segments
from knnstore.storage.stack import Stack, stacks_of

__all__ = ["Datastore", "DocumentEntry", "open_made", "open_store"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentEntry:
    """A document of a snapshot. entries: how many of its tokens have a key."""

    id: str
    domain: str
    source: str
    entries: int
    metadata: dict[str, Any]


class Datastore:
    """One snapshot of a datastore: it never changes, whatever is committed after it was opened.

    Threads may share it. After `fork`, open it again in the child. Use it as a context manager, or `close` it.
    """

    def __init__(self, path: Path, manifest: Manifest, pin: Pin) -> None:
        self.path = path
        self.manifest = manifest
        self._folder = StoreFolder(path.absolute())  # files are opened at first use, perhaps after a chdir
        self._pin: Pin | None = pin
        self._pid = os.getpid()

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in the manifest's order; files are opened at first use."""
        return open_segments(self._folder, self.manifest)

    @cached_property
    def stacks(self) -> list[Stack]:
        """How the segments are searched together."""
        return stacks_of(self.segments)

    @property
    def snapshot(self) -> int:
        return self.manifest.snapshot

    @property
    def dim(self) -> int:
        return self.manifest.key.dim

    @property
    def domains(self) -> list[str]:
        return self.manifest.domains()

    def __len__(self) -> int:
        """Entries that count."""
        return sum(record.n_live() for record in self.manifest.segments)

    def search(
        self,
        keys: ArrayLike,
        *,
        k: int | None = None,
        nprobe: int | None = None,
        domains: filters.Domains | None = None,
        where: filters.Where | None = None,
        exclude: str | filters.RowRange | Iterable[str | filters.RowRange] | None = None,
        exact: bool = False,
        places: bool = True,
    ) -> Neighbors:
        """The k nearest entries of each key.

        keys: (n, dim) or (dim,) numbers. k, nprobe: None for the manifest's defaults. domains: names, or {name: weight};
        others are not searched. where: metadata that documents must have. exclude: document ids and row ranges.
        exact: by brute force over kept keys. places: where only distances and values are wanted, False saves the rest, and leaves entries
        of equal distance in any order. Raises InvalidArgumentError, NotFoundError, DamageError.
        """
        segments = self._open_segments()
        weights = filters.domain_weights(segments, domains)
        allowed = filters.allowed_rows(segments, weights=weights, where=where, exclude=exclude)
        weighs = weights is not None and any(weight not in (0.0, 1.0) for weight in weights.values())
        hits = search(
            segments,
            allowed,
            check_keys(keys, self.dim),
            k=self.manifest.k if k is None else k,
            nprobe=self.manifest.nprobe if nprobe is None else nprobe,
            exact=exact,
            stacks=self.stacks,
            places=places or weighs,
        )
        log_weights = filters.log_weights(segments, weights, hits.segments, hits.rows) if weighs else None
        return Neighbors(hits.distances, hits.values, hits.segments, hits.rows, log_weights, segments)

    def documents(self) -> Iterator[DocumentEntry]:
        """All documents whose entries count, in row order; a document of several parts once."""
        for found in filters.live_documents(self._open_segments()):
            yield DocumentEntry(**found)

    def info(self) -> dict[str, Any]:
        """Sizes, spaces, checkpoint and calibration, as `knnstore info --json` prints them."""
        return inspection.store_info(self.path, self.manifest)

    def append(self, corpora: str | Path | Sequence[str | Path], **options: Any) -> "Datastore":
        """As `knnstore.append`, to this datastore as it is now. Returns it at the next snapshot; this handle stays as it was."""
        import knnstore  # the front door: what adds text is above this floor

        return knnstore.append(self._folder.path, corpora, **options)

    def close(self) -> None:
        """Gives the snapshot free. The datastore cannot be used after."""
        if "segments" in self.__dict__:
            for segment in self.segments:
                segment.close()
        if self._pin is not None and self._pid == os.getpid():
            self._pin.release()
        self._pin = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Datastore {self.path} snapshot {self.snapshot}: {len(self)} entries>"

    def _open_segments(self) -> tuple[Segment, ...]:
        if self._pin is None:
            raise InvalidArgumentError(f"{self.path}: this datastore was closed. Open it again.")
        if self._pid != os.getpid():
            raise InvalidArgumentError(f"{self.path}: opened in process {self._pid}, used in {os.getpid()}. Open it again after a fork.")
        return self.segments


def open_store(path: str | Path, *, snapshot: int | str | None = None) -> Datastore:
    """Opens a datastore at its newest snapshot, or at the one named by its number or as `tag:NAME`.

    Raises NotFoundError where there is none, FormatError for a later format, DamageError for a damaged one, InvalidArgumentError.
    """
    folder = Path(path)
    manifest, pin = open_snapshot(StoreFolder(folder), snapshot)
    return Datastore(folder, manifest, pin)


def open_made(path: str | Path, snapshot: int) -> Datastore:
    """The snapshot that was made, or the newest where a gc has removed it already."""
    try:
        return open_store(path, snapshot=snapshot)
    except NotFoundError:
        return open_store(path)
