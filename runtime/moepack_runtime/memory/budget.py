"""The memory budget of a process that runs a pack: what is needed at least, what is left."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moepack_formats.errors import ResourceError
from moepack_formats.pack import Pack

from ..options import format_size
from .available import own_nbytes

OVERHEAD_NBYTES = 64 << 20
"""What a budget covers besides the process's own pages: the code it runs (pages of files that must
stay), page tables and other kernel memory, and what libraries take on their first use."""


@dataclass(frozen=True)
class MemoryLimit:
    """A budget that is watched while a model runs.

    Attributes:
        nbytes: The budget.
    """

    nbytes: int

    def room(self, nbytes: int) -> int:
        """Bytes that would be left with ``nbytes`` more; negative when they do not fit."""
        return self.nbytes - OVERHEAD_NBYTES - own_nbytes() - nbytes

    def error(self) -> ResourceError:
        """What to raise when nothing more can give way."""
        return ResourceError(
            "the text and its work space no longer fit in memory",
            wanted=f"less than {format_size(self.nbytes)}",
            got=format_size(own_nbytes() + OVERHEAD_NBYTES),
            remedy="raise --ram or shorten the text",
        )


@dataclass(frozen=True)
class Budget:
    """What a process may take that runs a pack, and what it needs, all in bytes.

    Attributes:
        nbytes: What it may take.
        process: Interpreter, libraries and kernel.
        trunk: Everything but the routed experts.
        work: Activations and the context of a short text.
        smallest: One expert of each record size.
        everything: All experts.
    """

    nbytes: int
    process: int
    trunk: int
    work: int
    smallest: int
    everything: int

    @property
    def fixed(self) -> int:
        """What is not for experts."""
        return self.process + self.trunk + self.work

    @property
    def for_slots(self) -> int:
        """What is left for experts; negative when not even the trunk fits."""
        return self.nbytes - self.fixed

    def with_trunk(self, nbytes: int) -> Budget:
        """The same with a trunk of ``nbytes``."""
        return replace(self, trunk=nbytes)

    def holds(self, trunk: int) -> bool:
        """Whether a trunk of so many bytes and all experts fit."""
        return self.with_trunk(trunk).for_slots >= self.everything

    def check(self, pack: Pack) -> None:
        """Refuse what is below the smallest working set.

        Raises:
            ResourceError: The message says the need.
        """
        parts = (
            f"{format_size(self.process)} process, {format_size(self.trunk)} trunk, "
            f"{format_size(self.work)} work space"
        )
        check_budget(self.nbytes, self.fixed, self.smallest, parts, where=pack.folder)


def check_budget(
    nbytes: int, fixed: int, smallest: int, parts: str, *, where: object = None
) -> None:
    """Refuse a budget that is below the smallest working set.

    Args:
        nbytes: The budget, as are the next two in bytes.
        fixed: What is not for experts.
        smallest: One expert of each record size.
        parts: What ``fixed`` consists of, for a person.
        where: The pack.

    Raises:
        ResourceError: The message says the need.
    """
    least = fixed + smallest
    if nbytes < least:
        raise ResourceError(
            "not enough memory for the smallest working set",
            where=where,
            wanted=f"{format_size(least)} ({parts}, {format_size(smallest)} experts)",
            got=format_size(nbytes),
            remedy=f"give --ram {_enough(least) >> 20}MiB or more",
        )


def _enough(least: int) -> int:
    """``least`` and 8 to 16 MiB more, in whole steps of 8 MiB: the next process may be larger."""
    step = 8 << 20
    return (least // step + 2) * step
