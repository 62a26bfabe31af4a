"""What every quantizer of our own shares: groups of weights, and codes that have a minimum.

A matrix is worked on some rows at a time. In a chunk the groups lie side by side, one group to a
column, so that a sum over a group adds whole vectors and every pass stays in the cache.

Shape letters: R rows of a chunk, C cols (inputs), g weights in a group, G groups of a row,
N = R * G groups of a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moepack_runtime.kernels import native_solver as native

from .storage import Stored

P = TypeVar("P")

MINIMUM_TURNS = 2
"""Turns of codes and minima once the scales are final."""

MOST_STRETCH = 1.5
"""Of groups that are hardly described by their codes, most of the power is one outlier's."""

_SMALLEST_SUM = 1e-37
_SMALLEST_STEP = 1e-30  # Below it 1 / step is no longer finite; float16 ends at 6e-8.


@dataclass(frozen=True)
class Moments:
    """Sums over each group, ``q`` its codes and ``w`` its centred weights: ``[N]`` each."""

    q: Tensor
    qq: Tensor
    qw: Tensor


class Groups:
    """Weights of groups of one size, one group to a column, and sums over their codes.

    Args:
        weights: ``[g, N]`` float32.
        measure: ``[g, N]`` float32, how often each weight counts; None: once.

    Attributes:
        size: g.
        weights: As given.
        measure: As given.
    """

    def __init__(self, weights: Tensor, measure: Tensor | None) -> None:
        self.size = len(weights)
        self.weights, self.measure = weights, measure
        self._room: Tensor | None = None

    @property
    def _product(self) -> Tensor:
        """Room ``[g, N]`` for a step of the sums."""
        if self._room is None:
            self._room = torch.empty_like(self.weights)
        return self._room

    def codes(self, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
        """The nearest code, 0 to ``top``, of every weight: ``[g, N]`` float32.

        Args:
            inverse: ``[N]`` one over the step, as ``invert`` gives it.
            zero: ``[N]`` the code, a fraction, that stands for the group's mean.
            top: The largest code.
        """
        return (self.weights * inverse).add_(zero).round_().clamp_(0, top)

    def code_sum(self, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
        """Sum ``[N]`` of these codes."""
        if native.available():
            grid = inverse, zero, top
            (total,) = native.code_sums(self.weights, self.measure, *grid, squares=False)
            return total
        return self.total(self.codes(inverse, zero, top))

    def moments(self, inverse: Tensor, zero: Tensor, top: int) -> Moments:
        """Sums of these codes, for fitting step and zero point to them."""
        if native.available():
            return Moments(*native.code_sums(self.weights, self.measure, inverse, zero, top))
        codes = self.codes(inverse, zero, top)
        q, qq = self.total(codes), self._sum_product(codes, codes)
        return Moments(q, qq, self._sum_product(codes, self.weights))

    def squared_steps(self, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
        """Sum ``[N]`` of the squared errors of these codes, in steps."""
        if native.available():
            return native.squared_steps(self.weights, self.measure, inverse, zero, top)
        wanted = (self.weights * inverse).add_(zero)
        residual = wanted.sub_(torch.round(wanted, out=self._product).clamp_(0, top))
        return self._sum_product(residual, residual)

    def total(self, values: Tensor) -> Tensor:
        """Sum ``[N]`` of ``[g, N]`` values over each group."""
        if self.measure is None:
            return values.sum(dim=0)
        return torch.mul(values, self.measure, out=self._product).sum(dim=0)

    def _sum_product(self, left: Tensor, right: Tensor) -> Tensor:
        product = torch.mul(left, right, out=self._product)
        if self.measure is not None:
            product *= self.measure
        return product.sum(dim=0)


class Panel(Groups):
    """Groups of rows.

    The weights are centred on their group's mean: sums of squares then lose nothing to
    cancellation, and the sum of a group's weights is zero.

    With an importance, every sum and mean here and in ``Moments`` counts a weight as often as it,
    or its input, is important, relative to the others of its group; so what is fitted to the sums
    is fitted to what is important, and no formula changes.

    Args:
        rows: ``[R, G * g]`` weights of any float dtype.
        group: Weights in a group, g.
        importance: ``[G * g]`` float32 of the inputs or ``[R, G * g]`` of the weights, above 0;
            None: all the same.

    Attributes:
        size: g.
        weights: ``[g, N]`` float32, less ``mean``.
        mean: ``[N]`` float32.
        low: ``[N]`` smallest centred weight.
        high: ``[N]`` largest centred weight.
        power: ``[N]`` sum of the squares of the centred weights.
        measure: ``[g, N]`` float32 importance, of mean 1 in each group; None: 1 everywhere.
        emphasis: ``[N]`` float32 mean importance of each group; 1 without an importance.
    """

    def __init__(self, rows: Tensor, group: int, importance: Tensor | None = None) -> None:
        by_group = rows.reshape(-1, group).t()
        super().__init__(torch.empty(by_group.shape, dtype=torch.float32).copy_(by_group), None)
        self.emphasis = torch.ones(())
        if importance is not None:
            grouped = importance.reshape(-1, group).t()  # [g, G] or [g, N]
            grouped = grouped.clone(memory_format=torch.contiguous_format)
            emphasis = grouped.mean(dim=0)
            grouped /= emphasis
            repeats = by_group.shape[1] // len(emphasis)
            self.emphasis = emphasis.repeat(repeats)
            self.measure = grouped if repeats == 1 else grouped.repeat(1, repeats)
        self.mean = self.total(self.weights) / group
        self.weights -= self.mean
        self.low = self.weights.amin(dim=0)
        self.high = self.weights.amax(dim=0)
        self.power = self._sum_product(self.weights, self.weights)


class RowGroups(Generic[P]):
    """Rows of a matrix cut into groups; a short last group of a row is a panel of its own.

    Padding the short group would let the padding take part in the fit.

    Args:
        rows: ``[R, C]`` weights of any float dtype.
        group: Weights in a group.
        panel: Makes a panel of some columns, of the groups' size and of their importance.
        importance: ``[C]`` float32 of the inputs or ``[R, C]`` of the weights, above 0; None: all
            the same.

    Attributes:
        panels: The full groups of all rows, then the short last groups, as far as there are any.
    """

    def __init__(
        self,
        rows: Tensor,
        group: int,
        panel: Callable[[Tensor, int, Tensor | None], P],
        importance: Tensor | None = None,
    ) -> None:
        self._rows, cols = rows.shape
        self._full, short = divmod(cols, group)
        self.panels: list[P] = []
        for part, size in (
            (slice(0, self._full * group), group),
            (slice(self._full * group, cols), short),
        ):
            if size and part.start < part.stop:
                chosen = None if importance is None else importance[..., part]
                self.panels.append(panel(rows[:, part], size, chosen))

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut ``[R, G]`` values into ``[N]`` for each panel."""
        if len(self.panels) == 1:
            return [values.reshape(-1)]
        return [values[:, : self._full].reshape(-1), values[:, self._full :].reshape(-1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put ``[N]`` values of each panel together: ``[R, G]``."""
        by_row = [part.view(self._rows, -1) for part in parts]
        return by_row[0] if len(by_row) == 1 else torch.cat(by_row, dim=1)

    def gather(self, value: Callable[[P], Tensor]) -> Tensor:
        """One value per group, ``[R, G]``, from a function of a panel."""
        return self.join([value(panel) for panel in self.panels])

    def write(self, out: Tensor, codes: Iterable[Tensor]) -> None:
        """Put the ``[g, N]`` codes of each panel into the rows they are of: ``[R, C]`` uint8."""
        start = 0
        for part in codes:
            by_row = part.t().reshape(self._rows, -1)
            out[:, start : start + by_row.shape[1]].copy_(by_row)
            start += by_row.shape[1]


class GroupedRows(RowGroups[Panel]):
    """Rows of a matrix cut into groups that have a scale and a minimum.

    Args:
        rows: ``[R, C]`` weights of any float dtype.
        group: Weights in a group.
        importance: ``[C]`` float32 of the inputs or ``[R, C]`` of the weights, above 0; None: all
            the same.
    """

    def __init__(self, rows: Tensor, group: int, importance: Tensor | None = None) -> None:
        super().__init__(rows, group, Panel, importance)

    def grids(self, scales: Tensor, minima: Tensor) -> Iterator[tuple[Panel, Tensor, Tensor]]:
        """Each panel with the inverse and the zero point of these ``[R, G]`` scales and minima."""
        for panel, step, minimum in zip(
            self.panels, self.split(scales), self.split(minima), strict=True
        ):
            inverse = invert(step)
            yield panel, inverse, (minimum + panel.mean) * inverse

    def write_codes(self, scales: Stored, minima: Stored, top: int, out: Tensor) -> None:
        """Encode for the values that the reader will see.

        Args:
            scales: As stored.
            minima: As stored.
            top: The largest code.
            out: ``[R, C]`` uint8, overwritten.
        """
        effective = scales.values()
        grids = zip(self.grids(effective, minima.values()), self.split(effective), strict=True)
        # Codes of a step of 0 say nothing; keep them 0.
        self.write(
            out,
            (
                panel.codes(inverse, zero, top).mul_(step.sign())
                for (panel, inverse, zero), step in grids
            ),
        )


def invert(step: Tensor) -> Tensor:
    """One over each step; large and finite for a step of 0, whatever the codes then are."""
    return step.clamp(min=_SMALLEST_STEP).reciprocal_()


def size_lost(power: Tensor, explained: Tensor) -> Tensor:
    """By how much to stretch values that came out smaller than the weights they stand for.

    Args:
        power: Sums of the squared weights.
        explained: Sums of weight times value, shaped alike.
    """
    lost = power.clamp(min=_SMALLEST_SUM) / explained.clamp(min=_SMALLEST_SUM)
    return lost.clamp_(1.0, MOST_STRETCH)


def take_better(best: Tensor, error: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Where ``error`` is below ``best``, take it and the second of each pair; in place.

    Blending by ones and zeros is exact, and many times faster than torch's work with booleans.

    Args:
        best: ``[N]`` least errors so far.
        error: ``[N]``.
        pairs: What belongs to ``best`` and to ``error``, ``[N]`` each, all finite.
    """
    better = torch.lt(error, best, out=torch.empty_like(best))
    for kept, found in pairs:
        kept.lerp_(found, better)
    torch.minimum(best, error, out=best)


def refit_minima(rows: GroupedRows, scales: Tensor, minima: Tensor, top: int) -> Tensor:
    """Minima ``[R, G]`` that suit these stored scales, after some turns with the codes."""
    found = []
    for panel, step, minimum in zip(
        rows.panels, rows.split(scales), rows.split(minima), strict=True
    ):
        inverse = invert(step)
        zero = (minimum + panel.mean) * inverse
        for _ in range(MINIMUM_TURNS):
            zero = panel.code_sum(inverse, zero, top) / panel.size
        found.append(zero * step - panel.mean)
    return rows.join(found)
