"""Every record in GPU memory, when the budget allows it: read once, then nothing moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepack_formats.errors import ResourceError
from moepack_formats.pack import Pack

from ..cache.residency import Residency
from ..options import format_size
from ..statistics import Statistics
from .device_residency import DeviceResidency
from .link import Link


class ResidentRecords(DeviceResidency):
    """See :class:`moepack_runtime.cache.residency.Residency`.

    Args:
        pack: An open pack.
        host: Brings each record to host memory once; closed when all are on the device.
        stats: Where hits are counted.
        link: The device.

    Raises:
        ResourceError: The device has less memory than was asked for.
    """

    def __init__(self, pack: Pack, host: Residency, stats: Statistics, link: Link) -> None:
        self._stats = stats
        self._layers: list[list[Tensor]] = []
        try:
            for layer, places in enumerate(pack.layers):
                self._layers.append(
                    self._load(layer, [at.spec.nbytes for at in places], host, link)
                )
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "the GPU has no room for all experts", remedy="lower --vram"
            ) from error
        finally:
            link.finish()
            host.close()

    @staticmethod
    def _load(layer: int, sizes: Sequence[int], host: Residency, link: Link) -> list[Tensor]:
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=link.device)
        # What used the memory before may still be queued.
        link.copy_after(link.computed())
        records = list(memory.split(list(sizes)))
        for expert, record in host.fetch(layer, range(len(sizes))):
            # The host's slot is given to another record next.
            link.wait(link.copy(record, records[expert]))
        return records

    def layer(self, layer: int) -> list[Tensor]:
        """The records of a layer, by expert."""
        return self._layers[layer]

    def describe(self) -> str:
        """See :class:`Residency`."""
        nbytes = sum(record.numel() for layer in self._layers for record in layer)
        return f"all experts are in GPU memory ({format_size(nbytes)})"

    def close(self) -> None:
        """Let go of the memory."""
        self._layers.clear()

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Residency`."""
        for records in self.fetch_ready(layer, experts):
            yield from records.items()

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """All at once."""
        self._stats.hits += len(experts)
        yield {expert: self._layers[layer][expert] for expert in experts}

    def address(self, layer: int, expert: int) -> int | None:
        """See :class:`Residency`."""
        return self._layers[layer][expert].data_ptr()

    def holds(self, layer: int, expert: int) -> bool:
        """Always."""
        return True

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Nothing is chosen by weights here."""

    def resident(self, layer: int) -> list[int]:
        """See :class:`Residency`."""
        return list(range(len(self._layers[layer])))

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Nothing is missing."""
        return []
