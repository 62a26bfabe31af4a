"""Half-quadratic quantization, the default: our own vectorised solver.

The method is Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023),
as the hqq library 0.2.8 has it: codes and zero point are optimised in turns for
``||W - (Q - z) * s||_p^p`` with p = 0.7, what is an outlier among the residuals being taken out by
a shrinkage operator between the turns. What differs, each because it lowers the squared error:

- The library keeps the scale that spans a group's weights. Here smaller ones are tried as well,
  some turns each, and the one with the least squared error is kept group by group; then scale and
  zero point are refitted together, by least squares.
- Scales and minima are rounded to what the file stores *before* the last turns, so that the rest
  is fitted to the values a reader will see.

Shrinkage takes nothing from a residual up to ``beta ** (-1 / (2 - p))``, 0.17 at first, and
language models have weights smaller than that. A turn is then a plain mean, as in the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import Scheme
from torch import Tensor

from .grid import GroupedRows, Panel, invert, quantize_rows, refit_minima, take_better
from .storage import Stored, store_minima, store_scales
from .superscale import store_under_super_scales

LP_NORM = 0.7
BETA = 10.0
KAPPA = 1.01

SHARES = {
    2: (1.0, 0.92, 0.85, 0.78, 0.72, 0.66, 0.6, 0.55, 0.5, 0.45),
    3: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55),
    4: (1.05, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68),
    8: (1.0, 0.99),
}
"""Scales to try, by code width, as shares of the one that spans a group's weights."""

TURNS = 2
"""Turns of codes and zero point for each scale tried."""
REFITS = 6
"""Most turns of codes, scale and zero point together."""
SETTLED = 1e-3
"""A group has settled when a refit lowers its error by less than this share..."""
UNSETTLED_GROUPS = 0.05
"""...and a panel when fewer than this share of its groups have not."""

_POW_PIECE = 1 << 14  # Torch gives a piece of this size to one thread.


class HalfQuadratic:
    """The ``hqq`` quantizer."""

    name = "hqq"

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedMatrix:
        """See ``Quantizer.quantize``."""
        return quantize_rows(weight, scheme, solve)


def solve(rows: GroupedRows, scheme: Scheme) -> tuple[Stored, Stored]:
    """Scales and minima of some rows, as they will be stored."""
    fits = [fit(panel, scheme.bits) for panel in rows.panels]
    steps = rows.join([step for step, _ in fits])
    minima = rows.join([minimum for _, minimum in fits])
    if scheme.scale_bits == 4:
        return store_under_super_scales(rows, scheme, steps, minima)
    scales = store_scales(scheme, steps)
    minima = refit_minima(rows, scales.values(), minima, (1 << scheme.bits) - 1)
    return scales, store_minima(scheme, minima)


def fit(panel: Panel, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[N]`` that suit each group best, before they are stored."""
    top = (1 << bits) - 1
    span = panel.high - panel.low
    power = panel.power()
    # The library's start: code 0 at the smallest weight. A smaller scale keeps the zero point,
    # and so clips both ends by the same share.
    zero = -panel.low * invert(span) * top
    first, *others = SHARES[bits]
    best = _try_step(panel, span * (first / top), zero, top, power)
    for share in others:
        found = _try_step(panel, span * (share / top), zero, top, power)
        take_better(best.error, found.error, (best.step, found.step), (best.minimum, found.minimum))
    best = _refit(panel, best, top, power)
    return best.step, best.minimum - panel.mean


@dataclass(frozen=True)
class _Fit:
    """For each group, float32 ``[N]``: scale, minimum of the centred weights, squared error."""

    step: Tensor
    minimum: Tensor
    error: Tensor


def _try_step(panel: Panel, step: Tensor, zero: Tensor, top: int, power: Tensor) -> _Fit:
    """Turns of codes and zero point at one scale."""
    inverse = invert(step)
    panel.scale_by(inverse)
    beta = BETA
    for _ in range(TURNS):
        panel.encode(zero, top)
        # mean(codes - weights / step), and the weights of a group sum to zero.
        turned = panel.code_sum() / panel.size
        outliers = _Outliers.find(panel, step, zero, top, beta)
        if outliers is not None:
            groups = outliers.groups
            turned[groups] += outliers.total / panel.size * inverse[groups]
        zero = turned
        beta *= KAPPA
    panel.encode(zero, top)
    return _least_squares(panel, step, zero, top, beta, power)


def _refit(panel: Panel, fit: _Fit, top: int, power: Tensor) -> _Fit:
    """Turns of codes on the one side, scale and zero point on the other, until settled."""
    for turn in range(REFITS):
        inverse = invert(fit.step)
        zero = fit.minimum * inverse
        panel.scale_by(inverse)
        panel.encode(zero, top)
        beta = BETA * KAPPA ** (TURNS + turn)
        before = fit.error * (1 - SETTLED)
        fit = _least_squares(panel, fit.step, zero, top, beta, power)
        unsettled = torch.lt(fit.error, before, out=before).sum()  # Ones and zeros: exact.
        if float(unsettled) < UNSETTLED_GROUPS * len(before):
            break
    return fit


def _least_squares(
    panel: Panel, step: Tensor, zero: Tensor, top: int, beta: float, power: Tensor
) -> _Fit:
    """Scale and minimum that suit the panel's present codes best."""
    sums = panel.moments()
    mean_code = sums.q / panel.size
    # At least a quarter: of whole numbers that are not all the same it is half or more, and of
    # those that are, whatever the scale becomes, nothing depends on it.
    variance = (sums.qq - mean_code * sums.q).clamp_(min=0.25)
    outliers = _Outliers.find(panel, step, zero, top, beta)
    if outliers is None:
        fitted = (sums.qw / variance).clamp_(min=0)
        return _Fit(fitted, fitted * mean_code, power - fitted * sums.qw)
    groups = outliers.groups
    covariance, total = sums.qw.clone(), torch.zeros_like(step)
    covariance[groups] -= outliers.by_code - outliers.total * mean_code[groups]
    total[groups] = outliers.total
    fitted = (covariance / variance).clamp_(min=0)
    minimum = fitted * mean_code + total / panel.size
    error = power + fitted * (fitted * sums.qq - 2 * (sums.qw + minimum * sums.q))
    return _Fit(fitted, minimum, error + panel.size * minimum * minimum)


@dataclass(frozen=True)
class _Outliers:
    """What shrinkage takes out of the residuals, for the groups where that is anything."""

    groups: Tensor
    """``[n]`` indices into the panel's groups."""
    total: Tensor
    """``[n]`` sum over each of these groups."""
    by_code: Tensor
    """``[n]`` sum over each of these groups, times the weight's code."""

    @staticmethod
    def find(panel: Panel, step: Tensor, zero: Tensor, top: int, beta: float) -> _Outliers | None:
        """Shrink the residuals of the panel's present codes, which this ``zero`` gave.

        None when shrinkage leaves everything as it is: no residual is larger than half a step, or
        than what clipping takes from the smallest or largest weight.
        """
        limit = beta ** (-1 / (2 - LP_NORM))
        if panel.reach <= limit:
            return None
        clipped = torch.maximum(panel.high - (top - zero) * step, -zero * step - panel.low)
        groups = (torch.maximum(clipped, step / 2) > limit).nonzero().squeeze(1)
        if not len(groups):
            return None
        codes = panel.codes[:, groups]
        residual = panel.weights[:, groups] - (codes - zero[groups]) * step[groups]
        size = residual.abs()
        taken = size - _power(size, LP_NORM - 1).div_(beta)
        taken = taken.clamp_(min=0).copysign_(residual)
        return _Outliers(groups, taken.sum(dim=0), (taken * codes).sum(dim=0))


def _power(values: Tensor, exponent: float) -> Tensor:
    """Like ``values ** exponent``, with the same bits whatever the number of threads.

    Where one thread's share ends, torch computes the last few powers by another routine.
    """
    pieces = values.reshape(-1).split(_POW_PIECE)
    return torch.cat([piece.pow(exponent) for piece in pieces]).view(values.shape)


QUANTIZER = HalfQuadratic()
