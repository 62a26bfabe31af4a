"""Rounding a group's columns one after the other, for error feedback: both kinds of grid.

Shape letters: R rows, S cols of a span, g of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moepack_formats.schemes import Scheme
from moepack_runtime.kernels import native_solver as native

from . import hqq, signed
from .grid import GroupedRows, Groups, invert
from .signed import SignedPanel, SignedRows
from .storage import Stored
from .superscale import NEIGHBOURS, best_neighbour
from .walk import Fit


@dataclass(frozen=True)
class Rounding:
    """What a group's columns are rounded to: ``[R]`` float32 each.

    Attributes:
        step: Scale of each row; codes of a step of 0 are 0.
        inverse: One over it, large and finite for 0.
        minimum: A code stands for ``code * step - minimum``; None with levels.
        top: The largest code.
        levels: What codes stand for, in steps; None with minima.
    """

    step: Tensor
    inverse: Tensor
    minimum: Tensor | None
    top: int
    levels: Sequence[float] | None = None

    def feed_back(self, weights: Tensor, upper: Tensor, codes: Tensor, errors: Tensor) -> None:
        """Round the columns one after the other, the error of each fed to those after it.

        Args:
            weights: ``[g, R]`` float32; may be overwritten.
            upper: ``[g, g]`` float32, the part of the factor that these columns have.
            codes: ``[g, R]`` uint8, overwritten.
            errors: ``[g, R]`` float32, overwritten: what is to be fed to later groups.
        """
        if native.available():
            native.feed_back(
                weights,
                upper,
                self.inverse,
                self.step,
                codes,
                errors,
                minimum=self.minimum,
                top=self.top,
                levels=self.levels,
            )
            return
        for i, column in enumerate(weights):
            codes[i], value = self._round(column)
            errors[i] = (column - value).div_(upper[i, i])
            weights[i + 1 :] -= upper[i, i + 1 :, None] * errors[i]

    def _round(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to a column, ``[R]`` each."""
        if self.levels is not None:
            table = torch.tensor(self.levels, dtype=torch.float32)
            middles = (table[:-1] + table[1:]) / 2
            code = torch.bucketize(column * self.inverse, middles, right=True)
            code *= self.step != 0
            return code, table[code] * self.step
        if self.minimum is None:
            raise ValueError("neither minima nor levels")
        code = ((column + self.minimum) * self.inverse).round_().clamp_(0, self.top)
        code *= self.step != 0
        return code, code * self.step - self.minimum


class SpanGrid(Protocol):
    """The scales of a span's rows."""

    def start_group(self, index: int, weights: Tensor, importance: Tensor) -> Rounding:
        """Go to a group: move its stored scale and minimum to better neighbours.

        Args:
            index: Its number in the span.
            weights: ``[g, R]`` what feedback has left of its weights.
            importance: ``[g]``.
        """
        ...

    def fit(self) -> Fit:
        """Scales and minima as they will be stored."""
        ...


def span_grid(block: Tensor, scheme: Scheme, importance: Tensor) -> SpanGrid:
    """Choose scales for a span.

    Args:
        block: ``[S, R]`` float32 weights.
        scheme: A quantized scheme.
        importance: ``[S]``.
    """
    if scheme.levels:
        rows = SignedRows(block.t(), scheme, importance)
        return _SignedGrid(scheme, signed.solve(rows, scheme))
    scales, minima = hqq.solve(GroupedRows(block.t(), scheme.group, importance), scheme)
    return _GridWithMinima(scheme, scales, minima)


class _GridWithMinima:
    def __init__(self, scheme: Scheme, scales: Stored, minima: Stored) -> None:
        self._scheme, self._scales, self._minima = scheme, scales, minima

    def start_group(self, index: int, weights: Tensor, importance: Tensor) -> Rounding:
        scales, minima, top = self._scales, self._minima, (1 << self._scheme.bits) - 1
        if self._scheme.scale_bits == 4:
            scales.codes[:, index], minima.codes[:, index] = best_neighbour(
                Groups(weights, importance[:, None].expand_as(weights).contiguous()),
                torch.zeros_like(weights[0]),
                *_of_group(scales, index),
                *_of_group(minima, index),
                neighbours=NEIGHBOURS,
                top=top,
            )
        step = scales.values()[:, index].contiguous()
        return Rounding(step, invert(step), minima.values()[:, index].contiguous(), top)

    def fit(self) -> Fit:
        return self._scales, self._minima


class _SignedGrid:
    def __init__(self, scheme: Scheme, scales: Stored) -> None:
        self._levels, self._scales = scheme.levels, scales

    def start_group(self, index: int, weights: Tensor, importance: Tensor) -> Rounding:
        panel = SignedPanel(weights.t(), len(weights), self._levels, importance)
        code, outer = _of_group(self._scales, index)
        moved, _, _ = panel.best_move(code, outer, signed.QUICK.moves)
        self._scales.codes[:, index] = moved
        scale = self._scales.values()[:, index].contiguous()
        top = len(self._levels) - 1
        return Rounding(scale, signed.invert(scale), None, top, self._levels)

    def fit(self) -> Fit:
        return self._scales, None


def _of_group(stored: Stored, index: int) -> tuple[Tensor, Tensor]:
    """What is stored for a group of every row, and the factors it lies under: ``[R]`` each."""
    return stored.codes[:, index], stored.spread_outer()[:, index]
