"""Segments of one space searched in one pass: one lookup table and one heap for each query, however many small segments there are.

The largest segment's lists are searched where they are mapped; those of small ones are copied to memory beside them, with the number of
their segment in the upper bits of each label.
"""

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.format import LISTS_FILE
from knnstore.storage.blocks import faiss_packs_alike
from knnstore.storage.lists import MEMBER_SHIFT, stacked_index
from knnstore.storage.segment import Segment

__all__ = ["Stack", "stacks_of"]

PASSENGER_ENTRIES = 1 << 18  # larger segments are searched by themselves: their own pass costs less than their copy
PASSENGER_BYTES = 1 << 26  # bytes of lists copied for one stack
MAX_MEMBERS = 127  # numbers that fit the upper bits of a label


class Stack:
    """members: the largest segment, then small ones of the same space; numbers: their places in the snapshot.

    distortion: added to the distances of their codes.
    """

    def __init__(self, numbers: Sequence[int], members: Sequence[Segment], distortion: float | None = None) -> None:
        self.numbers = np.array(numbers, np.int32)
        self.members = tuple(members)
        self.distortion = members[0].content.distortion if distortion is None else distortion
        self._lock = threading.Lock()
        self._index: Any = None

    @property
    def space_id(self) -> str:
        return self.members[0].space.id

    @cached_property
    def bases(self) -> NDArray[np.int64]:
        """The number of each member's first list, and of all lists."""
        return np.concatenate(([0], np.cumsum([member.lists.nlist for member in self.members])))

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Entries of every list."""
        return np.concatenate([member.lists.sizes for member in self.members])

    @property
    def index(self) -> Any:
        """The faiss index over all lists; made by the first thread that asks."""
        if len(self.members) == 1:
            return self.members[0].index
        with self._lock:
            if self._index is None:
                self._index = stacked_index(self.members[0].space, [member.lists for member in self.members])
            return self._index

    def numbers_of(self, labels: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Place in the snapshot of each label's segment, and the label as the segment has it; -1 where there is none. Any shape."""
        if len(self.members) == 1:
            return np.where(labels >= 0, self.numbers[0], np.int32(-1)), labels
        found = labels >= 0
        member = np.where(found, labels >> MEMBER_SHIFT, 0)
        return np.where(found, self.numbers[member], np.int32(-1)), np.where(found, labels & ((1 << MEMBER_SHIFT) - 1), -1)


def stacks_of(segments: Sequence[Segment]) -> list[Stack]:
    """A snapshot's segments in as few passes as can be. The distortion added is the mean over all entries of a space, so that distances do
    not change where segments are joined."""
    stacks = []
    spaces: dict[str, list[int]] = {}
    for number, segment in enumerate(segments):
        spaces.setdefault(segment.space.id, []).append(number)
    for numbers in spaces.values():
        numbers.sort(key=lambda number: -segments[number].content.entries)
        contents = [segments[number].content for number in numbers]
        n_all = sum(content.entries for content in contents)
        distortion = sum(content.distortion * content.entries for content in contents) / max(1, n_all)
        groups = _groups(numbers, segments)
        stacks += [Stack(group, [segments[number] for number in group], distortion) for group in groups]
    return stacks


def _groups(numbers: Sequence[int], segments: Sequence[Segment]) -> list[list[int]]:
    """Large segments alone, small ones with the largest; more than fit make stacks of their own."""
    space = segments[numbers[0]].space
    if space.centroids is not None and not faiss_packs_alike(space.n_sub):
        return [[number] for number in numbers]
    groups = [[numbers[0]]]
    alone, room = [], PASSENGER_BYTES
    for number in numbers[1:]:
        content = segments[number].content
        size = content.size_of(LISTS_FILE)
        if content.entries > PASSENGER_ENTRIES or size > PASSENGER_BYTES:
            alone.append([number])
            continue
        if size > room or len(groups[-1]) == MAX_MEMBERS:
            groups.append([])
            room = PASSENGER_BYTES
        groups[-1].append(number)
        room -= size
    return groups + alone
