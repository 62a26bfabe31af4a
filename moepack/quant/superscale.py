"""Scales and minima of 4 bits under super-scales: choosing all of them together.

Rounding to 4 bits moves a scale by up to some percent, which the codes of the group can make good
as long as they are chosen afterwards. So neighbours of the rounded scale and minimum are tried on
the weights themselves, and the super-scales are refitted to what was chosen.

Shape letters: R rows, G groups of a row, S super-groups of a row (256 inputs, the last one up to
448), N groups of a panel, M = R * S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moepack_formats.schemes import SUPER_COLS, Scheme
from moepack_runtime.kernels import native_solver as native

from .grid import GroupedRows, Groups, Panel, invert, refit_minima, size_lost, take_better
from .storage import (
    CODE_TOP,
    Stored,
    as_float16,
    by_super,
    negative_minima,
    spread,
    store_minima,
    store_scales,
)

SHARES = (1.0, 1.03, 0.97, 0.94, 0.9, 0.86, 0.8)
"""Super-scales to try, as shares of the smallest that does not clip the largest scale."""
ANCHOR_TURNS = 3
Neighbours = Sequence[tuple[int, tuple[int, ...]]]
NEIGHBOURS: Neighbours = ((0, (0, -1, 1)), (-1, (0, -1)), (1, (0, 1)))
"""Moves of a scale's code, each with moves of the minimum's, to try. Staying wins a tie.

A larger step seldom goes with a smaller minimum: both stand for the width of the group."""
_CONDITION = 1e-5


def store_under_super_scales(
    rows: GroupedRows, scheme: Scheme, steps: Tensor, minima: Tensor, *, full_size: bool = True
) -> tuple[Stored, Stored]:
    """Round to 4 bits what was fitted freely, and fit again around the rounded values.

    Args:
        rows: The weights.
        scheme: A scheme with 4-bit scales.
        steps: ``[R, G]`` the best scales.
        minima: ``[R, G]`` the best minima.
        full_size: Stretch the values to the size of the weights.
    """
    top = (1 << scheme.bits) - 1
    negative = negative_minima(scheme, minima)
    steps = _anchor_at_zero(rows, scheme, steps, minima, negative)
    scales = store_scales(scheme, steps, SHARES)
    minima = refit_minima(rows, scales.values(), minima, top)
    stored = scales, store_minima(scheme, minima, negative, SHARES)
    return improve(rows, scheme, *stored, NEIGHBOURS, full_size=full_size)


def improve(
    rows: GroupedRows,
    scheme: Scheme,
    scales: Stored,
    minima: Stored,
    neighbours: Neighbours,
    *,
    full_size: bool = True,
) -> tuple[Stored, Stored]:
    """Move 4-bit codes to better neighbours, then refit what they lie under.

    Args:
        rows: The weights.
        scheme: A scheme with 4-bit scales.
        scales: As stored so far.
        minima: As stored so far.
        neighbours: Which moves to try.
        full_size: Stretch the values to the size of the weights.
    """
    top = (1 << scheme.bits) - 1
    stored = _try_neighbours(rows, scales, minima, neighbours, top)
    return _refit_outer(rows, scheme, *stored, top, full_size=full_size)


def _anchor_at_zero(
    rows: GroupedRows, scheme: Scheme, steps: Tensor, minima: Tensor, negative: Tensor
) -> Tensor:
    """Steps ``[R, G]``, new ones for groups whose minimum has the sign that is not stored.

    Such a group gets the minimum 0, and needs a step that reaches its weights from there.
    """
    sign = spread(1.0 - 2.0 * negative, SUPER_COLS // scheme.group, minima.shape[1])
    anchored = minima * sign < 0
    if not bool(anchored.any()):
        return steps
    top = (1 << scheme.bits) - 1
    found = []
    for panel, step, wanted in zip(
        rows.panels, rows.split(steps), rows.split(anchored), strict=True
    ):
        groups = wanted.nonzero().squeeze(1)  # Few, if any.
        if len(groups):
            some = Panel((panel.weights[:, groups] + panel.mean[groups]).t(), panel.size)
            step = step.index_copy(0, groups, _step_from_zero(some, top))
        found.append(step)
    return rows.join(found)


def _step_from_zero(panel: Panel, top: int) -> Tensor:
    """The step ``[N]`` that suits each group when its minimum is 0."""
    step = ((panel.high + panel.mean) / top).clamp_(min=0)
    for _ in range(ANCHOR_TURNS):
        inverse = invert(step)
        sums = panel.moments(inverse, panel.mean * inverse, top)
        fitted = (sums.qw + panel.mean * sums.q) / sums.qq
        step = torch.where((sums.qq > 0) & (fitted > 0), fitted, step)
    return step


def _try_neighbours(
    rows: GroupedRows, scales: Stored, minima: Stored, neighbours: Neighbours, top: int
) -> tuple[Stored, Stored]:
    """For each group the best of the present 4-bit codes and those one up or down."""
    arrays = (scales.codes, scales.spread_outer(), minima.codes, minima.spread_outer())
    found = [
        best_neighbour(panel, panel.mean, *parts, neighbours=neighbours, top=top)
        for panel, *parts in zip(rows.panels, *map(rows.split, arrays), strict=True)
    ]
    return (
        replace(scales, codes=rows.join([scale for scale, _ in found])),
        replace(minima, codes=rows.join([minimum for _, minimum in found])),
    )


def best_neighbour(
    groups: Groups,
    mean: Tensor,
    scale: Tensor,
    outer_scale: Tensor,
    minimum: Tensor,
    outer_minimum: Tensor,
    *,
    neighbours: Neighbours,
    top: int,
) -> tuple[Tensor, Tensor]:
    """The 4-bit codes ``[N]`` of scales and minima with the least squared error.

    Args:
        groups: The weights.
        mean: ``[N]`` what has been taken from each group's weights.
        scale: ``[N]`` present codes of the scales.
        outer_scale: ``[N]`` super-scales.
        minimum: ``[N]`` present codes of the minima.
        outer_minimum: ``[N]`` super-minima.
        neighbours: Which moves to try.
        top: The largest code of a weight.
    """
    if native.available():
        return native.best_neighbours(
            groups.weights,
            groups.measure,
            (scale.contiguous(), outer_scale.contiguous()),
            (minimum.contiguous(), outer_minimum.contiguous()),
            mean,
            [(up, along) for up, alongs in neighbours for along in alongs],
            top=top,
            code_top=CODE_TOP,
        )
    best: Tensor | None = None
    best_scale, best_minimum = scale.clone(), minimum.clone()
    for up, alongs in neighbours:
        tried_scale = (scale + up).clamp_(1, CODE_TOP)
        step = tried_scale * outer_scale
        inverse = invert(step)
        for along in alongs:
            tried_minimum = (minimum + along).clamp_(0, CODE_TOP)
            zero = (tried_minimum * outer_minimum).add_(mean).mul_(inverse)
            error = groups.squared_steps(inverse, zero, top).mul_(step).mul_(step)
            if best is None:
                best, best_scale, best_minimum = error, tried_scale.clone(), tried_minimum.clone()
                continue
            take_better(best, error, (best_scale, tried_scale), (best_minimum, tried_minimum))
    return best_scale, best_minimum


def _refit_outer(
    rows: GroupedRows,
    scheme: Scheme,
    scales: Stored,
    minima: Stored,
    top: int,
    *,
    full_size: bool,
) -> tuple[Stored, Stored]:
    """Super-scale and super-minimum by least squares, the 4-bit and the weights' codes fixed.

    At full size, both are stretched by what least squares makes the values smaller than the
    weights.
    """
    sums = [
        panel.moments(inverse, zero, top)
        for panel, inverse, zero in rows.grids(scales.values(), minima.values())
    ]
    q, qq = rows.join([part.q for part in sums]), rows.join([part.qq for part in sums])
    mean = rows.gather(lambda panel: panel.mean)
    size = rows.gather(lambda panel: torch.full_like(panel.mean, panel.size))
    qw = rows.join([part.qw for part in sums]) + mean * q  # Of the weights before centring.
    scale, minimum = scales.codes, minima.codes

    emphasis = rows.gather(lambda panel: panel.emphasis.expand_as(panel.mean))

    def total(values: Tensor) -> Tensor:
        return by_super(values * emphasis, scheme).sum(dim=0)  # [M]

    # Normal equations of  weight = x * (scale * q) - y * minimum.
    xx = total(scale * scale * qq)
    xy = -total(scale * minimum * q)
    yy = total(minimum * minimum * size)
    wx = total(scale * qw)
    wy = -total(minimum * mean * size)
    determinant = xx * yy - xy * xy
    x = (yy * wx - xy * wy) / determinant
    y = (xx * wy - xy * wx) / determinant
    # Not if all minima are 0, say, and never to a step of nothing.
    sound = (determinant > _CONDITION * xx * yy) & (x > 0)
    if full_size:
        power = total(rows.gather(lambda panel: panel.power) + mean * mean * size)
        gain = size_lost(power, x * wx + y * wy)
        x, y = x * gain, y * gain
    return _with_outer(scales, x, sound), _with_outer(minima, y, sound)


def _with_outer(stored: Stored, fitted: Tensor, sound: Tensor) -> Stored:
    if stored.outer is None:
        raise ValueError("4-bit codes lie under an outer factor")
    fitted, sound = fitted.view(stored.outer.shape), sound.view(stored.outer.shape)
    return replace(stored, outer=torch.where(sound, as_float16(fitted), stored.outer))
