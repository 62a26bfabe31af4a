"""Slots of GPU memory for the records of one size, and what is in them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from moepack_formats.errors import ResourceError

from ..options import format_size
from ..policies import Key, get_policy
from .link import Event, Link

STAGING = 4
"""Slots for guesses, of each record size; at most a quarter of the slots."""


@dataclass
class DeviceEntry:
    """A record that is in a slot, or will be once what is queued has run."""

    key: Key
    slot: int
    copied: Event
    guessed: bool
    pins: int = 0


class DeviceSlots:
    """Slots for the records of one size."""

    def __init__(self, nbytes: int, slots: int, records: int, policy: str, link: Link) -> None:
        self.nbytes, self.slots = nbytes, slots
        try:
            self.memory = torch.empty(slots * nbytes, dtype=torch.uint8, device=link.device)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"cannot take {format_size(slots * nbytes)} of GPU memory for expert slots",
                remedy="lower --vram",
            ) from error
        self.free = list(range(slots))
        # Until when kernels read what is, or was, in a slot.
        self.used: list[Event | None] = [None] * slots
        self.policy = get_policy(policy)()
        self.staged: deque[Key] = deque()
        self.reserved = 0 if slots >= records else min(STAGING, slots // 4)
        self.demanded = 0

    @property
    def demanded_limit(self) -> int:
        """Slots that demanded experts may fill."""
        return self.slots - self.reserved

    def tensor(self, slot: int) -> Tensor:
        """``[nbytes]`` uint8 over a slot."""
        return self.memory[slot * self.nbytes : (slot + 1) * self.nbytes]


def share_out(budget: int, sizes: dict[int, int]) -> dict[int, int]:
    """Slots of each record size: all that there are records for, or the same share of each.

    Args:
        budget: Bytes; enough for one slot of each size.
        sizes: Number of records by size.
    """
    slots = {
        nbytes: min(count, max(1, budget * count // sum(n * c for n, c in sizes.items())))
        for nbytes, count in sizes.items()
    }
    # Rounding up to one slot may have taken more than there is; rounding down left some over.
    for nbytes in sorted(slots, reverse=True):
        over = sum(n * s for n, s in slots.items()) - budget
        if over > 0:
            slots[nbytes] = max(1, slots[nbytes] - -(-over // nbytes))
        else:
            slots[nbytes] = min(sizes[nbytes], slots[nbytes] + -over // nbytes)
    return slots
