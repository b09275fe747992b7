"""Fewer searches: `pointers` and `confident` beside loops over lists of tuples."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import stores

import knnstore
from knnstore import EntryDocument, RowRange, filters
from knnstore.following import Follower
from knnstore.lm.mixing import LmView
from knnstore.lm.retrieval import Found, Retriever, retriever_for
from knnstore.lm.settings import Settings
from knnstore.storage import coarse
from knnstore.storage.calibration import Gate
from knnstore.store import Datastore

SETTINGS = Settings(k=48, nprobe=8, lmbda=0.3, temperature=20.0, retrieval="pointers", min_knns=3)
TOKENS = 5  # few, so that many neighbours have the token that came
ALWAYS = 1 << 40  # pointers that are never there: every position is searched


def build(path: Path, n: int, dim: int, **options: object) -> Datastore:
    """Documents of two domains, one of them longer than a segment; one is deleted. Keys of neighbouring entries are alike."""
    rng = np.random.default_rng(n)
    lengths = []
    while sum(lengths) < n:
        lengths.append(int(rng.integers(1, n // 12)) if len(lengths) != 4 else n // 3)
    lengths[-1] -= sum(lengths) - n
    documents = [
        EntryDocument(id=f"d{i}", n_entries=length, domain=("law", "poems")[i % 3 == 1]) for i, length in enumerate(lengths) if length
    ]
    values = rng.integers(0, TOKENS, n)
    stores.create_store(path, stores.draw_keys(n, n, dim), values, documents, segment_entries=n // 4, **options)
    knnstore.delete(path, ["d2", "d6"])
    return knnstore.open(path)


@pytest.fixture(scope="module", params=["raw", "pq4", "pq8", "exact"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    """Several segments of each codec; `exact` is a store of codes with kept keys."""
    path = tmp_path_factory.mktemp("retrieval") / "made.knn"
    options = {"raw": {}, "pq4": {"codec": "pq4"}, "pq8": {"codec": "pq8"}, "exact": {"keep_keys": "f32"}}[request.param]
    with build(path, 900 if request.param == "raw" else 12_000, 16, **options) as made:
        assert len(made.segments) > 3
        assert any(record.part > 0 for segment in made.segments for record in segment.contexts.documents())
        made.exact = request.param == "exact"
        yield made


def settings_for(store: Datastore, **options: object) -> Settings:
    return replace(SETTINGS, exact=store.exact, **options)


def text(store: Datastore, n: int, n_sequences: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, sequences and tokens that came of n positions, the sequences mixed. Half of the texts are near copies of what is stored."""
    rng = np.random.default_rng(seed)
    sequence = rng.integers(0, n_sequences, n)
    keys, came = stores.draw_keys(seed + 1, n, 16), rng.integers(0, TOKENS, n)
    if store.exact:
        segment = store.segments[0]
        for label in range(0, n_sequences, 2):
            at = np.flatnonzero(sequence == label)
            rows = 40 + np.arange(len(at))
            keys[at] += segment.exact_keys(int(rows[0]), int(rows[-1]) + 1)
            came[at[1:]] = segment.values.rows(int(rows[0]), int(rows[-1]))[:, 0]
    return keys, sequence * 1_000 - 7, came


# --- the oracle: RetoMaton, an entry at a time


def entries_that_count(store: Datastore, domains: dict[str, float] | None, exclude: set[str]) -> dict[tuple[int, int], tuple[object, int]]:
    """(segment, row) of each entry that counts: its document's place and its value."""
    found = {}
    for number, segment in enumerate(store.segments):
        values = np.fromfile(segment.folder / "values.bin", "<u2", segment.content.entries, offset=64).tolist()
        dead = {row for first, stop in segment.record.dead for row in range(first, stop)}
        domain = {row: name for name, first, stop in segment.record.runs for row in range(first, stop)}
        for record in segment.contexts.documents():
            for row in range(record.first_row, record.first_row + record.n_entries):
                if row not in dead and record.id not in exclude and (domains is None or domains.get(domain[row], 0) > 0):
                    found[number, row] = ((number, record.first_row), values[row])
    return found


class Oracle:
    """Follows and searches one position at a time, with what is stored looked up in a dict."""

    def __init__(self, store: Datastore, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self.entries = entries_that_count(store, settings.domains, set(settings.exclude))
        self.stored = [
            segment.exact_keys(0, segment.content.entries).astype(float) if settings.exact else stores.decoded_keys(segment)
            for segment in store.segments
        ]
        self.added = dict.fromkeys(range(len(store.segments)), 0.0)
        for stack in [] if settings.exact else store.stacks:
            self.added |= dict.fromkeys(stack.numbers.tolist(), float(stack.distortion))

    def search(self, key: np.ndarray) -> list[tuple[float, int, int, int]]:
        options = self.settings
        found = self.store.search(
            key, k=options.k, nprobe=options.nprobe, domains=options.domains, exclude=list(options.exclude) or None, exact=options.exact
        )
        return [
            item
            for item in zip(
                found.distances[0].tolist(), found.segments[0].tolist(), found.rows[0].tolist(), found.values[0].tolist(), strict=True
            )
            if item[3] >= 0
        ]

    def distance(self, key: np.ndarray, number: int, row: int) -> float:
        space = self.store.segments[number].space
        x = key.astype(float)
        if space.rotation is not None and not self.settings.exact:
            x = space.rotation.astype(float) @ x
        return float(((x - self.stored[number][row]) ** 2).sum()) + self.added[number]

    def run(self, keys: np.ndarray, sequence: np.ndarray, came: np.ndarray) -> tuple[list[list[tuple]], list[bool]]:
        state: dict[int, list[tuple]] = {}
        answers, searched = [], []
        for key, label, token in zip(keys, sequence.tolist(), came.tolist(), strict=True):
            left = []
            for _, number, row, value in state.get(label, []):
                if value == token and (number, row + 1) in self.entries:
                    document, after = self.entries[number, row + 1]
                    if document == self.entries[number, row][0]:
                        left.append((self.distance(key, number, row + 1), number, row + 1, after))
            searched.append(len(left) < self.settings.min_knns)
            state[label] = self.search(key) if searched[-1] else sorted(left)[: self.settings.k]
            answers.append(state[label])
        return answers, searched


def tuples(found: Found, i: int) -> list[tuple]:
    neighbors = found.neighbors
    n = int(neighbors.n_found[i])
    assert (neighbors.values[i, n:] == -1).all()
    assert np.isinf(neighbors.distances[i, n:]).all()
    columns = (neighbors.distances, neighbors.segments, neighbors.rows, neighbors.values)
    return list(zip(*(column[i, :n].tolist() for column in columns), strict=True))


def assert_same(found: Found, answers: list[list[tuple]], searched: list[bool]) -> None:
    assert found.searched.tolist() == searched
    for i, wanted in enumerate(answers):
        got = tuples(found, i)
        assert [item[1:] for item in got] == [item[1:] for item in wanted]
        np.testing.assert_allclose([item[0] for item in got], [item[0] for item in wanted], rtol=1e-4)


def same_arrays(one: Found, other: Found) -> None:
    np.testing.assert_array_equal(one.searched, other.searched)
    for name in ("distances", "values", "segments", "rows"):
        np.testing.assert_array_equal(getattr(one.neighbors, name), getattr(other.neighbors, name))


# --- pointers


@pytest.mark.parametrize("min_knns", [1, 3, 9])
@pytest.mark.parametrize("options", [{}, {"domains": {"law": 2.0, "poems": 0.0}}, {"exclude": ("d4",)}], ids=["all", "domain", "exclude"])
def test_pointers_are_those_of_retomaton(store, min_knns, options):
    """What is followed, when it is searched and every distance: as in a loop over (distance, segment, row, value)."""
    settings = settings_for(store, min_knns=min_knns, **options)
    keys, sequence, came = text(store, 160, 5)
    retriever = retriever_for(store, settings)
    found = retriever.find(keys, None, sequence=sequence, came=came)
    assert_same(found, *Oracle(store, settings).run(keys, sequence, came))
    assert (retriever.n_positions, retriever.n_searched) == (160, int(found.searched.sum()))
    assert 5 <= retriever.n_searched < (150 if min_knns < 9 else 161)
    if "domains" in options:
        np.testing.assert_allclose(found.neighbors.log_weights[found.neighbors.values >= 0], np.log(2.0), rtol=1e-6)
    else:
        assert found.neighbors.log_weights is None


@pytest.mark.parametrize("options", [{}, {"domains": {"law": 2.0, "poems": 0.0}}, {"exclude": ("d4",)}], ids=["all", "domain", "exclude"])
def test_what_comes_next_is_the_next_entry_of_the_document_that_counts(store, options):
    """Of every row of every segment, also the last of a segment, whose document goes on in another."""
    settings = settings_for(store, **options)
    entries = entries_that_count(store, settings.domains, set(settings.exclude))
    everything = entries_that_count(store, None, set())
    allowed = filters.allowed_rows(store.segments, weights=settings.domains, exclude=settings.exclude)
    follower = Follower(store.segments, store.stacks, allowed, exact=store.exact)
    places = sorted(everything)
    found = follower.has_next(np.array([number for number, _ in places], np.int32), np.array([row for _, row in places]))
    wanted = [(n, row + 1) in entries and everything[n, row + 1][0] == everything[n, row][0] for n, row in places]
    assert found.tolist() == wanted
    assert 0 < sum(wanted) < len(places)


def test_sequences_do_not_touch_each_other(store):
    """All texts in one call, mixed, give what each gives alone."""
    settings = settings_for(store)
    keys, sequence, came = text(store, 120, 4, seed=3)
    together = retriever_for(store, settings).find(keys, None, sequence=sequence, came=came)
    for label in np.unique(sequence):
        at = np.flatnonzero(sequence == label)
        alone = retriever_for(store, settings).find(keys[at], None, sequence=sequence[at], came=came[at])
        np.testing.assert_array_equal(alone.searched, together.searched[at])
        np.testing.assert_array_equal(alone.neighbors.rows, together.neighbors.rows[at])
        np.testing.assert_allclose(alone.neighbors.distances, together.neighbors.distances[at], rtol=1e-5)


def test_a_text_may_come_in_pieces(store):
    """A step at a time, as `generate` asks, or in pieces of any size: the same as at once. A label that left is forgotten."""
    settings = settings_for(store)
    keys, _, came = text(store, 90, 3, seed=5)
    sequence = np.tile([5, -2, 9], 30)
    whole = retriever_for(store, settings).find(keys, None, sequence=sequence, came=came)
    for cuts in (range(0, 91, 3), (0, 9, 12, 60, 90)):
        retriever = retriever_for(store, settings)
        pieces = [retriever.find(keys[a:b], None, sequence=sequence[a:b], came=came[a:b]) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate([piece.searched for piece in pieces]), whole.searched)
        np.testing.assert_array_equal(np.concatenate([piece.neighbors.rows for piece in pieces]), whole.neighbors.rows)
    assert not whole.searched.all()


def test_what_was_reset_or_left_out_of_a_call_begins_anew(store):
    """The state is of the last call alone."""
    settings = settings_for(store, min_knns=1)
    keys, came = stores.draw_keys(2, 1, 16), np.array([0])
    one = np.array([1])

    def goes_on(between) -> bool:
        retriever = retriever_for(store, settings)
        first = retriever.find(keys, None, sequence=one, came=came)
        between(retriever)
        token = np.bincount(first.neighbors.values[0, : int(first.neighbors.n_found[0])]).argmax()
        return not retriever.find(keys, None, sequence=one, came=np.array([token])).searched[0]

    assert goes_on(lambda retriever: None)
    assert not goes_on(lambda retriever: retriever.reset())
    assert not goes_on(lambda retriever: retriever.find(keys, None, sequence=one + 1, came=came))
    assert not goes_on(lambda retriever: retriever.find(keys[:0], None, sequence=one[:0], came=came[:0]))


def test_with_no_end_to_min_knns_it_is_a_full_search(store):
    """Every array equals that of `full`, and of the store's own search."""
    keys, sequence, came = text(store, 60, 3, seed=7)
    full = retriever_for(store, settings_for(store, retrieval="full")).find(keys, None, sequence=sequence, came=came)
    settings = settings_for(store)
    plain = store.search(keys, k=settings.k, nprobe=settings.nprobe, exact=settings.exact)
    np.testing.assert_array_equal(full.neighbors.rows, plain.rows)
    found = retriever_for(store, settings_for(store, min_knns=ALWAYS)).find(keys, None, sequence=sequence, came=came)
    assert found.searched.all()
    np.testing.assert_array_equal(found.neighbors.rows, full.neighbors.rows)
    np.testing.assert_allclose(found.neighbors.distances, full.neighbors.distances, rtol=1e-6)
    assert type(retriever_for(store, settings_for(store, retrieval="full"))) is Retriever


def test_rows_can_be_excluded_for_one_run(store):
    """Beside those of the settings: neither found nor followed into."""
    rows = RowRange(0, 10, store.segments[0].content.entries)
    keys, sequence, came = text(store, 60, 3, seed=9)
    for retrieval in ("full", "pointers"):
        settings = settings_for(store, retrieval=retrieval, min_knns=1)
        found = retriever_for(store, settings, [rows]).find(keys, None, sequence=sequence, came=came).neighbors
        assert not ((found.segments == 0) & (found.rows >= 10)).any()


# --- pointers with clusters: stores with inverted lists


@pytest.fixture(scope="module", params=["pq4", pytest.param("pq8", marks=pytest.mark.slow)])
def listed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    """Segments that share lists, and a small one without."""
    path = tmp_path_factory.mktemp("listed") / "made.knn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "FLAT_ENTRIES", 1_500)
        with build(path, 12_000, 16, codec=request.param):
            batch = stores.draw_keys(3, 700, 16), stores.draw_values(4, 700, TOKENS), [EntryDocument(id="new", n_entries=700)]
        knnstore.append_entries(path, [batch])
    with knnstore.open(path) as made:
        assert sum(segment.content.nlist == 128 for segment in made.segments) > 2
        assert sum(segment.content.nlist == 1 for segment in made.segments) == 1
        made.exact = False
        yield made


def lists_of(store: Datastore) -> dict[tuple[int, int], int | None]:
    """The list of each (segment, row); None in segments of one list."""
    found = {}
    for number, segment in enumerate(store.segments):
        for i in range(segment.lists.nlist):
            for row in (segment.lists.entries(i)[1] >> 24).tolist():
                found[number, row] = i if segment.lists.nlist > 1 else None
    return found


def chosen_lists(left: list[tuple], lists: dict[tuple[int, int], int | None], n_lists: int, temperature: float) -> list[int]:
    """The lists where most weight is; of equal weight, the first. left: (distance of the entry before, segment, row)."""
    nearest = min(distance for distance, _, _ in left)
    votes: dict[int, float] = {}
    for distance, number, row in left:
        name = lists[number, row]
        if name is not None:
            votes[name] = votes.get(name, 0.0) + np.exp((nearest - distance) / temperature)
    return sorted(votes, key=lambda name: (-round(votes[name], 12), name))[:n_lists]


@pytest.mark.parametrize("options", [{}, {"domains": {"poems": 2.0}}, {"exclude": ("d4",), "nprobe": 8}], ids=["all", "domain", "exclude"])
def test_pointers_bring_the_entries_of_their_lists(listed, options):
    """Given the answer before: the nearest of the pointers, and of all that counts in the lists with most of their weight."""
    settings = settings_for(listed, **{"min_knns": 2, "nprobe": 16, "temperature": 8.0, **options})
    keys, sequence, came = text(listed, 80, 4, seed=1)
    found = retriever_for(listed, settings).find(keys, None, sequence=sequence, came=came)
    oracle, lists = Oracle(listed, settings), lists_of(listed)
    full = listed.search(keys, k=settings.k, nprobe=settings.nprobe, domains=settings.domains, exclude=list(settings.exclude) or None)
    tolerance = stores.lookup_tolerance(listed.segments[0].space, keys)
    last: dict[int, int] = {}
    n_followed = n_beside = 0
    for i, (label, token) in enumerate(zip(sequence.tolist(), came.tolist(), strict=True)):
        left = []
        for distance, number, row, value in tuples(found, last[label]) if label in last else []:
            if (
                value == token
                and (number, row + 1) in oracle.entries
                and oracle.entries[number, row][0] == oracle.entries[number, row + 1][0]
            ):
                left.append((distance, number, row + 1))
        last[label] = i
        assert bool(found.searched[i]) == (len(left) < settings.min_knns)
        if found.searched[i]:
            np.testing.assert_array_equal(found.neighbors.rows[i], full.rows[i])
            continue
        wanted = set(chosen_lists(left, lists, settings.nprobe // 8, settings.temperature))
        pool = {place for place in oracle.entries if lists[place] in wanted} | {(number, row) for _, number, row in left}
        true = {place: oracle.distance(keys[i], *place) for place in pool}
        got = tuples(found, i)
        assert len({item[1:3] for item in got}) == len(got) == min(settings.k, len(pool))
        assert all(abs(distance - true[number, row]) <= tolerance[i] for distance, number, row, _ in got)
        assert all(value == oracle.entries[number, row][1] for _, number, row, value in got)
        missed = min((true[place] for place in pool - {item[1:3] for item in got}), default=np.inf)
        assert got[-1][0] <= missed + 2 * tolerance[i]
        assert [item[:3] for item in got] == sorted(item[:3] for item in got)
        n_followed += 1
        n_beside += any(lists[item[1:3]] not in wanted for item in got)
    assert n_followed > 20
    assert n_beside > 3  # pointers into the small segment, or into lists that were not chosen


# --- confident


def view(n: int, seed: int = 0) -> LmView:
    rng = np.random.default_rng(seed)
    return LmView(rng.integers(0, TOKENS, n), -rng.exponential(1.0, n), rng.exponential(2.0, n))


def test_confident_searches_where_lambda_is_expected_to_be_large(store):
    """A loop over positions: λ expected of the LM's own features; under the threshold no neighbour, else those of a search."""
    before = Gate(kind="logistic", features=("lm_entropy", "lm_max"), weights=(0.5, -0.25), bias=-1.5)
    keys, sequence, came = text(store, 50, 3)
    seen = view(50)
    expected = [1 / (1 + np.exp(-(-1.5 + 0.5 * h - 0.25 * top))) for h, top in zip(seen.entropy, seen.log_max, strict=True)]
    full = retriever_for(store, settings_for(store, retrieval="full")).find(keys, None, sequence=sequence, came=came)
    for threshold in (0.0, 0.35, 0.5, 1.0):
        settings = settings_for(store, retrieval="confident", before=before, threshold=threshold, domains={"law": 2.0, "poems": 2.0})
        retriever = retriever_for(store, settings)
        found = retriever.find(keys, seen, sequence=sequence, came=came)
        assert found.searched.tolist() == [value >= threshold for value in expected]
        assert retriever.n_searched == sum(value >= threshold for value in expected)
        for i, value in enumerate(expected):
            assert [item[1:] for item in tuples(found, i)] == ([item[1:] for item in tuples(full, i)] if value >= threshold else [])
        np.testing.assert_allclose(found.neighbors.log_weights[found.searched], np.log(2.0), rtol=1e-6)


def test_no_position_is_none_of_anything(store):
    """A call without positions, in each of the three."""
    before = Gate(kind="logistic", features=("lm_max",), weights=(1.0,), bias=0.0)
    for retrieval in ("full", "pointers", "confident"):
        retriever = retriever_for(store, settings_for(store, retrieval=retrieval, before=before))
        none = np.zeros(0, np.int64)
        found = retriever.find(np.zeros((0, 16), np.float32), view(0), sequence=none, came=none)
        assert found.neighbors.rows.shape == (0, 48)
        assert found.searched.shape == (0,)
        assert (retriever.n_positions, retriever.n_searched) == (0, 0)
