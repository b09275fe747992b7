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
    entries = codes.reshape(n_blocks, BLOCK_ENTRIES, width).transpose(0, 2, 1)  # (b, width, 32)
    low, high = entries[:, :, ORDER], entries[:, :, ORDER + 16]  # (b, width, 16)
    packed = np.empty((n_blocks, width, 2, 16), np.uint8)  # a byte of a code holds sub-codes 2i and 2i + 1
    packed[:, :, 0] = (low & 15) | (high << 4)
    packed[:, :, 1] = (low >> 4) | (high & 0xF0)
    return packed.reshape(n_blocks, width * 32)


def unpack(blocks: Bytes) -> Bytes:
    """The inverse of `pack`: (b, block_bytes) u8 → (32 * b, ceil(n_sub / 2)) u8."""
    width = blocks.shape[1] // BLOCK_ENTRIES
    packed = blocks.reshape(len(blocks), width, 2, 16)
    even, odd = packed[:, :, 0], packed[:, :, 1]
    low, high = (even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)
    entries = np.concatenate((low[:, :, _UNORDER], high[:, :, _UNORDER]), axis=2)  # (b, width, 32)
    return np.ascontiguousarray(entries.transpose(0, 2, 1)).reshape(len(blocks) * BLOCK_ENTRIES, width)


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
