"""Manifests: round trip, canonical bytes, and a clear error for every way in which one can be wrong."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnstore.errors import DamageError, FormatError
from knnstore.format import CODEC_NAMES, Codec
from knnstore.storage.calibration import Calibration, Gate
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.manifest import (
    SEED_MAX,
    CoarseRecord,
    FileRecord,
    IndexOptions,
    Manifest,
    Operation,
    SegmentContent,
    SegmentRecord,
    SpaceRecord,
    WindowRule,
)
from knnstore.storage.manifest_json import canonical, manifest_bytes, parse_manifest

text = st.text(max_size=8)  # any characters, lone surrogates too
size = st.integers(0, 2**40)
number = st.floats(allow_nan=False, allow_infinity=False)
distortions = st.floats(0, 3e38)
snapshots = st.integers(1, 10**17)
window_rules = st.builds(WindowRule, context=st.integers(1, 1 << 30), stride=st.integers(1, 1 << 30))
json_object = st.dictionaries(text, st.none() | st.booleans() | st.integers() | number | text | st.lists(text, max_size=2), max_size=3)


def hexes(digits: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=digits // 2, max_size=digits // 2).map(bytes.hex)


def files(*names: str) -> st.SearchStrategy[tuple[FileRecord, ...]]:
    return st.tuples(*(st.builds(FileRecord, name=st.just(name), size=size, sha256=hexes(64)) for name in sorted(names)))


@st.composite
def manifests(draw: Any) -> Manifest:
    """Any manifest that a writer may make."""

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    spaces = [
        draw(
            st.builds(
                SpaceRecord,
                id=hexes(30).map(f"{i:02x}".__add__),
                codec=st.sampled_from(list(CODEC_NAMES)),
                n_sub=st.integers(0, 200),
                rotation=st.sampled_from(["random", "opq", "none"]),
                distortion=distortions,
                files=files("space.json", "centroids.bin"),
            )
        )
        for i in range(draw(st.integers(1, 2)))
    ]
    coarse = [
        CoarseRecord(id=space.id[::-1], space=space.id, nlist=draw(st.integers(1, 65_536)), files=draw(files("centroids.bin")))
        for space in spaces
        if draw(st.booleans())
    ]
    segments = []
    for i in range(draw(st.integers(0, 3))):
        lists = draw(st.sampled_from([None, *coarse]))
        space_id = lists.space if lists else draw(st.sampled_from(spaces)).id
        cuts = sorted(draw(st.sets(st.integers(1, 10_000), min_size=1, max_size=4)))
        runs = tuple((draw(text), first, stop) for first, stop in zip([0, *cuts], cuts, strict=False))
        dead_cuts = sorted(draw(st.sets(st.integers(0, cuts[-1]), max_size=4)))
        dead = tuple(zip(dead_cuts[::2], dead_cuts[1::2], strict=False))
        content = SegmentContent(
            uuid=draw(hexes(30)) + f"{i:02x}",
            space=space_id,
            coarse=lists.id if lists else None,
            nlist=lists.nlist if lists else 1,
            entries=cuts[-1],
            documents=draw(st.integers(1, cuts[-1])),
            values=draw(st.sampled_from(["u16", "u32"])),
            keys=maybe(st.sampled_from(["f16", "bf16", "f32"])),
            text=draw(st.booleans()),
            dtype=maybe(text),
            windows=maybe(window_rules),
            distortion=draw(distortions),
            files=draw(files("lists.bin", "lists.dir", "values.bin", "contexts.lmdb")),
        )
        segments.append(SegmentRecord(content=content, runs=runs, dead=dead, sha256=draw(hexes(64))))
    lambdas = st.floats(0.0, 1.0)
    gates = st.one_of(
        st.dictionaries(st.floats(0.0, 1e6), lambdas, min_size=1, max_size=3).map(
            lambda points: Gate(kind="distance", distances=tuple(sorted(points)), lambdas=tuple(points[at] for at in sorted(points)))
        ),
        st.builds(
            lambda weights, bias: Gate(kind="logistic", features=tuple(weights), weights=tuple(weights.values()), bias=bias),
            st.dictionaries(text, number, max_size=3),
            number,
        ),
    )
    calibration = st.builds(
        Calibration,
        lmbda=number,
        temperature=number,
        k=size,
        nprobe=size,
        exact=st.booleans(),
        spaces=st.lists(hexes(32), min_size=1, max_size=2).map(tuple),
        domains=st.lists(text, min_size=1, max_size=2).map(tuple),
        status=st.sampled_from(["fresh", "stale", "default"]),
        made_by=text,
        tokens=size,
        perplexity=st.dictionaries(st.sampled_from(["lm", "knn", "mixed"]), number),
        gate=st.none() | gates,
        before=st.none() | gates,
        weights=st.dictionaries(text, st.floats(0.0, 1e6), max_size=2),
    )
    return Manifest(
        uuid=draw(hexes(32)),
        snapshot=draw(snapshots),
        parent=maybe(st.tuples(snapshots, hexes(64))),
        time=draw(text),
        operation=Operation(name=draw(text), arguments=draw(json_object), counts=draw(json_object)),
        checkpoint=Checkpoint(
            name=draw(text),
            revision=maybe(text),
            identity=draw(hexes(64)),
            tokenizer=maybe(hexes(64)),
            architecture=draw(text),
            vocab_size=draw(st.integers(1, 1 << 24)),
        ),
        key=KeyLayer(layer=draw(text), dim=draw(st.integers(1, 65_536))),
        tokens=maybe(json_object),
        windows=maybe(window_rules),
        index=IndexOptions(
            codec=draw(st.sampled_from(["pq4", "pq8"])),
            rotation=draw(st.sampled_from(["random", "opq", "none"])),
            keep_keys=maybe(st.sampled_from(["f16", "bf16", "f32"])),
            seed=draw(st.integers(0, SEED_MAX)),
            segment_entries=draw(st.integers(1, 1 << 32)),
        ),
        spaces=tuple(spaces),
        coarse=tuple(coarse),
        segments=tuple(segments),
        documents=draw(st.dictionaries(text, size, max_size=3)),
        calibration=maybe(calibration),
        k=draw(size),
        nprobe=draw(size),
        writer_features=tuple(draw(st.lists(text, max_size=2))),
    )


_FILES = ("contexts.lmdb", "keys.bin", "lists.bin", "lists.dir", "values.bin")

# A manifest in which nothing is missing.
FULL = Manifest(
    uuid="01" * 16,
    snapshot=7,
    parent=(6, "02" * 32),
    time="2026-01-02T03:04:05Z",
    operation=Operation(name="create", arguments={"domain": "law"}, counts={"documents": 3}),
    checkpoint=Checkpoint(
        name="gpt2", revision="main", identity="03" * 32, tokenizer="04" * 32, architecture="GPT2LMHeadModel", vocab_size=50_257
    ),
    key=KeyLayer(layer="h.11.mlp", dim=768),
    tokens={"bos": 1},
    windows=WindowRule(context=512, stride=256),
    index=IndexOptions(codec="pq8", rotation="opq", keep_keys="bf16", seed=7, segment_entries=1_000),
    spaces=tuple(
        SpaceRecord(
            id=name * 16,
            codec=Codec.PQ4,
            n_sub=128,
            rotation="random",
            distortion=1.5,
            files=(FileRecord(name="space.json", size=9, sha256="06" * 32),),
        )
        for name in ("05", "15")
    ),
    coarse=(CoarseRecord(id="07" * 16, space="05" * 16, nlist=64, files=(FileRecord(name="centroids.bin", size=8, sha256="08" * 32),)),),
    segments=tuple(
        SegmentRecord(
            content=SegmentContent(
                uuid=name * 16,
                space="05" * 16,
                coarse="07" * 16,
                nlist=64,
                entries=100,
                documents=3,
                values="u16",
                keys="bf16",
                text=True,
                dtype="float32",
                windows=WindowRule(context=512, stride=256),
                distortion=2.5,
                files=tuple(FileRecord(name=file, size=64, sha256="0a" * 32) for file in _FILES),
            ),
            runs=(("law", 0, 60), ("med", 60, 100)),
            dead=((5, 10), (90, 100)),
            sha256="0b" * 32,
        )
        for name in ("09", "19")
    ),
    documents={"law": 2, "med": 1},
    calibration=Calibration(
        lmbda=0.3,
        temperature=12.5,
        k=1_024,
        nprobe=32,
        exact=False,
        spaces=("05" * 16,),
        domains=("law",),
        status="fresh",
        made_by="create",
        tokens=4_096,
        perplexity={"lm": 30.5, "knn": 40.5, "mixed": 28.5},
        gate=Gate(kind="distance", distances=(1.5, 20.5), lambdas=(0.75, 0.0)),
        before=Gate(kind="logistic", features=("lm_max",), weights=(-0.5,), bias=0.25),
        weights={"law": 2.5},
    ),
    k=1_024,
    nprobe=32,
    writer_features=("x",),
)
FIELDS: dict[str, Any] = json.loads(manifest_bytes(FULL))


def seal(fields: dict[str, Any]) -> bytes:
    """The bytes of a manifest of these fields, with the `check` that belongs to them."""
    body = {name: value for name, value in fields.items() if name != "check"}
    return canonical({**body, "check": hashlib.sha256(canonical(body)).hexdigest()})


@given(manifest=manifests())
def test_a_manifest_comes_back(manifest):
    """And its bytes are canonical: the same manifest has the same bytes, sorted, ASCII, one line."""
    raw = manifest_bytes(manifest)
    parsed = parse_manifest(raw, "m")
    # Adjoining dead ranges are one range.
    joined = [dataclasses.replace(segment, dead=tuple(map(tuple, segment.dead_ranges().tolist()))) for segment in manifest.segments]
    assert parsed == dataclasses.replace(manifest, segments=tuple(joined))
    assert manifest_bytes(parsed) == manifest_bytes(dataclasses.replace(manifest, segments=tuple(joined)))
    fields = json.loads(raw)
    assert raw == (json.dumps(fields, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")
    assert raw == seal(fields)
    assert parsed.domains() == sorted(manifest.documents)
    for before, after in zip(manifest.segments, parsed.segments, strict=True):
        alive = set(range(before.content.entries)) - {row for first, stop in before.dead for row in range(first, stop)}
        assert after.n_live() == len(alive)
        for domain in {name for name, _, _ in before.runs}:
            rows = [row for first, stop in after.domain_ranges(domain).tolist() for row in range(first, stop)]
            assert rows == [row for name, first, stop in before.runs for row in range(first, stop) if name == domain]
        assert after.content.size_of("lists.bin") == next(f.size for f in before.content.files if f.name == "lists.bin")
        assert after.content.size_of("keys.bin") == 0


# Objects in which any names are allowed, and fields that may be null.
FREE = {("operation", "arguments"), ("operation", "counts"), ("tokens",)}
NULLABLE = {"keep_keys", "parent", "revision", "tokenizer", "tokens", "coarse", "keys", "dtype", "windows", "calibration"}
OPTIONAL = {("calibration", name) for name in ("gate", "before", "weights")}  # null is as if they were left out
MEMBERS = {"files", "documents", "perplexity"}  # objects whose members may be any number
NUMBERS = {"lambda", "temperature", "distortion", "lm", "knn", "mixed"}  # not whole ones only


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every place in a manifest's JSON, with what is there."""
    if at:
        yield at, value
    if at in FREE:
        return
    if isinstance(value, dict | list):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*at, name))


def changed(fields: dict[str, Any], at: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at a place; ... for none."""
    copy = json.loads(json.dumps(fields))
    holder = copy
    for step in at[:-1]:
        holder = holder[step]
    if value is ...:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return copy


def kind_of(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


@pytest.mark.parametrize("at", [at for at, _ in places(FIELDS)], ids=str)
def test_a_missing_or_unknown_field_is_damage(at):
    if isinstance(at[-1], int) or (len(at) > 1 and at[-2] in MEMBERS):
        return  # of lists and tables, items may be left out
    if at in OPTIONAL or at[:-1] == ("calibration", "weights"):
        assert parse_manifest(seal(changed(FIELDS, at, ...)), "m") != FULL
        return
    without = changed(FIELDS, at, ...)
    with pytest.raises(DamageError):
        parse_manifest(canonical(without) if at == ("check",) else seal(without), "m")
    with pytest.raises(DamageError, match="unknown"):
        parse_manifest(seal(changed(FIELDS, (*at[:-1], "unknown"), 1)), "m")


@pytest.mark.parametrize("at", [at for at, _ in places(FIELDS) if at != ("check",)], ids=str)
def test_a_field_of_another_type_is_damage(at):
    """Any value for which another kind of value stands; whole numbers are neither negative nor fractions."""
    value = functools.reduce(lambda holder, step: holder[step], at, FIELDS)
    huge = 10**400  # beyond any float
    for replacement in [None, True, -1, 1.5, huge, "x", [], {}, ["x"], {"x": 1}]:
        if replacement is None and (at[-1] in NULLABLE or at[-2:-1] == ("perplexity",) or at in OPTIONAL):
            continue
        if at[:2] in OPTIONAL and kind_of(value) == kind_of(replacement) == "number" and replacement != huge:
            continue  # what they may be is in test_manifest_ranges.py
        fits = kind_of(value) != "number" or (at[-1] in NUMBERS and replacement != huge)
        if kind_of(value) == kind_of(replacement) and (fits or (at == ("format",) and replacement == huge)):
            continue
        with pytest.raises(DamageError, match=r"m[.:\[]"):
            parse_manifest(seal(changed(FIELDS, at, replacement)), "m")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | number | text, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=5
)


@given(data=st.data())
def test_no_change_has_another_outcome_than_a_manifest_or_a_clear_error(data):
    """Whatever JSON stands anywhere: it is read, damage, or of a later format; never another exception."""
    fields = FIELDS
    for _ in range(3):
        at = data.draw(st.sampled_from([at for at, _ in places(fields)]))
        fields = changed(fields, at, data.draw(anything))
        with contextlib.suppress(DamageError, FormatError):
            parse_manifest(seal(fields), "m")


@given(manifest=manifests(), at=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_a_flipped_bit_is_damage(manifest, at, bit):
    """Also where what comes of it is sound JSON, or names a later format."""
    raw = bytearray(manifest_bytes(manifest))
    raw[at % len(raw)] ^= 1 << bit
    with pytest.raises(DamageError):
        parse_manifest(bytes(raw), "m")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b'{"check":1}', b"\xff", b"[" * 100_000, b'{"a":1,"a":1}', b"NaN"])
def test_what_is_no_manifest_is_damage(raw):
    with pytest.raises(DamageError):
        parse_manifest(raw, "m")


@given(manifest=manifests())
def test_a_later_format_is_said_to_be_one(manifest):
    """By its number, whatever its fields are; or by a feature that readers must understand. A writer's feature keeps no reader out."""
    fields = json.loads(manifest_bytes(manifest))
    with pytest.raises(FormatError, match="format 2; this knnstore reads up to 1"):
        parse_manifest(seal({"format": 2, "new": "shape"}), "m")
    with pytest.raises(FormatError, match="it needs graph-lists"):
        parse_manifest(seal(changed(fields, ("features", "reader"), ["graph-lists"])), "m")
    assert parse_manifest(seal(changed(fields, ("features", "writer"), ["new"])), "m").writer_features == ("new",)
    with pytest.raises(DamageError, match="format 0"):
        parse_manifest(seal(changed(fields, ("format",), 0)), "m")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("content.space", "15" * 16),  # there, but not that of the lists
        ("content.space", "ff" * 16),
        ("content.coarse", "ff" * 16),
        ("content.coarse", None),
        ("content.nlist", 65),
        ("content.entries", 101),
        ("runs", [["law", 0, 60]]),
        ("runs", [["law", 0, 60], ["med", 60, 100], ["more", 100, 101]]),
        ("runs", [["law", 1, 100]]),
        ("runs", [["law", 0, 60], ["med", 61, 100]]),
        ("runs", [["law", 0, 100], ["med", 100, 100]]),
        ("dead", [[0, 101]]),
        ("dead", [[0]]),
        ("content.files", {"../KNNSTORE": {"sha256": "00" * 32, "size": 1}}),
        ("content.files", {".hidden": {"sha256": "00" * 32, "size": 1}}),
    ],
)
def test_segments_refer_to_what_is_there(at, value):
    """Runs cover all rows in order; space, lists and their number are those of the manifest; files are names of the format."""
    with pytest.raises(DamageError, match=r"m[.:\[]"):
        parse_manifest(seal(changed(FIELDS, ("segments", 1, *at.split(".")), value)), "m")
