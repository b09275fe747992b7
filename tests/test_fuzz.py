"""JSON that nobody wrote, with every checksum right: a child process of bounded memory refuses it with an error of its own, in time, or
answers. None of it ends the child, and nothing outside of the store is touched.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from effort import examples
from fuzzing import NASTY, RAW_NASTY, At, Bench, changed, places, put_manifest, sealed_json
from hypothesis import given
from hypothesis import strategies as st
from stores import create_store, draw_keys, draw_values

import knnstore
from knnstore.build import take_back
from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import MANIFEST_MAX
from knnstore.storage.catalog import StoreFolder
from knnstore.storage.jobs import moved_by
from knnstore.storage.manifest_json import canonical
from knnstore.storage.parse import DEPTH_MAX


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tell: Callable[[str], None]) -> Iterator[Bench]:
    with Bench.made(tmp_path_factory.mktemp("fuzz"), tell) as made:
        yield made


nasty_values = (
    st.sampled_from(NASTY) | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=40)
)


@examples(150)
@given(data=st.data())
def test_manifests(bench: Bench, data: st.DataObject) -> None:
    """Any one or two of its values are others, gone or there twice; `check` and CURRENT are right."""
    fields = bench.newest()
    done: list[tuple[At, Any]] = []
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.sampled_from([at for at in places(fields) if at]))
        new = data.draw(nasty_values | st.just(...))
        fields = changed(fields, at, lambda _, new=new: new)
        done.append((at, new))
    with bench.tampered():
        put_manifest(bench.store, 2, sealed_json(fields))
        bench.ask("manifests", done)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_every_value_of_a_manifest(bench: Bench) -> None:
    """Each of its values is each nasty one in turn; a third of all, drawn."""
    fields = bench.newest()
    pairs = [(at, new) for at in places(fields) if at for new in [*NASTY, ..., "twice"]]
    for at, new in random.Random(9).sample(pairs, len(pairs) // 3):
        twice = new == "twice"
        tampered = changed(fields, at, lambda old, new=new, twice=twice: [*old, *old] if twice and isinstance(old, list) else new)
        with bench.tampered():
            put_manifest(bench.store, 2, sealed_json(tampered))
            bench.ask("manifests", (at, new))


@pytest.mark.parametrize("raw", RAW_NASTY, ids=lambda raw: raw[:12])
def test_json_that_is_none(bench: Bench, raw: str) -> None:
    """In the place of one value of a manifest, with the right `check`, and as the whole of each small file."""
    text = canonical({name: value for name, value in bench.newest().items() if name != "check"}).decode()
    for old in ('"k":1024', '"documents":{"a":1,"b":1}', '"name":"none"', '"counts":{"documents":1,'):
        assert text.count(old) == 1
        name, _, rest = old.partition(":")
        body = text.replace(old, f'{name}:{{"documents":{raw},' if rest.startswith("{") and rest.endswith(",") else f"{name}:{raw}")
        check = hashlib.sha256(body.encode()).hexdigest()
        at = body.index('"checkpoint"')
        with bench.tampered():
            put_manifest(bench.store, 2, f'{body[:at]}"check":"{check}",{body[at:]}'.encode())
            found = bench.ask("manifests", (old, raw))
            assert found["info"] == "DamageError"
    for name in SMALL:
        with bench.tampered():
            (bench.store / name).write_text(raw)
            bench.ask("small files", (name, raw))


SMALL = ("KNNSTORE", "CURRENT", "tags/kept.json", "manifests/1.json")


@examples(60)
@given(data=st.data())
def test_small_files(bench: Bench, data: st.DataObject) -> None:
    """KNNSTORE, CURRENT and a tag with other values and with other bytes; the tag with the right `check`."""
    name = data.draw(st.sampled_from(SMALL[:3]))
    raw = (bench.pristine / name).read_bytes()
    if name != "CURRENT" and data.draw(st.booleans()):
        fields = json.loads(raw)
        at = data.draw(st.sampled_from([at for at in places(fields) if at]))
        new = data.draw(nasty_values | st.just(...))
        fields = changed(fields, at, lambda _: new)
        raw = sealed_json(fields) if name.startswith("tags") else canonical(fields)
    else:
        number = data.draw(st.integers(-2, 10**19))
        raw = data.draw(
            st.binary(max_size=200)
            | st.just(f"{number} {'0' * 64}\n".encode())
            | st.just(raw * 3)
            | st.just(raw.replace(b"2", str(number).encode()))
        )
    with bench.tampered():
        (bench.store / name).write_bytes(raw)
        bench.ask("small files", (name, raw))


def put_content(path: Path, name: str, raw: bytes) -> None:
    """A segment.json or space.json, with its sha256 in the manifest that CURRENT names."""
    file = next(iter(sorted(path.glob(f"*/*/{name}"))))
    file.write_bytes(raw)
    fields = json.loads((path / "manifests" / "2.json").read_text())
    sha256 = hashlib.sha256(raw).hexdigest()
    for segment in fields["segments"]:
        if segment["content"]["uuid"] == file.parent.name:
            segment["sha256"] = sha256
    for space in fields["spaces"]:
        if space["id"] == file.parent.name:
            space["files"][name] = {"sha256": sha256, "size": len(raw)}
    put_manifest(path, 2, sealed_json(fields))


@examples(80)
@given(data=st.data())
def test_segments_and_spaces(bench: Bench, data: st.DataObject) -> None:
    """segment.json and space.json with other values, whose sha256 is in the manifest."""
    name = data.draw(st.sampled_from(["segment.json", "space.json"]))
    fields = json.loads(next(iter(sorted(bench.pristine.glob(f"*/*/{name}")))).read_text())
    at = data.draw(st.sampled_from(list(places(fields))))
    new = data.draw(nasty_values | st.just(...))
    if at == () and new is ...:
        new = None
    fields = changed(fields, at, lambda _: new)
    with bench.tampered():
        put_content(bench.store, name, canonical(fields))
        bench.ask("segments and spaces", (name, at, new))


@pytest.mark.parametrize("depth", [DEPTH_MAX, DEPTH_MAX + 1, 200, 600, 900, 980, 5_000])
def test_deep_manifests(bench: Bench, depth: int) -> None:
    """What is nested is read up to a depth that is far from where Python's own limit would stop another step."""
    deep = "[" * (depth - 1) + "]" * (depth - 1)  # in an object
    fields = {name: value for name, value in bench.newest().items() if name != "check"}
    text = canonical({**fields, "operation": {**fields["operation"], "arguments": {"x": "HERE"}}}).decode()
    body = text.replace('"HERE"', deep)
    check, at = hashlib.sha256(body.encode()).hexdigest(), body.index('"checkpoint"')
    with bench.tampered():
        put_manifest(bench.store, 2, f'{body[:at]}"check":"{check}",{body[at:]}'.encode())
        found = bench.ask("deep manifests", depth)
        assert (found["info"] == "DamageError") is (depth > DEPTH_MAX)


@pytest.mark.parametrize("depth", [DEPTH_MAX, DEPTH_MAX + 1, 600])
def test_deep_metadata(tmp_path: Path, depth: int) -> None:
    """What would not be read again is not written."""
    deep: Any = {}
    for _ in range(depth - 1):
        deep = {"x": deep}
    documents = [knnstore.EntryDocument(id="a", n_entries=3, metadata=deep)]
    if depth > DEPTH_MAX:
        with pytest.raises(InvalidArgumentError, match="deep"):
            create_store(tmp_path / "s.knn", draw_keys(0, 3, 2), draw_values(0, 3), documents)
    else:
        create_store(tmp_path / "s.knn", draw_keys(0, 3, 2), draw_values(0, 3), documents)
        with knnstore.open(tmp_path / "s.knn") as store:
            assert next(iter(store.documents())).metadata == deep


def test_large_manifests(bench: Bench) -> None:
    """One long string, many empty lists, many dead ranges: read or refused in little memory; one larger than allowed is not read."""
    fields = bench.newest()
    operation = fields["operation"]
    dead = [[i, i + 1] for i in range(0, 300, 2)]
    segments = [{**fields["segments"][0], "dead": dead}, *fields["segments"][1:]]
    for done, more in {
        "string": {"operation": {**operation, "arguments": {"x": "y" * 10_000_000}}},
        "lists": {"operation": {**operation, "arguments": {"x": [[]] * 50_000}}},
        "dead ranges": {"segments": segments},
        "dead lists": {"segments": [{**fields["segments"][0], "dead": [[]] * 50_000}, *fields["segments"][1:]]},
    }.items():
        with bench.tampered():
            put_manifest(bench.store, 2, sealed_json({**fields, **more}))
            bench.ask("large manifests", done)
    with bench.tampered():
        with (bench.store / "manifests" / "2.json").open("wb") as file:
            file.truncate(100 * MANIFEST_MAX)  # of which nothing is on the disk
        assert bench.ask("large manifests", "too large")["info"] == "DamageError"


def test_moves_lead_nowhere_else(tmp_path: Path, bench: Bench) -> None:
    """A job that somebody left in a store, and says that its commit moved what is outside: nothing there is touched."""
    store = StoreFolder(Path(shutil.copytree(bench.pristine, tmp_path / "s.knn")))
    outside = tmp_path / "outside"
    outside.mkdir()
    job = store.staging / ("ab" * 16)
    job.mkdir(parents=True)
    segment = next((store.path / "segments").iterdir()).name
    for pair in (
        ["x", "../outside"],
        ["x", str(outside)],
        ["../../../x", f"segments/{segment}"],
        ["/x", f"segments/{segment}"],
        ["x", f"segments/../segments/{segment}"],
        ["x", "segments"],
        ["x"],
        "xy",
        [1, 2],
    ):
        (job / "moves.json").write_bytes(canonical([pair]))
        assert moved_by(store, job) == set()
        with pytest.raises(DamageError):
            take_back(store, job)
    assert outside.is_dir()
    assert knnstore.verify(store.path).ok
