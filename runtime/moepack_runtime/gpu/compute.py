"""What an experts module computes when its records are on a GPU.

The host learns of a layer which experts its tokens go to, and which the next layer's router would
pick: one transfer, the only time that it waits. Then it queues copies and kernels and goes on.

Shape letters: T tokens, K choices of a token, H hidden size, E experts, P = T * K places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepack_formats.layer import RecordLocation

from ..cache.residency import Residency
from ..experts import ExpertsAdapter
from ..kernels import Engine, FusedExperts
from ..statistics import Statistics
from .helper import CpuHelper
from .link import Link
from .resident import ResidentRecords
from .speculator import DeviceSpeculator


class DeviceCompute:
    """Stands in for the forward of one experts module.

    Outputs are added in the router's order whatever order records arrive in: cache and prefetch
    change no result. Where the CPU computes an expert its output has other roundings.

    Args:
        layer: Ordinal of the MoE layer.
        adapter: The experts module.
        records: Where its records are; their layouts.
        residency: Brings the records to the device.
        speculator: Guesses the next layer's experts; None without prefetch.
        stats: Counts tokens.
        engine: Computes with the records.
        link: The device.
        helper: Computes missing experts on the CPU; None without.
    """

    def __init__(
        self,
        layer: int,
        adapter: ExpertsAdapter,
        records: list[RecordLocation],
        residency: Residency,
        speculator: DeviceSpeculator | None,
        stats: Statistics,
        engine: Engine,
        link: Link,
        helper: CpuHelper | None = None,
    ) -> None:
        self._layer, self._adapter, self._records = layer, adapter, records
        self._residency, self._speculator, self._stats = residency, speculator, stats
        self._engine, self._link, self._helper = engine, link, helper
        self._fused: FusedExperts | None = None
        self._grouped: Any | None = None
        self._table: Any | None = None
        self._asked, self._choices = False, 0

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden`` [T, H], ``top_k_index`` [T, K], ``top_k_weights`` [T, K] to [T, H]."""
        guess = None
        if self._speculator is not None:
            guess = self._speculator.ask(self._layer, top_k_index)
        return self._compute(hidden, top_k_index, top_k_weights, guess)

    @property
    def ready(self) -> bool:
        """Whether a first pass has shown what a compiled one must know."""
        return self._asked and (self._speculator is None or self._speculator.routers.found)

    @property
    def waits(self) -> bool:
        """Whether the host has to learn which experts were chosen."""
        return self._grouped is None or not isinstance(self._residency, ResidentRecords)

    def traced_guess(self) -> Tensor | None:
        """What a compiled pass has to hand to :meth:`replayed` besides the experts' inputs."""
        return None if self._speculator is None else self._speculator.traced(self._layer)

    def replayed(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, guess: Tensor | None
    ) -> Tensor:
        """A call from a compiled pass; the host runs it for every pass if it :attr:`waits`."""
        if not self.waits:
            return self._resident(hidden, top_k_index, top_k_weights)
        if self._speculator is not None:
            wanted = self._speculator.wants(self._layer, len(top_k_index))
            guess = guess if wanted else None
        return self._compute(hidden, top_k_index, top_k_weights, guess)

    def count(self, tokens: int) -> None:
        """So many tokens went through a compiled pass that the host has not seen."""
        self._count(tokens, tokens * self._choices)

    def _count(self, tokens: int, hits: int) -> None:
        if self._layer == 0:
            self._stats.tokens += tokens
        self._stats.hits += hits

    def _compute(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, guess: Tensor | None
    ) -> Tensor:
        """The same; ``guess`` is what the next layer's router would pick, ``[T, K]``."""
        self._find_kernels(hidden.device)
        self._choices = top_k_index.shape[1]
        if not self.waits:
            self._count(len(top_k_index), top_k_index.numel())
            return self._resident(hidden, top_k_index, top_k_weights)
        self._count(len(top_k_index), 0)
        help_with = self._helper is not None and self._fused is not None and len(top_k_index) == 1
        asked = [top_k_index] if guess is None else [top_k_index, guess]
        if help_with:
            asked += [hidden[0].float(), top_k_weights[0].float()]
        there = self._link.to_host(asked)
        chosen = there[0].reshape(-1).tolist()
        # An index of num_experts or more is a place without an expert.
        needed = [e for e in dict.fromkeys(chosen) if 0 <= e < self._adapter.num_experts]
        if self._speculator is not None:
            told = there[1] if guess is not None else None
            self._speculator.told(self._layer, needed, told)
        if self._fused is not None and len(top_k_index) == 1:
            inputs = (there[-2], there[-1]) if help_with else None
            return self._one_token(self._fused, hidden, top_k_weights, chosen, needed, inputs)
        if self._grouped is not None:
            return self._many_tokens(hidden, top_k_index, top_k_weights, needed)
        return self._by_matrices(hidden, top_k_weights, chosen, needed)

    def _find_kernels(self, device: torch.device) -> None:
        # Not before the first call: on the meta device an activation cannot be tried.
        if not self._asked:
            self._fused = self._engine.fused(self._adapter)
            grouped = getattr(self._engine, "grouped", None)
            self._grouped = None if grouped is None else grouped(self._adapter)
            if self._grouped is not None:
                # A layout that only some experts have would be compiled when one of them is chosen.
                self._grouped.warm_up([at.spec for at in self._records], device)
            self._asked = True

    def _resident(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Everything is there: the host learns nothing and waits for nothing."""
        assert self._grouped is not None  # the caller has looked
        if self._table is None:
            assert isinstance(self._residency, ResidentRecords)  # so it has
            records = self._residency.layer(self._layer)
            self._table = self._grouped.table(records, [at.spec for at in self._records])
        if len(index) == 1:
            # In float32 as with a cache, so that it is the same kernel.
            x = hidden[0].float().contiguous()
            y: Tensor = self._grouped.token(x, index[0], weights[0].float(), self._table)
            return y.to(hidden.dtype).unsqueeze(0)
        outputs = hidden.new_zeros(index.numel(), hidden.shape[1], dtype=torch.float32)
        self._grouped.many_tokens(hidden.contiguous(), index, weights, self._table, outputs)
        return outputs.view(*index.shape, -1).sum(dim=1).to(hidden.dtype)

    def _one_token(
        self,
        fused: FusedExperts,
        hidden: Tensor,
        top_k_weights: Tensor,
        index: list[int],
        needed: list[int],
        inputs: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """One token. Records that arrive in several turns give the same bits as all at once."""
        places = [k for k, expert in enumerate(index) if 0 <= expert < self._adapter.num_experts]
        chosen = [index[k] for k in places]
        x, weights = hidden[0].float().contiguous(), top_k_weights[0].float().contiguous()
        if len(places) < len(index):
            weights = weights[self._upload(places)]
        helped: list[int] = []
        if self._helper is not None and inputs is not None:
            helped = self._helper.choose(self._layer, needed)
        outputs = None
        rest = [expert for expert in needed if expert not in helped]
        for records in self._residency.fetch_ready(self._layer, rest):
            here = [k for k, expert in enumerate(chosen) if expert in records]
            data = [records[chosen[k]] for k in here]
            specs = [self._records[chosen[k]].spec for k in here]
            if len(here) == len(chosen):
                return fused(x, data, specs, weights).to(hidden.dtype).unsqueeze(0)
            if outputs is None:
                outputs = x.new_empty(len(chosen), x.shape[0])  # [K, H]
            if len(here) == 1:
                k = here[0]
                fused(x, data, specs, weights[k : k + 1], outputs[k : k + 1])
                continue
            rows = self._upload(here)
            part = x.new_empty(len(here), x.shape[0])
            outputs.index_copy_(0, rows, fused(x, data, specs, weights[rows], part))
        if outputs is None:
            outputs = x.new_zeros(len(chosen), x.shape[0])
        if self._helper is not None and inputs is not None and helped:
            # While the copies above are under way.
            here = [k for k, expert in enumerate(chosen) if expert in helped]
            y = self._helper.compute(
                self._layer, [chosen[k] for k in here], inputs[0], inputs[1][places][here]
            )
            outputs.index_copy_(0, self._upload(here), self._link.to_device(y))
        if not chosen:
            return torch.zeros_like(hidden)
        return fused.total(outputs.unsqueeze(0)).to(hidden.dtype)

    def _many_tokens(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, needed: list[int]
    ) -> Tensor:
        """Each turn's experts in one call, tokens grouped by expert."""
        assert self._grouped is not None  # the caller has looked
        tokens, choices = top_k_index.shape
        x, clamped = hidden.contiguous(), top_k_index.clamp(max=self._adapter.num_experts)
        outputs = x.new_zeros(tokens * choices, x.shape[1], dtype=torch.float32)
        for records in self._residency.fetch_ready(self._layer, needed):
            # Experts are numbered anew within a turn; what is not in it is no expert.
            numbers = torch.full((self._adapter.num_experts + 1,), len(records))
            numbers[list(records)] = torch.arange(len(records))
            local = self._link.to_device(numbers)[clamped]
            specs = [self._records[expert].spec for expert in records]
            table = self._grouped.table(list(records.values()), specs)
            self._grouped.many_tokens(x, local, top_k_weights, table, outputs)
        return outputs.view(tokens, choices, -1).sum(dim=1).to(hidden.dtype)

    def _by_matrices(
        self, hidden: Tensor, top_k_weights: Tensor, chosen: list[int], needed: list[int]
    ) -> Tensor:
        """Any number of tokens and any activation."""
        tokens, choices = top_k_weights.shape
        dtype = torch.promote_types(hidden.dtype, top_k_weights.dtype)
        outputs = hidden.new_zeros(tokens * choices, hidden.shape[-1], dtype=dtype)
        weights = top_k_weights.reshape(-1, 1)
        for expert, record in self._residency.fetch(self._layer, needed):
            places = self._upload([p for p, e in enumerate(chosen) if e == expert])
            spec = self._records[expert].spec
            y = self._engine.expert(record, spec, self._adapter, hidden[places // choices])
            outputs[places] = y * weights[places]
        return outputs.view(tokens, choices, -1).sum(dim=1).to(hidden.dtype)

    def _upload(self, numbers: list[int]) -> Tensor:
        return self._link.to_device(torch.tensor(numbers))
