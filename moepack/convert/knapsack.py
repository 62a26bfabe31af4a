"""Choosing one of a few sizes for every item so that the least is lost under a limit.

This is the multiple-choice knapsack. Lagrange's multiplier turns it into independent choices; what
is left of the limit is then given out by gain per byte. The dual value bounds the loss of any
choice from below, so how far from the optimum the answer can be is known and returned.

Shape letters: E items, M options, S options that are allowed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_HALVINGS = 60


@dataclass(frozen=True)
class Choice:
    """An answer.

    Attributes:
        option: ``[E]`` the option of each item.
        loss: What is lost in all.
        bound: No choice under the limit with the same options allowed loses less.
        nbytes: Bytes in all.
    """

    option: Ints
    loss: float
    bound: float
    nbytes: int


def choose(losses: Floats, sizes: Ints, limit: int, *, most: int = 3) -> Choice | None:
    """Choose an option for every item, at most ``most`` different ones in all.

    Args:
        losses: ``[E, M]`` what item and option lose.
        sizes: ``[E, M]`` their bytes.
        limit: Largest sum of bytes.
        most: Different options in all.

    Returns:
        The best of all sets of options, or None when nothing fits.
    """
    best: Choice | None = None
    options = range(losses.shape[1])
    for allowed in combinations(options, min(most, losses.shape[1])):
        columns = list(allowed)
        found = _choose_among(losses[:, columns], sizes[:, columns], limit)
        if found is not None and (best is None or found.loss < best.loss):
            best = Choice(
                np.asarray(columns, np.int64)[found.option], found.loss, found.bound, found.nbytes
            )
    return best


def _choose_among(losses: Floats, sizes: Ints, limit: int) -> Choice | None:
    """As ``choose``, with all ``[E, S]`` options allowed."""
    if int(sizes.min(axis=1).sum()) > limit:
        return None
    items = np.arange(len(losses))

    def at(price: float) -> Ints:
        option: Ints = (losses + price * sizes).argmin(axis=1)
        return option

    def nbytes(option: Ints) -> int:
        return int(sizes[items, option].sum())

    # Between equal losses the smaller size; 0 is a price like any other.
    option = np.lexsort((sizes, losses), axis=1)[:, 0] if losses.shape[1] > 1 else at(0.0)
    low, high = 0.0, _highest_price(losses, sizes)
    if nbytes(option) > limit:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if nbytes(at(middle)) > limit else (low, middle)
        option = at(high)
    else:
        high = 0.0
    if nbytes(option) > limit:  # prices too coarse for what is left: the smallest fit
        option = np.argmin(sizes, axis=1)
    bound = float((losses + high * sizes).min(axis=1).sum() - high * limit)
    option = _fill(losses, sizes, option, limit - nbytes(option))
    loss = float(losses[items, option].sum())
    return Choice(option, loss, min(bound, loss), nbytes(option))


def _highest_price(losses: Floats, sizes: Ints) -> float:
    """A price at which every item takes its smallest option."""
    spread = float((losses.max(axis=1) - losses.min(axis=1)).max(initial=0.0))
    steps = np.diff(np.sort(sizes, axis=1), axis=1)
    least = int(steps[steps > 0].min(initial=1 << 40)) if steps.size else 1
    return spread / max(least, 1) + 1e-30


def _fill(losses: Floats, sizes: Ints, option: Ints, left: int) -> Ints:
    """Spend what is left, the largest gain per byte first."""
    option, items = option.copy(), np.arange(len(losses))
    while True:
        gain = losses[items, option][:, None] - losses
        cost = sizes - sizes[items, option][:, None]
        useful = (gain > 0) & (cost <= left)
        if not useful.any():
            return option
        ratio = np.where(useful, gain / np.maximum(cost, 1), -1.0)
        item, chosen = np.unravel_index(int(ratio.argmax()), ratio.shape)
        left -= int(cost[item, chosen])
        option[item] = chosen
