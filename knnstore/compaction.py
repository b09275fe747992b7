"""Segments of a snapshot written again: small ones joined, dead rows dropped, codes listed anew, or all keys in a new space.

No model is needed here; `knnstore.lm.retrain` runs one where keys have to be computed again.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from knnstore.build import StagedSegment, choose_codec, coarse_record, sample_size, space_record, staged_segment, train_index
from knnstore.changes import Change, Staged, commit_change
from knnstore.errors import InvalidArgumentError
from knnstore.format import Codec
from knnstore.growth import Ground
from knnstore.joining import join_segments
from knnstore.progress import SILENT, Progress
from knnstore.sampling import has_keys, mean_distortion, sample_keys, sample_rotated
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.coarse import FLAT_ENTRIES, SAMPLES_PER_LIST, Coarse, choose_nlist, save_coarse, train_coarse
from knnstore.storage.files import disk
from knnstore.storage.jobs import job_name, remove_abandoned, run_job
from knnstore.storage.manifest import CoarseRecord, IndexOptions, Manifest, Operation, SpaceRecord
from knnstore.storage.segment import Segment
from knnstore.storage.space import Space, save_space, train_space

__all__ = ["Rewriting", "compact_store", "kept_keys", "packs"]

COMMAND = "compact"
MEASURED_KEYS = 4_096  # raw keys by which the spaces they may come into are compared


def compact_store(path: Path, *, retrain: bool = False, lossy: bool = False, progress: Progress = SILENT) -> Manifest:
    """Compacts a datastore without a model; see `knnstore.compact`. Returns the new manifest, or the one there was.

    Raises InvalidArgumentError where a new space needs keys that were not kept, and lossy is not set; ConflictError.
    """
    store = StoreFolder(path)
    base, pin = open_snapshot(store)
    ground = Ground.of(store, base)
    try:
        families = [] if retrain else _families(ground)
        if not (ground.segments if retrain else any(family.due() for family in families)):
            return base
        if retrain and not lossy:
            _check_keys(path, ground)
        remove_abandoned(store, COMMAND)
        attempt = {"command": COMMAND, "attempt": uuid4().hex}  # begun anew after a kill: it asks nothing of anyone
        with run_job(store, job_name(attempt), attempt) as job:
            work = Rewriting(store, ground, job, progress)
            work.write([_retrained(ground, work)] if retrain else families, lossy=lossy)
            return work.commit({"retrain": retrain, "lossy": lossy}, stale=retrain)
    finally:
        ground.close()
        pin.release()


def _check_keys(path: Path, ground: Ground) -> None:
    without = next((segment for segment in ground.segments if not has_keys(segment)), None)
    if without is not None:
        raise InvalidArgumentError(
            f"{path}: the keys of segment {without.content.uuid} were not kept, and its entries came from elsewhere, not from text. "
            "Use --lossy (lossy=True) to make a new space of its codes."
        )


def kept_keys(segment: Segment, options: IndexOptions) -> str | None:
    """In which type a segment's keys are kept when it is written again."""
    return segment.content.keys or (options.keep_keys if segment.space.codec is Codec.RAW else None)


def packs(segments: Sequence[Segment], kind: Callable[[Segment], Hashable], most: int) -> list[list[Segment]]:
    """Segments of one kind together, in order, as many as have at most so many live entries."""
    packed: list[list[Segment]] = []
    last: dict[Hashable, list[Segment]] = {}
    for segment in segments:
        pack = last.get(kind(segment))
        if pack is None or _live(pack) + segment.record.n_live() > most:
            pack = last[kind(segment)] = []
            packed.append(pack)
        pack.append(segment)
    return packed


def _live(segments: Sequence[Segment]) -> int:
    return sum(segment.record.n_live() for segment in segments)


@dataclass(frozen=True)
class _Family:
    """Segments that come into one space.

    space: None where it is to be trained from their raw keys. known: its largest coarse quantizer. whole: leave none as it is.
    """

    space: Space | None
    known: Coarse | None
    segments: Sequence[Segment]
    options: IndexOptions
    whole: bool = False

    def packs(self) -> list[list[Segment]]:
        """What is to be one segment each."""

        def kind(segment: Segment) -> Hashable:
            content = segment.content
            return kept_keys(segment, self.options), content.dtype, content.windows, content.text

        return packs(self.segments, kind, self.options.segment_entries)

    def nlist(self) -> int:
        """How many lists its large segments are to have: those of the known coarse quantizer until there could be twice as many."""
        known = 1 if self.known is None else self.known.nlist
        if self.space is not None and self.space.codec is Codec.RAW:
            return 1
        wanted = choose_nlist(_live(self.segments)) if any(_live(pack) >= FLAT_ENTRIES for pack in self.packs()) else 1
        return wanted if wanted >= 2 * known else known

    def due(self) -> list[list[Segment]]:
        """Packs that are to be written: those of several segments, with dead rows, of another space, or with half the lists or fewer."""
        nlist = self.nlist()

        def is_due(pack: Sequence[Segment]) -> bool:
            first = pack[0]
            return (
                self.whole
                or len(pack) > 1
                or bool(first.record.dead)
                or self.space is None
                or first.space.id != self.space.id
                or (_live(pack) >= FLAT_ENTRIES and nlist >= 2 * first.content.nlist)
            )

        return [pack for pack in self.packs() if is_due(pack)]


def _families(ground: Ground) -> list[_Family]:
    """Segments by the space they are in. Raw ones come into the space that suits them best, or a new one where there are enough."""
    options = ground.manifest.index
    spaces = {segment.space.id: segment.space for segment in ground.segments if segment.space.codec is not Codec.RAW}
    raw = [segment for segment in ground.segments if segment.space.codec is Codec.RAW]
    own: Space | None = raw[0].space if raw else None
    if raw and spaces:
        some = sample_keys(raw, MEASURED_KEYS, seed=options.seed)
        own = min(spaces.values(), key=lambda space: mean_distortion(space, some))
    elif raw and choose_codec(_live(raw), options) is not Codec.RAW:
        own = None
    families = []
    for space in spaces.values():
        members = [segment for segment in ground.segments if segment.space.id == space.id or (own is space and segment in raw)]
        coarse = {segment.coarse.id: segment.coarse for segment in members if segment.coarse is not None}
        families.append(_Family(space, max(coarse.values(), key=lambda item: item.nlist, default=None), members, options))
    if raw and not spaces:
        families.append(_Family(own, None, raw, options))
    return families


def _retrained(ground: Ground, work: "Rewriting") -> _Family:
    """All segments, and the new space and lists for them, trained on a sample of their keys."""
    options, n = ground.manifest.index, _live(ground.segments)
    with work.progress.stage("training the index", total=1, unit="index") as stage:
        sample = sample_keys(ground.segments, sample_size(n, ground.manifest.key.dim), seed=options.seed)
        space, coarse = train_index(sample, n, options)
        stage.advance(1)
    work.stage(space)
    work.stage(coarse)
    return _Family(space, coarse, ground.segments, options, whole=True)


@dataclass
class Rewriting:
    """What comes of a compaction, from its job's folder to its commit. made: what was written again, and what it became."""

    store: StoreFolder
    ground: Ground
    job: Path
    progress: Progress
    spaces: list[Staged[SpaceRecord]] = field(default_factory=list)
    coarse: list[Staged[CoarseRecord]] = field(default_factory=list)
    made: list[tuple[list[Segment], StagedSegment]] = field(default_factory=list)

    def stage(self, item: Space | Coarse | None) -> None:
        """Puts a space or coarse quantizer that the store has not into the job's folder."""
        if item is None or item.id in self.ground.known_index():
            return
        if isinstance(item, Space):
            folder = self.job / "index" / "spaces" / item.id
            save_space(item, folder)
            self.spaces.append(Staged(folder, space_record(item, folder)))
        else:
            folder = self.job / "index" / "coarse" / item.id
            save_coarse(item, folder)
            self.coarse.append(Staged(folder, coarse_record(item, folder)))
        disk.sync_folder(folder.parent)

    def write(self, families: Sequence[_Family], *, lossy: bool = False) -> None:
        """Writes all packs of these families that are due."""
        chosen = [(family, family.due(), *self._index(family)) for family in families if family.due()]
        total = sum(_live(pack) for _, due, *_ in chosen for pack in due)
        with self.progress.stage("rewriting", total=total, unit="entries") as stage:
            for family, due, space, coarse in chosen:
                for pack in due:
                    staged = join_segments(
                        self.job / "segments",
                        pack,
                        space=space,
                        coarse=coarse if _live(pack) >= FLAT_ENTRIES else None,
                        keys=kept_keys(pack[0], family.options),
                        lossy=lossy,
                        advance=stage.advance,
                    )
                    self.made.append((pack, staged))

    def _index(self, family: _Family) -> tuple[Space, Coarse | None]:
        """The space and lists of a family; what is missing is trained."""
        options, space, coarse, nlist = family.options, family.space, family.known, family.nlist()
        if family.whole and space is not None:
            return space, coarse
        n, dim = _live(family.segments), self.ground.manifest.key.dim
        if space is not None and nlist == (1 if coarse is None else coarse.nlist):
            return space, coarse
        with self.progress.stage("training the index", total=1, unit="index") as stage:
            if space is None:
                sample = sample_keys(family.segments, sample_size(n, dim), seed=options.seed)
                space = train_space(sample, codec=choose_codec(n, options), rotation=options.rotation, seed=options.seed)
                self.stage(space)
            if nlist > 1:
                sample = sample_rotated(family.segments, space, min(n, nlist * SAMPLES_PER_LIST), seed=options.seed)
                coarse = train_coarse(sample, space=space.id, nlist=nlist, seed=options.seed)
                self.stage(coarse)
            stage.advance(1)
        return space, coarse

    def commit(self, arguments: dict[str, bool], *, stale: bool) -> Manifest:
        """What was written takes the place of what it was written from."""
        parts = [segment for pack, _ in self.made for segment in pack]
        counts = {
            "replaced": len(parts),
            "segments": len(self.made),
            "entries": _live(parts),
            "dropped": sum(part.content.entries for part in parts) - _live(parts),
        }
        change = Change(
            operation=Operation(name=COMMAND, arguments=dict(arguments), counts=counts),
            spaces=self.spaces,
            coarse=self.coarse,
            segments=[staged_segment(staged) for _, staged in self.made],
            replaced=[part.record for part in parts],
            places={pack[0].content.uuid: staged.folder.name for pack, staged in self.made},
            stale=stale,
        )
        return commit_change(self.store, self.ground.manifest, change, job=self.job)
