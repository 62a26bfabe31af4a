"""How a budget becomes slots, and how those of a size are shared with guessed experts."""

from __future__ import annotations

MAX_STAGED = 8
"""Guessed experts that may wait in slots at a time, at most a quarter of the slots."""

LOOKAHEAD = 2
"""Layers ahead of the one that computes for which guesses are read."""


def due_layers(layer: int) -> range:
    """The layers whose guesses are still to be used while ``layer`` computes."""
    return range(layer + 1, layer + LOOKAHEAD + 1)


def reserved_slots(slots: int, records: int, *, prefetch: bool) -> int:
    """Slots that wait for guesses, so that a wrong guess never costs a cached expert.

    Args:
        slots: Slots of the class.
        records: Records of that size in the pack; when all fit, guesses need no place.
        prefetch: Whether anything is guessed at all.
    """
    return 0 if slots >= records or not prefetch else min(MAX_STAGED, slots // 4)


def divide_budget(budget: int, sizes: dict[int, int], most: int | None = None) -> dict[int, int]:
    """Slots for each record size: all that exist, or shares of the budget by total bytes.

    Args:
        budget: Bytes.
        sizes: Records by size.
        most: Slots of all sizes together, but at least one of each.
    """
    everything = sum(nbytes * count for nbytes, count in sizes.items())
    if most is not None:
        budget = min(budget, everything * most // sum(sizes.values()))
    if everything <= budget:
        return dict(sizes)
    slots = {n: min(c, max(1, budget * c // everything)) for n, c in sizes.items()}
    while sum(n * s for n, s in slots.items()) > budget:
        # Rounding a class up to its one slot took more than its share.
        largest = max((n for n in slots if slots[n] > 1), key=lambda n: n * slots[n], default=None)
        if largest is None:
            break
        slots[largest] -= 1
    return slots
