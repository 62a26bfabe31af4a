"""Which records are at hand: the interface, and the choice between slots and mapped files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from moepack_formats.pack import Pack

from ..memory.available import default_budget, own_nbytes
from ..memory.budget import OVERHEAD_NBYTES, Budget, MemoryLimit
from ..options import RuntimeOptions
from ..statistics import Statistics
from .mapped import MappedRecords
from .slot_cache import SLACK, SlotCache, record_sizes


class Residency(Protocol):
    """Brings records to where they are computed with.

    Attributes:
        lookahead: Layers ahead of the one that computes for which guesses are worth reading.
    """

    lookahead: int

    def demand(self, layer: int, experts: Sequence[int]) -> None:
        """Start reading what :meth:`fetch` will be asked for next, ahead of every guess."""

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(expert, record)`` for each of ``experts``, in the order they become ready.

        A record is valid until the next one is asked for.
        """

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Yield records by expert, at each turn all that are ready, until each had its turn.

        The records of a turn are valid together, until the next turn is asked for.
        """

    def address(self, layer: int, expert: int) -> int | None:
        """Where a record that was fetched before stays until the end; None where none stays."""

    def check_used(self, layer: int) -> None:
        """Records of a layer were used by their address; were they all there?

        Raises:
            ResourceError: A file was truncated meanwhile.
        """

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a record can be had without waiting for a file."""

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Start reading experts that will probably be needed soon, best guess first.

        Guesses that were made for the layer before and are not among these are forgotten unless
        they are being read.

        Returns:
            The experts that are going to be read for this.
        """

    def make_room(self, nbytes: int) -> None:
        """The caller is about to take this much memory for itself.

        Raises:
            ResourceError: The budget does not allow it.
        """

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """A layer's router has chosen; see :class:`moepack_runtime.policies.Observing`."""

    def resident(self, layer: int) -> list[int]:
        """The experts of a layer that need no reading, or are being read already."""

    def describe(self) -> str:
        """One line for a person: mode and capacity."""

    def close(self) -> None:
        """End threads and let go of memory."""


def fixed_nbytes() -> int:
    """What a process that runs a pack takes besides trunk and experts, seen from this process."""
    return own_nbytes() + OVERHEAD_NBYTES + SLACK


def open_budget(pack: Pack, options: RuntimeOptions) -> Budget:
    """What a process may take that runs a pack, and what it needs besides the trunk."""
    sizes = record_sizes(pack)
    return Budget(
        nbytes=default_budget() if options.ram is None else options.ram,
        process=own_nbytes() + OVERHEAD_NBYTES,
        trunk=0,
        work=SLACK,
        smallest=sum(sizes),
        everything=sum(nbytes * count for nbytes, count in sizes.items()),
    )


def open_residency(
    pack: Pack,
    options: RuntimeOptions,
    budget: Budget,
    stats: Statistics,
    *,
    pinned: bool = False,
) -> Residency:
    """Choose and open the residency for a pack.

    Args:
        pack: An open pack.
        options: I/O mode, policy, threads.
        budget: What may be taken.
        stats: Where hits, misses and bytes are counted.
        pinned: Slots are going to be pinned, so they keep their memory whatever else takes some.

    Raises:
        ResourceError: The budget is below the smallest working set; the message says the need.
    """
    budget.check(pack)
    limit = MemoryLimit(budget.nbytes)
    fits = options.slots is None and budget.for_slots >= budget.everything
    if options.io == "mmap" or (options.io == "auto" and fits):
        return MappedRecords(pack, stats, limit)
    return SlotCache(pack, budget.for_slots, options, stats, None if pinned else limit)
