"""Codes of one column at a time, for error feedback: both kinds of grid.

Shape letters: R rows, S cols of a span, g of a group.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moepack_formats.schemes import Scheme

from . import hqq, signed
from .grid import GroupedRows, Panel, invert
from .signed import SignedPanel, SignedRows, best_move
from .storage import Stored
from .superscale import NEIGHBOURS, best_neighbour
from .walk import Fit


class SpanGrid(Protocol):
    """The scales of a span's rows, and how its columns are rounded to them."""

    def start_group(self, index: int, weights: Tensor, importance: Tensor) -> None:
        """Go to a group, and move its stored scale and minimum to better neighbours.

        Args:
            index: Its number in the span.
            weights: ``[g, R]`` what feedback has left of its weights.
            importance: ``[g]``.
        """
        ...

    def round(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[R]`` and values ``[R]`` nearest to a column of the present group."""
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
        self._top = (1 << scheme.bits) - 1

    def start_group(self, index: int, weights: Tensor, importance: Tensor) -> None:
        scales, minima = self._scales, self._minima
        if self._scheme.scale_bits == 4:
            scales.codes[:, index], minima.codes[:, index] = best_neighbour(
                Panel(weights.t(), len(weights), importance),
                scales.codes[:, index],
                scales.spread_outer()[:, index],
                minima.codes[:, index],
                minima.spread_outer()[:, index],
                neighbours=NEIGHBOURS,
                top=self._top,
            )
        self._step, self._minimum = scales.values()[:, index], minima.values()[:, index]
        self._inverse, self._sign = invert(self._step), self._step.sign()

    def round(self, column: Tensor) -> tuple[Tensor, Tensor]:
        code = ((column + self._minimum) * self._inverse).round_().clamp_(0, self._top)
        code.mul_(self._sign)
        return code, code * self._step - self._minimum

    def fit(self) -> Fit:
        return self._scales, self._minima


class _SignedGrid:
    def __init__(self, scheme: Scheme, scales: Stored) -> None:
        self._levels, self._scales = scheme.levels, scales
        self._table = torch.tensor(self._levels, dtype=torch.float32)
        self._middles = (self._table[:-1] + self._table[1:]) / 2

    def start_group(self, index: int, weights: Tensor, importance: Tensor) -> None:
        panel = SignedPanel(weights.t(), len(weights), self._levels, importance)
        code, outer = self._scales.codes[:, index], self._scales.spread_outer()[:, index]
        moved, _, _ = best_move(panel, code, outer, signed.QUICK.moves)
        self._scales.codes[:, index] = moved
        self._scale = self._scales.values()[:, index]
        self._inverse, self._present = signed.invert(self._scale), (self._scale != 0).long()

    def round(self, column: Tensor) -> tuple[Tensor, Tensor]:
        # Of a single column, starting an operation takes longer than its work: not ``Encoder``.
        code = torch.bucketize(column * self._inverse, self._middles, right=True)
        code.mul_(self._present)
        return code, self._table[code] * self._scale

    def fit(self) -> Fit:
        return self._scales, None
