"""Which records are at hand: the interface, and the choice between slots and mapped files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from moepack_formats.errors import ResourceError
from moepack_formats.pack import Pack

from .mapped import MappedRecords
from .memory import default_budget
from .options import RuntimeOptions, format_size
from .slot_cache import SlotCache, record_sizes
from .statistics import Statistics


class Residency(Protocol):
    """Brings records to where they are computed with."""

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

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a record can be had without waiting for a file."""

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Start reading experts that will probably be needed soon, best guess first."""

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """A layer's router has chosen; see :class:`moepack_runtime.policies.Observing`."""

    def resident(self, layer: int) -> list[int]:
        """The experts of a layer that need no reading, or are being read already."""

    def describe(self) -> str:
        """One line for a person: mode and capacity."""

    def close(self) -> None:
        """End threads and let go of memory."""


def open_residency(
    pack: Pack, options: RuntimeOptions, trunk_nbytes: int, stats: Statistics
) -> Residency:
    """Choose and open the residency for a pack.

    Args:
        pack: An open pack.
        options: Budget and I/O mode.
        trunk_nbytes: Memory that the trunk takes, in bytes.
        stats: Where hits, misses and bytes are counted.

    Raises:
        ResourceError: The budget is below the smallest working set; the message says the need.
    """
    sizes = record_sizes(pack)
    work = _work_nbytes(pack)
    fixed = fixed_nbytes(pack, trunk_nbytes)
    smallest = fixed + sum(sizes)
    budget = default_budget() if options.ram is None else options.ram
    if budget < smallest:
        raise ResourceError(
            "not enough memory for the smallest working set",
            where=pack.folder,
            wanted=f"{format_size(smallest)} ({format_size(trunk_nbytes)} trunk, "
            f"{format_size(work)} work space, {format_size(sum(sizes))} experts)",
            got=format_size(budget),
            remedy=f"give --ram {smallest} or more",
        )
    for_slots = budget - fixed
    everything = sum(nbytes * count for nbytes, count in sizes.items())
    if options.io == "mmap" or (options.io == "auto" and everything <= for_slots):
        return MappedRecords(pack, stats)
    return SlotCache(pack, for_slots, options, stats)


def fixed_nbytes(pack: Pack, trunk_nbytes: int) -> int:
    """Bytes of a budget that are not for slots."""
    return trunk_nbytes + _work_nbytes(pack)


def _work_nbytes(pack: Pack) -> int:
    """Bytes of the largest expert as dense float32, which the reference path decodes it to."""
    return 4 * max(at.spec.parameters for layer in pack.layers for at in layer)
