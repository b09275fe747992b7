"""Segments of a snapshot written again: small ones joined, dead rows dropped, codes listed anew, or all keys in a new space.

No model is needed here; `knnstore.lm.retrain` runs one where keys have to be computed again.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from knnstore.build import choose_codec, sample_size, train_index
from knnstore.errors import InvalidArgumentError
from knnstore.format import Codec
from knnstore.growth import Ground
from knnstore.joining import join_segments
from knnstore.progress import SILENT, Progress
from knnstore.rewriting import Rewriting
from knnstore.sampling import has_keys, mean_distortion, sample_keys, sample_rotated
from knnstore.storage.catalog import StoreFolder, open_snapshot
from knnstore.storage.coarse import Coarse, choose_nlist, is_listed, takes_lists, train_coarse
from knnstore.storage.jobs import run_attempt
from knnstore.storage.manifest import IndexOptions, Manifest
from knnstore.storage.segment import Segment
from knnstore.storage.space import Space, train_space

__all__ = ["COMMAND", "Family", "compact_store", "packs", "write_families"]

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
        with run_attempt(store, COMMAND) as job:
            work = Rewriting(store, ground, job, progress)
            write_families(work, [_retrained(ground, work)] if retrain else families, lossy=lossy)
            return work.commit(COMMAND, {"retrain": retrain, "lossy": lossy}, stale=retrain)
    finally:
        ground.close()
        pin.release()


def _check_keys(path: Path, ground: Ground) -> None:
    without = next((segment for segment in ground.segments if not has_keys(segment)), None)
    if without is not None:
        raise InvalidArgumentError(
            f"{path}: the keys of segment {without.content.uuid} were not kept, and there is no text of it to run the model over. "
            "Make the new space of its codes with --lossy (lossy=True)."
        )


def _kept_keys(segment: Segment, options: IndexOptions) -> str | None:
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
class Family:
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
            return _kept_keys(segment, self.options), content.dtype, content.windows, content.text

        return packs(self.segments, kind, self.options.segment_entries)

    def nlist(self) -> int:
        """How many lists its large segments are to have: those of the known coarse quantizer until there could be twice as many."""
        known = 1 if self.known is None else self.known.nlist
        if self.space is not None and self.space.codec is Codec.RAW:
            return 1
        wanted = choose_nlist(_live(self.segments)) if any(takes_lists(_live(pack), known) for pack in self.packs()) else 1
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
                or (takes_lists(_live(pack), nlist) and nlist >= 2 * first.content.nlist)
            )

        return [pack for pack in self.packs() if is_due(pack)]


def _families(ground: Ground) -> list[Family]:
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
        families.append(Family(space, max(coarse.values(), key=lambda item: item.nlist, default=None), members, options))
    if raw and not spaces:
        families.append(Family(own, None, raw, options))
    return families


def _retrained(ground: Ground, work: Rewriting) -> Family:
    """All segments, and the new space and lists for them, trained on a sample of their keys."""
    options, n = ground.manifest.index, _live(ground.segments)
    with work.progress.stage("training the index", total=1, unit="index") as stage:
        sample = sample_keys(ground.segments, sample_size(n, ground.manifest.key.dim), seed=options.seed)
        space, coarse = train_index(sample, n, options)
        stage.advance(1)
    work.stage(space)
    work.stage(coarse)
    return Family(space, coarse, ground.segments, options, whole=True)


def write_families(work: Rewriting, families: Sequence[Family], *, lossy: bool = False) -> None:
    """Writes all packs of these families that are due."""
    chosen = [(family, family.due(), *_index(work, family)) for family in families if family.due()]
    total = sum(_live(pack) for _, due, *_ in chosen for pack in due)
    with work.progress.stage("rewriting", total=total, unit="entries") as stage:
        for family, due, space, coarse in chosen:
            for pack in due:
                staged = join_segments(
                    work.job / "segments",
                    pack,
                    space=space,
                    coarse=coarse if is_listed(_live(pack), coarse) else None,
                    keys=_kept_keys(pack[0], family.options),
                    lossy=lossy,
                    advance=stage.advance,
                )
                work.made.append((pack, staged))


def _index(work: Rewriting, family: Family) -> tuple[Space, Coarse | None]:
    """The space and lists of a family; what is missing is trained."""
    options, space, coarse, nlist = family.options, family.space, family.known, family.nlist()
    if family.whole and space is not None:
        return space, coarse
    if space is not None and nlist == (1 if coarse is None else coarse.nlist):
        return space, coarse
    n, dim = _live(family.segments), work.ground.manifest.key.dim
    with work.progress.stage("training the index", total=1, unit="index") as stage:
        if space is None:
            sample = sample_keys(family.segments, sample_size(n, dim), seed=options.seed)
            space = train_space(sample, codec=choose_codec(n, options), rotation=options.rotation, seed=options.seed)
            work.stage(space)
        if nlist > 1:
            sample = sample_rotated(family.segments, space, sample_size(n, dim), seed=options.seed)
            coarse = train_coarse(sample, space=space.id, nlist=nlist, seed=options.seed)
            work.stage(coarse)
        stage.advance(1)
    return space, coarse
