"""Types of option values that click's own let through too much of."""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A range of floats without infinity and NaN, which compares false with every bound."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """See ``click.ParamType``."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Seed(click.types.IntParamType):
    """An integer that torch's generator takes: of 64 bits, signed or not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See ``click.ParamType``."""
        seed = int(super().convert(value, param, ctx))
        if not -(2**63) <= seed < 2**64:
            self.fail(f"{value} has more than 64 bits.", param, ctx)
        return seed
