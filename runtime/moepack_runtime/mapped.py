"""Records as views of mapped files: no copy, no slots; the page cache decides what stays."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepack_formats import osio
from moepack_formats.errors import ResourceError
from moepack_formats.layer import RecordLocation
from moepack_formats.pack import Pack, check_record

from .statistics import Statistics


class MappedRecords:
    """Memory-mapped layer files.

    A record's checksum is compared on its first use. Before each use the file's size is asked, so
    that a truncated file ends in an error; only a truncation during the use itself would still
    end in SIGBUS.

    Args:
        pack: An open pack; its descriptors are used.
        stats: Where first uses count as misses and later ones as hits.
    """

    def __init__(self, pack: Pack, stats: Statistics) -> None:
        self._pack, self._stats = pack, stats
        self._maps: dict[int, mmap.mmap] = {}
        self._checked: set[tuple[int, int]] = set()

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Residency`."""
        for expert in experts:
            at = self._pack.layers[layer][expert]
            record = self._view(at, layer, expert)
            if (layer, expert) in self._checked:
                self._stats.hits += 1
            else:
                check_record(record.numpy().data, at, layer, expert)
                self._checked.add((layer, expert))
                self._stats.misses += 1
                self._stats.bytes_read += at.spec.nbytes
            yield expert, record

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """All at once; see :class:`Residency`."""
        yield dict(self.fetch(layer, experts))

    def address(self, layer: int, expert: int) -> int | None:
        """See :class:`Residency`."""
        if (layer, expert) not in self._checked:
            return None
        return self._view(self._pack.layers[layer][expert], layer, expert).data_ptr()

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a record was used before, and so is probably in the page cache still."""
        return (layer, expert) in self._checked

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Ask the kernel to read ahead; see :class:`Residency`."""
        for expert in experts:
            if (layer, expert) not in self._checked:
                at = self._pack.layers[layer][expert]
                os.posix_fadvise(at.descriptor, at.offset, at.spec.nbytes, os.POSIX_FADV_WILLNEED)
                self._stats.speculative_reads += 1

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
        self._maps.clear()

    def _view(self, at: RecordLocation, layer: int, expert: int) -> Tensor:
        size = os.fstat(at.descriptor).st_size
        if size < at.offset + at.spec.nbytes:
            raise ResourceError(
                "the file was truncated while in use",
                where=f"{at.file}, layer {layer}, expert {expert}",
                wanted=f"{at.offset + at.spec.nbytes} bytes",
                got=size,
                remedy="restore the file and run it again",
            )
        mapping = self._maps.get(at.descriptor)
        if mapping is None:
            # A private writable mapping: torch warns of read-only buffers, and nothing writes.
            with osio.io_errors(at.file):
                mapping = mmap.mmap(at.descriptor, size, access=mmap.ACCESS_COPY)
            self._maps[at.descriptor] = mapping
        return torch.frombuffer(mapping, dtype=torch.uint8, count=at.spec.nbytes, offset=at.offset)
