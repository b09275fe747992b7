"""Long arrays on disk (values, kept keys): the same numbers back, by blocks that are checked; types; what does not fit is refused."""

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from stores import build_segment, draw_keys, draw_values, flip, trained_space

from knnstore.errors import DamageError, FormatError, InvalidArgumentError
from knnstore.format import HEADER_SIZE, VALUES_BLOCK, Codec, DType, Header, Kind, aligned, parse_header
from knnstore.storage.arrays import MappedArray, read_array, to_bfloat16, to_float32, write_array
from knnstore.storage.segment_writer import CodesWriter, DocumentsWriter, stored_keys

OWNER = bytes(range(16))
FLOAT32_BITS = st.integers(0, 2**32 - 1) | st.integers(0, 2**16 - 1).map(lambda upper: upper << 16 | 0x8000)  # half way between two


@given(bits=st.lists(FLOAT32_BITS, min_size=1, max_size=50))
def test_bfloat16_rounds_as_torch_does(bits):
    """To nearest, ties to even, for every finite float32 (subnormal ones too)."""
    keys = np.array(bits, np.uint32).view(np.float32)
    keys = keys[np.isfinite(keys)]
    expected = torch.from_numpy(keys.copy()).to(torch.bfloat16)
    assert np.array_equal(to_bfloat16(keys), expected.view(torch.uint16).numpy())
    assert np.array_equal(to_float32(to_bfloat16(keys), DType.BF16), expected.float().numpy())


@pytest.mark.parametrize(("kind", "most"), [("f16", 65_504.0), ("bf16", float(torch.finfo(torch.bfloat16).max))])
def test_keys_too_large_for_their_type_are_refused(kind, most):
    """The largest number that fits is kept, one more is refused; float32 holds every finite key."""
    fits = np.array([[most, -most]], np.float32)
    beyond = np.nextafter(fits, np.float32(np.inf))
    assert np.isfinite(stored_keys(fits, kind).view(np.float16 if kind == "f16" else np.uint16)).all()
    with pytest.raises(InvalidArgumentError, match=f"more than {kind} holds"):
        stored_keys(beyond, kind)
    assert np.array_equal(stored_keys(beyond, "f32"), beyond)
    assert stored_keys(np.zeros((0, 4), np.float32), kind).shape == (0, 4)


@pytest.mark.parametrize("keep", ["f16", "bf16", "f32"])
def test_kept_keys_come_back(tmp_path, keep):
    """Rounded once to their type, in the key's own axes and in row order, whatever the order they were put in."""
    keys = draw_keys(0, 700, 6)
    segment = build_segment(tmp_path, keys, draw_values(0, 700), space=trained_space(Codec.PQ4, 6), keep=keep)
    torch_type = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[keep]
    expected = torch.from_numpy(keys).to(torch_type).float().numpy()
    assert np.array_equal(segment.exact_keys(0, 700), expected)
    assert np.array_equal(segment.exact_keys(13, 600), expected[13:600])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, DType.U16), (65_536, DType.U16), (65_537, DType.U32), (1 << 24, DType.U32)])
def test_values_take_two_bytes_or_four(tmp_path, vocab_size, dtype):
    """u16 as far as it holds every token, u32 beyond; the largest token comes back from values and labels."""
    keys = draw_keys(1, 100, 6)
    values = draw_values(1, 100, vocab_size)
    values[[0, 99]] = vocab_size - 1
    segment = build_segment(tmp_path, keys, values, space=trained_space(Codec.RAW, 6), vocab_size=vocab_size)
    assert segment.values.header.dtype is dtype
    assert segment.values.rows(0, 100)[:, 0].tolist() == values.tolist()
    labels = segment.lists.entries(0)[1]
    assert (labels & 0xFFFFFF).tolist() == values.tolist()


@pytest.mark.parametrize("vocab_size", [0, -1, (1 << 24) + 1])
def test_a_vocabulary_that_no_label_holds_is_refused(tmp_path, vocab_size):
    with pytest.raises(InvalidArgumentError, match="24 bits"):
        DocumentsWriter(tmp_path / "segment", uuid="ab" * 16, vocab_size=vocab_size)


@pytest.mark.parametrize("value", [-1, 100, 70_000])
def test_tokens_outside_the_vocabulary_are_refused(tmp_path, value):
    """Never wrapped into another token."""
    with (
        DocumentsWriter(tmp_path / "segment", uuid="ab" * 16, vocab_size=100) as writer,
        pytest.raises(InvalidArgumentError, match="the vocabulary has 100"),
    ):
        writer.add(np.array([3, value]))


def long_values(path, n):
    """values.bin of n values, by the writer."""
    values = np.random.default_rng(n).integers(0, 60_000, n)
    with DocumentsWriter(path, uuid=OWNER.hex(), vocab_size=60_000) as writer:
        for at in range(0, n, 1_000):
            writer.add(values[at : at + 1_000])
        writer.end_document(id="a", source="", prefix=(), metadata={}, content_hash=None, n_chars=None)
        writer.finish()
    return values


PER_BLOCK = VALUES_BLOCK // 2


@pytest.mark.parametrize("n", [1, 31, 32, 33, PER_BLOCK - 1, PER_BLOCK, PER_BLOCK + 1, 3 * PER_BLOCK + 7])
def test_a_long_array_is_as_the_format_says(tmp_path, n):
    """Header, rows, zeros to a multiple of 64, and xxh3 of each block of 64 KiB; any run of rows comes back."""
    values = long_values(tmp_path / "segment", n)
    raw = (tmp_path / "segment" / "values.bin").read_bytes()
    body = values.astype("<u2").tobytes()
    end = aligned(HEADER_SIZE + len(body))
    checks = b"".join(
        xxhash.xxh3_64_intdigest(body[at : at + VALUES_BLOCK]).to_bytes(8, "little") for at in range(0, len(body), VALUES_BLOCK)
    )
    assert raw[HEADER_SIZE:] == body + b"\0" * (end - HEADER_SIZE - len(body)) + checks
    array = MappedArray(tmp_path / "segment" / "values.bin", kind=Kind.VALUES, owner=OWNER, n_rows=n, size=len(raw))
    assert len(array) == n
    for first, stop in ((0, n), (n - 1, n), (n // 2, n // 2), (n // 3, n // 2 + 1)):
        assert array.rows(first, stop)[:, 0].tolist() == values[first:stop].tolist()
    assert not array.rows(0, n).flags.writeable


def test_a_block_is_checked_when_it_is_first_read(tmp_path):
    """Rows of sound blocks are read though another block is damaged; a damaged table of checksums is found at once."""
    n = 3 * PER_BLOCK
    values = long_values(tmp_path / "segment", n)
    path = tmp_path / "segment" / "values.bin"
    flip(path, HEADER_SIZE + VALUES_BLOCK + 5)
    array = MappedArray(path, kind=Kind.VALUES, owner=OWNER, n_rows=n)
    assert array.rows(PER_BLOCK - 3, PER_BLOCK)[:, 0].tolist() == values[PER_BLOCK - 3 : PER_BLOCK].tolist()
    assert array.rows(2 * PER_BLOCK, n)[:, 0].tolist() == values[2 * PER_BLOCK :].tolist()
    for first, stop in ((PER_BLOCK, PER_BLOCK + 1), (2 * PER_BLOCK - 1, 2 * PER_BLOCK), (0, n)):
        with pytest.raises(DamageError, match="block 1 "):
            array.rows(first, stop)
    flip(path, path.stat().st_size - 1)
    with pytest.raises(DamageError, match="table of checksums"):
        MappedArray(path, kind=Kind.VALUES, owner=OWNER, n_rows=n)


def test_a_long_array_of_another_size_or_place_is_refused(tmp_path):
    """Other rows than expected, cut, longer, of another segment, of another kind, missing, a folder."""
    long_values(tmp_path / "segment", 100)
    path = tmp_path / "segment" / "values.bin"
    size = path.stat().st_size
    for arguments in ({"n_rows": 99}, {"owner": bytes(16)}, {"kind": Kind.KEYS}, {"size": size + 1}):
        with pytest.raises(DamageError, match=r"values\.bin"):
            MappedArray(path, **{"kind": Kind.VALUES, "owner": OWNER, "n_rows": 100, **arguments})
    raw = path.read_bytes()
    for content in (raw[:-1], raw + b"\0", raw[:40], b""):
        path.write_bytes(content)
        with pytest.raises(DamageError, match=r"values\.bin"):
            MappedArray(path, kind=Kind.VALUES, owner=OWNER, n_rows=100)
    path.unlink()
    for other in (path, tmp_path):
        with pytest.raises(DamageError, match=r"missing|not a plain file"):
            MappedArray(other, kind=Kind.VALUES, owner=OWNER, n_rows=100)


@given(
    kind=st.sampled_from(Kind),
    codec=st.sampled_from(Codec),
    dtype=st.sampled_from(DType),
    numbers=st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=3),
    at=st.integers(0, 63),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_of_a_header_is_found(kind, codec, dtype, numbers, at, bit):
    """A header comes back as it was; with any bit changed it is damage (never a later format)."""
    rows, columns, check = numbers
    header = Header(kind=kind, codec=codec, dtype=dtype, rows=rows, columns=columns, owner=OWNER, check=check)
    raw = bytearray(header.pack())
    assert parse_header(bytes(raw), "x", kind=kind, owner=OWNER) == header
    raw[at] ^= 1 << bit
    with pytest.raises(DamageError, match="x: its header is damaged"):
        parse_header(bytes(raw), "x", kind=kind, owner=OWNER)


@pytest.mark.parametrize("change", [{8: 2}, {11: 200}, {12: 2}, {13: 200}, {14: 1}], ids=str)
def test_a_header_of_a_later_version_is_said_to_be_so(change):
    """Another header version, codec, codec version or dtype, or a field that is reserved here, with a good checksum."""
    raw = bytearray(Header(kind=Kind.LISTS, codec=Codec.PQ4, dtype=DType.U8, rows=1, columns=1, owner=OWNER).pack())
    for at, byte in change.items():
        raw[at] = byte
    raw[56:64] = xxhash.xxh3_64_intdigest(bytes(raw[:56])).to_bytes(8, "little")
    with pytest.raises(FormatError, match="later format"):
        parse_header(bytes(raw), "x", kind=Kind.LISTS, owner=OWNER)


@given(rows=st.integers(0, 5), columns=st.integers(1, 5), at=st.integers(0, 10_000))
def test_a_small_array_is_checked_as_a_whole(tmp_path_factory, rows, columns, at):
    """It comes back; with any byte inverted, or asked for in another shape, it is damage."""
    path = tmp_path_factory.mktemp("array") / "array.bin"
    array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    write_array(path, array, kind=Kind.CENTROIDS, dtype=DType.F32, owner=OWNER)
    assert np.array_equal(read_array(path, kind=Kind.CENTROIDS, owner=OWNER, shape=(rows, columns)), array)
    with pytest.raises(DamageError, match="it holds"):
        read_array(path, kind=Kind.CENTROIDS, owner=OWNER, shape=(rows + 1, columns))
    flip(path, at % path.stat().st_size)
    with pytest.raises(DamageError):
        read_array(path, kind=Kind.CENTROIDS, owner=OWNER, shape=(rows, columns))


def test_codes_continue_where_they_were_saved(tmp_path):
    """Rows put after the last save are forgotten by a kill, the others are not; a torn journal line counts for nothing."""
    space = trained_space(Codec.RAW, 2)
    keys = draw_keys(3, 40, 2)
    lists = np.zeros(40, np.uint32)

    def put(writer, first, stop):
        writer.put(first, space.encode(keys[first:stop]), lists[first:stop], keys[first:stop])
        writer.measured(float(stop - first), stop - first)

    with CodesWriter(tmp_path, n_rows=40, space=space, keys="f32") as writer:
        put(writer, 10, 20)
        put(writer, 30, 35)
        writer.save()
        put(writer, 20, 25)
        writer.save()
        put(writer, 0, 5)
    journal = tmp_path / "journal"
    whole = journal.read_bytes()
    for content, rows, total in ((whole, 20, 20.0), (whole[:-3], 15, 15.0), (whole + b"torn", 20, 20.0), (b"", 0, 0.0)):
        journal.write_bytes(content)
        with CodesWriter(tmp_path, n_rows=40, space=space, keys="f32") as writer:
            assert int(writer.done.sum()) == rows
            assert (writer.distortion_sum, writer.distortion_count) == (total, rows)
            assert not writer.done[:10].any()
    with CodesWriter(tmp_path, n_rows=40, space=space, keys="f32") as writer:
        put(writer, 0, 3)
        writer.save()
    assert journal.read_bytes().count(b"\n") == 1
