"""Missing experts on the CPU, from host memory, while others are copied."""

from __future__ import annotations

import torch
from torch import Tensor

from moepack_formats.pack import Pack

from ..cache.residency import Residency
from ..experts import ExpertsAdapter
from ..kernels import Engine, FusedExperts
from ..statistics import Statistics
from .device_cache import DeviceCache
from .hybrid import Costs
from .link import Link


class CpuHelper:
    """Decides and computes for the layers of a model.

    Args:
        pack: An open pack.
        adapters: Its experts modules.
        engine: Computes on the CPU.
        host: Brings records to host memory.
        cache: Knows what is on the device, and what is being copied.
        costs: Measured speeds.
        link: Keeps the time.
        stats: Where experts are counted.
    """

    def __init__(
        self,
        pack: Pack,
        adapters: list[ExpertsAdapter],
        engine: Engine,
        host: Residency,
        cache: DeviceCache,
        costs: Costs,
        link: Link,
        stats: Statistics,
    ) -> None:
        self._pack, self._adapters, self._engine = pack, adapters, engine
        self._host, self._cache, self._costs = host, cache, costs
        self._link, self._stats = link, stats
        self._fused: dict[int, FusedExperts | None] = {}

    def choose(self, layer: int, needed: list[int]) -> list[int]:
        """The experts of a layer that the CPU should compute."""
        if self._kernels(layer) is None:
            return []
        for nbytes, seconds in self._cache.measured():
            self._costs.copied(nbytes, seconds)
        missing = [
            (expert, self._pack.layers[layer][expert].spec.nbytes)
            for expert in needed
            if not self._cache.holds(layer, expert)
        ]
        return self._costs.choose(missing, self._cache.backlog_nbytes / self._costs.copy_rate)

    def compute(self, layer: int, experts: list[int], x: Tensor, weights: Tensor) -> Tensor:
        """Weighted outputs of experts at one token.

        Args:
            layer: Ordinal of the layer.
            experts: In the order of their rows; an expert may come twice.
            x: ``[H]`` float32 in host memory.
            weights: ``[len(experts)]`` float32 in host memory.

        Returns:
            ``[len(experts), H]`` float32.
        """
        fused = self._kernels(layer)
        assert fused is not None  # choose() names experts only where there is one
        outputs = torch.empty(len(experts), len(x), dtype=torch.float32)
        start, nbytes = self._link.clock(), 0
        for records in self._host.fetch_ready(layer, list(dict.fromkeys(experts))):
            here = [row for row, expert in enumerate(experts) if expert in records]
            data = [records[experts[row]] for row in here]
            specs = [self._pack.layers[layer][experts[row]].spec for row in here]
            part = torch.empty(len(here), len(x), dtype=torch.float32)
            outputs[here] = fused(x, data, specs, weights[here], part)
            nbytes += sum(record.numel() for record in data)
        self._link.host_worked(nbytes)
        self._costs.computed(nbytes, self._link.clock() - start)
        self._stats.computed_on_cpu += len(experts)
        return outputs

    def _kernels(self, layer: int) -> FusedExperts | None:
        if layer not in self._fused:
            self._fused[layer] = self._engine.fused(self._adapters[layer])
        return self._fused[layer]
