"""Decoding tiles to dense rows, to the same bits as the reference."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout
from .cells import (
    as_words,
    code3,
    code_offset,
    level,
    raw_value,
    scales,
    signed_scales,
    three_words,
    word6,
)
from .layout import bits, block_cells, cell_cols, kind

RAW = tl.constexpr(layout.RAW)
SIGNED_SCALES = tl.constexpr(layout.SIGNED_SCALES)


@triton.jit
def dense_rows(
    packed,
    tiles,
    rows,
    cols,
    tile_nbytes,
    out,
    SCHEME: tl.constexpr,
    HAS_TILES: tl.constexpr,
    W: tl.constexpr,
):
    """Decode tiles: grid (number of tiles, ceil(cells of a row / W)).

    Compiled without fused multiply-adds: two roundings, as SPEC.md section 3.5 says.

    Args:
        packed: Pointer to the packed matrix.
        tiles: ``[tiles]`` int64, the tiles to decode; read with ``HAS_TILES``.
        rows: Rows of ``out``.
        cols: Inputs of a row.
        tile_nbytes: Bytes of a tile.
        out: ``[rows, cols]`` of any float type.
        SCHEME: Of the matrix.
        HAS_TILES: Whether ``tiles`` says which; all in order otherwise.
        W: Cells of a program.
    """
    CELL: tl.constexpr = cell_cols(SCHEME)
    PER: tl.constexpr = block_cells(SCHEME)
    number = tl.program_id(0)
    tile = number.to(tl.int64)
    if HAS_TILES:
        tile = tl.load(tiles + number)
    blocks = (cols + 63) // 64
    row = tl.arange(0, 16)[None, :]
    cell = (tl.program_id(1) * W + tl.arange(0, W))[:, None]
    live = cell < blocks * PER
    matrix = packed.to(tl.int64)
    at = tile * tile_nbytes
    codes = at + code_offset(cell // PER, blocks, SCHEME)
    to = out + (number.to(tl.int64) * 16 + row) * cols
    real = (number * 16 + row < rows) & live
    if kind(SCHEME) == RAW:
        words = as_words(matrix) + (codes // 4 + cell % PER * 16) + row
        word = tl.load(words, mask=live, other=0)
        for part in tl.static_range(CELL):
            _put(to, cell * CELL + part, raw_value(word, part, SCHEME), cols, real)
    elif kind(SCHEME) == SIGNED_SCALES:
        first, second = signed_scales(matrix, at, cell, row, blocks, live, SCHEME)
        words = as_words(matrix) + (codes // 4 + cell % PER * 48) + row
        a, b, c = three_words(words, live)
        for k in tl.static_range(4):
            for quad in tl.static_range(8):
                value = level(code3(a, b, c, k, quad), SCHEME) * (first if quad < 4 else second)
                _put(to, cell * CELL + 4 * quad + k, value, cols, real)
    else:
        s, m = scales(matrix, at, cell, row, blocks, live, SCHEME)
        if bits(SCHEME) == 3:
            words = as_words(matrix) + (codes // 4 + cell % PER * 48) + row
            a, b, c = three_words(words, live)
            for k in tl.static_range(4):
                for quad in tl.static_range(8):
                    code = code3(a, b, c, k, quad)
                    _put(to, cell * CELL + 4 * quad + k, code.to(tl.float32) * s - m, cols, real)
        elif bits(SCHEME) == 6:
            words = as_words(matrix) + (codes // 4 + cell % PER * 48) + row
            a, b, c = three_words(words, live)
            for quad in tl.static_range(4):
                word = word6(a, b, c, quad)
                for k in tl.static_range(4):
                    value = (word >> (8 * k) & 63).to(tl.float32) * s - m
                    _put(to, cell * CELL + 4 * quad + k, value, cols, real)
        else:
            BITS: tl.constexpr = bits(SCHEME)
            words = as_words(matrix) + (codes // 4 + cell % PER * 16) + row
            word = tl.load(words, mask=live, other=0)
            for k in tl.static_range(4):
                for q in tl.static_range(8 // BITS):
                    code = word >> (8 * k + q * BITS) & ((1 << BITS) - 1)
                    _put(to, cell * CELL + 4 * q + k, code.to(tl.float32) * s - m, cols, real)


@triton.jit
def _put(to, column, value, cols, real):
    tl.store(to + column, value, mask=real & (column < cols))
