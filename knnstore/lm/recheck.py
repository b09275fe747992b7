"""Whether a model still gives what a datastore has stored: windows drawn at random are run through it again, and codes are compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import COARSE, LISTS_FILE, SEGMENTS, SPACES, Codec, DType
from knnstore.lm.building import dtype_name
from knnstore.lm.embed import Embedder, SegmentTokens
from knnstore.lm.opening import open_embedder
from knnstore.progress import Progress, Stage
from knnstore.storage.arrays import to_float32
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.manifest import Manifest, SegmentRecord
from knnstore.storage.rows import RangeSet, as_ranges, complement, contains, count
from knnstore.storage.segment import Segment
from knnstore.storage.segment_writer import stored_keys
from knnstore.storage.space import Space, load_space
from knnstore.verification.datastore import Problem, SegmentSample

__all__ = ["ENOUGH", "Recheck"]

ENOUGH = 0.99  # share of sub-codes asked for: a key between two centroids may fall to either side when sums are made in another order
_NEAR = 0.05  # by how much a number of a raw key may differ, as a share of the key's root mean square: likewise, in 16 bits

_ROUNDED = {"f16": DType.F16, "bf16": DType.BF16}  # types in which keys are kept that are narrower than theirs


class Recheck:
    """Segments of a snapshot whose keys a model gave, and that model. model_options: of `open_embedder`.

    Raises InvalidArgumentError where no segment says in which windows its keys were computed, CheckpointMismatchError, ModelError,
    NotFoundError.
    """

    def __init__(self, store: StoreFolder, manifest: Manifest, model_options: Mapping[str, Any]) -> None:
        self._store, self._manifest, self._options = store, manifest, dict(model_options)
        computed = [record for record in manifest.segments if record.content.windows is not None and record.content.dtype is not None]
        if not computed:
            raise InvalidArgumentError(
                f"{store.path}: it does not say in which windows of text a model gave the keys of its codes, so they cannot be compared. "
                "Verify without a sample."
            )
        self._records = sorted(computed, key=lambda record: record.content.dtype or "")  # the model is loaded once for each dtype
        given = self._options["model"]
        self._is_given = given is not None and not isinstance(given, str | Path)  # one in memory stays as it is
        self._embedder, self._opened_for = self._open(self._records[0].content.dtype)

    def _open(self, recorded: str | None) -> tuple[Embedder, str | None]:
        dtype = self._options["dtype"] or (None if self._is_given else recorded)
        return open_embedder(self._store.path, self._manifest, **{**self._options, "dtype": dtype}), recorded

    def run(
        self, n_windows: int, *, damaged: frozenset[str], rng: np.random.Generator, progress: Progress
    ) -> tuple[list[SegmentSample], list[Problem]]:
        """Compares windows that are drawn by their entries. damaged: folders in the store that are left out, with what needs them.

        Memory: a batch, the codes of the sampled entries, and some hundred bytes for each document of a segment.
        """
        records = [record for record in self._records if not damaged & _folders(record)]
        drawn = _draw([complement(record.dead_ranges(), record.content.entries) for record in records], n_windows, rng)
        samples, problems = [], []
        with progress.stage("comparing with the model", total=sum(map(len, drawn)), unit="windows") as stage:
            for record, rows in zip(records, drawn, strict=True):
                if not len(rows):
                    continue
                path = f"{SEGMENTS}/{record.content.uuid}/{LISTS_FILE}"
                try:
                    sample = self._sample(record, rows, rng, stage)
                except DamageError as error:  # since it was verified
                    problems.append(Problem("content", path, str(error)))
                    continue
                samples.append(sample)
                if sample.dtype == sample.recorded and sample.equal < ENOUGH:
                    problems.append(Problem("content", path, _told(sample)))
        return samples, problems

    def _sample(self, record: SegmentRecord, rows: NDArray[np.int64], rng: np.random.Generator, stage: Stage) -> SegmentSample:
        """rows: (n,) live ones, drawn. The windows they are in are compared, and others where several are in one."""
        content, store = record.content, self._store
        assert content.windows is not None, "those without were left out"
        if content.dtype != self._opened_for and not (self._is_given or self._options["dtype"]):
            self._embedder, self._opened_for = self._open(content.dtype)
        files = next(space.files for space in self._manifest.spaces if space.id == content.space)
        space = load_space(store.space(content.space), content.space, files)
        segment = Segment(store.segment(content.uuid), record, space, None)
        try:
            tokens = SegmentTokens(segment.values, segment.contexts, context=content.windows.context, stride=content.windows.stride)
            first_rows = tokens.window_rows
            windows = np.unique(np.searchsorted(first_rows, rows, side="right") - 1)
            others = np.setdiff1d(np.flatnonzero(~contains(record.dead_ranges(), first_rows)), windows)
            more = rng.choice(others, min(len(rows) - len(windows), len(others)), replace=False)
            windows = np.sort(np.concatenate((windows, more)))
            stops = first_rows[windows] + tokens.windows.n_entries[windows]
            stored_rows, codes = segment.lists.codes_in(as_ranges(np.stack((first_rows[windows], stops), axis=1)))
            equal = total = 0
            for batch in self._embedder.batches(tokens, windows):
                for window, keys in zip(batch.tolist(), self._embedder.keys(tokens, batch), strict=True):
                    at = int(np.searchsorted(stored_rows, first_rows[window]))
                    same = _same(space, codes[at : at + len(keys)], keys, content.keys)
                    equal, total = equal + int(np.count_nonzero(same)), total + same.size
                stage.advance(len(batch))
        finally:
            segment.close()
        return SegmentSample(
            segment=content.uuid,
            windows=len(windows),
            entries=len(stored_rows),
            equal=equal / total,
            dtype=dtype_name(self._embedder.model),
            recorded=content.dtype or "",
        )


def _folders(record: SegmentRecord) -> set[str]:
    """The folders in a store that a segment is read from."""
    content = record.content
    return {f"{SEGMENTS}/{content.uuid}", f"{SPACES}/{content.space}", f"{COARSE}/{content.coarse}"}


def _draw(live: Sequence[RangeSet], n: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """n rows of all that are live, each as probable as any other: one array for each segment."""
    sizes = np.array([count(ranges) for ranges in live], np.int64)
    if not sizes.sum():
        return [np.zeros(0, np.int64) for _ in live]
    drawn = np.sort(rng.integers(0, sizes.sum(), n))
    rows: list[NDArray[np.int64]] = []
    for ranges, some in zip(live, np.split(drawn, np.searchsorted(drawn, np.cumsum(sizes)[:-1])), strict=True):
        before = int(sizes[: len(rows)].sum())
        begins = np.cumsum(ranges[:, 1] - ranges[:, 0]) - (ranges[:, 1] - ranges[:, 0])  # live rows before each range
        at = np.searchsorted(begins, some - before, side="right") - 1
        rows.append(ranges[at, 0] + some - before - begins[at] if len(some) else some)
    return rows


def _same(space: Space, codes: NDArray[np.uint8], keys: NDArray[np.float32], kept: str | None) -> NDArray[np.bool_]:
    """Which of the sub-codes stored, (n, n_sub), are those of these keys (n, dim); of raw keys, which numbers, (n, dim), are near.

    kept: the type in which the segment keeps keys: codes that were made anew since are of keys that were rounded to it.
    """
    if space.codec is Codec.RAW:
        raw = space.decode(codes)
        near: NDArray[np.bool_] = np.abs(raw - keys) <= _NEAR * np.sqrt(np.square(raw).mean(axis=1, keepdims=True))
        return near
    stored = _sub_codes(space, codes)
    equal: NDArray[np.bool_] = stored == _sub_codes(space, space.encode(space.rotate(keys)))
    if kept in _ROUNDED:
        rounded = to_float32(stored_keys(keys, kept), _ROUNDED[kept])
        equal |= stored == _sub_codes(space, space.encode(space.rotate(rounded)))
    return equal


def _sub_codes(space: Space, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, code_size) as encoded → (n, n_sub)."""
    if space.codec is Codec.PQ8:
        return codes
    return np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1)[:, : space.n_sub]


def _told(sample: SegmentSample) -> str:
    return (
        f"of the sub-codes of {sample.windows} windows that were sampled, {100 * sample.equal:.2f}% are those that the model gives now "
        f"({sample.dtype}), {100 * ENOUGH:g}% are asked for"
    )
