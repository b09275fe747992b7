"""How a store grows: which codes and lists new entries get, and which small segments are written again as one."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.build import Index, StagedSegment, choose_codec, sample_size, segment_record, staged_segment
from knnstore.changes import DocumentKey, Staged
from knnstore.filters import live_records
from knnstore.format import Codec
from knnstore.joining import join_segments, kept_type, size_tiers
from knnstore.progress import SILENT, Progress
from knnstore.sampling import mean_distortion, sample_keys, sample_rotated
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.coarse import Coarse, choose_nlist, is_listed, save_coarse, train_coarse
from knnstore.storage.commits import check_features
from knnstore.storage.files import disk
from knnstore.storage.manifest import IndexOptions, Manifest, SegmentRecord
from knnstore.storage.rows import RangeSet, as_ranges
from knnstore.storage.segment import Segment, open_index, open_segments
from knnstore.storage.space import Space, raw_space, train_space

__all__ = ["Ground", "settle", "without_rows"]

Keys = NDArray[np.float32]

DRIFT = 1.25  # new text's distortion over the training sample's, above which a space of its own is tried (docs/design.md, Measured)
MEASURED_KEYS = 4_096  # of a sample, by which spaces are compared


@dataclass(frozen=True)
class Ground:
    """The snapshot that something is added to, open for reading."""

    manifest: Manifest
    segments: tuple[Segment, ...]
    spaces: Mapping[str, Space]
    coarse: Mapping[str, Coarse]

    @classmethod
    def of(cls, store: StoreFolder, manifest: Manifest) -> "Ground":
        """The ground of one snapshot. Raises FormatError where it may not be changed."""
        check_features(store, manifest)
        spaces, coarse = open_index(store, manifest)
        return cls(manifest, open_segments(store, manifest, (spaces, coarse)), spaces, coarse)

    def close(self) -> None:
        """Gives its files free."""
        for segment in self.segments:
            segment.close()

    def known_index(self) -> frozenset[str]:
        """Ids of the spaces and coarse quantizers that the store has."""
        return frozenset(self.spaces) | frozenset(self.coarse)

    def known_content(self, domain: str, document_id: str) -> str | None:
        """Content hash of a document; None where there is none of that id in the domain, "" where it was not hashed."""
        found = None
        for _, of_domain, record in live_records(self.segments, document_id):
            if of_domain == domain:
                found = record.content_hash or found or ""
        return found

    def rows_of(self, documents: Sequence[DocumentKey]) -> dict[str, RangeSet]:
        """Live rows of documents, by uuid of the segment."""
        rows: dict[str, list[tuple[int, int]]] = {}
        for key in documents:
            for number, domain, record in live_records(self.segments, key.id):
                if domain == key.domain:
                    uuid = self.segments[number].content.uuid
                    rows.setdefault(uuid, []).append((record.first_row, record.first_row + record.n_entries))
        return {uuid: as_ranges(pairs) for uuid, pairs in rows.items()}

    def choose_index(self, sample: Keys, n_new: int) -> Index:
        """Space and lists for n_new entries, by a sample of their keys, (n, dim) float32: what the store has where that serves them."""
        options = self.manifest.index
        space = self._choose_space(sample, n_new, options)
        if not is_listed(n_new, self.largest_coarse(space)):
            return space, None
        return space, self.choose_coarse(space, space.rotate(sample), n_new + self.n_live(space))

    def n_live(self, space: Space) -> int:
        """Entries of a space that count."""
        return sum(record.n_live() for record in self.manifest.segments if record.content.space == space.id)

    def largest_coarse(self, space: Space) -> Coarse | None:
        """The coarse quantizer of a space with the most lists."""
        return max((item for item in self.coarse.values() if item.space == space.id), key=lambda item: item.nlist, default=None)

    def _choose_space(self, sample: Keys, n_new: int, options: IndexOptions) -> Space:
        trained = [space for space in self.spaces.values() if space.codec is not Codec.RAW]
        if not trained:
            return self._outgrow_raw(sample, n_new, options)
        some = sample[:: max(1, len(sample) // MEASURED_KEYS)]
        measured = [mean_distortion(space, some) for space in trained]
        best = int(np.argmin(measured))
        codec = choose_codec(n_new, options)
        if codec is Codec.RAW or measured[best] <= DRIFT * trained[best].distortion:
            return trained[best]
        candidate = train_space(sample, codec=codec, rotation=options.rotation, seed=options.seed)
        return candidate if DRIFT * mean_distortion(candidate, some) < measured[best] else trained[best]

    def _outgrow_raw(self, sample: Keys, n_new: int, options: IndexOptions) -> Space:
        """Raw keys for as long as there are too few of them to train on."""
        raw = [segment for segment in self.segments if segment.space.codec is Codec.RAW]
        codec = choose_codec(n_new + sum(segment.record.n_live() for segment in raw), options)
        if codec is Codec.RAW:
            return raw_space(self.manifest.key.dim)
        keys = sample_keys(raw, sum(segment.record.n_live() for segment in raw), seed=options.seed)
        return train_space(np.concatenate((keys, sample)) if raw else sample, codec=codec, rotation=options.rotation, seed=options.seed)

    def choose_coarse(self, space: Space, rotated: Keys, n_all: int) -> Coarse:
        """The largest coarse quantizer of a space, or a new one where n_all entries have outgrown it. rotated: a sample of what comes."""
        known = self.largest_coarse(space)
        nlist = choose_nlist(n_all)
        if known is not None and nlist < 2 * known.nlist:
            return known
        old = [segment for segment in self.segments if segment.space.id == space.id]
        n_old = self.n_live(space)
        wanted = sample_size(n_all, space.dim)
        n_decoded = min(n_old, wanted * n_old // max(1, n_all))
        seed = self.manifest.index.seed
        sample = [sample_rotated(old, space, n_decoded, seed=seed)] if old else []
        sample.append(rotated[: max(1, wanted - n_decoded)])
        return train_coarse(np.concatenate(sample), space=space.id, nlist=nlist, seed=seed)


def settle(
    job: Path,
    ground: Ground,
    new: Sequence[StagedSegment],
    index: Index,
    *,
    dying: Mapping[str, RangeSet] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The segments of a change that adds new ones: those, or fewer that take in small segments of the store too.

    dying: rows of the store that the change makes dead; what is written again leaves them out. Costs what is added, times the
    logarithm of the store's size over many calls. Returns the fields `segments` and `replaced` of a `Change`.
    """
    space, chosen = index
    for leftover in (job / "index" / "coarse").iterdir():  # of an attempt that a kill, or a commit of others, cut off
        if chosen is None or leftover.name != chosen.id:
            disk.remove_tree(leftover)
    with ExitStack() as stack:
        added = {}
        for item in new:
            record = replace(segment_record(item.folder, item.runs), dead=item.dead)
            if record.n_live():
                added[record.content.uuid] = Segment(item.folder, record, space, index[1])
                stack.callback(added[record.content.uuid].close)
        kept = {segment.content.uuid: without_rows(segment, (dying or {}).get(segment.content.uuid)) for segment in ground.segments}
        segments = {uuid: segment for uuid, segment in {**kept, **added}.items() if segment.record.n_live()}
        groups = _groups(list(segments.values()), space, segment_entries=ground.manifest.index.segment_entries)
        groups += [[uuid] for uuid, segment in added.items() if segment.record.dead and not any(uuid in group for group in groups)]
        joined, rewritten = [], set()
        total = sum(segments[uuid].record.n_live() for group in groups for uuid in group)
        with (progress if groups else SILENT).stage("joining small segments", total=total, unit="entries") as stage:
            for group in groups:
                parts = [segments[uuid] for uuid in group]
                coarse = _coarse_of(job, ground, parts, index)
                keys = kept_type(parts, ground.manifest.index.keep_keys)
                staged = join_segments(job / "segments", parts, space=space, coarse=coarse, keys=keys, advance=stage.advance)
                joined.append(staged_segment(staged))
                rewritten.update(group)
        seen = {record.content.uuid: record for record in ground.manifest.segments}
        come: list[Staged[SegmentRecord]] = [staged_segment(item) for item in new if item.folder.name in added.keys() - rewritten]
        return {"segments": [*joined, *come], "replaced": [seen[uuid] for uuid in seen if uuid in rewritten]}


def without_rows(segment: Segment, dying: RangeSet | None) -> Segment:
    """A segment as it is when more of its rows are dead."""
    if dying is None or not len(dying):
        return segment
    ranges = as_ranges([*segment.record.dead, *map(tuple, dying.tolist())])
    record = replace(segment.record, dead=tuple((int(first), int(stop)) for first, stop in ranges))
    return Segment(segment.folder, record, segment.space, segment.coarse)


def _groups(segments: Sequence[Segment], space: Space, *, segment_entries: int) -> list[list[str]]:
    """Uuids of segments to be written as one each. Raw keys of a store that has a quantizer now are encoded."""
    raw = [segment for segment in segments if segment.space.codec is Codec.RAW and space.codec is not Codec.RAW]
    n_raw = sum(segment.record.n_live() for segment in raw)
    groups = [[segment.content.uuid for segment in raw]] if raw and n_raw <= segment_entries else []
    records = [segment.record for segment in segments if segment not in raw and segment.space.id == space.id]
    groups += [[record.content.uuid for record in group] for group in size_tiers(records, segment_entries=segment_entries)]
    return groups


def _coarse_of(job: Path, ground: Ground, parts: Sequence[Segment], index: Index) -> Coarse | None:
    """The lists of what parts are joined to; a coarse quantizer that is trained for it is staged beside the job's others."""
    space, coarse = index
    n = sum(part.record.n_live() for part in parts)
    if not is_listed(n, coarse or ground.largest_coarse(space)):
        return None
    if coarse is not None:
        return coarse
    sample = sample_rotated(parts, space, min(n, sample_size(n, space.dim)), seed=ground.manifest.index.seed)
    coarse = ground.choose_coarse(space, sample, max(n, ground.n_live(space)))
    folder = job / "index" / "coarse" / coarse.id
    if coarse.id not in ground.coarse and not folder.exists():
        save_coarse(coarse, folder)
        disk.sync_folder(folder.parent)
    return coarse
