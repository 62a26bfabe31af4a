"""The slots for the records of one size, and what is in them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from moepack_formats.pack import Pack

from ..disk.io_pool import Read
from ..options import RuntimeOptions
from ..policies import Key
from .arena import Arena
from .layer_policies import make_policy
from .slot_shares import reserved_slots


@dataclass
class Entry:
    """A record that is in a slot or on its way there."""

    key: Key
    slot: int
    reading: Read
    guessed: bool
    pins: int = 0
    counted: bool = False
    """Whether its policy knows already of the demand that is going to be fetched."""
    missed: bool = False
    """Whether its demand had to start the read and was not yet counted."""


class SizeClass:
    """Slots and policy for the records of one size.

    Attributes:
        arena: The slots' memory.
        free: Slots without a record.
        parked: Slots whose memory was given back to the system.
        untouched: Slots that are not parked and whose memory was never taken.
        guessing: Whether experts are being guessed; while not, no slot waits for them.
        staged: Guesses that were not demanded yet, oldest first.
        demanded: Number of slots with demanded records.
    """

    def __init__(self, arena: Arena, records: list[Key], options: RuntimeOptions) -> None:
        self.arena, self._records = arena, len(records)
        self.guessing = options.prefetch
        self.free = list(range(arena.slots))
        self.parked: list[int] = []
        self.untouched = set(self.free)
        self.staged: deque[Key] = deque()
        self.demanded = 0
        self.policy = make_policy(
            options.policy,
            self.demanded_limit,
            records,
            scope=options.scope,
            pins=options.pins,
        )

    @property
    def slots(self) -> int:
        """Slots that may be filled."""
        return self.arena.slots - len(self.parked)

    @property
    def demanded_limit(self) -> int:
        """Slots that demanded experts may fill; the others wait for guesses."""
        return self.slots - reserved_slots(self.slots, self._records, prefetch=self.guessing)

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        return self.arena.slot_nbytes

    def park(self) -> None:
        """Give a free slot's memory back."""
        slot = self.free.pop()
        self.arena.give_back(slot)
        self.untouched.discard(slot)
        self.parked.append(slot)

    def unpark(self) -> None:
        """Use a parked slot again."""
        slot = self.parked.pop()
        self.untouched.add(slot)
        self.free.append(slot)


def records_of_size(pack: Pack, nbytes: int) -> list[Key]:
    """The experts whose records have so many bytes, in the order of the pack."""
    return [
        (layer, expert)
        for layer, records in enumerate(pack.layers)
        for expert, at in enumerate(records)
        if at.spec.nbytes == nbytes
    ]
