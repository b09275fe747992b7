"""Row ranges against Python sets of rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from knnstore.storage.rows import RangeSet, as_ranges, complement, contains, count, intersect, subtract

N_ROWS = 40

pairs = st.lists(st.tuples(st.integers(0, N_ROWS), st.integers(0, N_ROWS)), max_size=8)


def rows_in(ranges: list[tuple[int, int]]) -> set[int]:
    return {row for first, stop in ranges for row in range(first, stop)}


def rows(ranges: RangeSet) -> set[int]:
    """The rows of a range set, which must be in normal form: ascending, none empty, none touching."""
    assert ranges.shape == (len(ranges), 2)
    assert ranges.dtype == np.int64
    assert (ranges[:, 0] < ranges[:, 1]).all()
    assert (ranges[1:, 0] > ranges[:-1, 1]).all()
    return rows_in(ranges.tolist())


@given(pairs=pairs)
def test_any_pairs_become_a_range_set_of_the_same_rows(pairs):
    """Order, overlaps and empty pairs do not matter, nor whether they come as a list or an array."""
    assert rows(as_ranges(pairs)) == rows_in(pairs)
    assert np.array_equal(as_ranges(np.array(pairs, np.int64).reshape(-1, 2)), as_ranges(pairs))


@given(a=pairs, b=pairs)
def test_the_algebra_is_that_of_sets(a, b):
    left, right = as_ranges(a), as_ranges(b)
    assert rows(intersect(left, right)) == rows_in(a) & rows_in(b)
    assert rows(subtract(left, right)) == rows_in(a) - rows_in(b)
    assert rows(complement(left, N_ROWS)) == set(range(N_ROWS)) - rows_in(a)
    assert count(left) == len(rows_in(a))


@given(pairs=pairs, n_rows=st.integers(0, N_ROWS))
def test_rows_beyond_the_end_are_no_part_of_the_complement(pairs, n_rows):
    assert rows(complement(as_ranges(pairs), n_rows)) == set(range(n_rows)) - rows_in(pairs)


@given(pairs=pairs, asked=st.lists(st.integers(-1, N_ROWS + 1), max_size=12))
def test_contains_asks_for_each_row(pairs, asked):
    """-1, the row of a neighbour that was not found, is in no range."""
    found = contains(as_ranges(pairs), np.array(asked, np.int64).reshape(1, -1))
    assert found.shape == (1, len(asked))
    assert found[0].tolist() == [row in rows_in(pairs) for row in asked]
