"""Codes in and out of the tile layout.

A tile is 16 rows; a block is 64 of its inputs. Codes are interleaved so that one 64-byte vector
holds 16 rows x 4 consecutive inputs, byte ``4 * row + (input % 4)``: a broadcast of four
activations then multiplies a whole vector. The 16 vectors of a block are called *quads* here, as
each covers four inputs.

Shape letters: T tiles, B blocks of 64 inputs, Q 16 quads of a block, L 64 lanes of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .schemes import BLOCK_COLS, TILE_ROWS

Bytes = npt.NDArray[np.uint8]

QUADS = BLOCK_COLS // 4
LANES = TILE_ROWS * 4


def pad(array: npt.NDArray[np.generic], rows: int, cols: int) -> npt.NDArray[np.generic]:
    """Zero-pad ``[r, c]`` to ``[rows, cols]``; the same array when nothing is missing."""
    if array.shape == (rows, cols):
        return np.ascontiguousarray(array)
    out = np.zeros((rows, cols), array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out


def block_nbytes(bits: int) -> int:
    """Bytes of one block's codes: 16 rows x 64 inputs."""
    return TILE_ROWS * BLOCK_COLS * bits // 8


def pack_codes(codes: npt.NDArray[np.generic], bits: int) -> Bytes:
    """Interleave and pack codes.

    Args:
        codes: ``[16 * T, 64 * B]``; uint8 codes, or uint16/uint32 bit patterns for raw schemes.
        bits: Width of one code: 2, 3, 4, 6, 8, 16 or 32.

    Returns:
        ``[T, B, block_nbytes]`` uint8.
    """
    tiles, blocks = codes.shape[0] // TILE_ROWS, codes.shape[1] // BLOCK_COLS
    # Whole 4-byte cells move at once: 4 codes, 2 half-words or 1 word of a row.
    cells = codes.astype(f"<u{max(bits, 8) // 8}", copy=False).view("<u4")
    cells = cells.reshape(tiles, TILE_ROWS, -1).transpose(0, 2, 1)
    lanes = np.ascontiguousarray(cells).view(np.uint8)
    if bits >= 8:
        return lanes.reshape(tiles, blocks, -1)
    quads = lanes.reshape(tiles, blocks, QUADS, LANES)
    return _PACK[bits](quads).reshape(tiles, blocks, -1)


def unpack_codes(packed: Bytes, bits: int) -> npt.NDArray[np.generic]:
    """Undo :func:`pack_codes`: ``[T, B, block_nbytes]`` to ``[16 * T, 64 * B]``."""
    tiles, blocks = packed.shape[:2]
    packed = np.ascontiguousarray(packed)
    if bits < 8:
        packed = _UNPACK[bits](packed.reshape(tiles, blocks, -1, LANES))
    cells = packed.reshape(tiles, -1).view("<u4").reshape(tiles, -1, TILE_ROWS)
    rows = np.ascontiguousarray(cells.transpose(0, 2, 1)).reshape(tiles * TILE_ROWS, -1)
    return rows.view(f"<u{max(bits, 8) // 8}")


def _pack2(quads: Bytes) -> Bytes:
    """Vector v of 4 holds quads 4v..4v+3, two bits each, the first lowest."""
    q = quads.reshape(*quads.shape[:2], 4, 4, LANES)
    packed = q[:, :, :, 0] | q[:, :, :, 1] << 2 | q[:, :, :, 2] << 4 | q[:, :, :, 3] << 6
    return packed.astype(np.uint8, copy=False)


def _unpack2(vectors: Bytes) -> Bytes:
    parts = [vectors >> shift & 3 for shift in (0, 2, 4, 6)]
    return np.stack(parts, axis=3).astype(np.uint8, copy=False)


def _pack4(quads: Bytes) -> Bytes:
    """Vector v of 8 holds quads 2v (low nibble) and 2v+1 (high nibble)."""
    packed = quads[:, :, 0::2] | quads[:, :, 1::2] << 4
    return packed.astype(np.uint8, copy=False)


def _unpack4(vectors: Bytes) -> Bytes:
    return np.stack([vectors & 15, vectors >> 4], axis=3)


def _pack3(quads: Bytes) -> Bytes:
    """Three vectors a, b, c hold eight quads p0..p7 (32 inputs).

    Bits 0-5 of a, b, c are p0 p1, p2 p3, p4 p5. The top two bits of a are p6's upper bits, those
    of c are p7's; p6's and p7's lowest bits are bits 6 and 7 of b. A kernel so finds six quads by
    a mask and the other two by a mask, a shift and an or.
    """
    p = quads.reshape(*quads.shape[:2], 2, 8, LANES)
    p6, p7 = p[:, :, :, 6], p[:, :, :, 7]
    a = p[:, :, :, 0] | p[:, :, :, 1] << 3 | (p6 >> 1) << 6
    b = p[:, :, :, 2] | p[:, :, :, 3] << 3 | (p6 & 1) << 6 | (p7 & 1) << 7
    c = p[:, :, :, 4] | p[:, :, :, 5] << 3 | (p7 >> 1) << 6
    return np.stack([a, b, c], axis=3)


def _unpack3(vectors: Bytes) -> Bytes:
    v = vectors.reshape(*vectors.shape[:2], 2, 3, LANES)
    a, b, c = v[:, :, :, 0], v[:, :, :, 1], v[:, :, :, 2]
    p6 = (a >> 6) << 1 | b >> 6 & 1
    p7 = (c >> 6) << 1 | b >> 7
    low = [part for vector in (a, b, c) for part in (vector & 7, vector >> 3 & 7)]
    return np.stack([*low, p6, p7], axis=3)


def _pack6(quads: Bytes) -> Bytes:
    """Three vectors a, b, c hold four quads p0..p3 (16 inputs).

    Bits 0-5 of a, b, c are p0, p1, p2. Their top two bits are p3, the lowest of it in a. A kernel
    so finds three quads by a mask each and puts one together.
    """
    p = quads.reshape(*quads.shape[:2], 4, 4, LANES)
    p3 = p[:, :, :, 3]
    parts = [p[:, :, :, i] | (p3 >> 2 * i & 3) << 6 for i in range(3)]
    return np.stack(parts, axis=3).astype(np.uint8, copy=False)


def _unpack6(vectors: Bytes) -> Bytes:
    v = vectors.reshape(*vectors.shape[:2], 4, 3, LANES)
    a, b, c = v[:, :, :, 0], v[:, :, :, 1], v[:, :, :, 2]
    return np.stack([a & 63, b & 63, c & 63, a >> 6 | b >> 6 << 2 | c >> 6 << 4], axis=3)


_PACK: dict[int, Callable[[Bytes], Bytes]] = {2: _pack2, 3: _pack3, 4: _pack4, 6: _pack6}
_UNPACK: dict[int, Callable[[Bytes], Bytes]] = {
    2: _unpack2,
    3: _unpack3,
    4: _unpack4,
    6: _unpack6,
}
