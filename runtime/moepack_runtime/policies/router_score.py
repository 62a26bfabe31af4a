"""Router score: the expert that the router has favoured least of late gives way.

As ``lfu``, but a demand counts as much as the router's weight for it: an expert that is chosen with
little weight is given up before one that is chosen as often with much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moepack_runtime.cache.aged_scores import AgedScores

from . import Key


class RouterScore:
    """Sums router weights; without ``observe`` the expert that came first gives way."""

    def __init__(self) -> None:
        self._scores = AgedScores()

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Adds the weights."""
        for expert, weight in zip(experts, weights, strict=True):
            self._scores.add((layer, expert), weight)

    def insert(self, key: Key) -> None:
        """Now a candidate."""
        self._scores.insert(key)

    def touch(self, key: Key) -> None:
        """Nothing: the router's weight has been seen already."""

    def remove(self, key: Key) -> None:
        """Gone, but remembered."""
        self._scores.remove(key)

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """The usable key with the least sum."""
        return self._scores.least(usable)


POLICY = RouterScore
