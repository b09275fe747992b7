"""Documents of drawn entries that come and go, and the dull oracle: a plain dict of them and brute force over their keys."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stores import checkpoint, decoded_keys, lookup_tolerance

import knnstore
from knnstore import EntryDocument, IndexOptions
from knnstore.format import Codec, DType
from knnstore.storage.arrays import to_bfloat16, to_float32
from knnstore.storage.manifest import Manifest
from knnstore.storage.segment import Segment
from knnstore.store import Datastore

DIM = 4
Key = tuple[str, str]  # domain and id: what identifies a document


@dataclass(frozen=True, eq=False)
class Drawn:
    """A document as it is given to a store. text is None where it has none."""

    domain: str
    id: str
    keys: NDArray[np.float32]
    values: NDArray[np.int64]
    text: str | None = None
    starts: NDArray[np.int64] | None = None
    ends: NDArray[np.int64] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.domain, self.id

    def held(self) -> tuple[Any, ...]:
        """What a store must give back: values, text, character offsets of the values, metadata."""
        offsets = () if self.starts is None or self.ends is None else tuple(zip(self.starts.tolist(), self.ends.tolist(), strict=True))
        return tuple(self.values.tolist()), self.text, offsets, self.metadata


def draw(
    document_id: str, version: int = 0, *, domain: str = "default", n: int = 6, dim: int = DIM, text: bool = True, **metadata: Any
) -> Drawn:
    """A document whose content follows from its domain, id and version; one on each reader's side can be drawn again."""
    rng = np.random.default_rng(zlib.crc32(f"{domain}/{document_id}/{version}/{n}".encode()))
    keys = (rng.standard_normal((n, dim)) * 3).astype(np.float32)
    values = rng.integers(0, 1_000, n)
    drawn = Drawn(domain, document_id, keys, values, metadata=metadata)
    if not text:
        return drawn
    words = [f"{document_id}.{version}.{value} " for value in values]
    ends = np.cumsum([len(word) for word in words])
    return replace(drawn, text="".join(words), starts=np.append(0, ends[:-1]), ends=ends - 1)


def batches(drawn: Iterable[Drawn]) -> list[tuple[Any, Any, Sequence[EntryDocument]]]:
    """Documents as `create_from_entries` and `append_entries` take them, one to a batch."""
    return [
        (
            item.keys,
            item.values,
            [
                EntryDocument(
                    id=item.id,
                    domain=item.domain,
                    n_entries=len(item.values),
                    metadata=item.metadata,
                    text=item.text,
                    starts=item.starts,
                    ends=item.ends,
                )
            ],
        )
        for item in drawn
    ]


def create(path: Path, drawn: Iterable[Drawn], *, dim: int = DIM, **options: Any) -> Manifest:
    """A store of documents."""
    return knnstore.create_from_entries(
        path, batches(drawn), checkpoint=checkpoint(), dim=dim, vocab_size=1_000, options=IndexOptions(**options)
    )


def by_key(drawn: Iterable[Drawn]) -> dict[Key, Drawn]:
    """The oracle of a store that holds these."""
    return {item.key: item for item in drawn}


@dataclass(frozen=True, slots=True)
class _Place:
    """A live record of a segment: rows [first_row, first_row + n) are tokens [first_token, first_token + n) of the document."""

    key: Key
    part: int
    first_row: int
    n: int
    first_token: int
    held: tuple[Any, ...]


def _places(segment: Segment) -> list[_Place]:
    """Live records, found by walking over all of them."""
    places = []
    for record in segment.contexts.documents():
        if any(first <= record.first_row < stop for first, stop in segment.record.dead):
            continue
        stop = record.first_row + record.n_entries
        domain = next(name for name, first, end in segment.record.runs if first <= record.first_row < end)
        span = segment.contexts.span(record.first_row, stop)
        text, base, offsets = (
            (None, 0, ()) if span is None else (span.text, span.base, zip(span.starts.tolist(), span.ends.tolist(), strict=True))
        )
        values = tuple(segment.values.rows(record.first_row, stop)[:, 0].tolist())
        held = (values, text, base, tuple(offsets), record.metadata)
        places.append(_Place((domain, record.id), record.part, record.first_row, record.n_entries, record.first_token, held))
    return places


def contents(store: Datastore) -> dict[Key, tuple[Any, ...]]:
    """What a store holds, in the form of `Drawn.held`; a document of several parts is put together."""
    parts: dict[Key, list[_Place]] = {}
    for segment in store.segments:
        for place in _places(segment):
            parts.setdefault(place.key, []).append(place)
    held = {}
    for key, places in parts.items():
        places.sort(key=lambda place: place.part)
        assert [place.part for place in places] == list(range(len(places))), f"{key} is there with parts {[p.part for p in places]}"
        values, texts, bases, offsets, metadata = zip(*(place.held for place in places), strict=True)
        text = None
        if texts[0] is not None:
            text = ""
            for base, piece in zip(bases, texts, strict=True):
                text = text[:base] + piece  # a later part may have characters of the one before again
        held[key] = (sum(values, ()), text, sum(offsets, ()), metadata[0])
    return held


def check_contents(store: Datastore, oracle: Mapping[Key, Drawn]) -> None:
    """Documents, values, texts, offsets, metadata and the manifest's counts are the oracle's, and nothing else is there."""
    assert contents(store) == {key: drawn.held() for key, drawn in oracle.items()}
    assert len(store) == sum(len(drawn.values) for drawn in oracle.values())
    domains = [domain for domain, _ in oracle]
    assert store.manifest.documents == {domain: domains.count(domain) for domain in domains}
    assert sorted((item.domain, item.id, item.entries) for item in store.documents()) == sorted(
        (*key, len(drawn.values)) for key, drawn in oracle.items()
    )


def _distortion(store: Datastore, space: str) -> float:
    """Of the entries of a space, in the mean: what is added to the distances of its codes."""
    contents = [segment.content for segment in store.segments if segment.content.space == space]
    return sum(content.distortion * content.entries for content in contents) / sum(content.entries for content in contents)


def _stored(segment: Segment, rows: slice, keys: NDArray[np.float32], decoded: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a segment keeps of a document's keys, (n, dim) in the axes of its space. decoded: what its codes stand for, by row.

    What was encoded again was encoded from keys as they were kept, which may be rounded.
    """
    kept = {"f16": lambda: keys.astype(np.float16), "bf16": lambda: to_float32(to_bfloat16(keys), DType.BF16)}
    rounded = kept.get(segment.content.keys or "", lambda: keys)().astype(np.float32)
    found, same = decoded[rows], np.zeros(len(keys), bool)
    for some in (keys, rounded):
        wanted = segment.space.rotate(some)
        if segment.space.codec is not Codec.RAW:
            wanted = segment.space.decode(segment.space.encode(wanted))
        same |= np.isclose(wanted, found, atol=1e-5).all(axis=1)
    assert same.all(), f"{np.flatnonzero(~same)}: not what these keys are encoded to"
    return found


def check_answers(store: Datastore, oracle: Mapping[Key, Drawn], queries: NDArray[np.float32], *, k: int, **arguments: Any) -> None:
    """The k nearest entries are those of brute force over all documents of the oracle, up to ties at the k-th distance.

    Every hit's value, document, token index and text stand where they do in its document. arguments: of `search`, where the oracle
    was narrowed down to what they let through.
    """
    hits = store.search(queries, k=k, **arguments)
    assert all((np.diff(row[np.isfinite(row)]) >= 0).all() for row in hits.distances)
    every: list[NDArray[np.float64]] = []
    rows: list[dict[int, tuple[Key, int, int]]] = []  # of each segment: row → document, token index, column of `every`
    tolerance = np.full(len(queries), 1e-9)
    n = 0
    for segment in store.segments:
        at: dict[int, tuple[Key, int, int]] = {}
        rows.append(at)
        decoded, distortion = decoded_keys(segment), _distortion(store, segment.content.space)
        asked = segment.space.rotate(queries).astype(np.float64)
        for place in _places(segment):
            if place.key not in oracle:
                continue
            keys = oracle[place.key].keys[place.first_token : place.first_token + place.n]
            stored = _stored(segment, slice(place.first_row, place.first_row + place.n), keys, decoded)
            every.append(np.square(asked[:, None] - stored[None]).sum(axis=2) + distortion)
            at.update({place.first_row + i: (place.key, place.first_token + i, n + i) for i in range(place.n)})
            n += place.n
        tolerance = np.maximum(tolerance, lookup_tolerance(segment.space, queries))
    distances = np.concatenate(every, axis=1) if every else np.zeros((len(queries), 0))
    n_wanted = min(k, n)
    assert (hits.n_found == n_wanted).all()
    nearest = np.sort(distances, axis=1)[:, :n_wanted]
    assert (np.abs(hits.distances[:, :n_wanted] - nearest) <= tolerance[:, None]).all()
    for query in range(len(queries)):
        found = set()
        for j in range(n_wanted):
            key, token, column = rows[int(hits.segments[query, j])][int(hits.rows[query, j])]
            drawn = oracle[key]
            assert abs(float(hits.distances[query, j]) - distances[query, column]) <= tolerance[query]
            assert hits.values[query, j] == drawn.values[token]
            found.add(column)
            if j < 3:
                _check_context(hits.context(query, j, left=2, right=2), drawn, token)
        assert len(found) == n_wanted, "an entry was found twice"


def _check_context(context: Any, drawn: Drawn, token: int) -> None:
    assert (context.domain, context.document, context.token_index, context.metadata) == (drawn.domain, drawn.id, token, drawn.metadata)
    assert context.token_id == drawn.values[token]
    n_left = len(context.left_ids)
    assert context.left_ids == tuple(drawn.values[token - n_left : token].tolist())
    assert context.right_ids == tuple(drawn.values[token + 1 : token + 1 + len(context.right_ids)].tolist())
    if drawn.text is None or drawn.starts is None or drawn.ends is None:
        assert context.token is None
    else:
        assert context.token == drawn.text[drawn.starts[token] : drawn.ends[token]]
        assert drawn.text.startswith(context.left, int(drawn.starts[token - n_left]) if n_left else 0)
