"""λ and temperature as `create` fits them: the best of their grid, and on text that does not answer for itself."""

import lms
import numpy as np
import pytest

from knnstore.lm import calibrate
from knnstore.lm.create import create
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.store import Datastore

CONTEXT, STRIDE = 32, 16
WINDOWS = {"context": CONTEXT, "stride": STRIDE}


@pytest.fixture(autouse=True)
def little_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens to fit on, so that it does not take long."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 512)


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


def fit_by_hand(held_out: calibrate.HeldOut) -> tuple[float, float, float]:
    """λ, T and perplexity: all of both grids, one query at a time."""
    scale = float(np.median([row[0] for row in held_out.distances if np.isfinite(row[0])]))
    best = (np.inf, 0.0, 0.0)
    for quarter in range(-24, 13):
        temperature = scale * 2 ** (quarter / 4)
        p_knn = []
        for distances, values, gold in zip(held_out.distances.astype(float), held_out.values, held_out.gold, strict=True):
            weights = np.where(values >= 0, np.exp((distances[0] - distances) / temperature), 0.0) if values[0] >= 0 else None
            p_knn.append(None if weights is None else weights[values == gold].sum() / weights.sum())
        for step in range(96):
            lmbda = step / 100
            p = [
                np.exp(lm) if knn is None else lmbda * knn + (1 - lmbda) * np.exp(lm)
                for lm, knn in zip(held_out.log_p_lm, p_knn, strict=True)
            ]
            loss = -float(np.mean(np.log(p)))
            if loss < best[0] - 1e-12:
                best = (loss, lmbda, temperature)
    return best[1], best[2], float(np.exp(best[0]))


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_the_best_of_its_grid(seed):
    """λ, T and the perplexity reached are those of a search by hand, also where some queries have fewer neighbours or none."""
    rng = np.random.default_rng(seed)
    n, k, vocab = 60, 12, 9
    distances = np.sort(rng.gamma(4.0, 20.0, (n, k)).astype(np.float32), axis=1)
    gold = rng.integers(0, vocab, n)
    near = rng.random((n, k)) < np.exp(-distances / 25)
    values = np.where(near, gold[:, None], rng.integers(0, vocab, (n, k))).astype(np.int32)
    for row in range(0, n, 9):
        distances[row, row % k :], values[row, row % k :] = np.inf, -1
    held_out = calibrate.HeldOut(distances, values, gold, np.log(rng.uniform(0.1, 0.9, n)))
    lmbda, temperature, perplexity = calibrate.fit(held_out)
    wanted = fit_by_hand(held_out)
    assert 0 < wanted[0] < 0.95
    np.testing.assert_allclose((lmbda, temperature, perplexity), wanted, rtol=1e-5)


def test_neighbours_that_tell_nothing_get_no_weight():
    """λ falls to 0 where the gold token is never among the neighbours."""
    distances = np.sort(np.random.default_rng(0).gamma(4.0, 20.0, (50, 5)).astype(np.float32), axis=1)
    held_out = calibrate.HeldOut(distances, np.zeros((50, 5), np.int32), np.ones(50, np.int64), np.full(50, -2.0))
    lmbda, temperature, perplexity = calibrate.fit(held_out)
    assert lmbda == 0
    assert temperature > 0
    np.testing.assert_allclose(perplexity, np.exp(2.0))


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(segment, rows of the window, hits) of each search that calibration makes."""
    seen: list[tuple] = []
    windows: list[tuple] = []
    choose, search = calibrate._choose, calibrate.search

    def choosing(tokens, seed):
        for number, window in choose(tokens, seed):
            first = int(tokens[number].window_rows[window])
            windows.append((number, first, first + int(tokens[number].windows.n_entries[window])))
            yield number, window

    def searching(segments, allowed, keys, **options):
        hits = search(segments, allowed, keys, **options)
        seen.append((*windows[len(seen)], hits))
        return hits

    monkeypatch.setattr(calibrate, "_choose", choosing)
    monkeypatch.setattr(calibrate, "search", searching)
    return seen


def test_with_eight_documents_calibration_sees_no_row_of_its_own(tmp_path, gpt2, searches):
    """Documents that each repeat one phrase: what would tell the next token is in the window's own document, also its other parts."""
    corpus = lms.write_texts(tmp_path / "corpus", {f"{i}.txt": f"{lms.random_words(i, 6)} " * 8 for i in range(8)})
    with create(tmp_path / "made.knn", corpus, model=gpt2, segment_entries=400, **WINDOWS) as store:
        calibration = store.manifest.calibration
        assert calibration.status == "fresh"
        owner = {}
        for number, segment in enumerate(store.segments):
            for record in segment.contexts.documents():
                owner |= {(number, row): record.id for row in range(record.first_row, record.first_row + record.n_entries)}
        assert len(searches) > 8
        for number, first, stop, hits in searches:
            own = {owner[number, row] for row in range(first, stop)}
            assert len(own) == 1
            found = {owner[place] for place in zip(hits.segments[hits.rows >= 0].tolist(), hits.rows[hits.rows >= 0].tolist(), strict=True)}
            assert found
            assert not own & found


def test_with_few_documents_calibration_sees_no_row_within_its_reach(tmp_path, gpt2, searches):
    """The window's rows, and two contexts (a quarter of a short document) on both sides, do not count."""
    texts = {"a.txt": lms.random_words(1, 400), "b.txt": lms.random_words(2, 20)}
    corpus = lms.write_texts(tmp_path / "corpus", texts)
    with create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS) as store:
        sizes = [document.entries for document in store.documents()]
    assert len(searches) > 3
    for _, first, stop, hits in searches:
        begin, end = (0, sizes[0]) if first < sizes[0] else (sizes[0], sum(sizes))
        reach = min(2 * CONTEXT, (end - begin) // 4)
        found = np.unique(hits.rows[hits.rows >= 0])
        wanted = [row for row in range(sum(sizes)) if not max(begin, first - reach) <= row < min(end, stop + reach)]
        assert found.tolist() == wanted[: len(found)] if len(wanted) <= 1_024 else set(found) <= set(wanted)


def test_text_that_nothing_predicts_is_not_memorized(tmp_path, gpt2, monkeypatch):
    """Random words: with its own rows a window would find each next token at distance 0, and λ would be fitted to that."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.random_words(1, 700)})
    with create(tmp_path / "made.knn", corpus, model=gpt2, **WINDOWS) as store:
        honest = store.manifest.calibration.perplexity
    monkeypatch.setattr(calibrate, "_exclusion", lambda tokens: lambda number, window: [])
    with create(tmp_path / "cheating.knn", corpus, model=gpt2, **WINDOWS) as store:
        cheating = store.manifest.calibration.perplexity
    assert honest["lm"] == pytest.approx(cheating["lm"], rel=1e-4)
    assert cheating["mixed"] < 2 < 20 < honest["mixed"]


def test_calibration_is_the_same_each_time(tmp_path, gpt2):
    """The same corpus, model and seed give the same λ and T."""
    corpus = lms.write_texts(tmp_path / "corpus", {"a.txt": lms.book()[:2_000]})
    made: list[Datastore] = [create(tmp_path / f"{i}.knn", corpus, model=gpt2, **WINDOWS) for i in range(2)]
    first, second = (store.manifest.calibration for store in made)
    assert (first.lmbda, first.temperature, first.tokens) == (second.lmbda, second.temperature, second.tokens)
    for store in made:
        store.close()
