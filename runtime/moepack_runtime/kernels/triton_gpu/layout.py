"""Where things are in a tile, as numbers that a kernel is compiled for.

Functions of a scheme's name; kernels call them while they are compiled. ``formats/SPEC.md``,
section 3.3, has the layout. Only :func:`triton.constexpr_function` is needed of Triton here.
"""

from __future__ import annotations

import triton

from moepack_formats.schemes import BLOCK_COLS, SCHEMES, TILE_ROWS

RAW, F16_SCALES, BYTE_SCALES, NIBBLE_SCALES, SIGNED_SCALES = 0, 1, 2, 3, 4
"""How a scheme stores scales and minima."""


@triton.constexpr_function
def bits(scheme: str) -> int:
    """Bits of a code."""
    return SCHEMES[scheme].bits


@triton.constexpr_function
def kind(scheme: str) -> int:
    """How scales are stored: one of the constants above."""
    kinds = {0: RAW, 16: F16_SCALES, 8: BYTE_SCALES, 4: NIBBLE_SCALES, 5: SIGNED_SCALES}
    return kinds[SCHEMES[scheme].scale_bits]


@triton.constexpr_function
def groups(scheme: str) -> int:
    """Groups in a block; 1 also where a group is longer than a block."""
    group = SCHEMES[scheme].group
    return max(BLOCK_COLS // group, 1) if group else 1


@triton.constexpr_function
def head_nbytes(scheme: str) -> int:
    """Bytes at the head of a tile."""
    return SCHEMES[scheme].head_nbytes


@triton.constexpr_function
def span_blocks(scheme: str) -> int:
    """Blocks of a full span."""
    return SCHEMES[scheme].span // BLOCK_COLS


@triton.constexpr_function
def joins_last(scheme: str) -> bool:
    """Whether blocks that are left over after full spans belong to the last of these."""
    return len(SCHEMES[scheme].span_runs(SCHEMES[scheme].span + BLOCK_COLS)) == 1


@triton.constexpr_function
def span_nbytes(scheme: str) -> int:
    """Bytes of a full span."""
    return SCHEMES[scheme].span_nbytes(SCHEMES[scheme].span // BLOCK_COLS)


@triton.constexpr_function
def first_nbytes(scheme: str) -> int:
    """Bytes before the codes of a span's first block."""
    return SCHEMES[scheme].span_head_nbytes


@triton.constexpr_function
def code_nbytes(scheme: str) -> int:
    """Bytes of a block's codes."""
    return TILE_ROWS * BLOCK_COLS * SCHEMES[scheme].bits // 8


@triton.constexpr_function
def step_nbytes(scheme: str) -> int:
    """Bytes from the codes of a block to those of the next block of its span."""
    found = SCHEMES[scheme]
    if found.scale_bits in (4, 5):
        return found.span_nbytes(2) - found.span_nbytes(1)
    return TILE_ROWS * BLOCK_COLS * found.bits // 8


@triton.constexpr_function
def cell_cols(scheme: str) -> int:
    """Inputs of a *cell*: of a row, the codes in one 32-bit word, or in three at 3 and 6 bits."""
    width = SCHEMES[scheme].bits
    return (96 if width in (3, 6) else 32) // width


@triton.constexpr_function
def block_cells(scheme: str) -> int:
    """Cells of a row in a block."""
    width = SCHEMES[scheme].bits
    return BLOCK_COLS // ((96 if width in (3, 6) else 32) // width)


@triton.constexpr_function
def level_bytes(scheme: str, upper: bool) -> int:
    """Four of the levels that codes stand for, less the lowest, a byte each."""
    levels = SCHEMES[scheme].levels
    four = levels[4:8] if upper else levels[:4]
    return sum((level - levels[0]) << (8 * i) for i, level in enumerate(four))


@triton.constexpr_function
def lowest_level(scheme: str) -> int:
    """The first of a scheme's levels."""
    return SCHEMES[scheme].levels[0]


def cell_width(scheme: str) -> int:
    """What :func:`cell_cols` gives, for the host."""
    width = SCHEMES[scheme].bits
    return (96 if width in (3, 6) else 32) // width
