"""Manifests: round trip, canonical bytes, and a clear error for every way in which one can be wrong."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnstore.errors import DamageError, FormatError
from knnstore.format import CODEC_NAMES
from knnstore.storage.checkpoint import Checkpoint, KeyLayer
from knnstore.storage.manifest import (
    Calibration,
    CoarseRecord,
    FileRecord,
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
json_object = st.dictionaries(text, st.none() | st.booleans() | st.integers() | number | text | st.lists(text, max_size=2), max_size=3)


def hexes(digits: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=digits // 2, max_size=digits // 2).map(bytes.hex)


def files(*names: str) -> st.SearchStrategy[tuple[FileRecord, ...]]:
    return st.tuples(*(st.builds(FileRecord, name=st.just(name), size=size, sha256=hexes(64)) for name in sorted(names)))


@st.composite
def manifests(draw: Any, *, full: bool = False) -> Manifest:
    """Any manifest that a writer may make. full: with every field that may be missing, and one segment at least."""

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(strategy) if full else draw(st.none() | strategy)

    spaces = [
        draw(
            st.builds(
                SpaceRecord,
                id=hexes(32),
                codec=st.sampled_from(list(CODEC_NAMES)),
                n_sub=st.integers(0, 200),
                rotation=st.sampled_from(["random", "opq", "none"]),
                distortion=number,
                files=files("space.json", "centroids.bin"),
            )
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    coarse = []
    for space in spaces:
        if full or draw(st.booleans()):
            coarse.append(
                CoarseRecord(id=draw(hexes(32)), space=space.id, nlist=draw(st.integers(1, 65_536)), files=draw(files("centroids.bin")))
            )
    segments = []
    for _ in range(draw(st.integers(1 if full else 0, 3))):
        lists = coarse[0] if full else draw(st.sampled_from([None, *coarse]))
        space_id = lists.space if lists else draw(st.sampled_from(spaces)).id
        cuts = sorted(draw(st.sets(st.integers(1, 10_000), min_size=1, max_size=4)))
        runs = tuple((draw(text), first, stop) for first, stop in zip([0, *cuts], cuts, strict=False))
        dead_cuts = sorted(draw(st.sets(st.integers(0, cuts[-1]), min_size=2 if full else 0, max_size=4)))
        dead = tuple(zip(dead_cuts[::2], dead_cuts[1::2], strict=False))
        content = SegmentContent(
            uuid=draw(hexes(32)),
            space=space_id,
            coarse=lists.id if lists else None,
            nlist=lists.nlist if lists else 1,
            entries=cuts[-1],
            documents=draw(size),
            values=draw(st.sampled_from(["u16", "u32"])),
            keys=maybe(st.sampled_from(["f16", "bf16", "f32"])),
            text=draw(st.booleans()),
            dtype=maybe(text),
            windows=maybe(st.builds(WindowRule, context=size, stride=size)),
            distortion=draw(number),
            files=draw(files("lists.bin", "lists.dir", "values.bin", "contexts.lmdb")),
        )
        segments.append(SegmentRecord(content=content, runs=runs, dead=dead, sha256=draw(hexes(64))))
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
        perplexity=st.fixed_dictionaries({"lm": number, "knn": number, "mixed": number}) if full else st.just({}),
    )
    return Manifest(
        uuid=draw(hexes(32)),
        snapshot=draw(size),
        parent=maybe(st.tuples(size, hexes(64))),
        time=draw(text),
        operation=Operation(name=draw(text), arguments=draw(json_object), counts=draw(json_object)),
        checkpoint=Checkpoint(
            name=draw(text),
            revision=maybe(text),
            identity=draw(hexes(64)),
            tokenizer=maybe(hexes(64)),
            architecture=draw(text),
            vocab_size=draw(st.integers(0, 1 << 24)),
        ),
        key=KeyLayer(layer=draw(text), dim=draw(st.integers(1, 65_536))),
        tokens=maybe(json_object),
        spaces=tuple(spaces),
        coarse=tuple(coarse),
        segments=tuple(segments),
        documents=draw(st.dictionaries(text, size, min_size=1 if full else 0, max_size=3)),
        calibration=maybe(calibration),
        k=draw(size),
        nprobe=draw(size),
        writer_features=tuple(draw(st.lists(text, max_size=2))),
    )


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
NULLABLE = {"parent", "revision", "tokenizer", "tokens", "coarse", "keys", "dtype", "windows", "calibration"}
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


@given(manifest=manifests(full=True))
def test_a_missing_or_unknown_field_is_damage(manifest):
    fields = json.loads(manifest_bytes(manifest))
    for at, _ in list(places(fields)):
        if isinstance(at[-1], str) and (len(at) < 2 or at[-2] not in MEMBERS):
            with pytest.raises(DamageError):
                parse_manifest(seal(changed(fields, at, ...)) if at != ("check",) else canonical(changed(fields, at, ...)), "m")
            if at[:-1] not in FREE and at != ("check",):
                with pytest.raises(DamageError):
                    parse_manifest(seal(changed(fields, (*at[:-1], "unknown"), 1)), "m")


@given(manifest=manifests(full=True), replacement=st.sampled_from([None, True, -1, 1.5, 10**400, "x", [], {}, ["x"], {"x": 1}]))
def test_a_field_of_another_type_is_damage(manifest, replacement):
    """Any value for which another kind of value stands; whole numbers are neither negative nor fractions."""
    fields = json.loads(manifest_bytes(manifest))
    for at, value in list(places(fields)):
        if at == ("check",) or (replacement is None and at[-1] in NULLABLE) or at[-1] == "x":
            continue
        if kind_of(value) == kind_of(replacement) and (value.__class__ is not int or at[-1] in NUMBERS):
            continue
        if at[-1] in NUMBERS and kind_of(replacement) == "number" and replacement != 10**400:
            continue
        if replacement is None and at[-2:-1] == ("perplexity",):
            continue
        with pytest.raises(DamageError, match=r"m[.:\[]"):
            parse_manifest(seal(changed(fields, at, replacement)), "m")


@given(manifest=manifests(full=True), data=st.data())
def test_no_change_has_another_outcome_than_a_manifest_or_a_clear_error(manifest, data):
    """Whatever JSON stands anywhere: it is read, damage, or of a later format; never another exception."""
    fields = json.loads(manifest_bytes(manifest))
    every = [at for at, _ in places(fields)]
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | number | text,
        lambda inner: st.lists(inner) | st.dictionaries(text, inner),
        max_leaves=5,
    )
    for _ in range(5):
        fields = changed(fields, data.draw(st.sampled_from(every)), data.draw(anything))
        every = [at for at, _ in places(fields)]
        try:
            parse_manifest(seal(fields), "m")
        except (DamageError, FormatError):
            pass


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


@given(manifest=manifests(full=True), data=st.data())
def test_segments_refer_to_what_is_there(manifest, data):
    """Runs cover all rows in order; space, lists and their number are those of the manifest."""
    fields = json.loads(manifest_bytes(manifest))
    number = data.draw(st.integers(0, len(fields["segments"]) - 1))
    at: tuple[str | int, ...] = ("segments", number)
    segment = fields["segments"][number]
    entries = segment["content"]["entries"]
    wrong = [
        (("content", "space"), "00" * 16),
        (("content", "coarse"), "00" * 16),
        (("content", "coarse"), None if segment["content"]["nlist"] > 1 else "00" * 16),
        (("content", "nlist"), segment["content"]["nlist"] + 1),
        (("content", "entries"), entries + 1),
        (("runs",), segment["runs"][:-1]),
        (("runs",), [*segment["runs"], ["more", entries, entries + 1]]),
        (("runs",), [["a", 1, entries + 1]]),
        (("runs",), [["a", 0, entries], ["b", entries, entries]]),
        (("dead",), [[0, entries + 1]]),
        (("dead",), [[0]]),
        (("content", "files"), {"../KNNSTORE": {"sha256": "00" * 32, "size": 1}}),
        (("content", "files"), {".hidden": {"sha256": "00" * 32, "size": 1}}),
    ]
    for place, value in wrong:
        with pytest.raises(DamageError):
            parse_manifest(seal(changed(fields, (*at, *place), value)), "m")
