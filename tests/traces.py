"""Looks for what is left of a document in all files of a store, without knnstore's own readers where a format can be read plainly."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import zstandard
from living import Drawn
from numpy.typing import NDArray
from stores import decoded_keys

from knnstore.format import Codec
from knnstore.storage.contexts import id_hash
from knnstore.storage.manifest import SegmentRecord
from knnstore.storage.segment import Segment, read_segment_content
from knnstore.storage.space import load_space

ZSTD = b"\x28\xb5\x2f\xfd"  # how each zstd frame begins
TOKENS = 5  # in a row are a document's own, in stores as small as these


def traces(path: Path, drawn: Drawn) -> set[str]:
    """Where something of a document is: `<what> in <kind of file>`."""
    found = set()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            found |= {f"{what} in {_kind(file)}" for what in _in_bytes(file.read_bytes(), drawn)}
    for folder in [*(path / "segments").iterdir(), *path.glob("staging/*/segments/*")]:
        found |= {f"{what} in {name}" for what, name in _in_segment(path, folder, drawn)}
    return found


def _kind(file: Path) -> str:
    return file.parent.name if file.parent.name in ("manifests", "tags") else file.name


def _words(drawn: Drawn) -> dict[str, list[bytes]]:
    """What no byte may say. Metadata and ids are in JSON, so also as it writes them."""
    values = [value for value in drawn.metadata.values() if isinstance(value, str)]
    words = {"id": [drawn.id], "metadata": values, "text": [] if drawn.text is None else drawn.text.split()}
    return {what: [form for word in some for form in (word.encode(), json.dumps(word)[1:-1].encode())] for what, some in words.items()}


def _in_bytes(raw: bytes, drawn: Drawn) -> Iterator[str]:
    """In the bytes themselves, and in every zstd frame in them, whether a tree still leads there or not."""
    at = raw.find(ZSTD)
    pieces = [raw]
    while at >= 0:
        with contextlib.suppress(zstandard.ZstdError):  # bytes that look like the beginning of a frame
            pieces.append(zstandard.ZstdDecompressor().decompressobj().decompress(raw[at:]))
        at = raw.find(ZSTD, at + 1)
    for what, words in _words(drawn).items():
        if any(word in piece for word in words for piece in pieces):
            yield what
    if struct.pack("<Q", id_hash(drawn.id)) in raw:
        yield "hash of the id"
    for kind in ("<u2", "<u4"):
        rows = drawn.values.astype(kind).tobytes()
        width = np.dtype(kind).itemsize * TOKENS
        if any(rows[first : first + width] in raw for first in range(0, len(rows) - width + 1, np.dtype(kind).itemsize)):
            yield "tokens"
    for kind in ("<f4", "<f2"):
        if any(key.astype(kind).tobytes() in raw for key in drawn.keys):
            yield "keys"


def _in_segment(path: Path, folder: Path, drawn: Drawn) -> Iterator[tuple[str, str]]:
    """In the pages of LMDB that lead somewhere, in labels, and in codes."""
    with lmdb.open(str(folder / "contexts.lmdb"), subdir=False, readonly=True, lock=False, max_dbs=2) as environment:
        for name in (b"documents", b"text"):
            database = environment.open_db(name, create=False)
            with environment.begin(db=database) as transaction, transaction.cursor() as cursor:
                content = b"\n".join(zstandard.ZstdDecompressor().decompress(value) for _, value in cursor)
            for what, words in _words(drawn).items():
                if any(word in content for word in words):
                    yield what, f"{name.decode()} of contexts.lmdb"
    content, sha256 = read_segment_content(folder)
    space = load_space(path / "spaces" / content.space, content.space)
    segment = Segment(folder, SegmentRecord(content=content, runs=(), dead=(), sha256=sha256), space, None)
    labels = np.sort(np.concatenate([segment.lists.entries(number)[1] for number in range(content.nlist)]))
    if _has_run(labels & 0xFFFFFF, drawn.values):
        yield "tokens", "labels"
    if space.codec is not Codec.RAW:
        wanted = space.decode(space.encode(space.rotate(drawn.keys)))
        stored = decoded_keys(segment).astype(np.float32)
        if (np.abs(stored[None] - wanted[:, None]).max(axis=2) < 1e-6).any():
            yield "codes", "lists"


def _has_run(tokens: NDArray[np.int64], values: NDArray[np.int64]) -> bool:
    """Whether some tokens of a document stand one after the other."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, TOKENS) if len(tokens) >= TOKENS else np.zeros((0, TOKENS), np.int64)
    return any((windows == values[first : first + TOKENS]).all(axis=1).any() for first in range(len(values) - TOKENS + 1))
