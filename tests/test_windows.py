"""Windows over documents, and batches of windows, against loops that do one entry at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnstore.errors import InvalidArgumentError
from knnstore.lm.windows import Windows, batches, plan_windows

Rows = list[tuple[int, int, int, int, int]]


def rows(windows: Windows) -> Rows:
    columns = (windows.document, windows.first_entry, windows.n_entries, windows.input_start, windows.input_stop)
    assert all(column.dtype == np.int64 for column in columns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def windows_by_hand(n_entries: list[int], n_prefix: list[int], context: int, stride: int) -> Rows:
    """One document and one window at a time."""
    found = []
    for document, (n, p) in enumerate(zip(n_entries, n_prefix, strict=True)):
        done = 0
        while done < n:
            end = max(context, p - 1 + stride) - 1 if done == 0 else p - 1 + done + stride - 1
            end = min(end, p - 1 + n - 1)
            count = end - (p - 1 + done) + 1
            found.append((document, done, count, max(0, end + 1 - context), end + 1))
            done += count
    return found


sizes = st.tuples(st.integers(2, 12), st.integers(1, 12)).map(lambda t: (t[0], min(t)))
documents = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 15)), max_size=6)


@given(documents=documents, size=sizes)
def test_windows_are_those_made_by_hand(documents: list[tuple[int, int]], size: tuple[int, int]) -> None:
    """The vectorised plan is the loop's plan."""
    counts, prefixes = [n for n, _ in documents], [p for _, p in documents]
    plan = plan_windows(counts, prefixes, context=size[0], stride=size[1])
    assert rows(plan) == windows_by_hand(counts, prefixes, *size)


@given(documents=documents, size=sizes)
def test_each_entry_is_a_target_once_with_its_context(documents: list[tuple[int, int]], size: tuple[int, int]) -> None:
    """Each key lies in its window's input, which is at most the context; beyond the first window it sees context - stride + 1 tokens."""
    context, stride = size
    plan = plan_windows([n for n, _ in documents], [p for _, p in documents], context=context, stride=stride)
    targets = []
    for document, first, count, start, stop in rows(plan):
        n, p = documents[document]
        assert 0 <= start < stop <= p + n - 1  # the last value is never an input
        assert stop - start <= context
        keys = [p - 1 + e for e in range(first, first + count)]
        assert keys
        assert start <= keys[0]
        assert keys[-1] == stop - 1
        if first > 0:
            assert stop - start == min(context, stop)
            assert keys[0] - start + 1 >= min(context - stride + 1, keys[0] + 1)
        targets += [(document, e) for e in range(first, first + count)]
    assert targets == [(d, e) for d, (n, _) in enumerate(documents) for e in range(n)]
    assert plan.lengths.tolist() == [stop - start for *_, start, stop in rows(plan)]


def test_a_document_that_fits_is_one_window() -> None:
    """BOS and 9 entries are 9 inputs: the tenth token is a value only."""
    assert rows(plan_windows([9, 10], [1, 1], context=9, stride=3)) == [(0, 0, 9, 0, 9), (1, 0, 9, 0, 9), (1, 9, 1, 1, 10)]


def test_no_documents_make_no_windows() -> None:
    """An empty plan is a plan."""
    assert len(plan_windows([], [], context=4, stride=2)) == 0
    assert list(batches([], tokens_per_batch=8)) == []


def test_a_million_documents_are_planned_at_once() -> None:
    """No Python loop over documents or windows; the sums are those of the entries."""
    counts = np.random.default_rng(0).integers(1, 2000, 1_000_000, dtype=np.int32)
    plan = plan_windows(counts, np.ones(len(counts), np.uint8), context=512, stride=256)
    assert plan.n_entries.sum() == counts.sum(dtype=np.int64)
    assert plan.lengths.max() == 512


@pytest.mark.parametrize(
    ("context", "stride", "words"),
    [(1, 1, "context is 1"), (0, 1, "context is 0"), (8, 0, "stride is 0"), (8, 9, r"stride is 9.*\(8\)"), (8, -1, "stride is -1")],
)
def test_sizes_that_make_no_windows_are_refused(context: int, stride: int, words: str) -> None:
    """The value is in the message."""
    with pytest.raises(InvalidArgumentError, match=words):
        plan_windows([5], [1], context=context, stride=stride)


@pytest.mark.parametrize(("counts", "prefixes"), [([0], [1]), ([5], [0]), ([5, 5], [1]), ([[5]], [[1]]), ([1.5], [1]), (5, 1)])
def test_counts_that_are_none_are_refused(counts: object, prefixes: object) -> None:
    """A document has at least one prefix token and one entry."""
    with pytest.raises(InvalidArgumentError):
        plan_windows(counts, prefixes, context=8, stride=4)  # type: ignore[arg-type]


@given(lengths=st.lists(st.integers(1, 30), max_size=60), budget=st.integers(1, 90), run=st.integers(1, 25))
def test_batches_hold_each_window_once_within_the_budget(lengths: list[int], budget: int, run: int) -> None:
    """Runs come in order; inside one, longest first, ties in order; a batch is full unless its run ends."""
    found = [batch.tolist() for batch in batches(lengths, tokens_per_batch=budget, windows_per_run=run)]
    flat = [index for batch in found for index in batch]
    assert flat == sorted(range(len(lengths)), key=lambda i: (i // run, -lengths[i], i))
    for batch in found:
        longest = lengths[batch[0]]
        assert longest == max(lengths[i] for i in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
        run_end = min((batch[0] // run + 1) * run, len(lengths))
        is_last = flat.index(batch[-1]) + 1 == run_end
        assert is_last or (len(batch) + 1) * longest > budget


@pytest.mark.parametrize("options", [{"tokens_per_batch": 0}, {"tokens_per_batch": 8, "windows_per_run": 0}])
def test_batches_of_nothing_are_refused(options: dict[str, int]) -> None:
    """A budget of no tokens would never end."""
    with pytest.raises(InvalidArgumentError):
        list(batches([3], **options))
