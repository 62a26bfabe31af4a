"""Kernels for one token: packed matrices times a vector.

Experts are found on the device: ``table[index[k]]`` is the address of the record that the token's
k-th choice names. A choice is skipped where ``index[k]`` is no expert, or where its record has
another layout than the launch is for: a layer with several layouts gets a launch for each.

Nothing is added in an order that depends on timing. Partial sums over a part of the inputs are
stored, and :func:`combine` adds them one after the other.

Shape letters: K choices of a token, E experts, H hidden size, I intermediate size, S splits of the
inputs, N tiles of a program, W cells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cells import as_floats
from .dots import tile_dots
from .gates import gated, ungated


@triton.jit(do_not_specialize=["index", "layout_of", "layout", "num_experts"])
def experts_up(
    x,
    index,
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
    SCHEME: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``h[k] = activation(gate_up(x))``: grid (ceil(I / 16), K); without a gate (ceil(I / 32), K).

    Args:
        x: ``[H]``.
        index: ``[K]`` int64.
        table: ``[E]`` int64, addresses of records.
        layout_of: ``[E]`` int64.
        layout: The layout that this launch computes.
        num_experts: E.
        hidden: H.
        intermediate: I.
        first_offset: Of ``gate_up`` or ``up`` in the record, bytes.
        bias_offset: Of its bias.
        tile_nbytes: Bytes of one of its tiles.
        alpha: See csrc/moepack.h, as ``limit`` and ``up_offset``.
        limit: Infinite for none.
        up_offset: Added to up.
        h: ``[K, I]`` float32, written.
        SCHEME: Of the matrix.
        GATED: Whether tiles of gate and up alternate.
        HAS_BIAS: Whether there is a bias.
        KIND: The activation.
        W: Cells read at a time.
        EVEN: Whether the inputs are a multiple of 64.
    """
    k = tl.program_id(1)
    expert = tl.load(index + k)
    if (expert < 0) | (expert >= num_experts):
        return
    if tl.load(layout_of + expert) != layout:
        return
    record = tl.load(table + expert)
    tile = tl.program_id(0) * 2
    tiles = (intermediate + 15) // 16 * (2 if GATED else 1)
    matrix, blocks = record + first_offset, (hidden + 63) // 64
    sums = tile_dots(
        matrix, tile, tiles, tile_nbytes, x, hidden, 0, blocks, 2, W, EVEN, SCHEME
    )  # [2, 16]
    places = tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :]
    if HAS_BIAS:
        at = tile * 16 + places
        bias = as_floats(record + bias_offset)
        sums += tl.load(bias + at, mask=at < tiles * 16, other=0.0)
    if GATED:
        gate, up = tl.split(tl.trans(sums))
        row = tl.program_id(0) * 16 + tl.arange(0, 16)
        value = gated(gate, up, alpha, limit, up_offset, KIND)
        tl.store(h + k * intermediate + row, value, mask=row < intermediate)
    else:
        row = tile * 16 + places
        value = ungated(sums, alpha, limit, KIND)
        tl.store(h + k * intermediate + row, value, mask=row < intermediate)


@triton.jit(do_not_specialize=["index", "layout_of", "layout", "num_experts"])
def experts_down(
    h,
    index,
    table,
    layout_of,
    layout,
    num_experts,
    hidden,
    intermediate,
    down_offset,
    bias_offset,
    tile_nbytes,
    split_blocks,
    partial,
    SCHEME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``partial[k, s]``: the part of ``down(h[k])`` that comes from blocks of split ``s``.

    Grid (ceil(H / 16 N), S, K). Other arguments as in :func:`experts_up`.

    Args:
        h: ``[K, I]`` float32.
        index: ``[K]`` int64.
        table: ``[E]`` int64.
        layout_of: ``[E]`` int64.
        layout: The layout that this launch computes.
        num_experts: E.
        hidden: H.
        intermediate: I.
        down_offset: Of ``down`` in the record, bytes.
        bias_offset: Of its bias.
        tile_nbytes: Bytes of one of its tiles.
        split_blocks: Blocks of a split.
        partial: ``[K, S, H]`` float32, written.
        SCHEME: Of the matrix.
        HAS_BIAS: Whether there is a bias.
        N: Tiles of a program.
        W: Cells read at a time.
        EVEN: Whether the inputs are a multiple of 64.
    """
    split, k = tl.program_id(1), tl.program_id(2)
    expert = tl.load(index + k)
    if (expert < 0) | (expert >= num_experts):
        return
    if tl.load(layout_of + expert) != layout:
        return
    record = tl.load(table + expert)
    tile = tl.program_id(0) * N
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, (intermediate + 63) // 64)
    sums = tile_dots(
        record + down_offset,
        tile,
        (hidden + 15) // 16,
        tile_nbytes,
        h + k * intermediate,
        intermediate,
        first,
        last,
        N,
        W,
        EVEN,
        SCHEME,
    )
    row = tile * 16 + tl.arange(0, N)[:, None] * 16 + tl.arange(0, 16)[None, :]
    if HAS_BIAS:
        bias = tl.load(as_floats(record + bias_offset) + row, mask=row < hidden, other=0.0)
        sums += tl.where(split == 0, bias, 0.0)
    out = partial + (k * tl.num_programs(1) + split) * hidden
    tl.store(out + row, sums, mask=row < hidden)


@triton.jit
def linear(
    x,
    packed,
    rows,
    cols,
    tile_nbytes,
    split_blocks,
    partial,
    SCHEME: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``partial[s]``: the part of a packed matrix times ``x`` from the blocks of split ``s``.

    Grid (ceil(rows / 16 N), S); ``x`` is ``[cols]``, ``partial`` is ``[S, rows]`` float32.
    """
    split = tl.program_id(1)
    tile = tl.program_id(0) * N
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, (cols + 63) // 64)
    matrix = packed.to(tl.int64)
    tiles = (rows + 15) // 16
    sums = tile_dots(matrix, tile, tiles, tile_nbytes, x, cols, first, last, N, W, EVEN, SCHEME)
    row = tile * 16 + tl.arange(0, N)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(partial + split * rows + row, sums, mask=row < rows)


@triton.jit(do_not_specialize=["weights", "index", "num_experts", "choices", "splits"])
def combine(
    partial,
    weights,
    index,
    num_experts,
    bias,
    out,
    width,
    choices,
    splits,
    EACH: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """``out = sum over k of weights[k] * sum over s of partial[k, s]``, one after the other.

    Compiled without fused multiply-adds, so that the sum of stored products has the same bits.

    Args:
        partial: ``[K, S, width]`` float32.
        weights: ``[K]`` float32, read with ``HAS_WEIGHTS``.
        index: ``[K]`` int64; choices that are no expert are skipped. Read with ``HAS_INDEX``.
        num_experts: E.
        bias: ``[width]``, read with ``HAS_BIAS``.
        out: ``[width]``, or with ``EACH`` ``[K, width]``, of any float type.
        width: Outputs.
        choices: K.
        splits: S.
        EACH: Whether the products are stored and not added up.
        HAS_WEIGHTS: Whether there are weights.
        HAS_INDEX: Whether choices may be no expert.
        HAS_BIAS: Whether to add a bias.
        SIZE: Outputs of a program.
    """
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = at < width
    total = tl.zeros([SIZE], tl.float32)
    for k in range(choices):
        exists = True
        if HAS_INDEX:
            expert = tl.load(index + k)
            exists = (expert >= 0) & (expert < num_experts)
        value = tl.zeros([SIZE], tl.float32)
        for s in range(splits):
            part = partial + (k * splits + s) * width
            value += tl.load(part + at, mask=live & exists, other=0.0)
        if HAS_WEIGHTS:
            value *= tl.load(weights + k)
        if HAS_INDEX:
            value = tl.where(exists, value, 0.0)
        if EACH:
            tl.store(out + k * width + at, value, mask=live)
        total += value
    if HAS_BIAS:
        total += tl.load(bias + at, mask=live, other=0.0).to(tl.float32)
    if not EACH:
        tl.store(out + at, total, mask=live)
