"""What a snapshot is: its segments, spaces, coarse quantizers and checkpoint. `manifest_json` turns it into a file and back."""

from dataclasses import dataclass
from typing import Any

from knnstore.errors import InvalidArgumentError
from knnstore.format import LABEL_BASE, ROTATIONS, SEGMENT_ENTRIES, Codec
from knnstore.storage.calibration import Calibration
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.rows import RangeSet, as_ranges

__all__ = [
    "SEED_MAX",
    "CoarseRecord",
    "FileRecord",
    "IndexOptions",
    "Manifest",
    "Operation",
    "SegmentContent",
    "SegmentRecord",
    "SpaceRecord",
    "WindowRule",
]

SEED_MAX = (1 << 31) - 1 - 1_234  # faiss seeds its k-means with this much more, as a 32-bit integer


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file by its name in its folder, its size in bytes and its sha256 (64 hex digits)."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """How keys become codes and lists: chosen when a store is made, and kept by what is added to it.

    codec: `pq4` (4-bit codes, scanned by FastScan) or `pq8`. rotation: `random`, `opq` or `none`. keep_keys: None, `f16`,
    `bf16` or `f32`, for exact search. seed: of rotation, sample and k-means. segment_entries: entries in a segment at most.
    """

    codec: str = "pq4"
    rotation: str = "random"
    keep_keys: str | None = None
    seed: int = 0
    segment_entries: int = SEGMENT_ENTRIES

    def __post_init__(self) -> None:
        if self.codec not in ("pq4", "pq8"):
            raise InvalidArgumentError(f"codec {self.codec!r}: use pq4 or pq8.")
        if self.rotation not in ROTATIONS:
            raise InvalidArgumentError(f"rotation {self.rotation!r}: use one of {', '.join(ROTATIONS)}.")
        if self.keep_keys not in (None, "f16", "bf16", "f32"):
            raise InvalidArgumentError(f"keep_keys {self.keep_keys!r}: use f16, bf16 or f32.")
        if not 0 <= self.seed <= SEED_MAX:
            raise InvalidArgumentError(f"seed {self.seed}: use 0 to {SEED_MAX}.")
        if not 1 <= self.segment_entries <= 1 << 32:
            raise InvalidArgumentError(f"segment_entries {self.segment_entries}: use 1 to {1 << 32}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRule:
    """How documents were cut for the model: context and stride in tokens."""

    context: int
    stride: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentContent:
    """What a segment's own `segment.json` says.

    coarse: None for one flat list. keys: type of kept keys, None without. dtype: what the model computed in, None where the
    keys came from elsewhere. distortion: mean squared distance between keys and their decoded codes. label_base: what its labels say row
    0 is.
    """

    uuid: str
    space: str
    coarse: str | None
    nlist: int
    entries: int
    documents: int
    values: str
    keys: str | None
    text: bool
    dtype: str | None
    windows: WindowRule | None
    distortion: float
    files: tuple[FileRecord, ...]
    label_base: int = 0

    def size_of(self, name: str) -> int:
        """Bytes of one of its files; 0 where it has none of that name."""
        return next((file.size for file in self.files if file.name == name), 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRecord:
    """A segment in a snapshot.

    runs: (domain, first row, stop row) in row order. dead: rows that no longer count. sha256: of its segment.json.
    """

    content: SegmentContent
    runs: tuple[tuple[str, int, int], ...]
    dead: tuple[tuple[int, int], ...]
    sha256: str

    def domain_ranges(self, domain: str) -> RangeSet:
        """The rows of one domain, dead ones included."""
        return as_ranges([(first, stop) for name, first, stop in self.runs if name == domain])

    def dead_ranges(self) -> RangeSet:
        return as_ranges(self.dead)

    def n_live(self) -> int:
        """Entries that count."""
        return self.content.entries - sum(stop - first for first, stop in self.dead)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceRecord:
    """A space in a snapshot; distortion: of its training sample."""

    id: str
    codec: Codec
    n_sub: int
    rotation: str
    distortion: float
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoarseRecord:
    """A coarse quantizer in a snapshot."""

    id: str
    space: str
    nlist: int
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """What made a snapshot: the command, its arguments and what it counted (JSON values)."""

    name: str
    arguments: dict[str, Any]
    counts: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One snapshot.

    tokens, windows: the rules by which text became tokens and windows, None where entries came from elsewhere. index: how keys
    become codes in what is added. documents: how many each domain has.
    k, nprobe: of a search that does not say. writer_features: what must be understood to build on it.
    """

    uuid: str
    snapshot: int
    parent: tuple[int, str] | None
    time: str
    operation: Operation
    checkpoint: Checkpoint
    key: KeyLayer
    tokens: dict[str, Any] | None
    windows: WindowRule | None
    index: IndexOptions
    spaces: tuple[SpaceRecord, ...]
    coarse: tuple[CoarseRecord, ...]
    segments: tuple[SegmentRecord, ...]
    documents: dict[str, int]
    calibration: Calibration | None
    k: int
    nprobe: int
    writer_features: tuple[str, ...] = ()

    @property
    def reader_features(self) -> tuple[str, ...]:
        """What must be understood to read it."""
        return (LABEL_BASE,) if any(record.content.label_base for record in self.segments) else ()

    def domains(self) -> list[str]:
        """Names of all domains that have documents, sorted."""
        return sorted(self.documents)
