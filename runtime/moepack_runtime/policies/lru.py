"""Least recently used: the expert that was demanded longest ago gives way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from . import Key


class LeastRecentlyUsed:
    """Keeps keys in the order of their last demand."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def insert(self, key: Key) -> None:
        """Newest."""
        self._order[key] = None

    def touch(self, key: Key) -> None:
        """Newest again."""
        self._order.move_to_end(key)

    def remove(self, key: Key) -> None:
        """Gone."""
        del self._order[key]

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """The oldest usable key."""
        return next((key for key in self._order if usable(key)), None)


POLICY = LeastRecentlyUsed
