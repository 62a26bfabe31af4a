"""Memory for resident records: slots of equal size, taken once and reused."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from moepack_formats.errors import ResourceError

from ..options import format_size


def huge_pages(nbytes: int) -> mmap.mmap:
    """Memory of the process's own, in huge pages where the system has them.

    A token reads hundreds of megabytes from all over memory: with pages of 4 KiB, the lookups of
    their addresses cost a tenth of the bandwidth and more.

    Raises:
        OSError: There is not enough memory.
    """
    # Anonymous mappings start at a page, as direct reads need. Private, because shared ones are
    # files to the kernel: without huge pages, and not given back by DONTNEED.
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def zeros_in_huge_pages(rows: int, cols: int) -> Tensor:
    """``[rows, cols]`` float32 zeros, in memory that goes back when nobody has the tensor any more.

    The C library maps what is as large as many tokens' outputs anew each time, in pages of 4 KiB,
    and taking those costs more than what is computed with them.
    """
    if rows * cols == 0:
        return torch.zeros(rows, cols, dtype=torch.float32)
    memory = huge_pages(rows * cols * 4)  # which come as zeros
    return torch.frombuffer(memory, dtype=torch.float32, count=rows * cols).view(rows, cols)


class Arena:
    """Slots for records of one size class.

    Args:
        slot_nbytes: Size of a slot, a multiple of 4096.
        slots: How many.

    Raises:
        ResourceError: There is not enough memory.
    """

    def __init__(self, slot_nbytes: int, slots: int) -> None:
        self.slot_nbytes, self.slots = slot_nbytes, slots
        try:
            self._memory = huge_pages(slots * slot_nbytes)
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"cannot take {format_size(slots * slot_nbytes)} for expert slots: {error}",
                remedy="lower --ram",
            ) from error
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._view = memoryview(self._memory)

    def tensor(self, slot: int, count: int = 1) -> Tensor:
        """``[count * slot_nbytes]`` uint8 over some slots."""
        return self._bytes[slot * self.slot_nbytes : (slot + count) * self.slot_nbytes]

    def buffer(self, slot: int) -> memoryview:
        """The slot's bytes, for reading into."""
        return self._view[slot * self.slot_nbytes : (slot + 1) * self.slot_nbytes]

    def give_back(self, slot: int) -> None:
        """Return a slot's memory to the system; the next write to it takes memory again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self.slot_nbytes, self.slot_nbytes)
