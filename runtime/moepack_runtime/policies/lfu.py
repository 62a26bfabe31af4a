"""Least frequently used, with ageing: the expert whose fading count of demands is least gives way.

Counts fade so that experts of a past topic give way in time (LRFU: Lee et al., "LRFU: A Spectrum of
Policies that Subsumes the Least Recently Used and Least Frequently Used Policies", 2001). Counts of
experts that are not resident are remembered: one that is read again and again comes to stay.
"""

from __future__ import annotations

from collections.abc import Callable

from moepack_runtime.cache.aged_scores import AgedScores

from . import Key


class LeastFrequentlyUsed:
    """Counts demands."""

    def __init__(self) -> None:
        self._counts = AgedScores()

    def insert(self, key: Key) -> None:
        """One demand more."""
        self._counts.add(key)
        self._counts.insert(key)

    def touch(self, key: Key) -> None:
        """One demand more."""
        self._counts.add(key)

    def remove(self, key: Key) -> None:
        """Gone, but remembered."""
        self._counts.remove(key)

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """The usable key with the least count."""
        return self._counts.least(usable)


POLICY = LeastFrequentlyUsed
