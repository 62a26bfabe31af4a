"""Means over windows of a text with 95% intervals, also of differences between two models.

Windows are what varies: tokens of one window depend on one another. A difference is paired, window
by window, so that what makes a window hard for both models cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_Z: float = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95% interval; infinite with fewer than two windows."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    def exp(self) -> tuple[float, float, float]:
        """``(low, mean, high)`` of the exponential: nats a token to perplexity."""
        return _exp(self.low), _exp(self.mean), _exp(self.high)

    def __format__(self, spec: str) -> str:
        """Both figures in a format of floats; the mean alone where there is no interval."""
        mean = format(self.mean, spec)
        return mean if math.isinf(self.half_width) else f"{mean} ± {format(self.half_width, spec)}"


def mean_interval(sums: Sequence[float], tokens: Sequence[int]) -> Interval:
    """The mean per token of windows.

    Args:
        sums: Each window's sum over its tokens.
        tokens: Each window's tokens.
    """
    total, count = sum(tokens), len(sums)
    mean = sum(sums) / total
    if count < 2:
        return Interval(mean, math.inf)
    # A ratio of two sums: windows weigh as much as they have tokens.
    spread = sum((s - mean * n) ** 2 for s, n in zip(sums, tokens, strict=True))
    error = math.sqrt(spread * count / (count - 1)) / total
    return Interval(mean, student_t(count - 1) * error)


def paired_interval(
    left: Sequence[float], right: Sequence[float], tokens: Sequence[int]
) -> Interval:
    """The mean per token of ``left - right``, window by window."""
    return mean_interval([a - b for a, b in zip(left, right, strict=True)], tokens)


def student_t(freedom: int) -> float:
    """The 97.5% point of Student's t, to a part in a thousand.

    Exact for one and two degrees of freedom; otherwise the expansion of Abramowitz & Stegun,
    26.7.5.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, n = _Z, float(freedom)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (i + 1) for i, term in enumerate(terms))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
