"""`verify` with a sample: windows run through the model again give the codes that are stored, and others are found out."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lms
import numpy as np
import pytest
import xxhash
from click.testing import CliRunner
from damage import invert
from hypothesis import given
from hypothesis import strategies as st
from knnstore_cli.main import cli
from mending import resign, sealed
from stores import build_segment, create_store, draw_keys, draw_values, trained_coarse, trained_space

import knnstore
from knnstore.errors import CheckpointMismatchError, InvalidArgumentError
from knnstore.format import HEADER_SIZE, Codec
from knnstore.lm import calibrate, recheck
from knnstore.lm.create import create
from knnstore.lm.models import LanguageModel, load_language_model
from knnstore.storage.blocks import block_bytes, pack, unpack
from knnstore.storage.rows import as_ranges, complement, count
from knnstore.storage.space import MIN_TRAINING

KINDS = ("raw", "pq4", "pq8")
WINDOWS = {"context": 32, "stride": 16}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> dict[str, Path]:
    """A store of each codec; that of 4-bit codes has three segments, documents in several, and a dead one."""
    folder = tmp_path_factory.mktemp("made")
    book = lms.book()
    texts = {f"{i}.txt": book[i * 1_500 : (i + 1) * 1_500] for i in range(6)}
    corpora = {
        "raw": lms.write_texts(folder / "few", {"a.txt": book[:3_000], "b.txt": book[3_000:3_100]}),
        "pq4": lms.write_texts(folder / "some", texts),
        "pq8": lms.write_texts(folder / "more", {"all.txt": book[:5_000]}),
    }
    options: dict[str, dict[str, Any]] = {"raw": {}, "pq4": {"segment_entries": 1_600}, "pq8": {"codec": "pq8"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_TOKENS", 256)
        patch.setitem(MIN_TRAINING, Codec.PQ4, 1_600)  # few entries, so that it does not take long
        patch.setitem(MIN_TRAINING, Codec.PQ8, 1_600)
        for kind, corpus in corpora.items():
            create(folder / f"{kind}.knn", corpus, model=model, **WINDOWS, **options[kind]).close()
    knnstore.delete(folder / "pq4.knn", ["4.txt"])
    knnstore.gc(folder / "pq4.knn", keep=1)
    stores = {kind: folder / f"{kind}.knn" for kind in KINDS}
    for kind, path in stores.items():
        with knnstore.open(path) as store:
            assert {segment.space.codec.name.lower() for segment in store.segments} == {kind}
    return stores


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(made[kind], tmp_path / f"{kind}.knn"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_given_again(made: dict[str, Path], model: LanguageModel, kind: str) -> None:
    """A sample of some windows, and of more than there are."""
    with knnstore.open(made[kind]) as store:
        n_entries, uuids = len(store), [segment.content.uuid for segment in store.segments]
    for sample in (3, 10_000):
        report = knnstore.verify(made[kind], level="quick", sample=sample, model=model, seed=1)
        assert report.ok
        assert {item.segment for item in report.samples} <= set(uuids)
        assert all(item.equal > 0.999 and (item.dtype, item.recorded) == ("float32", "float32") for item in report.samples)
        assert sum(item.windows for item in report.samples) <= sample
        if sample == 3:
            assert sum(item.windows for item in report.samples) == 3
            assert sum(item.entries for item in report.samples) <= 3 * 32
    assert len(report.samples) == len(uuids)
    assert sum(item.entries for item in report.samples) == n_entries, "every live entry once, and no dead one"


def shift_codes(path: Path, number: int = 0) -> str:
    """Gives each entry of one segment's lists the code of the one before it, and mends all checksums. Returns its uuid."""
    with knnstore.open(path) as store:
        segment = store.segments[number]
        space, lists = segment.space, segment.lists
        sizes, offsets = lists.sizes.tolist(), lists.offsets.tolist()
    width = block_bytes(space.n_sub) // 32 if space.codec is Codec.PQ4 else space.code_size
    raw = bytearray((segment.folder / "lists.bin").read_bytes())
    directory = bytearray((segment.folder / "lists.dir").read_bytes())
    table = np.frombuffer(directory, "<u8", offset=HEADER_SIZE).reshape(-1, 3)
    for i, (n, begin) in enumerate(zip(sizes, offsets, strict=True)):
        capacity = -(-n // 32) * 32
        stored = np.frombuffer(raw, np.uint8, capacity * width, begin)
        if space.codec is Codec.PQ4:
            codes = unpack(stored.reshape(-1, block_bytes(space.n_sub)))
            codes[:n] = np.roll(codes[:n], 1, axis=0)
            stored[:] = pack(codes).reshape(-1)
        else:
            codes = stored.reshape(capacity, width)
            codes[:n] = np.roll(codes[:n], 1, axis=0)
        table[i, 2] = xxhash.xxh3_64_intdigest(memoryview(raw)[begin : begin + capacity * (width + 8)])
    (segment.folder / "lists.bin").write_bytes(raw)
    (segment.folder / "lists.dir").write_bytes(sealed(bytes(directory)))
    resign(path)
    return str(segment.content.uuid)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_other_keys(copy: Callable[[str], Path], model: LanguageModel, kind: str) -> None:
    """Codes that were mixed up, with all checksums right: nothing else in `verify` can see it."""
    path = copy(kind)
    uuid = shift_codes(path)
    assert knnstore.verify(path).ok
    report = knnstore.verify(path, sample=40, model=model, seed=1)
    (problem,) = report.problems
    assert (problem.kind, problem.path) == ("content", f"segments/{uuid}/lists.bin")
    assert "99% are asked for" in problem.detail
    for item in report.samples:
        assert (item.equal < 0.7) is (item.segment == uuid)


def test_keys_of_another_model(made: dict[str, Path], tmp_path: Path, model: LanguageModel) -> None:
    """A store that names this checkpoint, and has the keys of another of the same shape."""
    other = load_language_model(lms.gpt2_model(seed=1), tokenizer=lms.gpt2_tokenizer())
    corpus = lms.write_texts(tmp_path / "few", {"a.txt": lms.book()[:3_000]})
    create(tmp_path / "s.knn", corpus, model=other, **WINDOWS).close()
    resign(tmp_path / "s.knn", lambda manifest: dataclasses.replace(manifest, checkpoint=model.checkpoint))
    report = knnstore.verify(tmp_path / "s.knn", sample=5, model=model)
    assert not report.ok
    assert report.samples[0].equal < 0.5


def test_codes_that_were_made_anew(
    copy: Callable[[str], Path], tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From kept keys, which were rounded, they are right; from decoded codes they are not those of the keys, and are not compared."""
    monkeypatch.setattr(calibrate, "HELD_OUT_TOKENS", 256)
    monkeypatch.setitem(MIN_TRAINING, Codec.PQ4, 1_600)
    corpus = lms.write_texts(tmp_path / "few", {"a.txt": lms.book()[:4_500]})
    create(tmp_path / "s.knn", corpus, model=model, keep_keys="bf16", **WINDOWS).close()
    knnstore.compact(tmp_path / "s.knn", retrain=True).close()
    report = knnstore.verify(tmp_path / "s.knn", sample=10_000, model=model)
    assert report.ok
    assert report.samples[0].equal > 0.99
    path = copy("pq4")
    knnstore.compact(path, retrain=True, lossy=True).close()
    assert knnstore.verify(path).ok
    with pytest.raises(InvalidArgumentError, match="cannot be compared"):
        knnstore.verify(path, sample=1, model=model)


def test_another_dtype_is_told_and_not_judged(copy: Callable[[str], Path]) -> None:
    """Keys computed in another dtype may fall to other codes."""
    other = load_language_model(lms.gpt2_model(), tokenizer=lms.gpt2_tokenizer(), dtype="bfloat16")
    path = copy("pq4")
    report = knnstore.verify(path, sample=40, model=other)
    assert {(item.dtype, item.recorded) for item in report.samples} == {("bfloat16", "float32")}
    assert all(0.5 < item.equal < 1 for item in report.samples), "most codes are the same, and not all"
    shift_codes(path)
    assert knnstore.verify(path, sample=40, model=other).ok


def test_damaged_segments_are_left_out(copy: Callable[[str], Path], model: LanguageModel) -> None:
    """The others are sampled; where the newest snapshot does not open, only the damage is told."""
    path = copy("pq4")
    with knnstore.open(path) as store:
        folders = [segment.folder for segment in store.segments]
    invert(folders[0] / "values.bin", 100)
    report = knnstore.verify(path, sample=30, model=model)
    assert [problem.path for problem in report.problems] == [f"segments/{folders[0].name}/values.bin"]
    assert {item.segment for item in report.samples} == {folder.name for folder in folders[1:]}
    invert(path / "CURRENT", 5)
    report = knnstore.verify(path, sample=30, model=model)
    assert (report.samples, "CURRENT" in [problem.path for problem in report.problems]) == ((), True)


def test_refusals(made: dict[str, Path], tmp_path: Path, model: LanguageModel) -> None:
    """Another checkpoint, keys that no model gave, numbers and levels that are none."""
    with pytest.raises(InvalidArgumentError, match="sample -1"):
        knnstore.verify(made["raw"], sample=-1)
    with pytest.raises(InvalidArgumentError, match="deep"):
        knnstore.verify(made["raw"], level="deep", sample=1)
    other = load_language_model(lms.gpt2_model(seed=1), tokenizer=lms.gpt2_tokenizer())
    with pytest.raises(CheckpointMismatchError):
        knnstore.verify(made["raw"], sample=1, model=other)
    with pytest.warns(UserWarning, match="built with"):
        assert not knnstore.verify(made["raw"], sample=1, model=other, allow_model_mismatch=True).ok
    create_store(tmp_path / "s.knn", draw_keys(0, 20, 3), draw_values(0, 20))
    with pytest.raises(InvalidArgumentError, match="in which windows"):
        knnstore.verify(tmp_path / "s.knn", sample=1)


@given(
    live=st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4), min_size=1, max_size=5),
    n=st.integers(0, 50),
    seed=st.integers(0, 1_000),
)
def test_rows_are_drawn_from_those_that_live(live: list[list[tuple[int, int]]], n: int, seed: int) -> None:
    """n of them, in segments and rows that live; each can be drawn."""
    ranges = [complement(as_ranges([(min(pair), max(pair)) for pair in dead]), 30) for dead in live]
    drawn = recheck._draw(ranges, n, np.random.default_rng(seed))
    assert sum(map(len, drawn)) == (n if sum(map(count, ranges)) else 0)
    for of_segment, rows in zip(ranges, drawn, strict=True):
        allowed = {row for first, stop in of_segment.tolist() for row in range(first, stop)}
        assert set(rows.tolist()) <= allowed
    many = recheck._draw(ranges, 20_000, np.random.default_rng(seed))
    assert [len(set(rows.tolist())) for rows in many] == [count(of_segment) for of_segment in ranges]


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.PQ4, Codec.PQ8])
def test_codes_of_some_rows(tmp_path: Path, codec: Codec) -> None:
    """They are those that are found by going through all lists."""
    space = trained_space(codec, 10)
    coarse = None if codec is Codec.RAW else trained_coarse(space, 7)
    segment = build_segment(tmp_path, draw_keys(3, 700, 10), draw_values(3, 700), space=space, coarse=coarse)
    every = {}
    for number in range(segment.lists.nlist):
        codes, labels = segment.lists.entries(number)
        every |= {int(label) >> 24: code.tobytes() for code, label in zip(codes, labels, strict=True)}
    rng = np.random.default_rng(0)
    for _ in range(30):
        ranges = as_ranges(np.sort(rng.integers(0, 701, (int(rng.integers(0, 6)), 2)), axis=1))
        rows, codes = segment.lists.codes_in(ranges)
        assert rows.tolist() == [row for first, stop in ranges.tolist() for row in range(first, stop)]
        assert [code.tobytes() for code in codes] == [every[row] for row in rows.tolist()]


def test_no_model_is_loaded_without_a_sample(made: dict[str, Path]) -> None:
    """`knnstore.verify` needs torch only for a sample."""
    script = "import sys, knnstore; assert knnstore.verify(sys.argv[1]).ok; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script, str(made["raw"])], check=True, timeout=120)


def test_command_with_the_default_model(tmp_path: Path) -> None:
    """The model that a store names is loaded, in the dtype of its keys; the share is shown, and 8 is returned where it is too small."""
    (tmp_path / "a.txt").write_text(lms.book()[:2_000])
    create(tmp_path / "s.knn", tmp_path / "a.txt").close()
    runner = CliRunner()
    result = runner.invoke(cli, ["verify", "--store", str(tmp_path / "s.knn"), "--sample", "2"])
    assert result.exit_code == 0, result.output
    assert "computed again (" in result.stdout
    assert "100.00% of sub-codes equal" in " ".join(result.stdout.split())
    shift_codes(tmp_path / "s.knn")
    result = runner.invoke(cli, ["verify", "--store", str(tmp_path / "s.knn"), "--sample", "2", "--json"])
    fields = json.loads(result.stdout)
    assert (result.exit_code, fields["ok"]) == (8, False)
    assert fields["samples"][0]["equal"] < 0.9
    result = runner.invoke(cli, ["verify", "--store", str(tmp_path / "s.knn"), "--device", "cpu"])
    assert result.exit_code == 2
    assert "--sample N only" in result.stderr
