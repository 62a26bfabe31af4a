"""Records as views of mapped files: no copy, no slots; the page cache decides what stays."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepack_formats import osio
from moepack_formats.errors import IntegrityError, ResourceError
from moepack_formats.layer import RecordLocation
from moepack_formats.pack import Pack, check_record

from ..disk.truncation_guard import Guard
from ..memory.budget import MemoryLimit
from ..statistics import Statistics


class MappedRecords:
    """Memory-mapped layer files.

    A record's checksum is compared on its first use. Before each use the file's size is asked, and
    after it whether a page was missing, so that a file that is truncated ends in an error. Without
    the native library a truncation during the use itself still ends in SIGBUS.

    Args:
        pack: An open pack; its descriptors are used.
        stats: Where first uses count as misses and later ones as hits.
        limit: The budget of the process.
    """

    lookahead = 1

    def __init__(self, pack: Pack, stats: Statistics, limit: MemoryLimit | None = None) -> None:
        self._pack, self._stats, self._limit = pack, stats, limit
        self._maps: dict[int, mmap.mmap] = {}
        self._guard = Guard()
        self._checked: set[tuple[int, int]] = set()
        self._files = [tuple({at.descriptor for at in layer}) for layer in pack.layers]

    def demand(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing: the use itself reads; see :class:`Residency`."""

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Residency`."""
        for expert in experts:
            yield expert, self._record(layer, expert)
            self._check_used(layer, [expert])

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """All at once; see :class:`Residency`."""
        yield {expert: self._record(layer, expert) for expert in experts}
        self._check_used(layer, experts)

    def _record(self, layer: int, expert: int) -> Tensor:
        if layer == 0:
            self.make_room(0)
        at = self._pack.layers[layer][expert]
        record = self._view(at, layer, expert)
        if (layer, expert) in self._checked:
            self._stats.hits += 1
            return record
        try:
            check_record(record.numpy().data, at, layer, expert)
        except IntegrityError:
            self._check_used(layer, [expert])
            raise
        self._checked.add((layer, expert))
        self._stats.misses += 1
        self._stats.bytes_read += at.spec.nbytes
        return record

    def _check_used(self, layer: int, experts: Sequence[int]) -> None:
        """Raise when a page that was used was not in the file any more."""
        for descriptor in {self._pack.layers[layer][expert].descriptor for expert in experts}:
            offset = self._guard.missing(descriptor)
            if offset is None:
                continue
            # The mapping has zeros where the file has nothing.
            self._guard.remove(descriptor)
            self._maps.pop(descriptor, None)
            found = next(
                (e for e in experts if self._holds(layer, e, descriptor, offset)), experts[0]
            )
            raise _truncated(self._pack.layers[layer][found], layer, found, offset)

    def _holds(self, layer: int, expert: int, descriptor: int, offset: int) -> bool:
        at = self._pack.layers[layer][expert]
        return at.descriptor == descriptor and 0 <= offset - at.offset < at.spec.nbytes

    def address(self, layer: int, expert: int) -> int | None:
        """See :class:`Residency`."""
        if (layer, expert) not in self._checked:
            return None
        return self._view(self._pack.layers[layer][expert], layer, expert).data_ptr()

    def check_used(self, layer: int) -> None:
        """See :class:`Residency`."""
        # Every token asks for every layer: no more than needed, as long as nothing is missing.
        if self._guard.quiet:
            return
        if any(self._guard.missing(file) is not None for file in self._files[layer]):
            self._check_used(layer, range(len(self._pack.layers[layer])))

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a record was used before, and so is probably in the page cache still."""
        return (layer, expert) in self._checked

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Ask the kernel to read ahead; see :class:`Residency`."""
        absent = [expert for expert in experts if (layer, expert) not in self._checked]
        for expert in absent:
            at = self._pack.layers[layer][expert]
            os.posix_fadvise(at.descriptor, at.offset, at.spec.nbytes, os.POSIX_FADV_WILLNEED)
        self._stats.speculative_reads += len(absent)
        return absent

    def make_room(self, nbytes: int) -> None:
        """See :class:`Residency`. Mapped pages are the kernel's to take back."""
        if self._limit is not None and self._limit.room(nbytes) < 0:
            raise self._limit.error()

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Nothing: the page cache has a policy of its own."""

    def resident(self, layer: int) -> list[int]:
        """All: what is in the page cache cannot be told."""
        return list(range(len(self._pack.layers[layer])))

    def describe(self) -> str:
        """See :class:`Residency`."""
        return "records memory-mapped"

    def close(self) -> None:
        """Forget the mappings; they end when no view of them is left."""
        self._guard.close()
        self._maps.clear()

    def _view(self, at: RecordLocation, layer: int, expert: int) -> Tensor:
        size = os.fstat(at.descriptor).st_size
        if size < at.offset + at.spec.nbytes:
            raise _truncated(at, layer, expert, size)
        mapping = self._maps.get(at.descriptor)
        if mapping is None:
            # A private writable mapping: torch warns of read-only buffers, and nothing writes.
            with osio.io_errors(at.file):
                mapping = mmap.mmap(at.descriptor, size, access=mmap.ACCESS_COPY)
            self._maps[at.descriptor] = mapping
            address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
            self._guard.add(at.descriptor, address, size)
        return torch.frombuffer(mapping, dtype=torch.uint8, count=at.spec.nbytes, offset=at.offset)


def _truncated(at: RecordLocation, layer: int, expert: int, end: int) -> ResourceError:
    return ResourceError(
        "the file was truncated while in use",
        where=f"{at.file}, layer {layer}, expert {expert}",
        wanted=f"{at.offset + at.spec.nbytes} bytes",
        got=end,
        remedy="restore the file and run it again",
    )
