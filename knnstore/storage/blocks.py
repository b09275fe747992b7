"""Packed blocks of 4-bit codes, as faiss's FastScan reads them: 32 entries side by side.

In a block, byte 16 * m + j holds sub-code m of entry ORDER[j] in its low four bits and of entry ORDER[j] + 16 in its high
four. An odd number of sub-quantizers is filled up with one sub-code of zeros.
"""

import faiss
import numpy as np
from numpy.typing import NDArray

from knnstore.format import BLOCK_ENTRIES

__all__ = ["ORDER", "block_bytes", "faiss_packs_alike", "pack", "single_codes", "unpack"]

Bytes = NDArray[np.uint8]

ORDER = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])  # the lanes of the SIMD shuffle that reads them
_UNORDER = np.argsort(ORDER)


def block_bytes(n_sub: int) -> int:
    """Bytes of one block of 32 entries."""
    return (n_sub + n_sub % 2) * BLOCK_ENTRIES // 2


def pack(codes: Bytes) -> Bytes:
    """(32 * b, ceil(n_sub / 2)) u8 codes as the quantizer encodes them (low nibble first, a last one of 0) → (b, block_bytes) u8."""
    n_blocks, width = len(codes) // BLOCK_ENTRIES, codes.shape[1]
    if width % 8:
        padded = np.zeros((len(codes), width + -width % 8), np.uint8)
        padded[:, :width] = codes
        return np.ascontiguousarray(pack(padded)[:, : width * BLOCK_ENTRIES])
    packed, step = np.empty((n_blocks, width * BLOCK_ENTRIES), np.uint8), _step(width)
    codes = np.ascontiguousarray(codes)
    for at in range(0, n_blocks, step):
        n = min(step, n_blocks - at)
        tiles = np.empty((4, 2, 2, 2, n, width // 8), "<u8")
        tiles[:] = _by_entry(codes[at * BLOCK_ENTRIES : (at + n) * BLOCK_ENTRIES], n)
        _turn(tiles.reshape(8, -1))
        _by_byte(packed[at : at + n], n)[:] = _nibbles_exchanged(tiles.reshape(8, 2, 2, n, -1))
    return packed


def unpack(blocks: Bytes) -> Bytes:
    """The inverse of `pack`: (b, block_bytes) u8 → (32 * b, ceil(n_sub / 2)) u8."""
    n_blocks, width = len(blocks), blocks.shape[1] // BLOCK_ENTRIES
    if width % 8:
        padded = np.zeros((n_blocks, (width + -width % 8) * BLOCK_ENTRIES), np.uint8)
        padded[:, : width * BLOCK_ENTRIES] = blocks
        return np.ascontiguousarray(unpack(padded)[:, :width])
    codes, step = np.empty((n_blocks * BLOCK_ENTRIES, width), np.uint8), _step(width)
    blocks = np.ascontiguousarray(blocks)
    for at in range(0, n_blocks, step):
        n = min(step, n_blocks - at)
        tiles = _nibbles_exchanged(np.ascontiguousarray(_by_byte(blocks[at : at + n], n)))
        _turn(tiles.reshape(8, -1))
        _by_entry(codes[at * BLOCK_ENTRIES : (at + n) * BLOCK_ENTRIES], n)[:] = tiles.reshape(4, 2, 2, 2, n, -1)
    return codes


# Between codes and blocks, bytes change places in squares of 8 x 8: 8 bytes of a code, and 8 entries. The bytes of a square are turned as
# eight u64, whose arrays are one after the other, so that numpy takes 8 bytes of many squares at a time.

_LOW, _HIGH, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(4)
_TURNS = tuple((n, np.uint64(8 * n), np.uint64(mask)) for n, mask in ((1, 0x00FF00FF00FF00FF), (2, 0x0000FFFF0000FFFF), (4, 0xFFFFFFFF)))


def _step(width: int) -> int:
    """Blocks turned at a time: half a megabyte, with what is made of it in a core's cache."""
    return max(1, (1 << 19) // (width * BLOCK_ENTRIES))


def _by_entry(codes: Bytes, n: int) -> NDArray[np.uint64]:
    """A view of the codes of n blocks: (entry within its half, as two axes of ORDER: 4, 2; half; eight of a half: 2; n; width / 8) u64."""
    return codes.view("<u8").reshape(n, 2, 2, 2, 4, -1).transpose(4, 2, 1, 3, 0, 5)


def _by_byte(blocks: Bytes, n: int) -> NDArray[np.uint64]:
    """A view of n blocks: (byte of a code in its eight, sub-code of the byte, eight of a half: 2, n, width / 8) u64."""
    return blocks.view("<u8").reshape(n, -1, 8, 2, 2).transpose(2, 3, 4, 0, 1)


def _nibbles_exchanged(tiles: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(8, 2, ...) → the same shape: low nibbles of both rows of axis 1 in the first, high ones in the second. Its own inverse."""
    first, second = tiles[:, 0], tiles[:, 1]
    exchanged = np.empty_like(tiles)
    low, high = exchanged[:, 0], exchanged[:, 1]
    np.bitwise_and(second, _LOW, out=low)
    low <<= _FOUR
    low |= first & _LOW
    np.right_shift(first, _FOUR, out=high)
    high &= _LOW
    high |= second & _HIGH
    return exchanged


def _turn(tiles: NDArray[np.uint64]) -> None:
    """Exchanges rows and bytes of tiles (8, m) u64, in place: byte i of row j and byte j of row i."""
    for n, bits, mask in _TURNS:
        pairs = tiles.reshape(4 // n, 2, n, -1)
        first, second = pairs[:, 0], pairs[:, 1]
        changed = first >> bits
        changed ^= second
        changed &= mask
        second ^= changed
        changed <<= bits
        first ^= changed


def single_codes(raw: Bytes, begins: NDArray[np.int64], entries: NDArray[np.int64], n_sub: int) -> Bytes:
    """Codes of single entries of packed lists, (n, ceil(n_sub / 2)) u8 as encoded.

    raw: bytes that hold the lists; begins: (n,) where each entry's list begins there; entries: (n,) its place in the list.
    """
    within = entries % BLOCK_ENTRIES
    at = begins + entries // BLOCK_ENTRIES * block_bytes(n_sub) + _UNORDER[within % 16]
    even = at[:, None] + 32 * np.arange((n_sub + 1) // 2)  # bytes of the sub-codes 0, 2, 4 …
    shift = (within >= 16).astype(np.uint8)[:, None] * np.uint8(4)
    codes: Bytes = ((raw[even] >> shift) & 15) | ((raw[even + 16] >> shift) << 4)
    return codes


def faiss_packs_alike(n_sub: int) -> bool:
    """Whether the installed faiss packs a probe block as this module does (its layout is not part of its promises)."""
    width = (n_sub + 1) // 2
    probe = np.random.default_rng(0).integers(0, 256, (BLOCK_ENTRIES, width), dtype=np.uint8)
    if n_sub % 2:
        probe[:, -1] &= 15
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(n_sub), n_sub, 1, n_sub, 4, faiss.METRIC_L2, BLOCK_ENTRIES)
    lists = faiss.downcast_InvertedLists(index.invlists)
    if lists.n_per_block != BLOCK_ENTRIES or lists.block_size != block_bytes(n_sub):
        return False
    block = np.zeros((1, lists.block_size), np.uint8)
    packer = lists.packer
    for entry in range(BLOCK_ENTRIES):
        packer.pack_1(np.ascontiguousarray(probe[entry][: packer.code_size]), entry, block)
    return bool(np.array_equal(block, pack(probe)))
