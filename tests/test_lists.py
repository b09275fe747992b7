"""Inverted lists: their layout, the same answers from the mapped file as from faiss in memory, checksums, what opening reads."""

import re
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import build_segment, create_store, draw_keys, draw_values, flip, trained_coarse, trained_space

from knnstore.errors import DamageError
from knnstore.format import Codec
from knnstore.search import search
from knnstore.storage import lists
from knnstore.storage import stack as stack_module
from knnstore.storage.blocks import ORDER, block_bytes, faiss_packs_alike, pack, unpack
from knnstore.storage.lists import labels_of, rows_of, tokens_of
from knnstore.storage.rows import as_ranges
from knnstore.storage.stack import Stack
from knnstore.store import open_store

K = 50


@given(n_sub=st.integers(1, 40), n_blocks=st.integers(0, 3), seed=st.integers(0, 1_000))
def test_packing_is_a_permutation_of_nibbles(n_sub, n_blocks, seed):
    """Sub-code m of entry ORDER[j] is the low nibble of byte 16 * m + j, that of entry ORDER[j] + 16 the high one; unpacking inverts."""
    codes = np.random.default_rng(seed).integers(0, 256, (32 * n_blocks, (n_sub + 1) // 2), dtype=np.uint8)
    if n_sub % 2:
        codes[:, -1] &= 15
    blocks = pack(codes)
    assert blocks.shape == (n_blocks, block_bytes(n_sub))
    assert np.array_equal(unpack(blocks), codes)
    nibbles = np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), 2 * codes.shape[1])  # (n, sub-codes, one of zeros where odd)
    for block in range(n_blocks):
        for m in range(nibbles.shape[1]):
            of_block = nibbles[32 * block : 32 * (block + 1), m]
            expected = [of_block[ORDER[j]] | of_block[ORDER[j] + 16] << 4 for j in range(16)]
            assert blocks[block, 16 * m : 16 * (m + 1)].tolist() == expected


@pytest.mark.parametrize("n_sub", [1, 2, 3, 15, 16, 64, 127, 128])
def test_faiss_packs_as_the_format_says(n_sub):
    """The installed faiss, asked for one block (at opening) and for a whole index."""
    assert faiss_packs_alike(n_sub)
    index = faiss.IndexPQFastScan(n_sub, n_sub, 4, faiss.METRIC_L2)
    keys = np.random.default_rng(n_sub).standard_normal((96, n_sub)).astype(np.float32)
    index.train(keys)
    index.add(keys)
    codes = index.pq.compute_codes(keys)
    assert np.array_equal(faiss.vector_to_array(index.codes), pack(codes).reshape(-1))


@given(row=st.integers(0, (1 << 39) - 1), token=st.integers(0, (1 << 24) - 1))
def test_a_label_holds_row_and_token(row, token):
    label = labels_of(np.array([row]), np.array([token]))
    assert label[0] >= 0  # faiss keeps negative ids for itself
    assert (rows_of(label)[0], tokens_of(label)[0]) == (row, token)


def faiss_in_memory(segment, keys, values):
    """The ordinary faiss index over the same quantizers and entries, with the same labels."""
    space = segment.space
    quantizer = faiss.IndexFlatL2(space.dim)
    quantizer.add(np.zeros((1, space.dim), np.float32) if segment.coarse is None else segment.coarse.centroids)
    if space.codec is Codec.PQ4:
        index = faiss.IndexIVFPQFastScan(quantizer, space.dim, quantizer.ntotal, space.n_sub, 4)
    elif space.codec is Codec.PQ8:
        index = faiss.IndexIVFPQ(quantizer, space.dim, quantizer.ntotal, space.n_sub, 8)
    else:
        index = faiss.IndexIVFFlat(quantizer, space.dim, quantizer.ntotal)
    index.referenced_objects = [quantizer]
    if space.codec is not Codec.RAW:
        index.by_residual = False
        faiss.copy_array_to_vector(space.centroids.reshape(-1), index.pq.centroids)
    index.is_trained = True
    index.add_with_ids(space.rotate(keys), labels_of(np.arange(len(keys)), values))
    return index


def assert_same_up_to_ties(found, distances, labels):
    """The same distances; the same labels but for those tied at the k-th distance."""
    assert np.array_equal(found.distances, distances)
    for i in range(len(distances)):
        sure = distances[i] < distances[i, -1]
        assert set(found.rows[i][sure]) == set(rows_of(labels[i][sure]))
        assert np.array_equal(np.sort(found.values[i][sure]), np.sort(tokens_of(labels[i][sure])))


@pytest.mark.parametrize("ranges", [None, [(100, 1_900)], [(0, 40), (41, 90), (700, 701), (1_500, 3_000)]])
@pytest.mark.parametrize("nlist", [1, 40])
@pytest.mark.parametrize(("codec", "dim"), [(Codec.PQ4, 16), (Codec.PQ4, 15), (Codec.PQ8, 16), (Codec.RAW, 12)])
def test_mapped_lists_answer_as_faiss_in_memory(tmp_path, codec, dim, nlist, ranges):
    """Distances and labels are those of the same faiss index in RAM (dimension 15: an odd number of sub-quantizers)."""
    keys, values, queries = draw_keys(1, 3_000, dim), draw_values(1, 3_000), draw_keys(2, 16, dim)
    space = trained_space(codec, dim)
    segment = build_segment(tmp_path, keys, values, space=space, coarse=None if nlist == 1 else trained_coarse(space, nlist))
    index = faiss_in_memory(segment, keys, values)
    rows = np.concatenate([np.arange(first, stop) for first, stop in ranges or [(0, len(keys))]])
    selector = faiss.IDSelectorBatch(labels_of(rows, values[rows]))
    for nprobe in {1, min(nlist, 8), nlist}:
        parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
        distances, labels = index.search(space.rotate(queries), K, params=parameters)
        distances[labels < 0] = np.inf
        found = search([segment], [None if ranges is None else as_ranges(ranges)], queries, k=K, nprobe=nprobe)
        assert_same_up_to_ties(found, distances + np.float32(segment.content.distortion), labels)


def test_lists_are_repacked_where_faiss_packs_otherwise(tmp_path, monkeypatch):
    """A faiss whose blocks are laid out in another way gives the same answers, from memory."""
    keys, values, queries = draw_keys(3, 2_000, 15), draw_values(3, 2_000), draw_keys(4, 9, 15)
    space = trained_space(Codec.PQ4, 15)
    segment = build_segment(tmp_path, keys, values, space=space, coarse=trained_coarse(space, 10))
    mapped = search([segment], [None], queries, k=K, nprobe=4)
    monkeypatch.setattr(stack_module, "faiss_packs_alike", lambda n_sub: False)
    other = Stack([0], [segment])
    repacked = search([segment], [None], queries, k=K, nprobe=4, stacks=[other])
    assert "OnDisk" not in type(faiss.downcast_InvertedLists(other.index(9).invlists)).__name__
    assert np.array_equal(search([segment], [None], queries[:1], k=K, nprobe=4, stacks=[other]).rows, mapped.rows[:1])
    assert np.array_equal(repacked.distances, mapped.distances)
    assert np.array_equal(repacked.rows, mapped.rows)


@pytest.mark.parametrize("n_entries", [1, 31, 32, 33, 65_536 + 40])
@pytest.mark.parametrize("codec", [Codec.PQ4, Codec.RAW])
def test_lists_give_back_codes_and_labels(tmp_path, codec, n_entries):
    """Every entry once, in its list, codes as encoded; also in lists of more entries than are laid out at a time, and empty ones.

    Lists are padded to 32 entries with codes of zeros and labels of -1.
    """
    space = trained_space(codec, 5)
    keys, values = draw_keys(5, n_entries, 5), draw_values(5, n_entries)
    coarse = trained_coarse(space, 3, seed=7)
    coarse.centroids[1] = 1e6  # nothing is near it
    coarse = None if n_entries > 65_536 else coarse
    segment = build_segment(tmp_path, keys, values, space=space, coarse=coarse)
    codes = space.encode(space.rotate(keys))
    assigned = np.zeros(n_entries, int) if coarse is None else coarse.assign(space.rotate(keys))
    raw = (segment.folder / "lists.bin").read_bytes()
    width = space.n_sub // 2 + space.n_sub % 2 if codec is Codec.PQ4 else space.code_size
    for number in range(segment.lists.nlist):
        rows = np.flatnonzero(assigned == number)
        got_codes, got_labels = segment.lists.entries(number)
        assert np.array_equal(got_codes, codes[rows])
        assert np.array_equal(got_labels, labels_of(rows, values[rows]))
        begin, capacity = int(segment.lists.offsets[number]), -(-len(rows) // 32) * 32
        stored = np.frombuffer(raw, np.uint8, capacity * width, begin)
        assert not (unpack(stored.reshape(-1, 32 * width)) if codec is Codec.PQ4 else stored.reshape(-1, width))[len(rows) :].any()
        assert (np.frombuffer(raw, "<i8", capacity, begin + capacity * width)[len(rows) :] == -1).all()
    assert coarse is None or segment.lists.sizes[1] == 0


@pytest.mark.parametrize("codec", [Codec.PQ4, Codec.RAW])
def test_lists_are_the_same_however_many_are_laid_out_at_a_time(tmp_path, monkeypatch, codec):
    """Byte for byte, from all lists at once to pieces of one list."""
    space = trained_space(codec, 5)
    coarse = trained_coarse(space, 20)
    rotated, values = space.rotate(draw_keys(8, 3_000, 5)), draw_values(8, 3_000)
    written = []
    for group in (65_536, 640, 64, 32):
        monkeypatch.setattr(lists, "_GROUP", group)
        folder = tmp_path / str(group)
        folder.mkdir()
        codes, assigned = space.encode(rotated), coarse.assign(rotated)
        lists.write_lists(folder, space=space, owner=bytes(16), codes=codes, lists=assigned, nlist=20, values=values, base=1 << 19)
        written.append([(folder / name).read_bytes() for name in ("lists.bin", "lists.dir")])
    assert all(files == written[0] for files in written)


def test_a_list_is_checked_when_it_is_first_searched(tmp_path):
    """A flipped byte in one list: the others still answer, that one raises; before any search nothing was read of either."""
    space = trained_space(Codec.PQ4, 16)
    coarse = trained_coarse(space, 8)
    segment = build_segment(tmp_path, draw_keys(6, 2_000, 16), draw_values(6, 2_000), space=space, coarse=coarse)
    centers = coarse.centroids @ space.rotation  # back in the key's own axes
    damaged = int(np.argmax(segment.lists.sizes))
    path = segment.folder / "lists.bin"
    flip(path, int(segment.lists.offsets[damaged]) + 3)
    del segment.lists
    for number in range(8):
        query = np.ascontiguousarray(centers[number : number + 1], dtype=np.float32)
        if number == damaged:
            with pytest.raises(DamageError, match=f"{re.escape(str(path))}: list {damaged} "):
                search([segment], [None], query, k=3, nprobe=1)
        elif segment.lists.sizes[number]:
            assert search([segment], [None], query, k=3, nprobe=1).rows[0, 0] >= 0


def resident_bytes(path: Path) -> int:
    """Bytes of a file's mappings that this process has touched."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def bytes_read() -> int:
    """What read calls of this process have returned so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc of Linux")
def test_opening_reads_the_directory_of_lists_not_the_entries(tmp_path):
    """Stores of 33,000 and 65,000 entries have 256 lists each, and cost the same to open: bytes of read calls, pages touched."""
    cost = {}
    for n in (33_000, 65_000):
        path = tmp_path / f"{n}.knn"
        create_store(path, draw_keys(n, n, 8), draw_values(n, n))
        before = bytes_read()
        store = open_store(path)
        (segment,), (stack,) = store.segments, store.stacks
        assert stack.index(1).ntotal == n
        cost[n] = bytes_read() - before
        assert segment.lists.nlist == 256
        lists_file = segment.folder / "lists.bin"
        # Only the header is touched; around a page that is, the kernel maps up to 64 KiB.
        assert resident_bytes(lists_file) <= 65_536
        assert resident_bytes(segment.folder / "values.bin") == resident_bytes(segment.folder / "contexts.lmdb") == 0
        segment.lists.check(np.arange(256))
        assert resident_bytes(lists_file) >= lists_file.stat().st_size - 4096 > 12 * n  # this does see what is touched
        store.close()
    assert abs(cost[33_000] - cost[65_000]) < 64  # numbers in JSON have more or fewer digits
