"""Pinning host memory that exists already, in bulk.

A GPU copies straight from pinned pages. Memory is registered as it is, in large pieces: what was
mapped with huge pages and filled by direct reads needs no second copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..options import format_size

_log = logging.getLogger(__name__)

PIECE_NBYTES = 1 << 30
"""Memory is registered in pieces of this size, so that a limit leaves most of it pinned."""

Register = Callable[[int, int], int]
"""``register(address, nbytes)`` to 0, or the driver's error code."""


class PinnedMemory:
    """Pages that are registered with the driver until :meth:`close`.

    Args:
        register: Registers a run of memory.
        unregister: Undoes it.
        piece_nbytes: Of a run.
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
            memory: Contiguous uint8 tensors in host memory.
        """
        wanted = sum(tensor.numel() for tensor in memory)
        for tensor in memory:
            start = tensor.data_ptr()
            for offset in range(0, tensor.numel(), self._piece):
                nbytes = min(self._piece, tensor.numel() - offset)
                error = self._register(start + offset, nbytes)
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
                self._pinned.append(start + offset)
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
    return PinnedMemory(
        lambda address, nbytes: int(runtime.cudaHostRegister(address, nbytes, 0)),
        lambda address: runtime.cudaHostUnregister(address),
    )
