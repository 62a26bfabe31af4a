"""Products of tiles with one vector, on the ordinary units of a GPU.

Each thread multiplies cells of some rows with the inputs that they share. The sum over a group is
``scale * sum(code * x) - minimum * sum(x)``.

Shape letters: N tiles, W cells, 16 rows of a tile.
"""

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
    tiny,
    word6,
)
from .layout import bits, block_cells, cell_cols, kind

RAW = tl.constexpr(layout.RAW)
SIGNED_SCALES = tl.constexpr(layout.SIGNED_SCALES)
UP = tl.constexpr(88)
"""Inputs are multiplied by up to 2^88 to meet subnormal codes: exact below 2^39 in size."""


@triton.jit
def tile_dots(
    matrix,
    tile,
    tiles,
    tile_nbytes,
    x,
    cols,
    first,
    last,
    N: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """Products of ``N`` consecutive tiles with a vector, over some of their blocks.

    Args:
        matrix: Address of the packed matrix, int64, a multiple of 16.
        tile: The first tile.
        tiles: Tiles that there are; beyond nothing is read and the products are 0.
        tile_nbytes: Bytes of a tile.
        x: Pointer to the vector ``[cols]``.
        cols: Its length. What is beyond counts as 0, so that padding takes no part.
        first: The first block.
        last: The block after the last.
        N: How many tiles.
        W: Cells that are read at a time, at least those of a block.
        EVEN: Whether ``cols`` is a multiple of 64.
        SCHEME: Of the matrix.

    Returns:
        ``[N, 16]`` float32.
    """
    PER: tl.constexpr = block_cells(SCHEME)
    blocks = (cols + 63) // 64
    # Cells come first, and tiles last: so threads are laid along the cells, and each has the same
    # cell of all tiles, for which it loads inputs once.
    row = tl.arange(0, 16)[None, None, :]
    at = (tile + tl.arange(0, N)).to(tl.int64)[None, :, None] * tile_nbytes
    real = (tile + tl.arange(0, N) < tiles)[None, :, None]
    total = tl.zeros([W, N, 16], tl.float32)
    for start in range(first * PER, last * PER, W):
        cell = start + tl.arange(0, W)
        inputs = cell * cell_cols(SCHEME)
        here = cell < last * PER
        wide = cell[:, None, None]
        live = here[:, None, None] & real
        codes = at + code_offset(wide // PER, blocks, SCHEME)
        if kind(SCHEME) == RAW:
            words = as_words(matrix) + (codes // 4 + wide % PER * 16) + row
            total += _raw_dots(words, live, x, inputs, here, cols, EVEN, SCHEME)
        elif kind(SCHEME) == SIGNED_SCALES:
            s, s_next = signed_scales(matrix, at, wide, row, blocks, live, SCHEME)
            words = as_words(matrix) + (codes // 4 + wide % PER * 48) + row
            dots, dots_next = _level_dots(words, live, x, inputs, here, cols, EVEN, SCHEME)
            total += s * dots + s_next * dots_next
        else:
            s, m = scales(matrix, at, wide, row, blocks, live, SCHEME)
            if bits(SCHEME) == 3 or bits(SCHEME) == 6:
                words = as_words(matrix) + (codes // 4 + wide % PER * 48) + row
                if bits(SCHEME) == 3:
                    dots, sums = _dots3(words, live, x, inputs, here, cols, EVEN)
                else:
                    dots, sums = _dots6(words, live, x, inputs, here, cols, EVEN)
            else:
                words = as_words(matrix) + (codes // 4 + wide % PER * 16) + row
                dots, sums = _dots(words, live, x, inputs, here, cols, EVEN, SCHEME)
            total += s * dots - m * sums[:, None, None]
    return tl.sum(total, axis=0)


@triton.jit
def _input(x, index, here, cols, EVEN: tl.constexpr):
    mask = here if EVEN else here & (index < cols)
    return tl.load(x + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _dots(words, live, x, inputs, here, cols, EVEN: tl.constexpr, SCHEME: tl.constexpr):
    """``sum(code * x)`` of each cell, and ``sum(x)``, at 2, 4 and 8 bits."""
    BITS: tl.constexpr = bits(SCHEME)
    word = tl.load(words, mask=live, other=0)
    dots = tl.zeros(word.shape, tl.float32)
    sums = tl.zeros(inputs.shape, tl.float32)
    for k in tl.static_range(4):
        for q in tl.static_range(8 // BITS):
            value = _input(x, inputs + (4 * q + k), here, cols, EVEN)
            factor = value * 2.0 ** (UP - 8 * (k % 2) - q * BITS)
            dots += tiny(word, k, q * BITS, BITS) * factor[:, None, None]
            sums += value
    return dots * 2.0 ** (149 - UP), sums


@triton.jit
def _dots3(words, live, x, inputs, here, cols, EVEN: tl.constexpr):
    """As :func:`_dots` at 3 bits: quads 6 and 7 are in the upper bits of the three words."""
    a, b, c = three_words(words, live)
    dots = tl.zeros(a.shape, tl.float32)
    sums = tl.zeros(inputs.shape, tl.float32)
    for k in tl.static_range(4):
        for quad in tl.static_range(6):
            word = a if quad < 2 else (b if quad < 4 else c)
            value = _input(x, inputs + (4 * quad + k), here, cols, EVEN)
            factor = value * 2.0 ** (UP - 8 * (k % 2) - 3 * (quad % 2))
            dots += tiny(word, k, 3 * (quad % 2), 3) * factor[:, None, None]
            sums += value
        for high in tl.static_range(2):
            value = _input(x, inputs + (24 + 4 * high + k), here, cols, EVEN)
            # The upper two bits of the code are the top of a (or c), and count twice.
            upper = value * 2.0 ** (UP - 8 * (k % 2) - 6 + 1)
            lowest = value * 2.0 ** (UP - 8 * (k % 2) - 6 - high)
            dots += tiny(a if high == 0 else c, k, 6, 2) * upper[:, None, None]
            dots += tiny(b, k, 6 + high, 1) * lowest[:, None, None]
            sums += value
    return dots * 2.0 ** (149 - UP), sums


@triton.jit
def _dots6(words, live, x, inputs, here, cols, EVEN: tl.constexpr):
    """As :func:`_dots` at 6 bits: quad 3 is in the upper bits of the three words."""
    a, b, c = three_words(words, live)
    dots = tl.zeros(a.shape, tl.float32)
    sums = tl.zeros(inputs.shape, tl.float32)
    for quad in tl.static_range(4):
        word = word6(a, b, c, quad)
        for k in tl.static_range(4):
            value = _input(x, inputs + (4 * quad + k), here, cols, EVEN)
            factor = value * 2.0 ** (UP - 8 * (k % 2))
            dots += tiny(word, k, 0, 6) * factor[:, None, None]
            sums += value
    return dots * 2.0 ** (149 - UP), sums


@triton.jit
def _level_dots(words, live, x, inputs, here, cols, EVEN: tl.constexpr, SCHEME: tl.constexpr):
    """``sum(level * x)`` of the two groups of each cell, where 3 bits stand for a level."""
    a, b, c = three_words(words, live)
    first = tl.zeros(a.shape, tl.float32)
    second = tl.zeros(a.shape, tl.float32)
    for k in tl.static_range(4):
        for quad in tl.static_range(4):
            value = _input(x, inputs + (4 * quad + k), here, cols, EVEN)
            first += level(code3(a, b, c, k, quad), SCHEME) * value[:, None, None]
            value = _input(x, inputs + (16 + 4 * quad + k), here, cols, EVEN)
            second += level(code3(a, b, c, k, quad + 4), SCHEME) * value[:, None, None]
    return first, second


@triton.jit
def _raw_dots(words, live, x, inputs, here, cols, EVEN: tl.constexpr, SCHEME: tl.constexpr):
    word = tl.load(words, mask=live, other=0)
    dots = tl.zeros(word.shape, tl.float32)
    for part in tl.static_range(cell_cols(SCHEME)):
        value = _input(x, inputs + part, here, cols, EVEN)
        dots += raw_value(word, part, SCHEME) * value[:, None, None]
    return dots
