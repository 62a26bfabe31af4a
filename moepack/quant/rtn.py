"""Round to nearest: scale and minimum from the smallest and largest weight, nothing optimised."""

from __future__ import annotations

from torch import Tensor

from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import Scheme

from . import signed
from .grid import GroupedRows
from .storage import Stored, store_minima, store_scales
from .walk import Solver, quantize_rows


class RoundToNearest:
    """The ``rtn`` quantizer."""

    name = "rtn"

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedMatrix:
        """See ``Quantizer.quantize``."""
        return quantize_rows(weight, scheme, SOLVER)


def solve(rows: GroupedRows, scheme: Scheme) -> tuple[Stored, Stored]:
    """Scales and minima of some rows, as they will be stored."""
    top = (1 << scheme.bits) - 1
    steps = rows.gather(lambda panel: (panel.high - panel.low) / top)
    minima = rows.gather(lambda panel: -panel.low - panel.mean)
    return store_scales(scheme, steps), store_minima(scheme, minima)


SOLVER = Solver(solve, signed.round_to_nearest, by_size=False)
QUANTIZER = RoundToNearest()
