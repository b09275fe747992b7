"""Binary files that nobody wrote, with every checksum right: headers, directories of lists, records and texts. See test_fuzz.py."""

import dataclasses
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from effort import examples
from fuzzing import Bench
from hypothesis import given
from hypothesis import strategies as st
from mending import contexts_of, records, resign, sealed

from knnstore.format import HEADER_SIZE, DType, Header, Kind
from knnstore.storage.catalog import file_records
from knnstore.storage.manifest import Manifest


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tell: Callable[[str], None]) -> Iterator[Bench]:
    with Bench.made(tmp_path_factory.mktemp("fuzz"), tell) as made:
        yield made


def headers(path: Path) -> list[Path]:
    """One binary file of each kind."""
    names = ("lists.bin", "lists.dir", "values.bin", "keys.bin", "ids.bin", "rotation.bin")
    files = [next(iter(sorted(path.glob(f"*/*/{name}")))) for name in names]
    return [*files, next(iter(path.glob("spaces/*/centroids.bin"))), next(iter(path.glob("coarse/*/centroids.bin")))]


counts = st.sampled_from([0, 1, 2, 3, 1 << 31, 1 << 32, 1 << 39, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1)


@examples(150)
@given(data=st.data())
def test_headers(bench: Bench, data: st.DataObject) -> None:
    """Binary files whose headers say otherwise: counts, types, codecs; with the right check of the header and every sha256."""
    file = data.draw(st.sampled_from(headers(bench.pristine)))
    head = bytearray(file.read_bytes()[:HEADER_SIZE])
    changes = data.draw(st.dictionaries(st.sampled_from(["kind", "codec", "dtype", "rows", "columns"]), counts, min_size=1, max_size=3))
    for name, count in changes.items():
        begin, size = {"kind": (10, 1), "codec": (11, 1), "dtype": (13, 1), "rows": (16, 8), "columns": (24, 8)}[name]
        head[begin : begin + size] = (count & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    head[56:] = xxhash.xxh3_64_intdigest(bytes(head[:56])).to_bytes(8, "little")
    with bench.tampered():
        target = bench.store / file.relative_to(bench.pristine)
        target.write_bytes(bytes(head) + file.read_bytes()[HEADER_SIZE:])
        mend(bench.store)
        bench.ask("headers", (file.name, changes))


@pytest.mark.parametrize(
    ("name", "way", "dtype", "columns"),
    [
        ("keys.bin", "exact", DType.F32, 5),
        ("keys.bin", "exact", DType.BF16, 10),
        ("keys.bin", "exact", DType.U8, 20),
        ("values.bin", "contexts", DType.U8, 2),
        ("values.bin", "contexts", DType.F16, 1),
        ("ids.bin", "find", DType.U32, 4),
        ("ids.bin", "find", DType.U8, 16),
    ],
)
def test_other_elements_in_as_many_bytes(bench: Bench, name: str, way: str, dtype: DType, columns: int) -> None:
    """A header that says so of a file of the right size is not believed by what reads the file."""
    for file in sorted(bench.pristine.glob(f"segments/*/{name}")):
        raw = file.read_bytes()
        header = Header(
            kind=Kind(raw[10]),
            owner=raw[32:48],
            dtype=dtype,
            rows=int.from_bytes(raw[16:24], "little"),
            columns=columns,
            check=int.from_bytes(raw[48:56], "little"),
        )
        with bench.tampered():
            (bench.store / file.relative_to(bench.pristine)).write_bytes(header.pack() + raw[HEADER_SIZE:])
            mend(bench.store)
            assert bench.child.ask("answers", bench.store).value[way] == "DamageError"
            bench.ask("headers", (name, dtype, columns))


@examples(100)
@given(data=st.data())
def test_directories_and_checksums(bench: Bench, data: st.DataObject) -> None:
    """Lists of sizes and places that nobody laid out so; the directory's own check is right."""
    file = next(iter(sorted(bench.pristine.glob("*/*/lists.dir"))))
    raw = bytearray(file.read_bytes())
    table = np.frombuffer(raw, "<u8", offset=HEADER_SIZE).reshape(-1, 3)
    for _ in range(data.draw(st.integers(1, 4))):
        row, column = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, 2))
        table[row, column] = data.draw(counts | st.sampled_from(table[:8].reshape(-1).tolist()))
    with bench.tampered():
        (bench.store / file.relative_to(bench.pristine)).write_bytes(sealed(bytes(raw)))
        mend(bench.store)
        bench.ask("directories", table.tolist())


def mend(store: Path) -> None:
    """The sha256 and size of every file, in segment.json and manifest; those of spaces and coarse quantizers too."""

    def change(manifest: Manifest) -> Manifest:
        return dataclasses.replace(
            manifest,
            spaces=tuple(dataclasses.replace(item, files=file_records(store / "spaces" / item.id)) for item in manifest.spaces),
            coarse=tuple(dataclasses.replace(item, files=file_records(store / "coarse" / item.id)) for item in manifest.coarse),
        )

    resign(store, change)


# Frames of Zstandard


def contexts_file(bench: Bench) -> Path:
    """The contexts that begin with the first document."""
    files = bench.pristine.glob("segments/*/contexts.lmdb")
    return next(file for file in files if b'"number":0' in zstandard.decompress(records(file, "documents")[0][1]))


def packed(raw: bytes, **settings: Any) -> bytes:
    return zstandard.ZstdCompressor(**{"write_checksum": True, "write_content_size": True, **settings}).compress(raw)


def claiming(content: bytes, size: int) -> bytes:
    """A frame whose header says that it decompresses to so many bytes."""
    frame = packed(content, write_checksum=False)
    assert frame[4] & 0x20, "one segment: the size stands after the descriptor"
    return frame[:4] + bytes([0xE0]) + size.to_bytes(8, "little") + frame[6:]


def frames(record: bytes, text: bytes) -> dict[str, tuple[str, bytes]]:
    """Nasty contents of the two databases. record, text: raw ones as they were written."""
    deep = b'{"x":' * 5_000 + b"1" + b"}" * 5_000
    many = b"[" + b"[]," * (1_398_000) + b"[]]"
    nested = record.replace(b'"metadata":{"number":0}', b'"metadata":{"x":' + b"[" * 500 + b"]" * 500 + b"}")
    assert nested != record
    huge = record.replace(b'"prefix":[]', b'"prefix":' + b"[" + b"1," * 1_000_000 + b"1]")
    return {
        "bomb of zeros": ("text", packed(bytes(1 << 28))),
        "record of zeros": ("documents", packed(bytes(1 << 28))),
        "bomb without its size": ("text", packed(bytes(1 << 28), write_content_size=False)),
        "lists in a record": ("documents", packed(many)),
        "deep record": ("documents", packed(deep)),
        "deep metadata": ("documents", packed(nested)),
        "long prefix": ("documents", packed(huge)),
        "claims much": ("text", claiming(text, 1 << 40)),
        "claims all": ("text", claiming(text, (1 << 64) - 3)),
        "claims little": ("text", claiming(text, 3)),
        "record claims much": ("documents", claiming(record, 1 << 40)),
        "two frames": ("text", packed(text) * 2),
        "cut": ("text", packed(text)[:-5]),
        "nothing": ("text", b""),
        "no frame": ("documents", b"\0" * 64),
        "skippable": ("text", b"\x50\x2a\x4d\x18" + (1 << 31).to_bytes(4, "little")),
    }


NAMES = list(frames(b'"metadata":{"number":0}"prefix":[]' + b"x" * 300, b"x" * 300))


@pytest.mark.parametrize("name", NAMES)
def test_frames(bench: Bench, name: str) -> None:
    """A record or a piece of text that is a bomb, or lies about its size, is refused in bounded memory."""
    file = contexts_file(bench)
    record, text = (zstandard.decompress(records(file, database)[0][1]) for database in ("documents", "text"))
    database, content = frames(record, text)[name]
    with bench.tampered():
        target = bench.store / file.relative_to(bench.pristine)
        with contexts_of(bench.store, target) as (transaction, databases):
            transaction.put((0).to_bytes(8, "big"), content, db=databases[database])
        found = bench.ask("frames", name)
        assert found["verify full"] == "False"


@examples(100)
@given(
    head=st.tuples(
        st.sampled_from([0, 1, 299, 300, 301, 1 << 20, (1 << 32) - 1]),
        st.sampled_from([0, 1, 100, (1 << 32) - 1]),
        st.sampled_from([0, 1, 1 << 48, 1 << 62, 1 << 63, (1 << 64) - 1]),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    body=st.binary(max_size=64),
    fit=st.booleans(),
)
def test_text_frames(bench: Bench, head: tuple[int, int, int, int, int], body: bytes, fit: bool) -> None:
    """Numbers in a text frame that nobody wrote; some with a body of the length that they ask for."""
    n, n_text, base, gap_width, length_width = head
    if fit and gap_width < 4 and length_width < 4 and n <= 301 and n_text <= 100:
        size = (n << gap_width) + (n << length_width) + n_text
        body = (body or b"\0") * (size // max(1, len(body)) + 1)
        body = body[:size]
    raw = struct.pack("<IIQBBH", n, n_text, base, gap_width, length_width, 0) + body
    file = contexts_file(bench)
    with bench.tampered():
        with contexts_of(bench.store, bench.store / file.relative_to(bench.pristine)) as (transaction, databases):
            transaction.put((0).to_bytes(8, "big"), packed(raw), db=databases["text"])
        bench.ask("frames", head)


def test_names_that_are_no_rows(bench: Bench) -> None:
    """Keys of other lengths, and records of rows that no document begins at."""
    file = contexts_file(bench)
    content = records(file, "documents")[0][1]
    for database in ("documents", "text"):
        for key in (b"", b"1", b"1" * 7, b"1" * 9, (7).to_bytes(8, "big"), b"\xff" * 8):
            if key:
                with bench.tampered():
                    with contexts_of(bench.store, bench.store / file.relative_to(bench.pristine)) as (transaction, databases):
                        transaction.put(key, content, db=databases[database])
                    assert bench.ask("frames", (database, key))["verify full"] == "False"
