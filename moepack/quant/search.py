"""Search: the ``hqq`` fit, then wider and repeated moves of scales, minima and codes together.

Weighted least squares over everything that is stored, the scales' own quantization inside the
loop. What ``hqq`` finds in one round is within a percent of where this settles. At 2 bits that is
still worth having (docs/quality.md), and this the default; it takes 1.2 to 1.7 times as long.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import Scheme

from . import hqq, signed
from .grid import GroupedRows
from .inputs import InputMoments
from .storage import Stored
from .superscale import improve
from .walk import Solver, quantize_rows

ROUNDS = 2
_MOVES = (0, -1, 1, -2, 2)
NEIGHBOURS = tuple((move, _MOVES) for move in _MOVES)
"""Moves of a scale's 4-bit code, each with moves of the minimum's."""

SIGNED_EFFORT = signed.Effort(
    starts=(-18.0, -22.0, -20.0, -19.0, -17.0, -16.0, -14.5, 13.0, 14.0, 15.0, 12.0, -13.0),
    refits=4,
    shares=tuple(0.9 + 0.02 * step for step in range(11)),
    moves=(0, -1, 1, -2, 2),
    rounds=3,
)
"""For grids without minima."""


class WeightedSearch:
    """The ``search`` quantizer."""

    name = "search"
    needs_products = False

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedMatrix:
        """See ``Quantizer.quantize``."""
        return quantize_rows(weight, scheme, SOLVER)

    def quantize_for(self, weight: Tensor, scheme: Scheme, inputs: InputMoments) -> QuantizedMatrix:
        """See ``InputAwareQuantizer.quantize_for``: squared errors count by importance."""
        return quantize_rows(weight, scheme, SOLVER, inputs.importance())


def solve(rows: GroupedRows, scheme: Scheme) -> tuple[Stored, Stored]:
    """Scales and minima of some rows, as they will be stored."""
    if scheme.scale_bits != 4:
        return hqq.solve(rows, scheme)
    scales, minima = hqq.solve(rows, scheme, full_size=False)
    for turn in range(ROUNDS):
        # Stretched only at the end: the refits of later rounds would undo it.
        last = turn == ROUNDS - 1
        scales, minima = improve(rows, scheme, scales, minima, NEIGHBOURS, full_size=last)
    return scales, minima


SOLVER = Solver(solve, partial(signed.solve, effort=SIGNED_EFFORT))
QUANTIZER = WeightedSearch()
