"""Launching the kernels for one packed matrix: products and dense rows.

Shape letters: T tokens, R rows, C cols.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepack_formats.errors import FormatError
from moepack_formats.schemes import BLOCK_COLS, TILE_ROWS, Scheme

from . import dense, matmul, matvec, sizes
from .layout import cell_width


def linear(
    x: Tensor, packed: Tensor, scheme: Scheme, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """``x`` [T, C] times a packed [R, C], to [T, R] in the dtype of ``x``.

    Raises:
        FormatError: The packed bytes are too short.
        ValueError: They do not start at a multiple of 16, or are on another device.
    """
    check_packed(packed, scheme.packed_nbytes(*shape), x.device)
    x = x.contiguous()
    if len(x) == 1:
        return _one(x[0], packed, scheme, shape, bias).unsqueeze(0)
    (rows, cols), name = shape, scheme.name
    out = x.new_empty(len(x), rows)
    laid = sizes.arrange(x, name)
    tile, columns = sizes.rows_tile(len(x), x), sizes.columns_tile()
    matmul.linear_rows[(-(-len(x) // tile), -(-rows // columns))](
        laid,
        laid.shape[1],
        len(x),
        packed,
        rows,
        cols,
        scheme.tile_nbytes(cols),
        bias if bias is not None else laid,
        out,
        SCHEME=name,
        HAS_BIAS=bias is not None,
        M=tile,
        C=columns,
        W=sizes.chunk_cells(name),
        PRECISION="ieee",
        num_warps=sizes.VECTOR_WARPS,
        num_stages=sizes.ROWS_STAGES,
    )
    return out


def _one(
    x: Tensor, packed: Tensor, scheme: Scheme, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    (rows, cols), name = shape, scheme.name
    split = sizes.split_inputs(rows, cols)
    partial = x.new_empty(split.count, rows, dtype=torch.float32)
    matvec.linear[(-(-rows // (TILE_ROWS * sizes.VECTOR_TILES)), split.count)](
        x,
        packed,
        rows,
        cols,
        scheme.tile_nbytes(cols),
        split.blocks,
        partial,
        SCHEME=name,
        N=sizes.VECTOR_TILES,
        W=sizes.vector_cells(name),
        EVEN=cols % BLOCK_COLS == 0,
        num_warps=sizes.VECTOR_WARPS,
    )
    out = x.new_empty(rows)
    combine(partial.unsqueeze(0), None, out, bias=bias)
    return out


def combine(
    partial: Tensor,
    weights: Tensor | None,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    num_experts: int = 0,
) -> None:
    """Add up parts one after the other, see :func:`matvec.combine`.

    Args:
        partial: ``[K, S, width]`` float32.
        weights: ``[K]`` float32; None for ones.
        out: ``[width]`` for the sum, ``[K, width]`` for the weighted outputs.
        bias: ``[width]`` or None.
        index: ``[K]`` int64, where choices may be no expert.
        num_experts: Index of the first that is none.
    """
    choices, splits, width = partial.shape
    matvec.combine[(-(-width // sizes.COMBINE_SIZE),)](
        partial,
        partial if weights is None else weights,
        partial if index is None else index,
        num_experts,
        partial if bias is None else bias,
        out,
        width,
        choices,
        splits,
        EACH=out.dim() == 2,
        HAS_WEIGHTS=weights is not None,
        HAS_INDEX=index is not None,
        HAS_BIAS=bias is not None,
        SIZE=sizes.COMBINE_SIZE,
        num_warps=4,
        enable_fp_fusion=False,
    )


def decode(
    packed: Tensor,
    scheme: Scheme,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    tiles: Tensor | None = None,
) -> Tensor:
    """Dense ``[rows, cols]`` of a packed matrix, or of some of its tiles.

    Args:
        packed: Its bytes.
        scheme: How it is packed.
        rows: Rows wanted, counted from the first decoded tile.
        cols: True inputs of a row.
        dtype: Of the result; computed in float32 and rounded once.
        tiles: ``[n]`` int64 indices of tiles on the same device; None for all from the first.
    """
    check_packed(packed, 0, packed.device)
    out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
    name, count = scheme.name, -(-rows // TILE_ROWS) if tiles is None else len(tiles)
    if rows == 0 or count == 0:
        return out
    cells = -(-cols // BLOCK_COLS) * BLOCK_COLS // cell_width(name)
    width = sizes.chunk_cells(name)
    dense.dense_rows[(count, -(-cells // width))](
        packed,
        packed if tiles is None else tiles,
        rows,
        cols,
        scheme.tile_nbytes(cols),
        out,
        SCHEME=name,
        HAS_TILES=tiles is not None,
        W=width,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def check_packed(packed: Tensor, wanted: int, device: torch.device) -> None:
    """Kernels read where they are told to; a short or misplaced buffer must not get there.

    Raises:
        FormatError: The bytes are too few.
        ValueError: They are on another device, not contiguous, or not aligned.
    """
    if packed.device != device or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"packed bytes must be contiguous uint8 on {device}, not {packed.device}")
    if packed.data_ptr() % 16:
        raise ValueError("packed bytes must start at a multiple of 16")
    if packed.numel() < wanted:
        raise FormatError("packed bytes are too short", wanted=wanted, got=packed.numel())
