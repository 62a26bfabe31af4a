"""How much of a matrix one program takes: functions of shapes alone, so that results are, too."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepack_formats.schemes import BLOCK_COLS, SCHEMES, TILE_ROWS

from .layout import cell_width

VECTOR_TILES = 2
"""Tiles of a program of a matrix-vector kernel."""

VECTOR_WARPS = 4

ROWS_STAGES = 1
"""Stages of the loops of matrix products.

With more, Triton keeps the inputs of whole chunks in shared memory: at 3 bits and 64 rows its usual
three stages take 228 KiB, more than any GPU has. Loads within a chunk overlap as it is.
"""

COMBINE_SIZE = 128

_WANTED_PROGRAMS = 512
_MAX_SPLITS = 8
_MIN_SPLIT_BLOCKS = 8


@dataclass(frozen=True)
class Split:
    """How the inputs of a product are shared out.

    Attributes:
        count: Programs that share a row's inputs.
        blocks: Blocks of 64 inputs that each takes.
    """

    count: int
    blocks: int


def split_inputs(rows: int, cols: int) -> Split:
    """Enough programs to fill a GPU, each with a run of inputs that is worth starting."""
    blocks = -(-cols // BLOCK_COLS)
    programs = -(-rows // (VECTOR_TILES * TILE_ROWS))
    count = 1
    while (
        2 * count <= _MAX_SPLITS
        and count * programs < _WANTED_PROGRAMS
        and blocks >= 2 * count * _MIN_SPLIT_BLOCKS
    ):
        count *= 2
    each = -(-blocks // count)
    return Split(-(-blocks // each), each)


def vector_cells(scheme: str) -> int:
    """Cells that a matrix-vector program reads at a time: 32 fill its four warps."""
    return max(32, BLOCK_COLS // cell_width(scheme))


def chunk_cells(scheme: str) -> int:
    """Cells of a chunk of inputs in matrix products: what one tensor-core product sums over."""
    return {32: 16, 16: 16, 8: 32, 4: 32, 2: 32, 1: 64}[cell_width(scheme)]


def chunk_inputs(scheme: str) -> int:
    """Inputs of a chunk."""
    return chunk_cells(scheme) * cell_width(scheme)


def rows_tile(rows: float, inputs: torch.Tensor) -> int:
    """Rows of a program where there are about so many of an expert; tensor cores take 16.

    Tiles of other sizes may round otherwise: what ``rows`` is must follow from a pass and a layer,
    never from which records are there.

    Args:
        rows: Tokens, or places of an expert on the average.
        inputs: Of the product; their type and device matter. No tensor core multiplies float32 to
            its precision, and threads would not have registers for more than 16 rows.
    """
    if inputs.dtype == torch.float32:
        return 16
    capability = torch.cuda.get_device_capability(inputs.device) if inputs.is_cuda else None
    return min(most_rows(capability), 16 if rows <= 16 else 32 if rows <= 32 else 64)


def most_rows(capability: tuple[int, int] | None) -> int:
    """Rows for which a GPU's threads have registers: where products read shared memory, 64."""
    return 64 if capability is None or capability[0] == 9 else 32


def columns_tile() -> int:
    """Columns of a program of a matrix product."""
    return 64


def arrange(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """Lay inputs out for the products of a scheme.

    Args:
        x: ``[P, cols]``.
        scheme: Of the matrix that they will meet.

    Returns:
        ``[P, padded]``, in each chunk the first inputs of all cells, then the second ones, ...;
        zeros beyond ``cols``.
    """
    cells, width = chunk_cells(scheme), cell_width(scheme)
    rows, cols = x.shape
    padded = arranged_width(cols, scheme)
    if padded != cols:
        x = torch.nn.functional.pad(x, (0, padded - cols))
    return x.view(rows, -1, cells, width).transpose(2, 3).reshape(rows, padded)


def arranged_width(cols: int, scheme: str) -> int:
    """Columns after :func:`arrange`."""
    chunk = chunk_inputs(scheme)
    return -(-cols // chunk) * chunk


def tile_nbytes(scheme: str, cols: int) -> int:
    """Bytes of a tile."""
    return SCHEMES[scheme].tile_nbytes(cols)
