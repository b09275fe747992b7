"""Segments of one space searched in one pass: one lookup table and one heap for each query, however many segments there are.

All lists are searched where they are mapped. Whose an entry is can be told from its label: each segment's labels count rows from a base
of its own, in slots of 2**19 rows, and segments of a stack share no slot.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnstore.format import ROW_BITS, SLOT_BITS, TOKEN_BITS
from knnstore.storage.blocks import faiss_packs_alike
from knnstore.storage.coarse import Coarse
from knnstore.storage.lists import single_query_index, stacked_index
from knnstore.storage.segment import Segment
from knnstore.storage.space import Space

__all__ = ["Shelf", "Stack", "stacks_of"]

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shelf:
    """Members of a stack that share a coarse quantizer (None: of one list each). List l of the i-th has number first + l * len(members) + i
    in the stack's index: what a query reads in all of them lies side by side.

    members: their places in the stack.
    """

    coarse: Coarse | None
    members: NDArray[np.int64]
    first: int

    def numbers(self, lists: Labels, places: NDArray[np.int64]) -> Labels:
        """The stack's numbers of lists (n, m) of members at some places, (n, m * len(places)); -1 where there is none."""
        if len(self.members) == 1 and not self.first:
            return lists
        numbers = (lists * len(self.members) + self.first)[:, :, None] + places
        if (nowhere := lists < 0).any():
            numbers[nowhere] = -1
        return numbers.reshape(len(lists), lists.shape[1] * len(places))


class Stack:
    """members: segments of one space that share no slot of labels; numbers: their places in the snapshot.

    distortion: added to the distances of their codes.
    """

    def __init__(self, numbers: Sequence[int], members: Sequence[Segment], distortion: float | None = None) -> None:
        self.numbers = np.array(numbers, np.int32)
        self.members = tuple(members)
        self.distortion = members[0].content.distortion if distortion is None else distortion
        self.label_bases = np.array([member.content.label_base << TOKEN_BITS for member in members], np.int64)
        self._lock = threading.Lock()
        self._indexes: tuple[Any, Any] | None = None

    @property
    def space(self) -> Space:
        return self.members[0].space

    @cached_property
    def shelves(self) -> list[Shelf]:
        """The members by coarse quantizer."""
        groups: dict[str, list[int]] = {}
        for i, member in enumerate(self.members):
            groups.setdefault("" if member.coarse is None else member.coarse.id, []).append(i)
        shelves, first = [], 0
        for places in groups.values():
            shelves.append(Shelf(self.members[places[0]].coarse, np.array(places), first))
            first += sum(self.members[i].lists.nlist for i in places)
        return shelves

    @cached_property
    def list_numbers(self) -> list[Labels]:
        """For each member, the numbers of its lists in the index."""
        found: dict[int, Labels] = {}
        for shelf in self.shelves:
            for place, i in enumerate(shelf.members.tolist()):
                found[i] = shelf.numbers(np.arange(self.members[i].lists.nlist)[None], np.array([place]))[0]
        return [found[i] for i in range(len(self.members))]

    @cached_property
    def sizes(self) -> Labels:
        """Entries of every list of the index."""
        sizes = np.empty(sum(member.lists.nlist for member in self.members), np.int64)
        for member, numbers in zip(self.members, self.list_numbers, strict=True):
            sizes[numbers] = member.lists.sizes
        return sizes

    def index(self, n_queries: int) -> Any:
        """The faiss index over all lists, for a search of so many queries; made by the first thread that asks."""
        with self._lock:
            if self._indexes is None:
                index = self._make()
                self._indexes = index, single_query_index(self.space, index)
            return self._indexes[n_queries == 1]

    def _make(self) -> Any:
        if len(self.members) == 1 and not _packs_alike(self.space):
            return self.members[0].lists.repacked()
        return stacked_index(self.space, [member.lists for member in self.members], self.list_numbers)

    def check(self, lists: Labels) -> None:
        """Compares the checksums of lists, by their numbers in the index, where this process has not yet. Raises DamageError."""
        unseen = lists[~self._seen[lists]]
        if not len(unseen):
            return
        for shelf in self.shelves:
            n = len(shelf.members)
            stop = shelf.first + n * self.members[shelf.members[0]].lists.nlist
            numbers, within = np.divmod(unseen[(unseen >= shelf.first) & (unseen < stop)] - shelf.first, n)
            for i in np.unique(within).tolist():
                self.members[shelf.members[i]].lists.check(numbers[within == i])
        self._seen[unseen] = True

    @cached_property
    def _seen(self) -> NDArray[np.bool_]:
        return np.append(self.sizes == 0, True)  # the last: of list -1

    @cached_property
    def _owners(self) -> NDArray[np.int32]:
        """The member whose a slot of labels is."""
        owners = np.zeros(1 << (ROW_BITS - SLOT_BITS), np.int32)
        for i, member in enumerate(self.members):
            owners[_slots(member)] = i
        return owners

    def locate(self, labels: Labels, *, whole: bool) -> NDArray[np.int32]:
        """Place in the snapshot of each label's segment; labels, of any shape, are changed in place to count rows from 0. -1 stays -1, of
        which there is none where it is said to be whole."""
        missing = None if whole else labels < 0
        if len(self.members) == 1:
            segments = np.broadcast_to(self.numbers[0], labels.shape)
            labels -= self.label_bases[0]
        else:
            owners = self._owners[(labels if missing is None else np.maximum(labels, 0)) >> (TOKEN_BITS + SLOT_BITS)]
            segments = self.numbers[owners]
            labels -= self.label_bases[owners]
        if missing is not None:
            segments = np.where(missing, np.int32(-1), segments)
            labels[missing] = -1
        return segments


def _slots(segment: Segment) -> slice:
    """The slots of labels that a segment's are in."""
    base = segment.content.label_base
    return slice(base >> SLOT_BITS, ((base + segment.content.entries - 1) >> SLOT_BITS) + 1)


def _packs_alike(space: Space) -> bool:
    return space.centroids is None or faiss_packs_alike(space.n_sub)


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
    """Each segment goes to the first group in which its slots of labels are free."""
    if not _packs_alike(segments[numbers[0]].space):
        return [[number] for number in numbers]
    groups: list[list[int]] = []
    taken: list[list[slice]] = []
    for number in numbers:
        own = _slots(segments[number])
        for group, others in zip(groups, taken, strict=True):
            if all(own.stop <= other.start or other.stop <= own.start for other in others):
                group.append(number)
                others.append(own)
                break
        else:
            groups.append([number])
            taken.append([own])
    return groups
