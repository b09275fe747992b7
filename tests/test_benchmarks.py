"""The benchmarks run, and what they measure with is right. Their figures are not looked at here."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measuring import drop_cache, in_turn, machine, peak_anonymous, ratio, resident_share
from benchmarks.page import newest, save_results, spread, table, verdict
from benchmarks.search_peers import along_the_curve
from benchmarks.workloads import GeneratedKeys

ROOT = Path(__file__).resolve().parents[1]


def test_works_are_timed_in_turn_and_the_first_round_is_dropped():
    done = []
    a, b = in_turn(3, lambda: done.append("a"), partial(time.sleep, 0.01))
    assert done == ["a"] * 4
    assert len(a) == len(b) == 3
    assert min(b) >= 0.01 > min(a)


def test_a_ratio_is_taken_round_by_round():
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "least": 1.0, "greatest": 3.0}


def test_memory_is_what_the_child_took_between_begin_and_end():
    """What is there before BEGIN, or comes after END, does not count; the other lines are given back."""
    code = """
import sys, time
n = int(sys.argv[1])
before = bytearray(n)
print("BEGIN")
time.sleep(0.1)
held = bytearray(2 * n)
time.sleep(0.1)
del held
time.sleep(0.1)
print("END")
time.sleep(0.1)
after = bytearray(8 * n)
time.sleep(0.1)
print("done")
"""
    n = 20_000_000
    found = peak_anonymous(code, n)
    assert found["printed"] == ["done"]
    assert found["at_start_bytes"] >= n
    assert 2 * n <= found["peak_bytes"] - found["at_start_bytes"] < 2.5 * n
    assert abs(found["at_end_bytes"] - found["at_start_bytes"]) < 0.5 * n
    assert 0.3 <= found["seconds"] < 5


def test_a_child_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError) as caught:
        peak_anonymous("raise SystemExit('no such thing')")
    assert "no such thing" in caught.value.stderr


def test_files_leave_the_page_cache(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(os.urandom(1 << 20))
    if resident_share(path) < 1.0:
        pytest.skip("the file system here keeps no page cache of its own")
    stayed = drop_cache(tmp_path)
    assert stayed == resident_share(path)
    assert stayed < 0.5
    path.read_bytes()
    assert resident_share(path) == 1.0


def test_the_machine_is_named():
    found = machine()
    assert found["cores"] >= 1
    assert set(found["versions"]) >= {"faiss-cpu", "numpy", "torch"}
    json.dumps(found)


def test_generated_keys_are_the_same_for_the_same_seed_and_number():
    drawn, again, other = GeneratedKeys(16, n_centres=64), GeneratedKeys(16, n_centres=64), GeneratedKeys(16, 1, n_centres=64)
    n = GeneratedKeys.BLOCK + 7
    keys = drawn.chunk(3, n)
    assert keys.shape == (n, 16)
    assert keys.dtype == np.float32
    assert np.array_equal(keys, again.chunk(3, n))
    others = drawn.chunk(4, 100), drawn.queries(100), other.chunk(3, 100)
    assert len(np.unique(np.concatenate((keys, *others)), axis=0)) == n + 300


@pytest.mark.parametrize("dim", [64, 256])
def test_generated_keys_vary_as_much_as_real_ones(dim):
    keys = GeneratedKeys(dim).chunk(0, 20_000)
    assert 180 < keys.var(axis=0).sum() < 290
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(keys.T)))[::-1]
    assert 0.5 < spectrum[: dim // 8].sum() / spectrum.sum() < 0.75


def test_rates_are_compared_at_the_same_perplexity():
    """Between two of our settings the logarithm of the rate is straight; beyond our best there is none to compare with."""

    def row(nprobe, ours, our_rate, field, field_rate):
        rates = {"knnstore": {"queries_per_s": our_rate}, "faiss IVFPQ": {"queries_per_s": field_rate}}
        return {"nprobe": nprobe, "perplexity": {"knnstore": ours, "faiss IVFPQ": field}, "batch": rates}

    curve = [row(1, 50.0, 1_000.0, 51.0, 100.0), row(2, 48.0, 100.0, 49.0, 10.0), row(4, 47.0, 10.0, 46.0, 1.0)]
    ratios = [found["ratio"] for found in along_the_curve(curve, "batch")]
    assert ratios[0] == pytest.approx(10.0)  # worse than our worst: our fastest
    assert ratios[1] == pytest.approx(np.sqrt(1_000.0 * 100.0) / 10.0)
    assert ratios[2] is None


def test_results_of_a_day_are_added_and_the_newest_is_shown(tmp_path):
    save_results(tmp_path, "2026-01-01", {"cpu": "a"}, {"one": {"x": 1}, "two": {"x": 1}})
    save_results(tmp_path, "2026-01-02", {"cpu": "b"}, {"one": {"x": 2}})
    save_results(tmp_path, "2026-01-02", {"cpu": "b"}, {"three": {"x": 3}})
    found = newest(tmp_path)
    assert found["one"] == ("2026-01-02", {"cpu": "b"}, {"x": 2})
    assert found["two"] == ("2026-01-01", {"cpu": "a"}, {"x": 1})
    assert found["three"][2] == {"x": 3}


def test_pieces_of_the_page():
    assert table(("a", "b"), [("x", 1)]) == "| a | b |\n|---|---:|\n| x | 1 |\n"
    assert spread({"median": 1.5, "least": 1.0, "greatest": 2.25}) == "1.50 (1.00 to 2.25)"
    assert verdict(5.0, 5.0, least=True) == "met (asked for: at least 5)"
    assert verdict(1.2, 1.1, least=False) == "**not met** (asked for: at most 1.1)"


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("kind", [(), ("--large",)], ids=["bench", "bench-large"])
def test_every_section_runs_and_is_shown(kind, tmp_path):
    """All sections at sizes that take seconds, with the peers that are installed; nothing is written but to the folder."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks", "--smoke", *kind, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "smoke" / "docs" / "benchmarks.md"
    assert done.stdout.strip() == str(page)
    (results,) = (tmp_path / "smoke" / "results").glob("*.json")
    sections = json.loads(results.read_text())["sections"]
    text = page.read_text()
    assert text.count("\n## ") >= len(sections)
    for plot in (tmp_path / "smoke" / "docs" / "benchmarks").glob("*.svg"):
        assert f"(benchmarks/{plot.name})" in text
