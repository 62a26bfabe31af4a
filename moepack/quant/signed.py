"""Grids without minima: fixed levels times a signed scale, chosen together with its storage.

Of a group only the scale is free. For given codes the best one is ``sum(level * w)`` over
``sum(level^2)``, and the power it explains is itself times the former sum: so starts are compared
without looking at a single residual. A grid of levels reaches farther on one side than on the
other; a negative scale turns it round, and both are tried.

Scales are stored as five bits under a float16 super-scale. Neighbours of the rounded scale are
tried on the weights themselves, the super-scale is refitted to what was chosen, and stretched to
full size as ``hqq`` explains.

Shape letters: R rows, C cols (inputs), g weights in a group, G groups of a row, N groups of a
panel, S super-groups (256 inputs) of a row, M = R * S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moepack_formats.schemes import SUPER_COLS, Scheme
from moepack_runtime.kernels import native_solver as native

from .grid import RowGroups, size_lost, take_better
from .storage import FLOAT16_SMALLEST, Stored, as_float16, by_row, by_super

LOWEST, HIGHEST = -16, 15
"""Of a stored scale."""

_FINEST = 2
"""Thresholds between whole levels lie at halves."""
_MIDDLE = 64
"""Added before cutting off the fraction, which rounds down only what is positive."""
_FARTHEST = 127
_SMALLEST_SCALE = 1e-30
_SMALLEST_SUM = 1e-37


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        starts: Levels, or numbers beside them, that a group's largest weight is put at.
        refits: Turns of codes and scale after the best start.
        shares: Super-scales to try, as shares of the one that puts the largest scale at -16.
        moves: Moves of a stored scale to try, the first being 0.
        rounds: Rounds of moves and super-scales.
    """

    starts: Sequence[float]
    refits: int
    shares: Sequence[float]
    moves: Sequence[int]
    rounds: int


QUICK = Effort(
    starts=(-18.0, -20.5, -16.5, 13.0, 15.0, -14.5),
    refits=2,
    shares=(1.0, 1.06, 1.03, 0.97, 0.94),
    moves=(0, -1, 1),
    rounds=1,
)


class Encoder:
    """Finds the nearest level of every weight.

    Comparing bytes with each threshold in turn is many times faster than looking levels up.

    Args:
        levels: What each code stands for, ascending integers of at most 31 in size.
        shape: Of the weights, ``[..., N]``; room for them is kept.
    """

    def __init__(self, levels: Sequence[int], shape: Sequence[int]) -> None:
        self._lowest = levels[0]
        self._rises = [
            (_FINEST * (lower + upper) // 2 + _MIDDLE - 1, upper - lower)
            for lower, upper in pairwise(levels)
        ]
        self._scaled = torch.empty(shape, dtype=torch.float32)
        self._places = torch.empty(shape, dtype=torch.int8)
        self._above = torch.empty_like(self._places)
        self._sum = torch.empty_like(self._places)

    def levels(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The nearest levels, int8; overwritten by the next call.

        Args:
            weights: ``[..., N]`` float32.
            scale: ``[N]``, signed.
        """
        self._place(weights, scale)
        total = self._sum.fill_(self._lowest)
        for below, rise in self._rises:
            total.add_(torch.gt(self._places, below, out=self._above), alpha=rise)
        return total

    def codes(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The codes of these levels, 0 where the scale is 0, int8; overwritten likewise."""
        self._place(weights, scale)
        total = self._sum.zero_()
        for below, _ in self._rises:
            total.add_(torch.gt(self._places, below, out=self._above))
        return total.mul_(scale.abs().sign().to(torch.int8))

    def _place(self, weights: Tensor, scale: Tensor) -> None:
        """Weights in halves of a scale, 0 in the middle of the positive bytes."""
        inverse = invert(scale).mul_(_FINEST)
        scaled = torch.mul(weights, inverse, out=self._scaled)
        self._places.copy_(scaled.add_(_MIDDLE).clamp_(0, _FARTHEST))


class SignedPanel:
    """Groups of one size, one to a column.

    Args:
        rows: ``[R, G * g]`` weights of any float dtype.
        group: Weights in a group, g.
        levels: What each code stands for.
        importance: ``[G * g]`` float32 of the inputs or ``[R, G * g]`` of the weights, above 0;
            None: all the same.

    Attributes:
        size: g.
        weights: ``[g, N]`` float32.
        extreme: ``[N]`` the largest weight of each group, with its sign.
        power: ``[N]`` sum of the squares of the weights, each counted by importance.
    """

    def __init__(
        self, rows: Tensor, group: int, levels: Sequence[int], importance: Tensor | None = None
    ) -> None:
        by_group = rows.reshape(-1, group).t()
        self.size = group
        self.weights = torch.empty(by_group.shape, dtype=torch.float32).copy_(by_group)
        low, high = self.weights.amin(dim=0), self.weights.amax(dim=0)
        self.extreme = torch.where(-low > high, low, high)
        self._levels = levels
        self._encoder: Encoder | None = None
        self._measure: Tensor | None = None
        self._counted = self.weights
        if importance is not None:
            measure = importance.reshape(-1, group).t()  # [g, G] or [g, N]
            self._measure = measure.repeat(1, len(self.extreme) // measure.shape[1]).contiguous()
            self._counted = self.weights * self._measure
        self.power = (self.weights * self._counted).sum(dim=0)

    def moments(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Encode for a scale, and sum up.

        Args:
            scale: ``[N]``, signed.

        Returns:
            ``[N]`` sums of level times weight, and of the squares of levels.
        """
        if native.available():
            return native.level_sums(self.weights, self._measure, invert(scale), self._levels)
        levels = self._levels_of_weights().levels(self.weights, scale).to(torch.float32)
        qw = (levels * self._counted).sum(dim=0)
        squares = levels.mul_(levels)
        if self._measure is not None:
            squares *= self._measure
        return qw, squares.sum(dim=0)

    def codes(self, scale: Tensor) -> Tensor:
        """The nearest code of every weight, ``[g, N]`` int8; 0 where the scale is 0."""
        return self._levels_of_weights().codes(self.weights, scale)

    def best_move(
        self, code: Tensor, outer: Tensor, moves: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stored scales with the least squared error, and the moments that they give.

        Args:
            code: ``[N]`` stored scales at present.
            outer: ``[N]`` super-scales.
            moves: Moves to try; of equals the first is taken.

        Returns:
            ``[N]`` stored scales, and both sums of ``moments``.
        """
        if native.available():
            ends, stored = (LOWEST, HIGHEST), (code.contiguous(), outer.contiguous())
            return native.best_moves(self.weights, self._measure, stored, self._levels, moves, ends)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for move in moves:
            tried = (code + move).clamp_(LOWEST, HIGHEST)
            scale = tried * outer
            qw, qq = self.moments(scale)
            lost = scale * (scale * qq - 2 * qw)
            if best is None:
                best, least = (tried, qw, qq), lost
            else:
                take_better(least, lost, *zip(best, (tried, qw, qq), strict=True))
        if best is None:
            raise ValueError("no moves to try")
        return best

    def _levels_of_weights(self) -> Encoder:
        if self._encoder is None:
            self._encoder = Encoder(self._levels, self.weights.shape)
        return self._encoder


class SignedRows(RowGroups[SignedPanel]):
    """Rows of a matrix cut into groups.

    Args:
        rows: ``[R, C]`` weights of any float dtype.
        scheme: A scheme of levels.
        importance: ``[C]`` float32 of the inputs or ``[R, C]`` of the weights, above 0; None: all
            the same.
    """

    def __init__(self, rows: Tensor, scheme: Scheme, importance: Tensor | None = None) -> None:
        def panel(part: Tensor, size: int, chosen: Tensor | None) -> SignedPanel:
            return SignedPanel(part, size, scheme.levels, chosen)

        super().__init__(rows, scheme.group, panel, importance)

    def write_codes(self, scales: Stored, out: Tensor) -> None:
        """Encode for the values that the reader will see.

        Args:
            scales: As stored.
            out: ``[R, C]`` uint8, overwritten.
        """
        parts = zip(self.panels, self.split(scales.values()), strict=True)
        self.write(out, (panel.codes(scale) for panel, scale in parts))


def invert(scale: Tensor) -> Tensor:
    """One over each signed scale; large and finite for a scale of 0."""
    return scale.abs().clamp_(min=_SMALLEST_SCALE).reciprocal_().copysign_(scale)


def solve(
    rows: SignedRows, scheme: Scheme, effort: Effort = QUICK, *, full_size: bool = True
) -> Stored:
    """Scales of some rows, as they will be stored.

    Args:
        rows: The weights.
        scheme: A scheme of levels.
        effort: How much to try.
        full_size: Stretch the values to the size of the weights.
    """
    fits = [fit(panel, effort) for panel in rows.panels]
    free, squares = (rows.join([found[i] for found in fits]) for i in (0, 1))
    scales = store_scales(scheme, free, squares, effort.shares)
    for turn in range(effort.rounds):
        last = turn == effort.rounds - 1
        scales, qw, qq = _move(rows, scales, effort.moves)
        scales = _refit_outer(rows, scheme, scales, qw, qq, full_size=full_size and last)
    return scales


def round_to_nearest(rows: SignedRows, scheme: Scheme) -> Stored:
    """Scales that put each group's largest weight at the farthest level."""
    scales = rows.gather(lambda panel: panel.extreme / scheme.levels[0])
    return store_scales(scheme, scales, torch.ones_like(scales))


def fit(panel: SignedPanel, effort: Effort) -> tuple[Tensor, Tensor]:
    """The best scale ``[N]`` of each group before it is stored, and the squares of its levels."""
    first, *others = effort.starts
    scale, squares, lost = _least_squares(panel, panel.extreme / first)
    for start in others:
        tried, its_squares, its_lost = _least_squares(panel, panel.extreme / start)
        take_better(lost, its_lost, (scale, tried), (squares, its_squares))
    for _ in range(effort.refits):
        scale, squares, _ = _least_squares(panel, scale)
    return scale, squares


def _least_squares(panel: SignedPanel, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best scale for the codes of another, their squares, and minus the power explained."""
    qw, qq = panel.moments(scale)
    fitted = qw / qq.clamp(min=_SMALLEST_SUM)
    return fitted, qq, -(fitted * qw)


def store_scales(
    scheme: Scheme, scales: Tensor, costs: Tensor, shares: Sequence[float] = (1.0,)
) -> Stored:
    """Round scales to five bits under the best super-scale.

    Args:
        scheme: A scheme with 5-bit scales.
        scales: ``[R, G]`` float32, signed.
        costs: ``[R, G]`` what the square of each one's change costs.
        shares: Super-scales to try, as shares of the one that puts the largest scale at -16.
    """
    rows, groups = scales.shape
    grouped, cost = by_super(scales, scheme), by_super(costs, scheme)  # [K, M]
    largest = grouped.gather(0, grouped.abs().argmax(dim=0, keepdim=True))[0] / LOWEST
    tried = torch.stack([_as_stored(largest * share) for share in shares])
    if len(shares) > 1:
        lost = [((_round(grouped, o) * o - grouped).square_() * cost).sum(dim=0) for o in tried]
        tried = tried.gather(0, torch.stack(lost).argmin(dim=0, keepdim=True))
    outer = tried[0]
    codes = by_row(_round(grouped, outer), scheme, groups)
    return Stored(codes, torch.int8, outer.view(rows, -1), per_outer=SUPER_COLS // scheme.group)


def _as_stored(wanted: Tensor) -> Tensor:
    """As float16 holds it; one that is there at all must not vanish."""
    return torch.where(
        wanted.abs() < FLOAT16_SMALLEST, wanted.sign() * FLOAT16_SMALLEST, as_float16(wanted)
    )


def _round(scales: Tensor, outer: Tensor) -> Tensor:
    return (scales / outer).nan_to_num_(nan=0.0).round_().clamp_(LOWEST, HIGHEST)


def _move(rows: SignedRows, scales: Stored, moves: Sequence[int]) -> tuple[Stored, Tensor, Tensor]:
    """Stored scales moved to the best near them, group by group, and their moments ``[R, G]``."""
    parts = zip(
        rows.panels, rows.split(scales.codes), rows.split(scales.spread_outer()), strict=True
    )
    found = [panel.best_move(code, outer, moves) for panel, code, outer in parts]
    codes, qw, qq = (rows.join([part[i] for part in found]) for i in range(3))
    return replace(scales, codes=codes), qw, qq


def _refit_outer(
    rows: SignedRows, scheme: Scheme, scales: Stored, qw: Tensor, qq: Tensor, *, full_size: bool
) -> Stored:
    """Super-scales by least squares, codes and stored scales fixed; stretched at full size.

    Args:
        rows: The weights.
        scheme: A scheme with 5-bit scales.
        scales: As stored so far.
        qw: ``[R, G]`` sums of level times weight at these scales.
        qq: ``[R, G]`` sums of the squares of levels.
        full_size: Stretch the values to the size of the weights.
    """
    outer = scales.outer
    if outer is None:
        raise ValueError("5-bit scales lie under an outer factor")
    wx = by_super(scales.codes * qw, scheme).sum(dim=0)  # [M]
    xx = by_super(scales.codes.square() * qq, scheme).sum(dim=0)
    fitted = wx / xx.clamp(min=_SMALLEST_SUM)
    if full_size:
        power = by_super(rows.gather(lambda panel: panel.power), scheme).sum(dim=0)
        fitted *= size_lost(power, fitted * wx)
    fitted = torch.where(xx > 0, fitted, outer.view(-1))
    return replace(scales, outer=_as_stored(fitted).view(outer.shape))
