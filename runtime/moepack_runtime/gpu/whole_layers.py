"""Offloading without experts in mind: a layer's records are all moved, for every pass through it.

What the paper calls naive, on the same packed records; only there to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepack_formats.pack import Pack

from ..options import format_size
from ..statistics import Statistics
from .device_residency import DeviceResidency
from .host_source import HostSource
from .link import Event, Link


@dataclass(frozen=True)
class _Moved:
    """A layer in a buffer, or on its way there."""

    layer: int
    buffer: int
    records: list[Tensor]
    copied: Event


class WholeLayers(DeviceResidency):
    """See :class:`moepack_runtime.cache.residency.Residency`.

    Two buffers of a layer take turns: while one layer computes, the next one can be copied.

    Args:
        pack: An open pack.
        source: Gives records in host memory.
        stats: Where misses and bytes are counted.
        link: The device.
    """

    def __init__(self, pack: Pack, source: HostSource, stats: Statistics, link: Link) -> None:
        self._pack, self._stats, self._link = pack, stats, link
        self._source = source
        largest = max(sum(at.spec.nbytes for at in layer) for layer in pack.layers)
        self._buffers = [
            torch.empty(largest, dtype=torch.uint8, device=link.device) for _ in range(2)
        ]
        # What used the memory before may still be queued.
        link.copy_after(link.computed())
        self._used: list[Event | None] = [None, None]
        self._ahead: _Moved | None = None
        self._next = 0

    def describe(self) -> str:
        """See :class:`Residency`."""
        nbytes = sum(buffer.numel() for buffer in self._buffers)
        return f"whole layers are moved, through {format_size(nbytes)} of GPU memory"

    def close(self) -> None:
        """Wait for what is queued, and let go of everything."""
        self._link.finish()
        self._source.close()
        self._buffers.clear()

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Residency`."""
        for records in self.fetch_ready(layer, experts):
            yield from records.items()

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """All at once, after the whole layer; the next layer's copy is queued behind it."""
        ahead = self._ahead
        if ahead is None or ahead.layer != layer:
            ahead = self._move(layer)
        self._ahead = self._move((layer + 1) % len(self._pack.layers))
        self._stats.misses += len(experts)
        records = {expert: ahead.records[expert] for expert in experts}
        self._link.compute_after(ahead.copied)
        self._link.reads(list(records.values()))
        yield records
        self._used[ahead.buffer] = self._link.computed()

    def address(self, layer: int, expert: int) -> None:
        """None: buffers are used again."""

    def holds(self, layer: int, expert: int) -> bool:
        """Never: a layer is moved for each pass."""
        return False

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Nothing is chosen by weights here."""

    def resident(self, layer: int) -> list[int]:
        """See :class:`Residency`."""
        return []

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Whole layers are moved whatever is guessed."""
        return []

    def _move(self, layer: int) -> _Moved:
        """Queue the copies of a layer's records."""
        number, self._next = self._next, 1 - self._next
        used = self._used[number]
        if used is not None:
            self._link.copy_after(used)
        sizes = [at.spec.nbytes for at in self._pack.layers[layer]]
        records = list(self._buffers[number][: sum(sizes)].split(sizes))
        keys = [(layer, expert) for expert in range(len(sizes))]
        event: Event = None
        for (_, expert), record in self._source.records(keys):
            event = self._link.copy(record, records[expert])
            self._source.copying(event)
            self._stats.bytes_copied += sizes[expert]
        return _Moved(layer, number, records, event)
