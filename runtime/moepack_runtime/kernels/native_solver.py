"""What quantizers compute of every weight, by the native library.

Groups of weights lie side by side, one to a column. A call runs on the calling thread alone,
without the GIL, and gives the same bits on every instruction set. ``moepack.quant`` does the same
with torch where there is no library.

Shape letters: g weights in a group, N groups, R rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .native_buffers import check_floats
from .native_interface import (
    MOST_GROUP,
    MOST_LEVELS,
    Columns,
    Grid,
    Groups,
    Levels,
    Moves,
    Neighbours,
)
from .native_library import available, check, loaded

__all__ = [
    "available",
    "best_moves",
    "best_neighbours",
    "code_sums",
    "feed_back",
    "level_sums",
    "squared_steps",
]


def code_sums(
    weights: Tensor,
    measure: Tensor | None,
    inverse: Tensor,
    zero: Tensor,
    top: int,
    *,
    squares: bool = True,
) -> tuple[Tensor, ...]:
    """Sums over each group of the codes nearest to ``weights * inverse + zero``.

    Args:
        weights: ``[g, N]`` float32.
        measure: ``[g, N]`` float32, how often each weight counts; None: once.
        inverse: ``[N]`` float32, one over the step.
        zero: ``[N]`` float32, the code, a fraction, that stands for 0.
        top: The largest code.
        squares: Whether all sums are wanted.

    Returns:
        ``[N]`` float32 each: codes, and with ``squares`` their squares and code times weight.

    Raises:
        TypeError: A tensor is not float32 on the CPU.
        ValueError: A tensor has another shape or is not contiguous.
    """
    groups, grid = _groups(weights, measure), _grid(weights, inverse, zero, top)
    sums = tuple(torch.empty_like(inverse) for _ in range(3 if squares else 1))
    addresses = [each.data_ptr() for each in sums] + [None] * (3 - len(sums))
    check(loaded().moepack_code_sums(ctypes.byref(groups), ctypes.byref(grid), *addresses))
    return sums


def squared_steps(
    weights: Tensor, measure: Tensor | None, inverse: Tensor, zero: Tensor, top: int
) -> Tensor:
    """Sums ``[N]`` of squared differences, in steps, from the nearest code; see ``code_sums``."""
    groups, grid = _groups(weights, measure), _grid(weights, inverse, zero, top)
    lost = torch.empty_like(inverse)
    check(loaded().moepack_squared_steps(ctypes.byref(groups), ctypes.byref(grid), lost.data_ptr()))
    return lost


def level_sums(
    weights: Tensor, measure: Tensor | None, inverse: Tensor, levels: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Sums over each group of the levels nearest to ``weights * inverse``.

    Args:
        weights: ``[g, N]`` float32.
        measure: ``[g, N]`` float32, how often each weight counts; None: once.
        inverse: ``[N]`` float32, one over the scale, signed.
        levels: Ascending, at most eight.

    Returns:
        ``[N]`` float32 each: level times weight, and squares of levels.

    Raises:
        TypeError: A tensor is not float32 on the CPU.
        ValueError: A tensor has another shape or is not contiguous, or the levels are not such.
    """
    groups = _groups(weights, measure)
    check_floats(inverse, weights.shape[1:], "inverse")
    qw, qq = torch.empty_like(inverse), torch.empty_like(inverse)
    check(
        loaded().moepack_level_sums(
            ctypes.byref(groups),
            ctypes.byref(_levels(levels)),
            inverse.data_ptr(),
            qw.data_ptr(),
            qq.data_ptr(),
        )
    )
    return qw, qq


def best_neighbours(
    weights: Tensor,
    measure: Tensor | None,
    scale: tuple[Tensor, Tensor],
    minimum: tuple[Tensor, Tensor],
    mean: Tensor,
    moves: Sequence[tuple[int, int]],
    *,
    top: int,
    code_top: int,
) -> tuple[Tensor, Tensor]:
    """Stored scales and minima moved to where the sum of squared errors is least.

    Args:
        weights: ``[g, N]`` float32.
        measure: ``[g, N]`` float32, how often each weight counts; None: once.
        scale: ``[N]`` float32 each: whole numbers, and the factors that they lie under.
        minimum: The same of the minima.
        mean: ``[N]`` float32 of each group, if it has been taken from the weights; or zeros.
        moves: Of a scale and a minimum, to try; of equals the first is taken.
        top: The largest code of a weight.
        code_top: The largest of a scale or minimum; the smallest are 1 and 0.

    Returns:
        ``[N]`` float32 scales and minima, whole numbers.

    Raises:
        TypeError: A tensor is not float32 on the CPU.
        ValueError: A tensor has another shape or is not contiguous.
    """
    groups, shape = _groups(weights, measure), weights.shape[1:]
    flat = [number for move in moves for number in move]
    table = (ctypes.c_int8 * len(flat))(*flat)
    tried = Neighbours(
        *(check_floats(part, shape, "scale") for part in scale),
        *(check_floats(part, shape, "minimum") for part in minimum),
        check_floats(mean, shape, "mean"),
        ctypes.addressof(table),
        len(moves),
        top,
        code_top,
    )
    found = torch.empty_like(scale[0]), torch.empty_like(minimum[0])
    addresses = (part.data_ptr() for part in found)
    check(loaded().moepack_best_neighbours(ctypes.byref(groups), ctypes.byref(tried), *addresses))
    return found


def best_moves(
    weights: Tensor,
    measure: Tensor | None,
    scale: tuple[Tensor, Tensor],
    levels: Sequence[float],
    moves: Sequence[int],
    ends: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Stored scales of levels moved to where the sum of squared errors is least.

    Args:
        weights: ``[g, N]`` float32.
        measure: ``[g, N]`` float32, how often each weight counts; None: once.
        scale: ``[N]`` float32 each: whole numbers, and the factors that they lie under.
        levels: Ascending, at most eight.
        moves: To try; of equals the first is taken.
        ends: The lowest and highest whole number.

    Returns:
        ``[N]`` float32 scales, and the sums of ``level_sums`` that they give.

    Raises:
        TypeError: A tensor is not float32 on the CPU.
        ValueError: A tensor has another shape or is not contiguous, or the levels are not such.
    """
    groups, shape = _groups(weights, measure), weights.shape[1:]
    table = (ctypes.c_int8 * len(moves))(*moves)
    tried = Moves(
        *(check_floats(part, shape, "scale") for part in scale),
        ctypes.addressof(table),
        len(moves),
        *ends,
    )
    found = tuple(torch.empty_like(scale[0]) for _ in range(3))
    check(
        loaded().moepack_best_moves(
            ctypes.byref(groups),
            ctypes.byref(_levels(levels)),
            ctypes.byref(tried),
            *(part.data_ptr() for part in found),
        )
    )
    return found[0], found[1], found[2]


def feed_back(
    weights: Tensor,
    upper: Tensor,
    inverse: Tensor,
    step: Tensor,
    codes: Tensor,
    errors: Tensor,
    *,
    minimum: Tensor | None = None,
    top: int = 0,
    levels: Sequence[float] | None = None,
) -> None:
    """Round a group's columns one after the other, each one's error fed to the later ones.

    A code stands for ``code * step - minimum``, or with ``levels`` for ``level * step``.

    Args:
        weights: ``[g, R]`` float32, at most 128 columns.
        upper: ``[g, g]`` float32, each row contiguous: the factor's part for these columns.
        inverse: ``[R]`` float32, one over the step.
        step: ``[R]`` float32; where it is 0 codes are 0.
        codes: ``[g, R]`` uint8, overwritten.
        errors: ``[g, R]`` float32, overwritten: the columns' errors over ``upper[i, i]``.
        minimum: ``[R]`` float32; with ``levels`` there is none.
        top: The largest code; with ``levels`` their number decides.
        levels: Ascending, at most eight.

    Raises:
        TypeError: A tensor has another dtype or is not on the CPU.
        ValueError: A tensor has another shape or is not contiguous.
    """
    size, rows = weights.shape
    if size > MOST_GROUP:
        raise ValueError(f"{size} columns are more than {MOST_GROUP}")
    if codes.dtype is not torch.uint8 or not codes.is_cpu or not codes.is_contiguous():
        raise TypeError("codes must be contiguous uint8 on the CPU")
    if codes.shape != weights.shape or upper.shape != (size, size) or upper.stride(1) != 1:
        raise ValueError("codes and factor must have the shapes of the weights")
    if upper.dtype is not torch.float32 or not upper.is_cpu:
        raise TypeError("the factor must be float32 on the CPU")
    if (minimum is None) == (levels is None):
        raise ValueError("either minima or levels")
    table = None if levels is None else _levels(levels)
    columns = Columns(
        check_floats(weights, (size, rows), "weights"),
        upper.data_ptr(),
        size,
        rows,
        upper.stride(0) if size > 1 else size,
        check_floats(inverse, (rows,), "inverse"),
        check_floats(step, (rows,), "step"),
        None if minimum is None else check_floats(minimum, (rows,), "minimum"),
        top,
        None if table is None else ctypes.addressof(table),
        codes.data_ptr(),
        check_floats(errors, (size, rows), "errors"),
    )
    check(loaded().moepack_feed_back(ctypes.byref(columns)))


def _groups(weights: Tensor, measure: Tensor | None) -> Groups:
    size, count = weights.shape
    return Groups(
        check_floats(weights, (size, count), "weights"),
        None if measure is None else check_floats(measure, (size, count), "measure"),
        size,
        count,
    )


def _grid(weights: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Grid:
    shape = (weights.shape[1],)
    return Grid(check_floats(inverse, shape, "inverse"), check_floats(zero, shape, "zero"), top)


def _levels(levels: Sequence[float]) -> Levels:
    if len(levels) > MOST_LEVELS:
        raise ValueError(f"{len(levels)} levels are more than {MOST_LEVELS}")
    return Levels(len(levels), (ctypes.c_float * MOST_LEVELS)(*levels))
