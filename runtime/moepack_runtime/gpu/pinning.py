"""Pinning host memory that exists already, in bulk.

A GPU copies straight from pinned pages. Memory is registered as it is, in large pieces: what was
mapped with huge pages and filled by direct reads needs no second copy. The driver refuses to copy
from memory of which only a part is registered, or from two pieces: pieces end where slots do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..options import format_size

_log = logging.getLogger(__name__)

PIECE_NBYTES = 1 << 30
"""Memory is registered in pieces of about this size, so that a limit leaves most of it pinned."""

Register = Callable[[int, int], int]
"""``register(address, nbytes)`` to 0, or the driver's error code."""


class PinnedMemory:
    """Pages that are registered with the driver until :meth:`close`.

    Args:
        register: Registers a run of memory.
        unregister: Undoes it.
        piece_nbytes: The most of a run, where more than a slot fits in.
    """

    def __init__(
        self,
        register: Register,
        unregister: Callable[[int], object],
        piece_nbytes: int = PIECE_NBYTES,
    ) -> None:
        self._register, self._unregister = register, unregister
        self._piece = piece_nbytes
        self._pinned: list[int] = []
        self.nbytes = 0

    def pin(self, memory: Sequence[Tensor]) -> None:
        """Pin as much as the system allows; warn about the rest and go on.

        Copies from pages that are not pinned go through the driver's own buffer: slower, and the
        host waits for them.

        Args:
            memory: Contiguous ``[slots, bytes of a slot]`` uint8 in host memory.
        """
        wanted = sum(tensor.numel() for tensor in memory)
        for tensor in memory:
            slots, slot_nbytes = tensor.shape
            each = max(1, self._piece // slot_nbytes)
            for first in range(0, slots, each):
                address = tensor.data_ptr() + first * slot_nbytes
                nbytes = min(each, slots - first) * slot_nbytes
                error = self._register(address, nbytes)
                if error:
                    _log.warning(
                        "only %s of %s of the expert slots in memory can be pinned (error %d); "
                        "copies to the GPU from the others are slower. Raise the limit of locked "
                        "memory (ulimit -l), or lower --ram",
                        format_size(self.nbytes),
                        format_size(wanted),
                        error,
                    )
                    return
                self._pinned.append(address)
                self.nbytes += nbytes

    def close(self) -> None:
        """Undo everything."""
        for address in self._pinned:
            self._unregister(address)
        self._pinned.clear()
        self.nbytes = 0


def cuda_pinned_memory() -> PinnedMemory:
    """Pinned memory of the CUDA driver."""
    runtime = torch.cuda.cudart()

    def register(address: int, nbytes: int) -> int:
        error = int(runtime.cudaHostRegister(address, nbytes, 0))
        if error:
            _take_error()
        return error

    return PinnedMemory(register, lambda address: runtime.cudaHostUnregister(address))


def _take_error() -> None:
    """CUDA keeps an error until somebody asks; torch does after a launch, and would blame that."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
