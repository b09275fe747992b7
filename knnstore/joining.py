"""Segments written again as one, without their dead rows: what append, `delete --purge` and compact do to small or touched segments."""

from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from knnstore.build import ENCODE_ROWS, MEASURED_ROWS, StagedSegment
from knnstore.errors import InvalidArgumentError
from knnstore.format import Codec
from knnstore.storage.coarse import Coarse
from knnstore.storage.files import disk
from knnstore.storage.lists import rows_of
from knnstore.storage.manifest import SegmentRecord
from knnstore.storage.rows import complement
from knnstore.storage.segment import Segment
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment
from knnstore.storage.space import Space

__all__ = ["can_join", "copy_documents", "join_segments", "size_tiers"]

Keys = NDArray[np.float32]

FIRST_TIER = 1_024  # live entries: smaller segments are one tier
TIER_RATIO = 4  # a tier holds segments up to this many times the size of the one below, and fewer than this many of them


def can_join(a: SegmentRecord, b: SegmentRecord) -> bool:
    """Whether two segments can be one without encoding again."""
    one, two = a.content, b.content
    return (one.space, one.keys, one.dtype, one.windows, one.text) == (two.space, two.keys, two.dtype, two.windows, two.text)


def size_tiers(records: Sequence[SegmentRecord], *, segment_entries: int) -> list[list[SegmentRecord]]:
    """Which segments to write as one each, so that their number stays under 4 for each power of 4 of the store's size.

    Tier 0 has segments of under 1,024 live entries, each further tier four times as many. Four of a tier that can be joined, with at
    most segment_entries together, are; what comes of it counts in its own tier.
    """
    groups = [[record] for record in records]
    changed = True
    while changed:
        changed = False
        tiers: dict[tuple[int, object], list[list[SegmentRecord]]] = {}
        for group in groups:
            content = group[0].content
            alike = (content.space, content.keys, content.dtype, content.windows, content.text)
            tiers.setdefault((_tier(_live(group)), alike), []).append(group)
        for some in tiers.values():
            if len(some) >= TIER_RATIO and sum(map(_live, some)) <= segment_entries:
                joined = [record for record in records if any(record in group for group in some)]
                groups = [group for group in groups if group not in some] + [joined]
                changed = True
                break
    return [group for group in groups if len(group) > 1]


def _live(group: Sequence[SegmentRecord]) -> int:
    return sum(record.n_live() for record in group)


def _tier(n_live: int) -> int:
    tier, bound = 0, FIRST_TIER
    while n_live >= bound:
        tier, bound = tier + 1, bound * TIER_RATIO
    return tier


def join_segments(
    parent: Path,
    parts: Sequence[Segment],
    *,
    space: Space,
    coarse: Coarse | None,
    keys: str | None,
    lossy: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> StagedSegment:
    """One new segment in the folder `parent` with all live rows of the parts in order, synced and ready to be committed.

    Codes of the same space are taken as they are; raw or kept keys are encoded; else decoded codes are, if lossy. keys: what is kept
    (`f16`, `bf16`, `f32`), where the parts have keys. advance: called with the numbers of entries done. Memory: some
    ten bytes an entry of the largest part, one list's codes, and 16,384 keys.
    Raises InvalidArgumentError where codes of another space have no keys, DamageError.
    """
    folder, runs, text = copy_documents(parent, parts)
    n_rows = runs[-1][2]
    if keys is not None and not all(_has_keys(part) for part in parts):
        keys = None
    with CodesWriter(folder, n_rows=n_rows, space=space, keys=keys) as writer:
        at, distortions = 0, []
        for part in parts:
            at, distortion = _copy_codes(writer, part, at, space, coarse, lossy, advance)
            distortions.append((distortion, part.record.n_live()))
    contents = [part.content for part in parts]
    finish_segment(
        folder,
        uuid=folder.name,
        n_documents=_n_records(parts),
        text=text,
        space=space,
        coarse=coarse,
        keys=keys,
        distortion=sum(distortion * n for distortion, n in distortions) / n_rows,
        dtype=contents[0].dtype if len({content.dtype for content in contents}) == 1 else None,
        windows=contents[0].windows if len({content.windows for content in contents}) == 1 else None,
    )
    disk.sync_folder(parent)
    return StagedSegment(folder, runs)


def copy_documents(parent: Path, parts: Sequence[Segment]) -> tuple[Path, tuple[tuple[str, int, int], ...], bool]:
    """A new folder with the live documents of the parts, as `DocumentsWriter` leaves it, its runs, and whether there is text."""
    uuid = uuid4().hex
    vocab_size = 1 << 16 if all(part.content.values == "u16" for part in parts) else 1 << 24
    runs: list[tuple[str, int, int]] = []
    with DocumentsWriter(parent / uuid, uuid=uuid, vocab_size=vocab_size) as writer:
        for part in parts:
            live = _live_rows(part)
            for domain, first, stop in part.record.runs:
                begins = part.contexts.first_rows
                for row in begins[(begins >= first) & (begins < stop)].tolist():
                    if not live[row]:
                        continue
                    record = part.contexts.document_at(row)
                    values = part.values.rows(row, row + record.n_entries)[:, 0]
                    begin = writer.n_rows
                    writer.copy_document(values, part.contexts, record, text=part.content.text)
                    if runs and runs[-1][0] == domain:
                        begin = runs.pop()[1]
                    runs.append((domain, begin, writer.n_rows))
        text = writer.text
        writer.finish()
    return parent / uuid, tuple(runs), text


def _live_rows(part: Segment) -> NDArray[np.bool_]:
    live = np.ones(part.content.entries, dtype=bool)
    for first, stop in part.record.dead:
        live[first:stop] = False
    return live


def _n_records(parts: Sequence[Segment]) -> int:
    return sum(int(_live_rows(part)[part.contexts.first_rows].sum()) for part in parts)


def _has_keys(part: Segment) -> bool:
    return part.content.keys is not None or part.space.codec is Codec.RAW


def _copy_codes(
    writer: CodesWriter,
    part: Segment,
    at: int,
    space: Space,
    coarse: Coarse | None,
    lossy: bool,
    advance: Callable[[int], None],
) -> tuple[int, float]:
    """Codes of a part's live rows, from row `at` on. Returns the row after them, and their mean distortion."""
    if part.space.id != space.id and not (lossy or _has_keys(part)):
        raise InvalidArgumentError(
            f"segment {part.content.uuid}: its codes are of another space and its keys were not kept. Allow a lossy change, or run the "
            "model over its text."
        )
    codes, lists = _codes_by_row(part) if part.space.id == space.id or not _has_keys(part) else (None, None)
    keep_lists = part.coarse is not None and coarse is not None and part.coarse.id == coarse.id and part.space.id == space.id
    error, measured = 0.0, 0
    for first, stop in complement(part.record.dead_ranges(), part.content.entries).tolist():
        for begin in range(first, stop, ENCODE_ROWS):
            end = min(begin + ENCODE_ROWS, stop)
            keys = part.exact_keys(begin, end) if _has_keys(part) and (codes is None or writer.keys is not None) else None
            if part.space.id == space.id:
                assert codes is not None
                some = codes[begin:end]
                rotated = None if coarse is None or keep_lists else space.decode(some)
            else:
                rotated = space.rotate(keys if keys is not None else _unrotated(part, codes, begin, end))
                some = space.encode(rotated)
                sample = slice(None, None, max(1, len(some) // MEASURED_ROWS))
                error += float(np.square(rotated[sample] - space.decode(some[sample])).sum(dtype=np.float64))
                measured += len(some[sample])
            if coarse is None:
                assigned = np.zeros(end - begin, np.uint32)
            elif keep_lists:
                assert lists is not None
                assigned = lists[begin:end]
            else:
                assert rotated is not None
                assigned = coarse.assign(rotated)
            writer.put(at, some, assigned, keys)
            at += end - begin
            advance(end - begin)
    if part.space.id == space.id:
        return at, part.content.distortion
    # What was decoded is off by its own distortion already.
    before = 0.0 if _has_keys(part) else part.content.distortion
    return at, before + error / max(1, measured)


def _unrotated(part: Segment, codes: NDArray[np.uint8] | None, begin: int, end: int) -> Keys:
    assert codes is not None
    decoded = part.space.decode(codes[begin:end])
    return decoded if part.space.rotation is None else decoded @ part.space.rotation


def _codes_by_row(part: Segment) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Codes (n, code_size) u8 and list (n,) u32 of every row."""
    n = part.content.entries
    codes, lists = np.zeros((n, part.space.code_size), np.uint8), np.zeros(n, np.uint32)
    for number in np.flatnonzero(part.lists.sizes).tolist():
        some, labels = part.lists.entries(number)
        rows = rows_of(labels)
        codes[rows] = some
        lists[rows] = number
    return codes, lists
