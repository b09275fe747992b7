"""Keys drawn from segments, to train spaces and lists on. Rows that no longer count are never drawn."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knnstore.build import ENCODE_ROWS, SAMPLE_BYTES
from knnstore.format import Codec
from knnstore.storage.lists import rows_of
from knnstore.storage.rows import contains
from knnstore.storage.segment import Segment
from knnstore.storage.space import Space

__all__ = ["has_keys", "mean_distortion", "sample_keys", "sample_rotated", "unrotated"]

Keys = NDArray[np.float32]


def has_keys(segment: Segment) -> bool:
    """Whether the keys themselves are there, kept or raw."""
    return segment.content.keys is not None or segment.space.codec is Codec.RAW


def mean_distortion(space: Space, keys: Keys) -> float:
    """Mean squared distance of keys (n, dim) to what their codes in the space stand for."""
    rotated = space.rotate(keys)
    return float(np.square(rotated - space.decode(space.encode(rotated))).sum(axis=1, dtype=np.float64).mean())


def unrotated(space: Space, rotated: Keys) -> Keys:
    """(n, dim) in the axes of a space → in the key's own."""
    return rotated if space.rotation is None else rotated @ space.rotation


def sample_keys(segments: Sequence[Segment], n: int, *, seed: int) -> Keys:
    """About n live keys drawn evenly from all segments, (about n, dim) float32, in the key's own axes.

    Kept or raw keys where a segment has them, else what its codes stand for. At most 1 GiB.
    """
    return _concatenated(
        segments,
        [
            _stored_keys(segment, rows) if has_keys(segment) else unrotated(segment.space, _decoded(segment, rows))
            for segment, rows in _drawn(segments, n, seed)
        ],
    )


def sample_rotated(segments: Sequence[Segment], space: Space, n: int, *, seed: int) -> Keys:
    """The same in the axes of a space; of segments in that space what the codes stand for."""
    parts = []
    for segment, rows in _drawn(segments, n, seed):
        if segment.space.id == space.id:
            parts.append(_decoded(segment, rows))
        else:
            keys = _stored_keys(segment, rows) if has_keys(segment) else unrotated(segment.space, _decoded(segment, rows))
            parts.append(space.rotate(keys))
    return _concatenated(segments, parts)


def _concatenated(segments: Sequence[Segment], parts: Sequence[Keys]) -> Keys:
    return np.concatenate(parts) if parts else np.zeros((0, segments[0].space.dim if segments else 0), np.float32)


def _drawn(segments: Sequence[Segment], n: int, seed: int) -> list[tuple[Segment, NDArray[np.bool_]]]:
    """Which rows of each segment are drawn, (entries,) bool."""
    rng = np.random.default_rng(seed)
    n_live = sum(segment.record.n_live() for segment in segments)
    drawn = []
    for segment in segments:
        n = min(n, SAMPLE_BYTES // (4 * segment.space.dim))
        live = np.flatnonzero(~contains(segment.record.dead_ranges(), np.arange(segment.content.entries)))
        chosen = np.zeros(segment.content.entries, dtype=bool)
        chosen[rng.choice(live, min(len(live), -(-len(live) * n // max(1, n_live))), replace=False)] = True
        drawn.append((segment, chosen))
    return drawn


def _decoded(segment: Segment, chosen: NDArray[np.bool_]) -> Keys:
    """What the codes of the chosen rows stand for, in the axes of the segment's space, (n, dim)."""
    found = [np.zeros((0, segment.space.dim), np.float32)]
    for number in np.flatnonzero(segment.lists.sizes).tolist():
        codes, labels = segment.lists.entries(number)
        wanted = chosen[rows_of(labels)]
        if wanted.any():
            found.append(segment.space.decode(codes[wanted]))
    return np.concatenate(found)


def _stored_keys(segment: Segment, chosen: NDArray[np.bool_]) -> Keys:
    """Kept or raw keys of the chosen rows, (n, dim)."""
    found = [np.zeros((0, segment.space.dim), np.float32)]
    for first in range(0, len(chosen), ENCODE_ROWS):
        wanted = chosen[first : first + ENCODE_ROWS]
        if wanted.any():
            found.append(segment.exact_keys(first, first + len(wanted))[wanted])
    return np.concatenate(found)
