"""Resident experts ordered by scores that fade: what the frequency policies stand on.

A score is a sum of weights, each of which halves as time goes by. Instead of fading every score at
every step, new weights grow: the order is the same, and a score changes only when its expert is
used. Scores are kept as logarithms, which never overflow.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

from ..policies import Key

HALF_LIFE = 8.0
"""A weight halves while this many uses for each expert that was ever scored go by: long enough to
tell frequent experts from rare ones, short enough to follow a change of topic. On tiny-moe 2 to 32
differ by less than a point of hits."""

_SLACK = 64


class AgedScores:
    """Scores of experts, resident or not, and the resident one with the least.

    Ties go to the expert whose score changed longest ago.
    """

    def __init__(self) -> None:
        self._now = 0.0  # in half-lives
        self._scores: dict[Key, float] = {}  # log2, as of time zero
        self._resident: set[Key] = set()
        # Entries whose score has changed since, or whose expert is gone, are skipped.
        self._heap: list[tuple[float, int, Key]] = []
        self._count = itertools.count()

    def add(self, key: Key, weight: float = 1.0) -> None:
        """One use of an expert; a weight of zero or less only lets time pass."""
        old = self._scores.setdefault(key, -math.inf)
        self._now += 1.0 / (HALF_LIFE * len(self._scores))
        if weight <= 0:
            return
        new = self._now + math.log2(weight)
        high, low = (new, old) if new > old else (old, new)
        self._scores[key] = high + math.log2(1.0 + 2.0 ** (low - high))
        if key in self._resident:
            self._push(key)

    def insert(self, key: Key) -> None:
        """The expert has become resident."""
        self._resident.add(key)
        self._scores.setdefault(key, -math.inf)
        self._push(key)

    def remove(self, key: Key) -> None:
        """The expert is no longer resident; its score is kept."""
        self._resident.remove(key)

    def least(self, usable: Callable[[Key], bool]) -> Key | None:
        """The resident expert with the least score, among those that ``usable`` accepts."""
        aside = []
        found = None
        while self._heap:
            entry = heapq.heappop(self._heap)
            score, _, key = entry
            if key not in self._resident or self._scores[key] != score:
                continue
            aside.append(entry)
            if usable(key):
                found = key
                break
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return found

    def _push(self, key: Key) -> None:
        heapq.heappush(self._heap, (self._scores[key], next(self._count), key))
        if len(self._heap) > 2 * len(self._resident) + _SLACK:
            self._heap = [(self._scores[k], next(self._count), k) for k in self._resident]
            heapq.heapify(self._heap)
