"""The offline optimum: the expert that is needed again last gives way.

It must know all demands to come (Belady, "A study of replacement algorithms for a virtual-storage
computer", 1966), so it runs only in the simulator, to show how much better a policy could be.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from . import Key


class Belady:
    """Looks the next demand of each key up."""

    def __init__(self) -> None:
        self._future: defaultdict[Key, deque[int]] = defaultdict(deque)
        self._next: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = itertools.count()

    def foresee(self, demands: Sequence[Sequence[Key]]) -> None:
        """All demands to come."""
        for step, keys in enumerate(demands):
            for key in keys:
                self._future[key].append(step)

    def insert(self, key: Key) -> None:
        """One of the foreseen demands is met."""
        uses = self._future[key]
        uses.popleft()
        self._next[key] = uses[0] if uses else math.inf
        heapq.heappush(self._heap, (-self._next[key], next(self._count), key))

    def touch(self, key: Key) -> None:
        """One of the foreseen demands is met."""
        self.insert(key)

    def remove(self, key: Key) -> None:
        """Gone."""
        del self._next[key]

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """The usable key that is needed again last."""
        aside, found = [], None
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._next.get(entry[2]) != -entry[0]:
                continue
            aside.append(entry)
            if usable(entry[2]):
                found = entry[2]
                break
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return found


POLICY = Belady
