"""How a scheme stores scales and minima, and what is left of them once it has.

Shape letters: R rows, G groups of a row, S super-groups of a row (256 inputs each, the last one up
to 448 under 4-bit scales), K groups of the longest of them, M = R * S super-groups of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moepack_formats.schemes import SUPER_COLS, Scheme

FLOAT16_SMALLEST = 2.0**-24
FLOAT16_LARGEST = 65504.0

CODE_TOP = 15
"""The largest 4-bit code of a scale or minimum."""


@dataclass(frozen=True)
class Stored:
    """Scales, or minima, as a file holds them.

    Attributes:
        codes: ``[R, G]`` float32 holding exactly what is stored: float16 values, or integers.
        dtype: The dtype of ``codes`` in a file.
        outer: ``[R, 1]`` or ``[R, S]`` float32 factors, or None.
        outer_dtype: The dtype of ``outer`` in a file.
        per_outer: Groups under one outer factor; the last one's are all that are left.
    """

    codes: Tensor
    dtype: torch.dtype
    outer: Tensor | None = None
    outer_dtype: torch.dtype = torch.float16
    per_outer: int = 1

    def values(self) -> Tensor:
        """The effective ``[R, G]`` float32 that a reader computes."""
        return self.codes if self.outer is None else self.codes * self.spread_outer()

    def spread_outer(self) -> Tensor:
        """Each group's outer factor, ``[R, G]``; 1 where there is none."""
        if self.outer is None:
            return torch.ones_like(self.codes)
        return spread(self.outer, self.per_outer, self.codes.shape[1])

    @classmethod
    def concatenate(cls, parts: Sequence[Stored]) -> Stored:
        """Stack the chunks of a matrix."""
        first = parts[0]
        outers = [part.outer for part in parts if part.outer is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            first.dtype,
            torch.cat(outers) if outers else None,
            first.outer_dtype,
            first.per_outer,
        )

    def codes_as_numpy(self) -> npt.NDArray[np.generic]:
        """``[R, G]`` in the file's dtype."""
        return self.codes.to(self.dtype).numpy()

    def outer_as_numpy(self) -> npt.NDArray[np.generic] | None:
        """``[R, 1]`` or ``[R, S]`` in the file's dtype."""
        return None if self.outer is None else self.outer.to(self.outer_dtype).numpy()


def as_float16(values: Tensor) -> Tensor:
    """Round to float16 and back; what float16 cannot hold becomes its largest."""
    return values.clamp(-FLOAT16_LARGEST, FLOAT16_LARGEST).to(torch.float16).to(torch.float32)


def spread(outer: Tensor, each: int, groups: int) -> Tensor:
    """Repeat ``[R, S]`` for the groups under it, the last one for all that are left: ``[R, G]``."""
    rows, count = outer.shape
    found = outer[:, :, None].expand(rows, count, each).reshape(rows, -1)[:, :groups]
    left = groups - count * each
    return torch.cat([found, outer[:, -1:].expand(rows, left)], dim=1) if left > 0 else found


def by_super(values: Tensor, scheme: Scheme) -> Tensor:
    """``[R, G]`` as ``[K, M]``, zeros after the last group of each super-group."""
    each, groups = SUPER_COLS // scheme.group, values.shape[1]
    whole = scheme.spans(groups * scheme.group) * each
    if whole < groups:
        return _with_long_last(values, whole - each, each).t().contiguous()
    if whole > groups:
        values = torch.nn.functional.pad(values, (0, whole - groups))
    return values.reshape(-1, each).t().contiguous()


def _with_long_last(values: Tensor, first: int, each: int) -> Tensor:
    """``[R, G]`` as ``[M, K]``: super-groups of ``each``, from ``first`` on one of all the rest."""
    rows, groups = values.shape
    found = values.new_zeros((rows, first // each + 1, groups - first))
    found[:, :-1, :each] = values[:, :first].view(rows, first // each, each)
    found[:, -1] = values[:, first:]
    return found.view(-1, groups - first)


def by_row(grouped: Tensor, scheme: Scheme, groups: int) -> Tensor:
    """Undo ``by_super``: from ``[K, M]`` to ``[R, G]``."""
    each, count = SUPER_COLS // scheme.group, scheme.spans(groups * scheme.group)
    values = grouped.t().reshape(-1, count, len(grouped))
    if len(grouped) > each:
        values = torch.cat([values[:, :-1, :each].flatten(1), values[:, -1]], dim=1)
    return values.flatten(1)[:, :groups].contiguous()


def store_scales(scheme: Scheme, steps: Tensor, shares: Sequence[float] = (1.0,)) -> Stored:
    """Round steps to what the scheme can store.

    Args:
        scheme: A quantized scheme.
        steps: ``[R, G]`` float32, 0 or more.
        shares: Super-scales to try, as shares of the smallest that clips nothing; for 4-bit scales.
    """
    if scheme.scale_bits == 16:
        # A step that is there at all must not vanish: its codes would say nothing.
        smallest = steps.sign() * FLOAT16_SMALLEST
        return Stored(torch.maximum(as_float16(steps), smallest), torch.float16)
    if scheme.scale_bits == 8:
        outer = steps.amax(dim=1, keepdim=True) / 255
        codes = _quotient(steps, outer).clamp_(max=255)
        codes = torch.maximum(codes, steps.sign())
        return Stored(codes, torch.uint8, outer, torch.float32, steps.shape[1])
    # From 1: a group whose step rounds to 0 does better with codes than without.
    codes, outer = _under_super_scales(scheme, steps, shares, lowest=1)
    return Stored(codes, torch.uint8, outer, per_outer=SUPER_COLS // scheme.group)


def store_minima(
    scheme: Scheme, minima: Tensor, negative: Tensor | None = None, shares: Sequence[float] = (1.0,)
) -> Stored:
    """Round minima to what the scheme can store.

    Args:
        scheme: A quantized scheme.
        minima: ``[R, G]`` float32.
        negative: ``[R, S]`` bool, super-groups with a negative super-minimum, as
            ``negative_minima`` finds them; for 4-bit scales.
        shares: As in ``store_scales``.
    """
    if scheme.scale_bits == 16:
        return Stored(as_float16(minima), torch.float16)
    if scheme.scale_bits == 8:
        outer = minima.abs().amax(dim=1, keepdim=True) / 127
        codes = _quotient(minima, outer).clamp_(-127, 127)
        return Stored(codes, torch.int8, outer, torch.float32, minima.shape[1])
    if negative is None:
        negative = negative_minima(scheme, minima)
    sign = 1.0 - 2.0 * negative  # [R, S]
    signed = spread(sign, SUPER_COLS // scheme.group, minima.shape[1])
    codes, outer = _under_super_scales(scheme, (minima * signed).clamp_(min=0), shares, lowest=0)
    return Stored(codes, torch.uint8, outer * sign, per_outer=SUPER_COLS // scheme.group)


def negative_minima(scheme: Scheme, minima: Tensor) -> Tensor:
    """Super-groups ``[R, S]`` that lose less with a negative super-minimum than with a positive.

    All minima under one super-minimum have its sign; one of the other sign is stored as 0.
    """
    grouped = by_super(minima, scheme)
    lost_if_positive = grouped.clamp(max=0).square_().sum(dim=0)
    lost_if_negative = grouped.clamp(min=0).square_().sum(dim=0)
    return (lost_if_negative < lost_if_positive).view(len(minima), -1)


def _under_super_scales(
    scheme: Scheme, values: Tensor, shares: Sequence[float], lowest: int
) -> tuple[Tensor, Tensor]:
    """4-bit codes ``[R, G]`` of values that are 0 or more, under the best float16 ``[R, S]``."""
    rows, groups = values.shape
    grouped = by_super(values, scheme)  # [K, M]
    largest = grouped.amax(dim=0) / CODE_TOP
    smallest = largest.sign() * FLOAT16_SMALLEST
    outers = torch.stack(  # [tried, M]
        [torch.maximum(as_float16(largest * share), smallest) for share in shares]
    )

    def lost(outer: Tensor) -> Tensor:
        codes = _quotient(grouped, outer).clamp_(lowest, CODE_TOP)
        return codes.mul_(outer).sub_(grouped).square_().sum(dim=0)

    outer = outers[0]
    if len(outers) > 1:
        best = torch.stack([lost(outer) for outer in outers]).argmin(dim=0)
        outer = outers.gather(0, best[None])[0]
    codes = _quotient(grouped, outer).clamp_(lowest, CODE_TOP)
    return by_row(codes, scheme, groups), outer.view(rows, -1)


def _quotient(values: Tensor, divisor: Tensor) -> Tensor:
    """Rounded quotients; 0 where the divisor is 0, as the values then are."""
    return (values / divisor).nan_to_num_(nan=0.0).round_()
