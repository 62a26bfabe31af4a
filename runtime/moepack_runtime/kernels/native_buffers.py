"""Checks of what native calls read and write, before the call."""

from __future__ import annotations

import torch
from torch import Tensor

from moepack_formats.errors import FormatError


def check_bytes(packed: Tensor, wanted: int, where: str) -> None:
    """Check that packed bytes are on the CPU, in a row, and at least as many as wanted."""
    if packed.dtype is not torch.uint8 or not packed.is_cpu:
        raise TypeError(f"packed bytes must be uint8 on the CPU, not {packed.dtype}")
    if not packed.is_contiguous():
        raise ValueError("packed bytes must be contiguous")
    size = packed.numel()
    if size < wanted:
        raise FormatError("packed bytes are too short", where=where, wanted=wanted, got=size)


def check_floats(values: Tensor, shape: tuple[int, ...], name: str) -> int:
    """Check contiguous float32 of a shape, and return the address."""
    if values.dtype is not torch.float32 or not values.is_cpu:
        raise TypeError(f"{name} must be float32 on the CPU, not {values.dtype}")
    if values.shape != shape or not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous {list(shape)}, not {list(values.shape)}")
    address = values.data_ptr()
    if address % 4:
        raise ValueError(f"{name} does not start at a multiple of 4 bytes")
    return address


def check_rows(rows: Tensor, count: int, limit: int, name: str) -> None:
    """Check ``[count]`` indices of rows, each below a limit."""
    if rows.dtype is not torch.int64 or not rows.is_cpu or not rows.is_contiguous():
        raise TypeError(f"{name} must be contiguous int64 on the CPU")
    if rows.shape != (count,) or (count and not 0 <= int(rows.min()) <= int(rows.max()) < limit):
        raise ValueError(f"{name} must be [{count}] rows below {limit}")
