"""Segments written again as one, without their dead rows: what append, `delete --purge` and compact do to small or touched segments."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from knnstore.build import ENCODE_ROWS, MEASURED_ROWS, StagedSegment
from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import CONTEXTS_FILE, HEADER_SIZE, KEYS_FILE, MAX_VOCABULARY, Codec
from knnstore.sampling import has_keys, unrotated
from knnstore.storage.arrays import MappedArray
from knnstore.storage.coarse import Coarse
from knnstore.storage.contexts import ContextsReader
from knnstore.storage.files import ArrayFile, disk
from knnstore.storage.manifest import FileRecord, SegmentRecord
from knnstore.storage.relisting import LIST_BYTES, ListedRows, ListSource, StoredLists, write_joined_lists
from knnstore.storage.rows import as_ranges, complement, contains, intersect
from knnstore.storage.segment import Segment
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment, label_base
from knnstore.storage.space import Space

__all__ = ["can_join", "copy_documents", "join_segments", "kept_type", "size_tiers"]

Keys = NDArray[np.float32]

FIRST_TIER = 1_024  # live entries: smaller segments are one tier
TIER_RATIO = 4  # a tier holds segments up to this many times the size of the one below, and fewer than this many of them
CODE_BYTES = 1 << 26  # bytes of codes held at a time, in row order


def can_join(a: SegmentRecord, b: SegmentRecord) -> bool:
    """Whether two segments can be one of which the same is said: nothing is encoded again and nothing dropped."""
    return _kind(a) == _kind(b)


def _kind(record: SegmentRecord) -> Hashable:
    content = record.content
    return content.space, content.keys, content.dtype, content.windows, content.text


def size_tiers(records: Sequence[SegmentRecord], *, segment_entries: int) -> list[list[SegmentRecord]]:
    """Which segments to write as one each, so that their number stays under 4 for each power of 4 of the store's size.

    Tier 0 has segments of under 1,024 live entries, each further tier four times as many. Four of a tier that can be joined are, as far
    as segment_entries allow; what comes of it counts in its own tier. So an entry is written again once a tier or so.
    """
    groups = [[number] for number in range(len(records))]  # of places in records, ascending
    live = [record.n_live() for record in records]
    kinds = [_kind(record) for record in records]

    def size(group: Sequence[int]) -> int:
        return sum(live[number] for number in group)

    joined = True
    while joined:
        tiers: dict[Hashable, list[list[int]]] = {}
        for group in groups:
            tiers.setdefault((_tier(size(group)), kinds[group[0]]), []).append(group)
        groups, joined = [], False
        for some in tiers.values():
            packed = _packed(some, size, segment_entries) if len(some) >= TIER_RATIO else some
            joined = joined or len(packed) < len(some)
            groups += packed
        groups.sort()
    return [[records[number] for number in group] for group in groups if len(group) > 1]


def _packed(groups: Sequence[list[int]], size: Callable[[Sequence[int]], int], most: int) -> list[list[int]]:
    """Neighbours joined as long as they have at most so many entries together."""
    packed = [groups[0]]
    for group in groups[1:]:
        if size(packed[-1]) + size(group) <= most:
            packed[-1] = sorted(packed[-1] + group)
        else:
            packed.append(group)
    return packed


def _tier(n_live: int) -> int:
    tier, bound = 0, FIRST_TIER
    while n_live >= bound:
        tier, bound = tier + 1, bound * TIER_RATIO
    return tier


def kept_type(parts: Sequence[Segment], wanted: str | None) -> str | None:
    """In which type the keys of a joined segment are kept: as its parts have them, where they agree; wanted, where all are raw."""
    kept = {part.content.keys for part in parts if part.space.codec is not Codec.RAW}
    if not kept:
        return wanted
    return kept.pop() if len(kept) == 1 else None if None in kept else wanted


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

    parts: with at least one live row. Codes of the same space are taken as they are; raw or kept keys are encoded; else decoded codes
    are, if lossy. keys: the type in which they are kept (`f16`, `bf16`, `f32`), None or parts without keys: they are dropped.
    advance: called with the numbers of entries done. Memory: 64 MiB of codes, 16,384 keys, 4 bytes an entry, some hundred a document.
    Raises InvalidArgumentError where codes of another space have no keys, or a key does not fit the type; DamageError.
    """
    for part in parts:
        if part.space.id != space.id and not (lossy or has_keys(part)):
            raise InvalidArgumentError(
                f"segment {part.content.uuid}: its codes are of another space and its keys were not kept. Allow a lossy change, or run "
                "the model over its text."
            )
    decodes = any(part.space.id != space.id and not has_keys(part) for part in parts)
    folder, runs, n_documents = copy_documents(parent, parts)
    n_rows = runs[-1][2]
    if not all(map(has_keys, parts)):
        keys = None
    record, distortion = None, 0.0
    if _can_relist(parts, space, coarse, keys):
        record, distortion = _relist(folder, parts, space, coarse, keys, advance)
    else:
        with CodesWriter(folder, n_rows=n_rows, space=space, keys=keys) as writer:
            at = 0
            for part in parts:
                of_part = _Codes(writer, part, space, coarse)
                stop = of_part.copy(at, advance)
                distortion += (stop - at) * of_part.distortion()
                at = stop
    contents = [part.content for part in parts]
    finish_segment(
        folder,
        uuid=folder.name,
        n_documents=n_documents,
        text=any(content.text for content in contents) and _has_text(folder, n_rows),
        space=space,
        coarse=coarse,
        keys=keys,
        distortion=distortion / n_rows,
        # Codes of decoded codes are not those that the model's keys have: to `verify` they come from elsewhere.
        dtype=contents[0].dtype if len({content.dtype for content in contents}) == 1 and not decodes else None,
        windows=contents[0].windows if len({content.windows for content in contents}) == 1 else None,
        lists_record=record,
    )
    disk.sync_folder(parent)
    return StagedSegment(folder, runs)


def _is_listed_alike(part: Segment, space: Space, coarse: Coarse | None) -> bool:
    """Whether a part has the codes and the lists that it is to have."""
    return part.space.id == space.id and part.content.coarse == (None if coarse is None else coarse.id)


def _can_relist(parts: Sequence[Segment], space: Space, coarse: Coarse | None, keys: str | None) -> bool:
    """Whether lists can be joined one by one: what comes from other codes or lists has room in memory, as has each list."""
    if keys is not None and any(part.content.keys != keys for part in parts):
        return False
    others = [part for part in parts if not _is_listed_alike(part, space, coarse)]
    if len(others) == len(parts):
        return False
    alike = [part.lists.sizes for part in parts if part not in others]
    longest = int(np.sum(alike, axis=0).max()) + sum(part.record.n_live() for part in others)
    return longest * space.code_size <= LIST_BYTES


def _relist(
    folder: Path, parts: Sequence[Segment], space: Space, coarse: Coarse | None, keys: str | None, advance: Callable[[int], None]
) -> tuple[FileRecord, float]:
    """Lists (and kept keys) of the parts as those of one segment: the record of lists.bin, and the sum of its entries' distortion."""
    nlist, at, distortion = 1 if coarse is None else coarse.nlist, 0, 0.0
    sources: list[ListSource] = []
    for part in parts:
        n_live, dead = part.record.n_live(), part.record.dead_ranges()
        if _is_listed_alike(part, space, coarse):
            sources.append(StoredLists(part.lists, space, dead=dead, at=at))
            distortion += n_live * part.content.distortion
        else:
            held = _Held(n_live, space.code_size)
            of_part = _Codes(held, part, space, coarse)
            of_part.copy(0, lambda n: None)
            tokens = part.values.rows(0, part.content.entries)[~contains(dead, np.arange(part.content.entries)), 0]
            sources.append(ListedRows(held.codes, held.lists, tokens, nlist=nlist, at=at))
            distortion += n_live * of_part.distortion()
        at += n_live
    if keys is not None:
        _copy_keys(folder, parts, space.dim)
    record = write_joined_lists(
        folder,
        space=space,
        owner=bytes.fromhex(folder.name),
        nlist=nlist,
        n_rows=at,
        base=label_base(folder.name, at),
        sources=sources,
        advance=advance,
    )
    return record, distortion


def _copy_keys(folder: Path, parts: Sequence[Segment], dim: int) -> None:
    """Kept keys of the live rows as they are stored; `finish_segment` completes the file."""
    at = 0
    with ArrayFile(folder / KEYS_FILE, row_bytes=dim * _kept(parts[0]).dtype.itemsize, offset=HEADER_SIZE) as file:
        for part in parts:
            for first, stop in complement(part.record.dead_ranges(), part.content.entries).tolist():
                for begin in range(first, stop, ENCODE_ROWS):
                    rows = _kept(part).rows(begin, min(begin + ENCODE_ROWS, stop))
                    file.put(at, rows)
                    at += len(rows)


def _kept(part: Segment) -> MappedArray:
    assert part.keys is not None, "said by _can_relist"
    return part.keys


def _has_text(folder: Path, n_rows: int) -> bool:
    """Whether any of the copied documents has text: those of the parts that had may be dead."""
    reader = ContextsReader(folder / CONTEXTS_FILE, n_rows=n_rows)
    try:
        return any(True for _ in reader.packed_frames(0, n_rows))
    finally:
        reader.close()


def copy_documents(parent: Path, parts: Sequence[Segment]) -> tuple[Path, tuple[tuple[str, int, int], ...], int]:
    """The live documents of the parts in a new folder, as `DocumentsWriter` leaves it: the folder, its runs, how many documents.

    Records and text are copied as they are packed. Raises DamageError where rows that live do not begin and end with documents.
    """
    uuid = uuid4().hex
    vocab_size = 1 << 16 if all(part.content.values == "u16" for part in parts) else MAX_VOCABULARY
    runs: list[tuple[str, int, int]] = []
    with DocumentsWriter(parent / uuid, uuid=uuid, vocab_size=vocab_size) as writer:
        for part in parts:
            edges, hashes = _documents_of(part)
            alive = complement(part.record.dead_ranges(), part.content.entries)
            for domain, run_first, run_stop in part.record.runs:
                for first, stop in intersect(as_ranges([(run_first, run_stop)]), alive).tolist():
                    lo, hi = np.searchsorted(edges, (first, stop)).tolist()
                    if (edges[lo], edges[hi]) != (first, stop):
                        raise DamageError(
                            f"{part.folder / CONTEXTS_FILE}: rows {first} to {stop} are no whole documents. Run `knnstore verify`."
                        )
                    at = writer.n_rows
                    writer.copy_documents(part.values.rows(first, stop)[:, 0], part.contexts, first, stop, hashes[lo:hi])
                    if runs and runs[-1][0] == domain:
                        at = runs.pop()[1]
                    runs.append((domain, at, writer.n_rows))
        writer.finish()
    return parent / uuid, tuple(runs), writer.n_documents


def _documents_of(part: Segment) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """First rows of a segment's documents and the end (m + 1,), ascending, and hashes of their ids (m,)."""
    table = part.ids.rows(0, len(part.ids))
    table = table[np.argsort(table[:, 1])]
    begins = part.contexts.first_rows
    if not np.array_equal(table[:, 1].astype(np.int64), begins):
        raise DamageError(f"{part.ids.path}: it does not lead to the documents in {CONTEXTS_FILE}. Run `knnstore verify`.")
    return np.append(begins, part.content.entries), table[:, 0]


class _Held:
    """Takes codes and lists as a `CodesWriter` does, and keeps them in memory. keys: none are wanted."""

    keys = None

    def __init__(self, n_rows: int, code_size: int) -> None:
        self.codes, self.lists = np.empty((n_rows, code_size), np.uint8), np.empty(n_rows, np.uint32)

    def put(self, first_row: int, codes: NDArray[np.uint8], lists: NDArray[np.uint32], keys: Keys | None) -> None:
        self.codes[first_row : first_row + len(codes)] = codes
        self.lists[first_row : first_row + len(codes)] = lists


class _Codes:
    """Codes, lists and keys of one part on their way to a new segment."""

    def __init__(self, writer: CodesWriter | _Held, part: Segment, space: Space, coarse: Coarse | None) -> None:
        self._writer, self._part, self._space, self._coarse = writer, part, space, coarse
        self._same_space = part.space.id == space.id
        self._same_lists = self._same_space and coarse is not None and part.coarse is not None and part.coarse.id == coarse.id
        # Raw keys are their own codes.
        self._reads_codes = part.space.codec is not Codec.RAW and (self._same_space or part.content.keys is None)
        self._reads_keys = has_keys(part) and (not self._reads_codes or writer.keys is not None)
        self._error, self._measured = 0.0, 0

    def distortion(self) -> float:
        """Mean squared distance of the part's keys to what its new codes stand for, as far as it is known."""
        # What was only decoded is off by its own distortion already.
        before = self._part.content.distortion if self._reads_codes else 0.0
        return before + self._error / max(1, self._measured)

    def copy(self, at: int, advance: Callable[[int], None]) -> int:
        """Puts the live rows at `at` and after it. Returns the row after them."""
        n, dead = self._part.content.entries, self._part.record.dead_ranges()
        step = max(1, CODE_BYTES // (self._part.space.code_size * ENCODE_ROWS)) * ENCODE_ROWS
        for begin in range(0, n, step):
            end = min(begin + step, n)
            live = ~contains(dead, np.arange(begin, end))
            if not live.any():
                continue
            codes, lists = self._part.lists.by_row(begin, end) if self._reads_codes else (None, None)
            for first in range(begin, end, ENCODE_ROWS):
                rows = slice(first - begin, min(first + ENCODE_ROWS, end) - begin)
                some = live[rows]
                if some.any():
                    keys = self._part.exact_keys(first, first + len(some))[some] if self._reads_keys else None
                    self._put(at, None if codes is None else codes[rows][some], None if lists is None else lists[rows][some], keys)
                    at += int(some.sum())
                    advance(int(some.sum()))
        return at

    def _put(self, at: int, codes: NDArray[np.uint8] | None, lists: NDArray[np.uint32] | None, keys: Keys | None) -> None:
        space, coarse = self._space, self._coarse
        rotated: Keys | None = None
        if codes is None or not self._same_space:
            decoded = self._part.space.decode(codes) if codes is not None else None
            rotated = space.rotate(unrotated(self._part.space, decoded) if decoded is not None else _given(keys))
            codes = space.encode(rotated)
            sample = slice(None, None, max(1, len(codes) // MEASURED_ROWS))
            self._error += float(np.square(rotated[sample] - space.decode(codes[sample])).sum(dtype=np.float64))
            self._measured += len(codes[sample])
        if coarse is None:
            lists = np.zeros(len(codes), np.uint32)
        elif lists is None or not self._same_lists:
            lists = coarse.assign(space.decode(codes) if rotated is None else rotated)
        self._writer.put(at, codes, lists, keys)


def _given(keys: Keys | None) -> Keys:
    assert keys is not None, "they are read where codes are not"
    return keys
