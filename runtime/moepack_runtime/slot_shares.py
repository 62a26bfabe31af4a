"""How the slots of one size class are shared between demanded and guessed experts."""

from __future__ import annotations

MAX_STAGED = 8
"""Guessed experts that may wait in slots at a time, at most a quarter of the slots."""


def reserved_slots(slots: int, records: int, *, prefetch: bool) -> int:
    """Slots that wait for guesses, so that a wrong guess never costs a cached expert.

    Args:
        slots: Slots of the class.
        records: Records of that size in the pack; when all fit, guesses need no place.
        prefetch: Whether anything is guessed at all.
    """
    return 0 if slots >= records or not prefetch else min(MAX_STAGED, slots // 4)
