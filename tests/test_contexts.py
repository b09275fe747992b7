"""`contexts.lmdb`: documents and text as they were put in, whatever the text, the tokens and the parts."""

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import flip

from knnstore.errors import DamageError, InvalidArgumentError
from knnstore.format import TEXT_FRAME_MAX, TEXT_FRAME_PACKED, TEXT_FRAME_RAW
from knnstore.storage.contexts import ContextsReader, DocumentRecord
from knnstore.storage.contexts_writer import ContextsWriter

# Words, Chinese, combining marks, emoji of several code points, NUL, line ends of all kinds.
PIECES = ["the ", "Dickens", "\r\n", "é", "ü", "中文字", "👩‍👩‍👧", "🏳️‍🌈", " ", "\n", "\x00", "a", "0123456789" * 8, "。"]


@dataclass
class Text:
    """A document's text, and the spans of its tokens. n_parts: how many parts it comes in; calls: tokens in one call."""

    text: str
    starts: np.ndarray
    ends: np.ndarray
    id: str = "a"
    n_parts: int = 1
    calls: int = 10_000
    metadata: dict = field(default_factory=dict)


@st.composite
def texts(draw, max_pieces=400):
    """A text cut into tokens: of one or more characters, of a part of a character (spans that are shared), with characters between
    that no token has, and perhaps an end token of no characters."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, max_pieces))
    text = "".join(rng.choice(PIECES, n)) or "x"
    starts, ends, at = [], [], int(rng.integers(0, min(3, len(text))))
    while at < len(text):
        stop = min(len(text), at + int(rng.integers(1, 9)))
        for _ in range(int(rng.choice([1, 1, 1, 1, 2, 4])) if stop == at + 1 else 1):
            starts.append(at)
            ends.append(stop)
        at = stop + int(rng.choice([0, 0, 0, 1, 12]))
    if draw(st.booleans()):
        starts.append(len(text))
        ends.append(len(text))
    n_parts = min(len(starts), draw(st.sampled_from([1, 1, 2, 3])))
    name = draw(st.sampled_from(["a", "a/b.txt", "naïve 中", "\udce9 is no UTF-8", "x#1"]))
    metadata = draw(st.sampled_from([{}, {"year": 1843, "tags": ["a", {"b": None}], "π": 3.5}]))
    return Text(text, np.array(starts), np.array(ends), name, n_parts, draw(st.sampled_from([1, 7, 10_000])), metadata)


def write(path: Path, documents: list[Text]) -> list[DocumentRecord]:
    """All documents in one file, each in its parts; the text of a part goes to the first character of the next."""
    writer = ContextsWriter(path)
    row, records = 0, []
    for document in documents:
        n = len(document.starts)
        cuts = np.linspace(0, n, document.n_parts + 1).astype(int).tolist()
        reached = 0
        for part, (first, stop) in enumerate(pairwise(cuts)):
            first_row = row
            for at in range(first, stop, document.calls):
                end = min(at + document.calls, stop)
                to = len(document.text) if end == n else max(reached, int(document.starts[end]))
                writer.add_tokens(row, document.starts[at:end], document.ends[at:end], document.text[reached:to], reached)
                row, reached = row + end - at, to
            last = stop == n
            record = DocumentRecord(
                id=document.id,
                source=f"/corpus/{document.id}",
                first_row=first_row,
                n_entries=row - first_row,
                prefix=(5, part),
                metadata=document.metadata,
                content_hash=hashlib.sha256(document.text.encode()).hexdigest() if last else None,
                n_chars=len(document.text) if last else None,
                part=part,
                last=last,
                first_token=first,
            )
            writer.end_document(record)
            records.append(record)
    writer.finish()
    return records


@given(documents=st.lists(texts(), min_size=1, max_size=4), seed=st.integers(0, 1_000))
@settings(max_examples=60)
def test_documents_and_text_come_back(tmp_path_factory, documents, seed):
    """Records in order and by id; the text and offsets of any rows of a document; all frames together are the text."""
    path = tmp_path_factory.mktemp("contexts") / "contexts.lmdb"
    records = write(path, documents)
    n_rows = sum(len(document.starts) for document in documents)
    reader = ContextsReader(path, n_rows=n_rows)
    assert list(reader.documents()) == records
    assert reader.first_rows.tolist() == [record.first_row for record in records]
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(len(documents)), [document.n_parts for document in documents])
    for number, record in zip(numbers, records, strict=True):
        document = documents[number]
        assert reader.document_at(record.first_row) == record
        for _ in range(6):
            first, stop = np.sort(rng.integers(0, record.n_entries + 1, 2))
            stop = max(stop, first + 1) if first < record.n_entries else stop
            first = min(first, record.n_entries - 1)
            span = reader.span(record.first_row + first, record.first_row + stop)
            tokens = slice(record.first_token + first, record.first_token + stop)
            assert span.starts.tolist() == document.starts[tokens].tolist()
            assert span.ends.tolist() == document.ends[tokens].tolist()
            low, high = int(span.starts.min()), int(span.ends.max())
            # A character shared by tokens of two parts is with one of them only.
            begin, end = max(low, span.base), min(high, span.base + len(span.text))
            assert span.cut(low, high) == document.text[begin:end]
            if document.n_parts == 1:
                assert (begin, end) == (low, high)
        rows = reader.first_row_of(np.arange(record.first_row, record.first_row + record.n_entries))
        assert set(rows.tolist()) == {record.first_row}
    assert_frames(reader, documents)
    reader.close()


def assert_frames(reader, documents):
    """Frames follow each other through all rows; each is within its limits, unless it holds a single token."""
    rebuilt, row = {}, 0
    starts_of = np.cumsum([0] + [len(document.starts) for document in documents])
    for first_row, starts, _, text, base in reader.frames():
        assert first_row == row
        row += len(starts)
        number = int(np.searchsorted(starts_of, first_row, side="right")) - 1
        before = rebuilt.get(number, "")
        assert base == len(before)
        rebuilt[number] = before + text
    assert row == starts_of[-1]
    assert [rebuilt[number] for number in range(len(documents))] == [document.text for document in documents]
    for packed, raw, n_tokens in frame_sizes(reader):
        assert n_tokens == 1 or (packed <= TEXT_FRAME_PACKED and raw <= TEXT_FRAME_RAW)


def frame_sizes(reader):
    """Bytes packed, bytes raw and tokens of each frame."""
    with reader._env.begin() as transaction, transaction.cursor(db=reader._text) as cursor:
        for _, packed in cursor:
            raw = zstandard.decompress(packed)
            yield len(packed), len(raw), int.from_bytes(raw[:4], "little")


@pytest.mark.parametrize("kind", ["prose", "noise", "chinese", "same"])
def test_long_documents_are_cut_into_frames_that_fill_pages(tmp_path, kind):
    """A long text of any kind: frames within their limits, and not many more than its packed size needs."""
    rng = np.random.default_rng(0)
    alphabet = {"prose": "etaoin shrdlu", "noise": [chr(c) for c in range(33, 2_000)], "chinese": [chr(c) for c in range(0x4E00, 0x5E00)]}
    text = "a" * 200_000 if kind == "same" else "".join(rng.choice(list(alphabet[kind]), 200_000))
    cuts = np.unique(np.concatenate(([0, len(text)], rng.integers(0, len(text), 60_000))))
    document = Text(text, cuts[:-1], cuts[1:])
    path = tmp_path / "contexts.lmdb"
    write(path, [document])
    reader = ContextsReader(path, n_rows=len(cuts) - 1)
    sizes = list(frame_sizes(reader))
    assert all(packed <= TEXT_FRAME_PACKED and raw <= TEXT_FRAME_RAW for packed, raw, _ in sizes)
    fill = [max(packed / TEXT_FRAME_PACKED, raw / TEXT_FRAME_RAW) for packed, raw, _ in sizes]
    assert np.mean(fill) > 0.75
    assert "".join(text for _, _, _, text, _ in reader.frames()) == text
    span = reader.span(100, len(cuts) - 101)
    assert span.cut(int(span.starts[0]), int(span.ends[-1])) == text[cuts[100] : cuts[-101]]
    reader.close()


@pytest.mark.parametrize("n_shared", [2, 3, 7])
def test_tokens_of_one_character_stay_in_one_frame(tmp_path, n_shared):
    """An emoji in bytes is several tokens; frames are cut between characters."""
    text = "".join(np.random.default_rng(0).choice(list("😀😃😄😁😆👩🏳🌈"), 6_000))
    starts = np.repeat(np.arange(len(text)), n_shared)
    write(tmp_path / "contexts.lmdb", [Text(text, starts, starts + 1)])
    reader = ContextsReader(tmp_path / "contexts.lmdb", n_rows=len(starts))
    frames = list(reader.frames())
    assert len(frames) > 3
    assert all(first_row % n_shared == 0 for first_row, *_ in frames)
    reader.close()


def test_one_token_may_span_much_text_but_not_any_amount(tmp_path):
    """A run of a million spaces as one token is taken; one that a reader would refuse is refused when it is written."""
    text = " " * 1_000_000 + "end"
    document = Text(text, np.array([0, 1_000_000]), np.array([1_000_000, 1_000_003]))
    write(tmp_path / "long.lmdb", [document])
    reader = ContextsReader(tmp_path / "long.lmdb", n_rows=2)
    assert reader.span(0, 1).cut(0, 2_000_000) == text[:1_000_000]
    assert reader.span(1, 2).cut(1_000_000, 1_000_003) == "end"
    reader.close()
    size = TEXT_FRAME_MAX + 1
    with pytest.raises(InvalidArgumentError, match="a token spans"):
        write(tmp_path / "longer.lmdb", [Text("x" * size, np.array([0]), np.array([size]))])


def test_documents_without_text_have_no_span(tmp_path):
    """Beside others with text, and alone."""
    writer = ContextsWriter(tmp_path / "contexts.lmdb")
    fields = {"source": "", "prefix": (), "metadata": {}, "content_hash": None, "n_chars": None}
    writer.end_document(DocumentRecord(id="bare", first_row=0, n_entries=3, **fields))
    writer.add_tokens(3, np.array([0, 1]), np.array([1, 2]), "ab", 0)
    writer.end_document(DocumentRecord(id="text", first_row=3, n_entries=2, **fields))
    writer.end_document(DocumentRecord(id="bare too", first_row=5, n_entries=1, **fields))
    writer.finish()
    reader = ContextsReader(tmp_path / "contexts.lmdb", n_rows=6)
    assert reader.span(0, 3) is None
    assert reader.span(3, 5).text == "ab"
    assert reader.span(5, 6) is None
    reader.close()


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": float("inf")}, {"x": {1, 2}}, {"x": np.int64(3)}, {"x": b"bytes"}])
def test_metadata_that_is_not_json_is_refused(tmp_path, metadata):
    writer = ContextsWriter(tmp_path / "contexts.lmdb")
    fields = {"source": "", "prefix": (), "content_hash": None, "n_chars": None}
    with pytest.raises(InvalidArgumentError, match="document 'strange': its metadata is not JSON"):
        writer.end_document(DocumentRecord(id="strange", first_row=0, n_entries=1, metadata=metadata, **fields))
    writer.close()


def test_a_file_grows_beyond_the_map_it_began_with(tmp_path, monkeypatch):
    """MapFullError in the middle of a write loses nothing."""
    monkeypatch.setattr("knnstore.storage.contexts_writer._MAP_STEP", 1 << 16)
    monkeypatch.setattr("knnstore.storage.contexts_writer._COMMIT_BYTES", 1 << 14)
    rng = np.random.default_rng(1)
    text = "".join(chr(c) for c in rng.integers(33, 2_000, 300_000))
    cuts = np.arange(0, 300_001, 3)
    write(tmp_path / "contexts.lmdb", [Text(text, cuts[:-1], cuts[1:])])
    assert (tmp_path / "contexts.lmdb").stat().st_size > 1 << 18
    reader = ContextsReader(tmp_path / "contexts.lmdb", n_rows=len(cuts) - 1)
    assert "".join(text for _, _, _, text, _ in reader.frames()) == text
    reader.close()


def test_readers_of_one_process_share_a_file(tmp_path):
    """Two readers of one path, closed in any order (LMDB refuses to open a file twice in a process)."""
    path = tmp_path / "contexts.lmdb"
    write(path, [Text("abc", np.arange(3), np.arange(1, 4))])
    first, second = ContextsReader(path, n_rows=3), ContextsReader(path, n_rows=3)
    first.close()
    assert second.span(1, 2).cut(1, 2) == "b"
    second.close()
    third = ContextsReader(path, n_rows=3)
    assert third.span(0, 1).cut(0, 1) == "a"
    third.close()


def test_a_file_that_is_none_is_damage(tmp_path):
    path = tmp_path / "contexts.lmdb"
    with pytest.raises(DamageError, match="LMDB cannot open it"):
        ContextsReader(path, n_rows=3)
    path.write_bytes(b"\0" * 8_192)
    with pytest.raises(DamageError, match="LMDB cannot open it"):
        ContextsReader(path, n_rows=3)
    path.unlink()
    write(path, [Text("abc" * 10_000, np.arange(30_000), np.arange(1, 30_001))])
    with pytest.raises(DamageError, match="do not rise"):
        ContextsReader(path, n_rows=0)
    flip(path, path.read_bytes().index(b"\x28\xb5\x2f\xfd") + 30)  # in a zstd frame, which has its own checksum
    reader = ContextsReader(path, n_rows=30_000)
    with pytest.raises(DamageError, match="does not decompress"):
        list(reader.documents()) + list(reader.frames())
    reader.close()
