"""Reading cells: codes as floats, scales and minima.

A *cell* is what one row has in one 32-bit word (three words at 3 and 6 bits): 32 / bits inputs, 32
at 3 and 16 at 6 bits. Threads hold cells, so that a word is loaded once and taken apart in
registers.

Codes become floats without a conversion, which GPUs do at a quarter to an eighth of the speed of an
addition. There are two ways:

- :func:`tiny`: masked and left where they are in the lower 16 bits, a code's bits are the mantissa
  of a subnormal number, ``code * 2^(bit - 149)``, exactly. One logical operation for a code, one
  shift for a word. The other factor makes up for the exponent. GPUs multiply subnormal numbers at
  full speed, as long as a kernel is not compiled to flush them.
- :func:`field`: shifted up and joined with the exponent of 1.0, ``1 + code * 2^(bit - 8)``: one
  operation more, and of ordinary size.

Shape letters: W cells, 16 rows of a tile; the shapes of arguments only have to broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout
from .layout import (
    block_cells,
    code_nbytes,
    first_nbytes,
    groups,
    head_nbytes,
    joins_last,
    kind,
    level_bytes,
    lowest_level,
    span_blocks,
    span_nbytes,
    step_nbytes,
)

F16_SCALES = tl.constexpr(layout.F16_SCALES)
BYTE_SCALES = tl.constexpr(layout.BYTE_SCALES)


@triton.jit
def as_bytes(at):
    """An address, a multiple of 16, as a pointer to bytes."""
    return tl.multiple_of(at.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def as_words(at):
    """An address, a multiple of 16, as a pointer to 32-bit words."""
    return tl.multiple_of(at.to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def as_halves(at):
    """An address, a multiple of 16, as a pointer to float16."""
    return tl.multiple_of(at.to(tl.pointer_type(tl.float16)), 16)


@triton.jit
def as_floats(at):
    """An address, a multiple of 16, as a pointer to float32."""
    return tl.multiple_of(at.to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def span_of(block, blocks, SCHEME: tl.constexpr):
    """Number of the span that a block belongs to; blocks: of a tile."""
    span = block // span_blocks(SCHEME)
    if joins_last(SCHEME):
        span = tl.minimum(span, tl.maximum(blocks // span_blocks(SCHEME) - 1, 0))
    return span


@triton.jit
def code_offset(block, blocks, SCHEME: tl.constexpr):
    """Byte of a tile at which the codes of a block start; blocks: of a tile."""
    span = span_of(block, blocks, SCHEME)
    inside = block - span * span_blocks(SCHEME)
    start = head_nbytes(SCHEME) + first_nbytes(SCHEME)
    return start + span * span_nbytes(SCHEME) + inside * step_nbytes(SCHEME)


@triton.jit
def tiny(word, BYTE: tl.constexpr, BIT: tl.constexpr, WIDTH: tl.constexpr):
    """``code * 2^(8 * (BYTE % 2) + BIT - 149)``, the code at a bit of a byte of words."""
    half = word if BYTE < 2 else word >> 16
    mask: tl.constexpr = ((1 << WIDTH) - 1) << (8 * (BYTE % 2) + BIT)
    return (half & mask).to(tl.float32, bitcast=True)


@triton.jit
def lane(word, K: tl.constexpr):
    """Byte ``K`` of words at bits 15-22; other bits are whatever they were."""
    if K == 0:
        return word << 15
    elif K == 1:
        return word << 7
    elif K == 2:
        return word >> 1
    else:
        return word >> 9


@triton.jit
def field(lanes, BIT: tl.constexpr, WIDTH: tl.constexpr):
    """``1 + code * 2^(BIT - 8)`` of the codes of ``WIDTH`` bits at bit ``BIT`` of a lane."""
    mask: tl.constexpr = ((1 << WIDTH) - 1) << (15 + BIT)
    return ((lanes & mask) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def scales(matrix, tile, cell, row, blocks, live, SCHEME: tl.constexpr):
    """Scale and minimum of cells.

    Args:
        matrix: Address of the packed matrix, int64.
        tile: Bytes from there to the tile, int64.
        cell: Number of the cell in its row; blocks and groups follow from it.
        row: Row of the tile, 0 to 15.
        blocks: Blocks of a tile.
        live: Which cells exist.
        SCHEME: Any but a raw one.

    Returns:
        Two float32 tensors; zeros where a cell does not exist.
    """
    block = cell // block_cells(SCHEME)
    KIND: tl.constexpr = kind(SCHEME)
    if KIND == F16_SCALES:
        SPAN: tl.constexpr = span_blocks(SCHEME)
        span = block // SPAN
        codes = span * span_nbytes(SCHEME)
        if SPAN == 1:
            codes += code_nbytes(SCHEME)
        else:  # the last span may be short
            codes += tl.minimum(blocks - span * SPAN, SPAN) * code_nbytes(SCHEME)
        at = as_halves(matrix) + (tile + codes) // 2 + row
        s = tl.load(at, mask=live, other=0.0).to(tl.float32)
        m = tl.load(at + 16, mask=live, other=0.0).to(tl.float32)
        return s, m
    # Several groups share a block, and cells are never longer than a group.
    PER: tl.constexpr = block_cells(SCHEME) // groups(SCHEME)
    group = cell % block_cells(SCHEME) // PER
    metadata = code_offset(block, blocks, SCHEME) + code_nbytes(SCHEME)
    if KIND == BYTE_SCALES:
        at = as_bytes(matrix) + (tile + (metadata + group * 32)) + row
        s = tl.load(at, mask=live, other=0).to(tl.float32)
        m = tl.load(at + 16, mask=live, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        outer = as_floats(matrix) + tile // 4 + row
        s *= tl.load(outer, mask=live, other=0.0)
        m *= tl.load(outer + 16, mask=live, other=0.0)
    else:
        at = as_bytes(matrix) + (tile + (metadata + group * 16)) + row
        both = tl.load(at, mask=live, other=0).to(tl.int32)
        span = span_of(block, blocks, SCHEME) * span_nbytes(SCHEME)
        outer = as_halves(matrix) + (tile + span) // 2 + row
        s = tl.load(outer, mask=live, other=0.0).to(tl.float32) * (both & 15).to(tl.float32)
        m = tl.load(outer + 16, mask=live, other=0.0).to(tl.float32) * (both >> 4).to(tl.float32)
    return s, m


@triton.jit
def signed_scales(matrix, tile, cell, row, blocks, live, SCHEME: tl.constexpr):
    """Scales of cells of 32 inputs whose codes stand for levels: two groups, no minima.

    Args:
        matrix: Address of the packed matrix, int64.
        tile: Bytes from there to the tile, int64.
        cell: Number of the cell in its row.
        row: Row of the tile, 0 to 15.
        blocks: Blocks of a tile.
        live: Which cells exist.
        SCHEME: One with signed scales of 5 bits.

    Returns:
        Two float32 tensors, of quads 0 to 3 and 4 to 7; zeros where a cell does not exist.
    """
    block = cell // 2
    fours = code_offset(block, blocks, SCHEME) + code_nbytes(SCHEME) + cell % 2 * 16
    four = tl.load(as_bytes(matrix) + (tile + fours) + row, mask=live, other=0).to(tl.int32)
    span = tile + block // span_blocks(SCHEME) * span_nbytes(SCHEME)
    group = cell % (2 * span_blocks(SCHEME)) * 2  # of the span's, 0 to 14
    fifths = as_bytes(matrix) + (span + 32 + group // 8 * 16) + row
    fifth = tl.load(fifths, mask=live, other=0).to(tl.int32) >> (group % 8)
    outer = tl.load(as_halves(matrix) + span // 2 + row, mask=live, other=0.0).to(tl.float32)
    first = (four & 15) - (fifth & 1) * 16
    second = (four >> 4) - (fifth >> 1 & 1) * 16
    return first.to(tl.float32) * outer, second.to(tl.float32) * outer


@triton.jit
def three_words(words, live):
    """The three words of cells of 3 or 6 bits; zeros where a cell does not exist."""
    a = tl.load(words, mask=live, other=0)
    b = tl.load(words + 16, mask=live, other=0)
    c = tl.load(words + 32, mask=live, other=0)
    return a, b, c


@triton.jit
def code3(a, b, c, K: tl.constexpr, QUAD: tl.constexpr):
    """Codes of 3 bits, of input ``4 * QUAD + K`` of cells; a, b, c are their words."""
    if QUAD < 6:
        word = a if QUAD < 2 else (b if QUAD < 4 else c)
        return word >> (8 * K + 3 * (QUAD % 2)) & 7
    else:
        upper = (a if QUAD == 6 else c) >> (8 * K + 5)
        return (upper & 6) | (b >> (8 * K + QUAD) & 1)


@triton.jit
def word6(a, b, c, QUAD: tl.constexpr):
    """Words with the codes of 6 bits of quad ``QUAD`` in the lower bits of their bytes.

    Bytes of the first three have other bits above them.
    """
    if QUAD < 3:
        return a if QUAD == 0 else (b if QUAD == 1 else c)
    else:
        return (a >> 6 & 0x03030303) | (b >> 4 & 0x0C0C0C0C) | (c >> 2 & 0x30303030)


@triton.jit
def level(code, SCHEME: tl.constexpr):
    """What codes of 3 bits stand for, float32, without a conversion."""
    four = tl.where(code < 4, level_bytes(SCHEME, False), level_bytes(SCHEME, True))
    above: tl.constexpr = 8388608 - lowest_level(SCHEME)  # 2^23, whose mantissa ends at the ones
    return ((four >> ((code & 3) * 8) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - above


@triton.jit
def raw_value(word, PART: tl.constexpr, SCHEME: tl.constexpr):
    """Value number ``PART`` of words of a raw scheme, float32."""
    if SCHEME == "f32":
        return word.to(tl.float32, bitcast=True)
    elif SCHEME == "bf16":
        high = word << 16 if PART == 0 else word & -65536
        return high.to(tl.float32, bitcast=True)
    else:
        low = word if PART == 0 else word >> 16
        return low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
