"""Kernels for many tokens: packed matrices times rows of inputs, on tensor cores.

Weights are decoded in registers and multiplied at once; nothing dense is written. Decoding yields,
for each position in a cell, the weights of all cells at that position. Inputs are laid out to meet
them (:func:`moepack_runtime.kernels.triton_gpu.sizes.arrange`): a *chunk* is ``W`` cells
of inputs, and in a chunk the first inputs of all cells come first, then the second ones.

Rows are sorted by expert and cut into tiles of ``M`` rows of one expert. A launch computes the
experts of one layout; the others' tiles end at once.

What differs between turns is not specialized for, nor is where ``layout_of`` starts: a kernel would
be compiled anew in the middle of a text.

Shape letters: P rows (places of a token's choices), M rows of a program, C columns of a program
(outputs, as they are stored), W cells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout
from .cells import (
    as_floats,
    as_words,
    code3,
    code_offset,
    field,
    lane,
    level,
    raw_value,
    scales,
    signed_scales,
    three_words,
    word6,
)
from .gates import gated, ungated
from .layout import bits, block_cells, cell_cols, kind

RAW = tl.constexpr(layout.RAW)
SIGNED_SCALES = tl.constexpr(layout.SIGNED_SCALES)


@triton.jit(do_not_specialize=["layout_of", "layout", "num_experts"])
def up_rows(
    x,
    stride,
    tile_expert,
    tile_first,
    tile_last,
    table,
    layout_of,
    layout,
    num_experts,
    hidden,
    intermediate,
    first_offset,
    bias_offset,
    tile_nbytes,
    alpha,
    limit,
    up_offset,
    h,
    h_stride,
    SCHEME: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    DOWN_CELL: tl.constexpr,
    DOWN_W: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``h = activation(gate_up(x))`` for sorted rows: grid (tiles of rows, ceil(stored / C)).

    Args:
        x: ``[P, stride]``, sorted and arranged for ``SCHEME``.
        stride: Elements of a row of ``x``.
        tile_expert: ``[tiles]`` int32, E or more for a tile without rows.
        tile_first: ``[tiles]`` int32, the tile's first row.
        tile_last: ``[tiles]`` int32, the row after its last.
        table: ``[E]`` int64, addresses of records.
        layout_of: ``[E]`` int64.
        layout: The layout that this launch computes.
        num_experts: E.
        hidden: H.
        intermediate: I.
        first_offset: Of the matrix in the record, bytes.
        bias_offset: Of its bias.
        tile_nbytes: Bytes of one of its tiles.
        alpha: See csrc/moepack.h, as ``limit`` and ``up_offset``.
        limit: Infinite for none.
        up_offset: Added to up.
        h: ``[P, h_stride]``, written as arranged for the scheme of down; the rest is not touched.
        h_stride: Elements of a row of ``h``.
        SCHEME: Of the matrix.
        GATED: Whether tiles of gate and up alternate.
        HAS_BIAS: Whether there is a bias.
        KIND: The activation.
        DOWN_CELL: Inputs of a cell of down.
        DOWN_W: Cells of a chunk of down.
        M: Rows of a program.
        C: Columns of a program, a multiple of 32.
        W: Cells of a chunk.
        PRECISION: Of products of float32: "ieee".
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert >= num_experts:
        return
    if tl.load(layout_of + expert) != layout:
        return
    record = tl.load(table + expert)
    row = tl.load(tile_first + tile) + tl.arange(0, M)
    live = row < tl.load(tile_last + tile)
    column = tl.program_id(1) * C + tl.arange(0, C)
    stored = (intermediate + 15) // 16 * (32 if GATED else 16)
    total = _product(
        x, row, live, stride, record + first_offset, column, stored, hidden, tile_nbytes,
        SCHEME, M, C, W, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(as_floats(record + bias_offset) + column, mask=column < stored, other=0.0)
        total += bias[None, :]
    if GATED:
        pairs = tl.permute(tl.reshape(total, (M, C // 32, 2, 16)), (0, 1, 3, 2))
        gate, up = tl.split(pairs)
        value = tl.reshape(gated(gate, up, alpha, limit, up_offset, KIND), (M, C // 2))
        out = tl.program_id(1) * (C // 2) + tl.arange(0, C // 2)
    else:
        value = ungated(total, alpha, limit, KIND)
        out = column
    chunk = DOWN_CELL * DOWN_W
    place = out // chunk * chunk + out % DOWN_CELL * DOWN_W + out % chunk // DOWN_CELL
    at = h + row.to(tl.int64)[:, None] * h_stride + place[None, :]
    tl.store(at, value, mask=live[:, None] & (out < intermediate)[None, :])


@triton.jit(do_not_specialize=["layout_of", "layout", "num_experts"])
def down_rows(
    h,
    stride,
    tile_expert,
    tile_first,
    tile_last,
    table,
    layout_of,
    layout,
    num_experts,
    hidden,
    intermediate,
    down_offset,
    bias_offset,
    tile_nbytes,
    place,
    weights,
    out,
    SCHEME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[place] = weight * down(h)`` for sorted rows: grid (tiles of rows, ceil(H / C)).

    Arguments as in :func:`up_rows`, and:

    Args:
        h: ``[P, stride]``, arranged for ``SCHEME``.
        stride: Elements of a row of ``h``.
        tile_expert: ``[tiles]`` int32.
        tile_first: ``[tiles]`` int32.
        tile_last: ``[tiles]`` int32.
        table: ``[E]`` int64.
        layout_of: ``[E]`` int64.
        layout: The layout that this launch computes.
        num_experts: E.
        hidden: H.
        intermediate: I.
        down_offset: Of the matrix in the record, bytes.
        bias_offset: Of its bias.
        tile_nbytes: Bytes of one of its tiles.
        place: ``[P]`` int64, where a sorted row's output goes.
        weights: ``[P]`` float32 by place.
        out: ``[P, H]`` float32.
        SCHEME: Of the matrix.
        HAS_BIAS: Whether there is a bias.
        M: Rows of a program.
        C: Columns of a program.
        W: Cells of a chunk.
        PRECISION: Of products of float32.
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert >= num_experts:
        return
    if tl.load(layout_of + expert) != layout:
        return
    record = tl.load(table + expert)
    row = tl.load(tile_first + tile) + tl.arange(0, M)
    live = row < tl.load(tile_last + tile)
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = _product(
        h, row, live, stride, record + down_offset, column, (hidden + 15) // 16 * 16, intermediate,
        tile_nbytes, SCHEME, M, C, W, PRECISION,
    )  # fmt: skip
    real = column < hidden
    if HAS_BIAS:
        total += tl.load(as_floats(record + bias_offset) + column, mask=real, other=0.0)[None, :]
    to = tl.load(place + row, mask=live, other=0)
    total *= tl.load(weights + to, mask=live, other=0.0)[:, None]
    at = out + to[:, None] * hidden + column[None, :]
    tl.store(at, total, mask=live[:, None] & real[None, :])


@triton.jit(do_not_specialize=["count"])
def linear_rows(
    x,
    stride,
    count,
    packed,
    rows,
    cols,
    tile_nbytes,
    bias,
    out,
    SCHEME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = x W^T + bias`` of a packed ``[rows, cols]``: grid (ceil(count / M), ceil(rows / C)).

    ``x`` is ``[count, stride]``, arranged for ``SCHEME``; ``out`` is ``[count, rows]``.
    """
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < count
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = _product(
        x, row, live, stride, packed.to(tl.int64), column, (rows + 15) // 16 * 16, cols,
        tile_nbytes, SCHEME, M, C, W, PRECISION,
    )  # fmt: skip
    real = column < rows
    if HAS_BIAS:
        total += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * rows + column[None, :]
    tl.store(at, total, mask=live[:, None] & real[None, :])


@triton.jit
def _product(
    x,
    row,
    live,
    stride,
    matrix,
    column,
    stored,
    cols,
    tile_nbytes,
    SCHEME: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ``[M]`` of ``x`` times columns ``[C]`` of a matrix, to ``[M, C]`` float32."""
    CELL: tl.constexpr = cell_cols(SCHEME)
    PER: tl.constexpr = block_cells(SCHEME)
    blocks = (cols + 63) // 64
    total = tl.zeros([M, C], tl.float32)
    at = (column // 16).to(tl.int64)[None, :] * tile_nbytes
    lines = (column % 16)[None, :]
    inputs = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, W)[None, :]
    for start in range(0, blocks * PER, W):
        cell = (start + tl.arange(0, W))[:, None]
        exists = (cell < blocks * PER) & (column < stored)[None, :]
        codes = at + code_offset(cell // PER, blocks, SCHEME)
        if kind(SCHEME) == RAW:
            word = tl.load(
                as_words(matrix) + (codes // 4 + cell % PER * 16) + lines, mask=exists, other=0
            )
            for part in tl.static_range(CELL):
                weight = raw_value(word, part, SCHEME)
                total = _add(total, inputs + (start * CELL + part * W), weight, live, PRECISION)
        elif kind(SCHEME) == SIGNED_SCALES:
            first, second = signed_scales(matrix, at, cell, lines, blocks, exists, SCHEME)
            words = as_words(matrix) + (codes // 4 + cell % PER * 48) + lines
            a, b, c = three_words(words, exists)
            for k in tl.static_range(4):
                for quad in tl.static_range(8):
                    weight = level(code3(a, b, c, k, quad), SCHEME)
                    weight *= first if quad < 4 else second
                    part = inputs + (start * CELL + (4 * quad + k) * W)
                    total = _add(total, part, weight, live, PRECISION)
        else:
            s, m = scales(matrix, at, cell, lines, blocks, exists, SCHEME)
            if bits(SCHEME) == 3:
                words = as_words(matrix) + (codes // 4 + cell % PER * 48) + lines
                a, b, c = three_words(words, exists)
                for k in tl.static_range(4):
                    for quad in tl.static_range(8):
                        weight = _weight3(a, b, c, s, m, k, quad)
                        part = inputs + (start * CELL + (4 * quad + k) * W)
                        total = _add(total, part, weight, live, PRECISION)
            elif bits(SCHEME) == 6:
                words = as_words(matrix) + (codes // 4 + cell % PER * 48) + lines
                a, b, c = three_words(words, exists)
                for quad in tl.static_range(4):
                    word = word6(a, b, c, quad)
                    for k in tl.static_range(4):
                        weight = field(lane(word, k), 0, 6) * (s * 256) - (s * 256 + m)
                        part = inputs + (start * CELL + (4 * quad + k) * W)
                        total = _add(total, part, weight, live, PRECISION)
            else:
                BITS: tl.constexpr = bits(SCHEME)
                words = as_words(matrix) + (codes // 4 + cell % PER * 16) + lines
                word = tl.load(words, mask=exists, other=0)
                for k in tl.static_range(4):
                    lanes = lane(word, k)
                    for q in tl.static_range(8 // BITS):
                        wide = s * (1 << (8 - q * BITS))
                        weight = field(lanes, q * BITS, BITS) * wide - (wide + m)
                        part = inputs + (start * CELL + (4 * q + k) * W)
                        total = _add(total, part, weight, live, PRECISION)
    return total


@triton.jit
def _add(total, at, weight, live, PRECISION: tl.constexpr):
    values = tl.load(at, mask=live[:, None], other=0.0)
    return tl.dot(values, weight.to(values.dtype), total, input_precision=PRECISION)


@triton.jit
def _weight3(a, b, c, s, m, K: tl.constexpr, QUAD: tl.constexpr):
    """The weights of one input of cells at 3 bits."""
    if QUAD < 6:
        word = a if QUAD < 2 else (b if QUAD < 4 else c)
        wide = s * (1 << (8 - 3 * (QUAD % 2)))
        return field(lane(word, K), 3 * (QUAD % 2), 3) * wide - (wide + m)
    else:
        # The upper two bits of the code are the top of a (or c), and count twice.
        upper = field(lane(a if QUAD == 6 else c, K), 6, 2)
        lowest = field(lane(b, K), QUAD, 1)
        low: tl.constexpr = 1 << (8 - QUAD)
        return upper * (s * 8.0) + (lowest * (s * low) - (s * (8.0 + low) + m))
