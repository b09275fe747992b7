"""Which small segments an append writes again as one: few stay, little is written, and what does not fit together is left apart."""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnstore.joining import can_join, size_tiers
from knnstore.storage.manifest import SegmentContent, SegmentRecord


@cache
def record_of(entries: int, space: str = "a" * 32, keys: str | None = None, dead: int = 0, number: int = 0) -> SegmentRecord:
    content = SegmentContent(
        uuid=f"{number:032x}",
        space=space,
        coarse=None,
        nlist=1,
        entries=entries,
        documents=1,
        values="u16",
        keys=keys,
        text=True,
        dtype=None,
        windows=None,
        distortion=0.0,
        files=(),
    )
    ranges = ((0, dead),) if dead else ()
    return SegmentRecord(content=content, runs=(("default", 0, entries),), dead=ranges, sha256="0" * 64)


@dataclasses.dataclass
class Growth:
    """A store that takes in one segment after another."""

    segment_entries: int
    sizes: list[int]
    rewritten: int = 0
    most: int = 0

    def append(self, n: int) -> None:
        records = [record_of(size, number=i) for i, size in enumerate([*self.sizes, n])]
        groups = size_tiers(records, segment_entries=self.segment_entries)
        gone = {record.content.uuid for group in groups for record in group}
        joined = [sum(record.n_live() for record in group) for group in groups]
        self.rewritten += sum(joined)
        self.sizes = [record.n_live() for record in records if record.content.uuid not in gone] + joined
        self.most = max(self.most, len(self.sizes))


@pytest.mark.parametrize(("appends", "least", "most"), [(2_000, 1, 1), (2_000, 20, 3_000), (10_000, 1, 40), (10_000, 500, 600)])
@pytest.mark.parametrize("base", [0, 3_000_000])
def test_many_appends_leave_few_segments(appends: int, least: int, most: int, base: int) -> None:
    """At most 20 segments after any of thousands of appends; an entry is written again a few times, not once an append."""
    rng = np.random.default_rng(appends + most)
    sizes = rng.integers(least, most + 1, appends).tolist()
    store = Growth(1 << 23, [base] if base else [])
    for size in sizes:
        store.append(size)
    total = sum(sizes)
    assert sum(store.sizes) == total + base
    assert store.most <= 20
    # Under 1,024 entries a tier is written again whatever is in it: at most so much an append.
    tiers = 1 + max(0, math.ceil(math.log(total / 1_024, 4)))
    assert store.rewritten - base <= 2 * tiers * total + appends * 1_024 / 3
    assert base in (0, *store.sizes), "the large segment is not touched by what is small beside it"


@given(
    sizes=st.lists(st.integers(1, 3_000), min_size=1, max_size=60),
    segment_entries=st.integers(1, 9_000),
)
@settings(max_examples=200, deadline=None)
def test_what_is_joined(sizes: Sequence[int], segment_entries: int) -> None:
    """Groups of two or more that fit into one segment, in order, no segment twice; nothing is left to be joined after."""
    records = [record_of(size, number=i) for i, size in enumerate(sizes)]
    groups = size_tiers(records, segment_entries=segment_entries)
    numbers = [[int(record.content.uuid, 16) for record in group] for group in groups]
    assert all(len(group) > 1 and group == sorted(group) for group in numbers)
    assert len({number for group in numbers for number in group}) == sum(map(len, numbers))
    assert all(sum(sizes[number] for number in group) <= segment_entries for group in numbers)
    left = [[i] for i in range(len(sizes)) if not any(i in group for group in numbers)]
    after = [sum(sizes[number] for number in group) for group in sorted([*left, *numbers])]
    again = [record_of(size, number=i) for i, size in enumerate(after)]
    assert not size_tiers(again, segment_entries=segment_entries)


@given(
    records=st.lists(
        st.builds(
            record_of,
            st.integers(10, 60),
            st.sampled_from(["a" * 32, "b" * 32]),
            st.sampled_from([None, "f16"]),
            st.integers(0, 9),
            st.integers(0, 1 << 40),
        ),
        max_size=40,
        unique_by=lambda record: record.content.uuid,
    )
)
@settings(max_examples=100, deadline=None)
def test_only_alike_segments_are_joined(records: Sequence[SegmentRecord]) -> None:
    """Of one space and with the same keys; of each kind at most 3 small ones are left. Dead entries do not count."""
    groups = size_tiers(records, segment_entries=1 << 23)
    for group in groups:
        assert all(can_join(group[0], record) for record in group)
    left = [record for record in records if not any(record in group for group in groups)]
    for record in left:
        assert sum(can_join(record, other) for other in left) <= 3
    full = [record_of(1_500, dead=1_490, number=number) for number in range(4)]
    assert size_tiers(full, segment_entries=40) == [full]
    assert size_tiers(full, segment_entries=39) == [full[:3]]
