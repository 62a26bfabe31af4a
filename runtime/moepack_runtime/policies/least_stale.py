"""Least stale: the expert that its layer has passed over most often since its last use gives way.

A model asks for its layers in a fixed round, so age is counted in turns of the expert's own layer,
not in time; among equals the one whose layer comes round last gives way. (The idea of keeping the
experts that are least stale: Hoang et al., "SpecMD", arXiv 2602.03921.) Where a token's experts do
not fit, this keeps some of them where LRU keeps none.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable

from . import Key


class LeastStale:
    """Keeps each layer's keys in the order of their last demand, with the layer's turn at it."""

    def __init__(self) -> None:
        self._layers: defaultdict[int, OrderedDict[Key, int]] = defaultdict(OrderedDict)
        self._turns: defaultdict[int, int] = defaultdict(int)
        self._current = -1

    def insert(self, key: Key) -> None:
        """Used in its layer's present turn."""
        layer = key[0]
        if layer != self._current:
            self._current = layer
            self._turns[layer] += 1
        self._layers[layer][key] = self._turns[layer]

    def touch(self, key: Key) -> None:
        """Used in its layer's present turn."""
        self.insert(key)
        self._layers[key[0]].move_to_end(key)

    def remove(self, key: Key) -> None:
        """Gone."""
        del self._layers[key[0]][key]

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """The stalest usable key."""
        best, best_rank = None, (-1, -1)
        round_length = max(self._layers, default=0) + 1
        for layer, keys in self._layers.items():
            key = next((key for key in keys if usable(key)), None)
            if key is not None:
                ahead = (layer - self._current - 1) % round_length
                rank = (self._turns[layer] - keys[key], ahead)
                if rank > best_rank:
                    best, best_rank = key, rank
        return best


POLICY = LeastStale
