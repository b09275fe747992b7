"""Segments that are written again as one: nothing that counts is lost, changed or found otherwise, and what is dead is gone."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import text_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import (
    code_distances,
    create_store,
    decoded_keys,
    draw_keys,
    draw_values,
    lookup_tolerance,
    trained_coarse,
    trained_space,
    with_dead,
)

import knnstore
from knnstore import joining
from knnstore.build import StagedSegment, segment_record
from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import Codec
from knnstore.joining import can_join, join_segments, kept_type
from knnstore.neighbors import read_context
from knnstore.search import search
from knnstore.storage import lists, relisting
from knnstore.storage.coarse import Coarse
from knnstore.storage.files import sha256_file
from knnstore.storage.segment import Segment
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, finish_segment
from knnstore.storage.space import Space
from knnstore.verification.files import Findings
from knnstore.verification.segment import ExpectedSegment, SegmentCheck

DIM = 6
PRECISION = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 0.0}  # relative error of a kept key


@dataclass(frozen=True)
class Kind:
    """What a segment is: its codec, its lists, the type of its kept keys, and whether its documents have text."""

    codec: Codec = Codec.PQ4
    nlist: int = 1
    keep: str | None = None
    text: bool = True
    space_seed: int = 0

    @property
    def space(self) -> Space:
        return trained_space(self.codec, DIM, self.space_seed)

    @property
    def coarse(self) -> Coarse | None:
        return trained_coarse(self.space, self.nlist) if self.nlist > 1 else None


def segment_of(parent: Path, kind: Kind, sizes: Sequence[int], seed: int, *, dead: Sequence[int] = ()) -> Segment:
    """A segment of documents of these sizes, in domains a, a, b, b, a, ...; those whose numbers are in `dead` do not count."""
    n, space, coarse = sum(sizes), kind.space, kind.coarse
    name = f"{seed:032x}"
    keys, values = draw_keys(seed, n, DIM), draw_values(seed, n)
    runs: list[tuple[str, int, int]] = []
    with DocumentsWriter(parent / name, uuid=name, vocab_size=1_000) as writer:
        for number, document in enumerate(text_documents(sizes)):
            at = writer.n_rows
            some = values[at : at + document.n_entries]
            if kind.text:
                writer.add(some, starts=document.starts, ends=document.ends, text=document.text or "", text_start=0)
            else:
                writer.add(some)
            writer.end_document(
                id=f"{seed}/{number}",
                source=f"books/{number}",
                prefix=(number % 5,),
                metadata={"number": number},
                content_hash=None,
                n_chars=None,
            )
            domain = "ab"[number // 2 % 2]
            if runs and runs[-1][0] == domain:
                at = runs.pop()[1]
            runs.append((domain, at, writer.n_rows))
        writer.finish()
    rotated = space.rotate(keys)
    codes = space.encode(rotated)
    with CodesWriter(parent / name, n_rows=n, space=space, keys=kind.keep) as codes_writer:
        codes_writer.put(0, codes, np.zeros(n, np.uint32) if coarse is None else coarse.assign(rotated), keys)
    finish_segment(
        parent / name,
        uuid=name,
        n_documents=len(sizes),
        text=kind.text,
        space=space,
        coarse=coarse,
        keys=kind.keep,
        distortion=float(np.square(rotated - space.decode(codes)).sum(axis=1).mean()),
        dtype="float32",
        windows=None,
    )
    begins = np.cumsum([0, *sizes]).tolist()
    made = Segment(parent / name, segment_record(parent / name, tuple(runs)), space, coarse)
    return with_dead(made, joined_pairs([(begins[number], begins[number + 1]) for number in sorted(set(dead))]))


def joined_pairs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for first, stop in pairs:
        if out and out[-1][1] == first:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((first, stop))
    return out


def opened(staged: StagedSegment, space: Space, coarse: Coarse | None) -> Segment:
    return Segment(staged.folder, segment_record(staged.folder, staged.runs), space, coarse)


def live_rows(segment: Segment) -> list[int]:
    dead = {row for first, stop in segment.record.dead for row in range(first, stop)}
    return [row for row in range(segment.content.entries) if row not in dead]


def told(segment: Segment) -> list[Any]:
    """Each live document: domain, record (but for its row), token ids, and the text and offsets around three of its rows."""
    out = []
    for record in segment.contexts.documents():
        first, stop = record.first_row, record.first_row + record.n_entries
        if any(a <= first < b for a, b in segment.record.dead):
            continue
        domain = next(name for name, _, end in segment.record.runs if first < end)
        contexts = [read_context(segment, row) for row in (first, (first + stop) // 2, stop - 1)]
        span = segment.contexts.span(first, stop)
        spans = None if span is None else (span.text, span.base, span.starts.tolist(), span.ends.tolist())
        values = segment.values.rows(first, stop)[:, 0].tolist()
        out.append((domain, dataclasses.replace(record, first_row=0), values, contexts, spans))
    return out


def stored(segment: Segment) -> np.ndarray[Any, Any]:
    """Decoded keys of the live rows, in the axes of the space."""
    return decoded_keys(segment)[live_rows(segment)]


def list_of_rows(segment: Segment) -> np.ndarray[Any, Any]:
    found = np.zeros(segment.content.entries, np.int64)
    for number in range(segment.lists.nlist):
        found[segment.lists.entries(number)[1] >> 24] = number
    return found


def top(segments: Sequence[Segment], queries: np.ndarray[Any, Any], k: int, *, exact: bool = False) -> tuple[Any, list[set[Any]]]:
    """Distances of all live entries, sorted, and for each query the entries found, as (document, index in it)."""
    alive = [np.array(joined_pairs([(row, row + 1) for row in live_rows(segment)])).reshape(-1, 2) for segment in segments]
    hits = search(segments, alive, queries, k=k, nprobe=1 << 20, exact=exact)
    found = []
    for at, rows in zip(hits.segments, hits.rows, strict=True):
        of_query = set()
        for number, row in zip(at.tolist(), rows.tolist(), strict=True):
            contexts = segments[number].contexts
            first = int(contexts.first_row_of(np.array([row]))[0])
            of_query.add((contexts.document_at(first).id, row - first))
        found.append(of_query)
    return hits.distances, found


CASES = [
    ([Kind(text=False), Kind(text=False)], Kind(text=False)),
    ([Kind(), Kind(), Kind()], Kind()),
    ([Kind(nlist=8), Kind(nlist=8)], Kind(nlist=8)),
    ([Kind(nlist=8), Kind(), Kind(nlist=4)], Kind(nlist=8)),
    ([Kind(nlist=8)], Kind()),
    ([Kind(Codec.PQ8, nlist=4), Kind(Codec.PQ8)], Kind(Codec.PQ8, nlist=8)),
    ([Kind(Codec.RAW), Kind(Codec.RAW)], Kind(Codec.RAW)),
    ([Kind(Codec.RAW, keep="f16"), Kind(Codec.RAW, keep="f16")], Kind(Codec.RAW, keep="f16")),
    ([Kind(keep="f16"), Kind(keep="f16")], Kind(keep="f16")),
    ([Kind(keep="bf16", nlist=4), Kind(keep="bf16")], Kind(keep="bf16", nlist=4)),
    ([Kind(keep="f32"), Kind(keep="f32")], Kind(keep="f16")),
    ([Kind(keep="f16"), Kind()], Kind(keep="f16")),
    ([Kind(keep="f32")], Kind()),
]
ENCODED = [
    ([Kind(Codec.RAW), Kind(Codec.RAW)], Kind(nlist=8)),
    ([Kind(Codec.RAW), Kind(Codec.RAW)], Kind(Codec.PQ8, keep="f16")),
    ([Kind(keep="f32"), Kind(Codec.RAW)], Kind(space_seed=1, keep="f32", nlist=4)),
    ([Kind(Codec.PQ8, keep="f16"), Kind(keep="f16")], Kind(space_seed=1, keep="f16")),
    ([Kind(keep="f32", space_seed=1), Kind(keep="f32")], Kind(keep="bf16")),
]


def draw_parts(parent: Path, kinds: Sequence[Kind], seed: int) -> list[Segment]:
    """Segments of some documents, some of them dead; at least one that counts."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, kind in enumerate(kinds):
        sizes = rng.integers(1, 60, int(rng.integers(1, 9))).tolist()
        dead = [i for i in range(len(sizes)) if rng.random() < 0.3 and (number or i)]
        parts.append(segment_of(parent, kind, sizes, 100 * seed + number, dead=dead))
    return parts


def check_told(parts: Sequence[Segment], made: Segment) -> None:
    """Documents, values, texts, domains, ids: those that lived, in order, and no others."""
    assert told(made) == [document for part in parts for document in told(part)]
    assert made.content.entries == sum(part.record.n_live() for part in parts)
    assert made.content.documents == len(told(made))
    for domain, record, *_ in told(made):
        (found,) = made.find(record.id)
        assert dataclasses.replace(found, first_row=0) == record
        assert domain in ("a", "b")
    assert {part.record.content.uuid for part in parts}.isdisjoint({made.content.uuid})
    dead_ids = {record.id for part in parts for record in part.contexts.documents()} - {record.id for _, record, *_ in told(made)}
    assert not [name for name in dead_ids if made.find(name)]
    assert all(a[0] != b[0] for a, b in zip(made.record.runs, made.record.runs[1:], strict=False)), "neighbours of one domain are one run"
    rows, tokens = [], []
    for number in range(made.lists.nlist):
        labels = made.lists.entries(number)[1]
        rows += (labels >> 24).tolist()
        tokens += (labels & 0xFFFFFF).tolist()
    assert sorted(rows) == list(range(made.content.entries))
    assert made.values.rows(0, made.content.entries)[rows, 0].tolist() == tokens


def check_files(made: Segment) -> None:
    """Every file is what segment.json says, and `verify` finds the lists in it as they are to be."""
    for file in made.content.files:
        assert sha256_file(made.folder / file.name) == (file.size, file.sha256)
    findings = Findings(made.folder.parent)
    space = made.space
    expected = ExpectedSegment(record=made.record, codec=space.codec, n_sub=space.n_sub, dim=space.dim, vocab_size=1_000)
    SegmentCheck(findings, made.folder, expected, {}, full=True).run()
    assert findings.problems == []


@pytest.mark.parametrize(("kinds", "target"), CASES)
@given(seed=st.integers(0, 10_000), small=st.booleans(), by_list=st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_joining_in_one_space_changes_no_code(tmp_path_factory, kinds, target, seed, small, by_list):
    """Codes, values, texts, kept keys and answers are those of the parts, whatever is read at a time, and in whatever order."""
    parent = tmp_path_factory.mktemp("joined")
    parts = draw_parts(parent, kinds, seed)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(joining, "ENCODE_ROWS", 7)
            patch.setattr(joining, "CODE_BYTES", 1)
            patch.setattr(relisting, "_GROUP", 50)
        if not by_list:
            patch.setattr(joining, "LIST_BYTES", 0)
        counted: list[int] = []
        staged = join_segments(parent, parts, space=target.space, coarse=target.coarse, keys=target.keep, advance=counted.append)
    made = opened(staged, target.space, target.coarse)
    check_told(parts, made)
    check_files(made)
    assert sum(counted) == made.content.entries
    assert np.array_equal(stored(made), np.concatenate([stored(part) for part in parts]))
    weights = [part.record.n_live() for part in parts]
    assert made.content.distortion == pytest.approx(np.average([part.content.distortion for part in parts], weights=weights))
    keep = target.keep if all(kind.keep or kind.codec is Codec.RAW for kind in kinds) else None
    assert made.content.keys == keep
    if keep is not None:
        before = np.concatenate([part.exact_keys(0, part.content.entries)[live_rows(part)] for part in parts])
        after = made.exact_keys(0, made.content.entries)
        same = {kind.keep for kind in kinds} == {keep} or target.codec is Codec.RAW
        assert np.array_equal(after, before) if same else np.allclose(after, before, rtol=PRECISION[keep], atol=1e-4)
    if target.coarse is not None and all(kind.nlist == target.nlist for kind in kinds):
        assert list_of_rows(made).tolist() == [n for part in parts for n in list_of_rows(part)[live_rows(part)].tolist()]
    elif target.coarse is not None:
        assert made.content.nlist == target.nlist
    queries = draw_keys(seed + 1, 4, DIM)
    k = min(12, made.content.entries)
    distances, found = top([made], queries, k)
    true = np.concatenate([code_distances(part, queries)[:, live_rows(part)] for part in parts], axis=1)
    kth = np.sort(true, axis=1)[:, :k]
    slack = 2 * lookup_tolerance(target.space, queries)[:, None] + np.ptp([part.content.distortion for part in parts])
    assert (np.abs(distances - kth) <= slack).all()
    if target.codec is Codec.RAW:  # exact distances: ties apart, the same entries
        before_distances, before_found = top(parts, queries, k)
        assert np.allclose(before_distances, distances, rtol=1e-5)
        assert found == before_found


@pytest.mark.parametrize(("kinds", "target"), ENCODED)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_joining_into_another_space_encodes_the_keys(tmp_path_factory, kinds, target, seed):
    """Codes are those of the keys in the new space, and the distortion is theirs; the keys stay."""
    parent = tmp_path_factory.mktemp("joined")
    parts = draw_parts(parent, kinds, seed)
    staged = join_segments(parent, parts, space=target.space, coarse=target.coarse, keys=target.keep)
    made = opened(staged, target.space, target.coarse)
    check_told(parts, made)
    keys = np.concatenate([part.exact_keys(0, part.content.entries)[live_rows(part)] for part in parts])
    rotated = target.space.rotate(keys)
    expected = target.space.decode(target.space.encode(rotated))
    assert np.allclose(stored(made), expected, atol=1e-5)
    counts = [part.record.n_live() for part in parts]
    errors = np.split(np.square(rotated - expected).sum(axis=1), np.cumsum(counts)[:-1])
    means = [error.sum() / max(1, len(error)) for error in errors]
    known = [part.content.distortion if part.space is target.space else mean for part, mean in zip(parts, means, strict=True)]
    assert made.content.distortion == pytest.approx(np.average(known, weights=counts), rel=1e-4)
    if target.coarse is not None:
        assert np.array_equal(list_of_rows(made), target.coarse.assign(rotated))
    assert made.content.keys == target.keep
    if target.keep is not None:
        assert np.allclose(made.exact_keys(0, len(keys)), keys, rtol=PRECISION[target.keep], atol=1e-4)


def test_codes_are_decoded_only_if_that_is_allowed(tmp_path):
    """Without keys, another space is refused, or with lossy=True what the codes stand for is encoded; its distortion adds up."""
    parts = [segment_of(tmp_path, Kind(), [200, 300, 40], 1, dead=[2]), segment_of(tmp_path, Kind(keep="f32"), [100], 2)]
    target = Kind(Codec.PQ8, nlist=4)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InvalidArgumentError, match="were not kept"):
        join_segments(tmp_path, parts, space=target.space, coarse=target.coarse, keys=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "refused before anything is written"
    made = opened(
        join_segments(tmp_path, parts, space=target.space, coarse=target.coarse, keys="f32", lossy=True), target.space, target.coarse
    )
    check_told(parts, made)
    assert made.content.keys is None
    rotation = parts[0].space.rotation
    decoded = (decoded_keys(parts[0])[:500] @ rotation).astype(np.float32)
    rotated = target.space.rotate(np.concatenate((decoded, draw_keys(2, 100, DIM))))
    expected = target.space.decode(target.space.encode(rotated))
    errors = np.square(rotated - expected).sum(axis=1)
    assert np.allclose(stored(made), expected, atol=1e-4)
    added = (500 * (parts[0].content.distortion + errors[:500].mean()) + 100 * errors[500:].mean()) / 600
    assert made.content.distortion == pytest.approx(added, rel=1e-3)


def test_what_segments_say_of_themselves(tmp_path):
    """Only what all parts have in common is said of the whole."""
    a = segment_of(tmp_path, Kind(keep="f16"), [10], 1)
    b = segment_of(tmp_path, Kind(keep="f16"), [20], 2)
    other = dataclasses.replace(b.record, content=dataclasses.replace(b.content, dtype="bfloat16"))
    mixed = Segment(b.folder, other, b.space, b.coarse)
    assert can_join(a.record, b.record)
    assert not can_join(a.record, other)
    for parts, dtype in (([a, b], "float32"), ([a, mixed], None)):
        made = opened(join_segments(tmp_path, parts, space=a.space, coarse=None, keys="f16"), a.space, None)
        assert (made.content.dtype, made.content.windows, made.content.text) == (dtype, None, True)
    for kind in (Kind(), Kind(keep="f32"), Kind(keep="f16", text=False), Kind(Codec.PQ8, keep="f16"), Kind(keep="f16", space_seed=1)):
        assert not can_join(a.record, segment_of(tmp_path, kind, [5], 3).record)
    raw, plain = segment_of(tmp_path, Kind(Codec.RAW), [5], 4), segment_of(tmp_path, Kind(), [5], 5)
    assert [kept_type([a, b], None), kept_type([a, raw], "f32"), kept_type([raw], "f32"), kept_type([a, plain], "f16")] == [
        "f16",
        "f16",
        "f32",
        None,
    ]


def test_a_key_too_large_for_its_type_is_refused(tmp_path):
    """What does not fit is said, not made infinite."""
    kind = Kind(Codec.RAW)
    made = segment_of(tmp_path, kind, [5], 1)
    large = np.full((5, DIM), 1e6, np.float32)
    with CodesWriter(made.folder, n_rows=5, space=kind.space, keys=None) as writer:
        writer.put(0, kind.space.encode(large), np.zeros(5, np.uint32), None)
    finish_segment(
        made.folder,
        uuid=made.content.uuid,
        n_documents=1,
        text=True,
        space=kind.space,
        coarse=None,
        keys=None,
        distortion=0.0,
        dtype=None,
        windows=None,
    )
    part = Segment(made.folder, segment_record(made.folder, made.record.runs), kind.space, None)
    with pytest.raises(InvalidArgumentError, match="more than f16 holds"):
        join_segments(tmp_path, [part], space=kind.space, coarse=None, keys="f16")


def test_dead_rows_within_a_document_are_refused(tmp_path):
    """A segment whose dead rows cut a document is not written again as if they did not."""
    made = with_dead(segment_of(tmp_path, Kind(), [10, 10], 1), [(5, 10)])
    with pytest.raises(DamageError, match="no whole documents"):
        join_segments(tmp_path, [made], space=made.space, coarse=None, keys=None)


def test_rows_come_in_order_from_any_lists(tmp_path, monkeypatch):
    """`by_row` gives any range of rows what the lists hold of it."""
    made = segment_of(tmp_path, Kind(nlist=8), [700, 300], 1)
    monkeypatch.setattr(lists, "_GROUP", 64)
    whole, numbers = made.lists.by_row(0, 1_000)
    assert np.array_equal(made.space.decode(whole), decoded_keys(made).astype(np.float32))
    assert np.array_equal(numbers, list_of_rows(made))
    for first, stop in ((0, 1), (31, 33), (500, 777), (999, 1_000), (5, 5)):
        some, of_some = made.lists.by_row(first, stop)
        assert np.array_equal(some, whole[first:stop])
        assert np.array_equal(of_some, numbers[first:stop])


def test_a_document_in_parts_stays_in_parts(tmp_path):
    """Parts that come into one segment remain records of their own, and a hit's context is the same."""
    documents = text_documents([90, 250, 40], domains=("a", "b"))
    keys, values = draw_keys(3, 380, DIM), draw_values(3, 380)
    create_store(tmp_path / "s.knn", keys, values, documents, segment_entries=100)
    with knnstore.open(tmp_path / "s.knn") as store:
        parts = list(store.segments)
        assert len(parts) == 4
        made = opened(join_segments(tmp_path, parts, space=parts[0].space, coarse=None, keys=None), parts[0].space, None)
        assert told(made) == [document for part in parts for document in told(part)]
        assert [record.part for record in made.find("document 1")] == [0, 1, 2, 3][: len(made.find("document 1"))]
        assert made.record.runs == (("a", 0, 90), ("b", 90, 340), ("a", 340, 380))
        assert np.array_equal(made.exact_keys(0, 380), keys)
