"""Records in host memory, kept there until the copies from it are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from moepack_formats.errors import ResourceError

from ..cache.residency import Residency
from ..policies import Key
from .link import Event, Link

MAX_HELD = 16
"""Passes over the host's records whose copies may be under way; the host waits for older ones."""


class _Held:
    """A pass that keeps the records of its last turn where they are, and their copies."""

    def __init__(self, turns: Iterator[dict[int, Tensor]]) -> None:
        self.turns = turns
        self.copies: list[Event] = []


class HostSource:
    """Gives records of a host residency to a device cache.

    Args:
        host: Where records are in host memory.
        link: Says when copies are done.
        unpin: Called when no copy is under way any more, before the host's memory goes.
    """

    def __init__(
        self, host: Residency, link: Link, unpin: Callable[[], None] = lambda: None
    ) -> None:
        self._host, self._link, self._unpin = host, link, unpin
        self._held: deque[_Held] = deque()
        self._current: _Held | None = None

    def describe(self) -> str:
        """See :class:`Residency`."""
        return self._host.describe()

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a record can be had without waiting for the disk."""
        return self._host.holds(layer, expert)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Bring records to host memory."""
        self._host.prefetch(layer, experts)

    def records(self, keys: Sequence[Key]) -> Iterator[tuple[Key, Tensor]]:
        """Yield records of one layer as they become ready; name each one's copy to ``copying``.

        A record stays as it is until the copies named during its turn are done.
        """
        if not keys:
            return
        self._let_go(MAX_HELD)
        layer, experts = keys[0][0], [expert for _, expert in keys]
        held = _Held(iter(self._host.fetch_ready(layer, experts)))
        try:
            while (turn := self._next(held, layer, experts)) is not None:
                for expert, record in turn.items():
                    self._current = held
                    yield (layer, expert), record
                experts = [expert for expert in experts if expert not in turn]
                if not experts:
                    break
                # The host needs this turn's room for the rest: what was copied must have left.
                self._wait(held)
        finally:
            self._current = None
            self._held.append(held)

    def copying(self, event: Event) -> None:
        """The record that was yielded last is being copied until ``event``."""
        if self._current is not None:
            self._current.copies.append(event)

    def close(self) -> None:
        """Let go of everything, then close the host's residency."""
        self._let_go(0)
        self._unpin()
        self._host.close()

    def _next(self, held: _Held, layer: int, experts: Sequence[int]) -> dict[int, Tensor] | None:
        try:
            return next(held.turns, None)
        except ResourceError:
            # Every slot is held for copies that are under way: wait for them and ask again.
            if not self._held:
                raise
            self._let_go(0)
            held.turns = iter(self._host.fetch_ready(layer, experts))
            return next(held.turns, None)

    def _let_go(self, most: int) -> None:
        """End passes whose copies are done, and of the others all but ``most``."""
        for held in list(self._held):
            if all(self._link.done(event) for event in held.copies) or len(self._held) > most:
                self._wait(held)
                self._end(held)
                self._held.remove(held)

    def _wait(self, held: _Held) -> None:
        for event in held.copies:
            self._link.wait(event)
        held.copies.clear()

    @staticmethod
    def _end(held: _Held) -> None:
        close = getattr(held.turns, "close", None)
        if close is not None:
            close()
