"""Host memory that behaves badly: few slots, used again as soon as nobody holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepack_formats.errors import ResourceError
from tests.runtime.fake_pack import FakePack

Key = tuple[int, int]


class FakeHost:
    """A residency of a few slots. A slot that is let go is overwritten with rubbish at once.

    Args:
        pack: Whose records it gives.
        slots: How many records it can hold at a time.
        at_hand: Records that need no disk; all by default.
    """

    def __init__(self, pack: FakePack, slots: int, at_hand: set[Key] | None = None) -> None:
        self._pack, self.free, self.at_hand = pack, slots, at_hand
        self.asked: list[Key] = []
        self.closed = False

    def describe(self) -> str:
        return "fake"

    def close(self) -> None:
        self.closed = True

    def holds(self, layer: int, expert: int) -> bool:
        return self.at_hand is None or (layer, expert) in self.at_hand

    def address(self, layer: int, expert: int) -> None:
        return None

    lookahead = 1

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        self.asked += [(layer, expert) for expert in experts]
        return list(experts)

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for records in self.fetch_ready(layer, experts):
            yield from records.items()

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        left = list(experts)
        while left:
            if self.free == 0:
                raise ResourceError("every slot is in use by another pass over the model")
            turn, left = left[: self.free], left[self.free :]
            records = {
                expert: torch.frombuffer(
                    bytearray(self._pack.bytes[layer, expert]), dtype=torch.uint8
                )
                for expert in turn
            }
            self.free -= len(turn)
            try:
                yield dict(records)
            finally:
                self.free += len(turn)
                for record in records.values():
                    record.fill_(0)
