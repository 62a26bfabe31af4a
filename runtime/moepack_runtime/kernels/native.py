"""Calls of the native library, with arguments that were checked first.

Packed bytes may start at any address; float buffers are contiguous float32. ``ctypes`` releases
the GIL during a call.

Shape letters: T tokens, K experts of a token, H hidden size.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from moepack_formats.schemes import SCHEMES, TILE_ROWS, Scheme

from .native_buffers import check_bytes, check_floats
from .native_experts import FusedExperts
from .native_interface import ACTIVATION_KINDS, SCHEME_NUMBERS, ExpertsLayer
from .native_library import available, check, library, loaded, set_isa, why_not

__all__ = [
    "ACTIVATION_KINDS",
    "SCHEME_NUMBERS",
    "ExpertsLayer",
    "FusedExperts",
    "available",
    "decode",
    "library",
    "linear",
    "play",
    "read_memory",
    "set_isa",
    "start_threads",
    "sum_rows",
    "why_not",
]


def start_threads(threads: int) -> int:
    """Start the threads that compute.

    Returns:
        How many there are, this one among them: fewer where the system refuses.
    """
    return int(loaded().moepack_start_threads(threads))


def read_memory(data: Tensor, threads: int) -> None:
    """Read every byte of a tensor once: what the bandwidth of memory is measured with."""
    loaded().moepack_read(data.data_ptr(), data.numel() * data.element_size(), threads)


def linear(
    x: Tensor,
    packed: Tensor,
    scheme: Scheme,
    shape: tuple[int, int],
    bias: Tensor | None,
    *,
    int8: bool,
    threads: int,
) -> Tensor:
    """Multiply a few tokens with a packed matrix.

    Args:
        x: ``[T, cols]`` float32.
        packed: At least ``scheme.packed_nbytes(*shape)`` uint8.
        scheme: How it is packed.
        shape: True ``(rows, cols)``.
        bias: ``[rows]`` float32 or None.
        int8: Whether activations are rounded to 8 bits; raw schemes never do.
        threads: How many to use.

    Returns:
        ``[T, rows]`` float32.

    Raises:
        FormatError: The packed bytes are too short.
        TypeError: A tensor has another dtype or is not on the CPU.
        ValueError: A tensor has another shape or is not contiguous.
    """
    rows, cols = shape
    tokens = x.shape[0]
    check_bytes(packed, _packed_nbytes(scheme.name, rows, cols), scheme.name)
    x_address = check_floats(x, (tokens, cols), "x")
    bias_address = None if bias is None else check_floats(bias, (rows,), "bias")
    y = torch.empty(tokens, rows, dtype=torch.float32)
    check(
        loaded().moepack_linear(
            SCHEME_NUMBERS[scheme.name],
            packed.data_ptr(),
            packed.numel(),
            rows,
            cols,
            x_address,
            tokens,
            bias_address,
            y.data_ptr(),
            int8,
            threads,
        )
    )
    return y


def decode(
    packed: Tensor,
    scheme: Scheme,
    cols: int,
    rows: int,
    dtype: torch.dtype,
    *,
    tiles: Tensor | None = None,
    threads: int,
) -> Tensor:
    """Decode tiles to dense rows, to the same bits as the reference.

    Args:
        packed: The packed matrix, uint8.
        scheme: How it is packed.
        cols: True inputs of a row.
        rows: Rows wanted, counted from the first decoded tile; the last tile may be cut.
        dtype: float32 or bfloat16, others by way of float32.
        tiles: Indices of the tiles, int64 on the CPU; None for all from the first.
        threads: How many to use.

    Returns:
        ``[rows, cols]``.

    Raises:
        FormatError: The packed bytes are too short for a tile that was asked for.
        TypeError: A tensor has another dtype or is not on the CPU.
        ValueError: More rows are wanted than the tiles hold, or a tensor is not contiguous.
    """
    if tiles is not None and (tiles.dtype != torch.int64 or not tiles.is_contiguous()):
        raise TypeError("tile indices must be contiguous int64")
    count = -(-rows // TILE_ROWS) if tiles is None else len(tiles)
    if rows > count * TILE_ROWS:
        raise ValueError(f"{rows} rows are more than {count} tiles hold")
    if rows == 0:
        return torch.empty(0, cols, dtype=dtype)
    first, last = (0, count - 1) if tiles is None else (int(tiles.min()), int(tiles.max()))
    if first < 0:
        raise ValueError(f"negative tile index {first}")
    check_bytes(packed, (last + 1) * scheme.tile_nbytes(cols), scheme.name)
    exact = dtype in (torch.float32, torch.bfloat16)
    out = torch.empty(rows, cols, dtype=dtype if exact else torch.float32)
    check(
        loaded().moepack_decode(
            SCHEME_NUMBERS[scheme.name],
            packed.data_ptr(),
            packed.numel(),
            cols,
            None if tiles is None else tiles.data_ptr(),
            count,
            rows,
            int(dtype == torch.bfloat16),
            out.data_ptr(),
            threads,
        )
    )
    return out if exact else out.to(dtype)


def play(
    steps: ctypes.Array[Any],
    begin: int,
    end: int,
    int8: bool,
    threads: int,
    seconds: ctypes.Array[ctypes.c_double] | None = None,
) -> int:
    """Run steps of a tape; see ``moepack_tape_run`` in csrc/moepack.h.

    Args:
        steps: The tape.
        begin: The first step to run.
        end: The step to stop before.
        int8: Whether activations are rounded to 8 bits.
        threads: Threads that compute.
        seconds: One for each step, to which the step's time is added.

    Returns:
        The first step that was not done, ``end`` when all were.
    """
    at = int(loaded().moepack_tape_run(steps, begin, end, int8, threads, seconds))
    if at < begin:
        raise ValueError("the native library refused a tape")
    return at


def sum_rows(rows: Tensor, threads: int) -> Tensor:
    """Sum ``[T, K, H]`` float32 over K, one row after the other, to ``[T, H]``."""
    tokens, count, width = rows.shape
    address = check_floats(rows, (tokens, count, width), "rows")
    y = rows.new_empty(tokens, width)
    check(loaded().moepack_sum_rows(address, tokens, count, width, y.data_ptr(), threads))
    return y


@functools.cache
def _packed_nbytes(scheme: str, rows: int, cols: int) -> int:
    return SCHEMES[scheme].packed_nbytes(rows, cols)
