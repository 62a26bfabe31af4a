"""What an experts module computes when its weights are in a pack.

Shape letters: T tokens, K experts a token, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepack_formats.layer import RecordLocation

from .experts import ExpertsAdapter
from .kernels import Engine, FusedExperts
from .prefetch import Speculator
from .residency import Residency
from .statistics import Statistics


class ExpertsCompute:
    """Stands in for the forward of one experts module.

    The outputs of a token's experts are added in the router's order, whatever order their records
    arrive in: cache and prefetch never change a result.

    Args:
        layer: Ordinal of the MoE layer.
        adapter: The experts module.
        records: Where its records are; their layouts.
        residency: Brings the records.
        speculator: Guesses the next layer's experts; None without prefetch.
        stats: Counts tokens.
        engine: Computes with the records.
    """

    def __init__(
        self,
        layer: int,
        adapter: ExpertsAdapter,
        records: list[RecordLocation],
        residency: Residency,
        speculator: Speculator | None,
        stats: Statistics,
        engine: Engine,
    ) -> None:
        self._layer, self._adapter, self._records = layer, adapter, records
        self._residency, self._speculator, self._stats = residency, speculator, stats
        self._engine = engine
        self._fused: FusedExperts | None = None
        self._asked_for_fused = False
        self._native: Any | None = None
        self._table: Any | None = None

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden`` [T, H], ``top_k_index`` [T, K], ``top_k_weights`` [T, K] to [T, H]."""
        fused = self._find_fused()
        if fused is not None and len(top_k_index) == 1:
            return self._one_token(fused, hidden, top_k_index, top_k_weights)
        chosen = top_k_index.reshape(-1)  # [T * K]
        # Places sorted by expert; an index of num_experts or more is a place without an expert.
        order = torch.argsort(chosen, stable=True)
        experts, counts = torch.unique_consecutive(chosen[order], return_counts=True)
        places = {
            expert: place
            for expert, place in zip(experts.tolist(), order.split(counts.tolist()), strict=True)
            if 0 <= expert < self._adapter.num_experts
        }
        self._announce(top_k_index, list(places))
        if fused is not None and fused.takes(len(top_k_index)):
            return self._many_tokens(fused, hidden, top_k_weights, places)
        return self._by_matrices(hidden, top_k_weights, places)

    def _by_matrices(
        self, hidden: Tensor, top_k_weights: Tensor, places: dict[int, Tensor]
    ) -> Tensor:
        """Any number of tokens and any activation."""
        tokens, choices = top_k_weights.shape
        dtype = torch.promote_types(hidden.dtype, top_k_weights.dtype)
        outputs = hidden.new_zeros(tokens * choices, hidden.shape[-1], dtype=dtype)
        weights = top_k_weights.reshape(-1, 1)
        for expert, record in self._residency.fetch(self._layer, list(places)):
            here = places[expert]
            spec = self._records[expert].spec
            y = self._engine.expert(record, spec, self._adapter, hidden[here // choices])
            outputs[here] = y * weights[here]
        return outputs.view(tokens, choices, -1).sum(dim=1).to(hidden.dtype)

    def _many_tokens(
        self,
        fused: FusedExperts,
        hidden: Tensor,
        top_k_weights: Tensor,
        places: dict[int, Tensor],
    ) -> Tensor:
        """Each expert in one call with all of its tokens."""
        tokens, choices = top_k_weights.shape
        x, weights = hidden.float().contiguous(), top_k_weights.float().reshape(-1)
        filled = sum(map(len, places.values())) == tokens * choices
        make = torch.empty if filled else torch.zeros
        outputs = make(tokens * choices, x.shape[1])
        for expert, record in self._residency.fetch(self._layer, list(places)):
            here, spec = places[expert], self._records[expert].spec
            fused.tokens(x, record, spec, here // choices, here, weights[here], outputs)
        return fused.total(outputs.view(tokens, choices, -1)).to(hidden.dtype)

    @property
    def native_layer(self) -> Any | None:
        """What a tape computes this layer with (``native.ExpertsLayer``), or None.

        Records that stay where they are go into its table as they are first used, and are then
        computed with without coming back here.
        """
        if self._native is None:
            make = getattr(self._find_fused(), "layer", None)
            if make is not None:
                self._native, self._table = make([at.spec for at in self._records])
        return self._native

    def _announce(self, top_k_index: Tensor, needed: list[int]) -> None:
        if self._layer == 0:
            self._stats.tokens += len(top_k_index)
        if self._speculator is not None:
            self._speculator.experts_called(self._layer, top_k_index, needed)

    def _find_fused(self) -> FusedExperts | None:
        # Not before the first call: on the meta device an activation cannot be tried.
        if not self._asked_for_fused:
            self._fused = self._engine.fused(self._adapter)
            self._asked_for_fused = True
        return self._fused

    def _one_token(
        self, fused: FusedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """One token. Records that arrive in several turns give the same bits as all at once."""
        index: list[int] = top_k_index[0].tolist()
        places = [k for k, expert in enumerate(index) if 0 <= expert < self._adapter.num_experts]
        chosen = [index[k] for k in places]
        needed = list(dict.fromkeys(chosen))
        self._announce(top_k_index, needed)
        x, weights = hidden[0].float().contiguous(), top_k_weights[0].float().contiguous()
        if len(places) < len(index):
            weights = weights[places]
        outputs = None
        if self._table is not None:
            for expert in needed:
                self._table[expert] = self._residency.address(self._layer, expert)
        for records in self._residency.fetch_ready(self._layer, needed):
            here = [k for k, expert in enumerate(chosen) if expert in records]
            data = [records[chosen[k]] for k in here]
            specs = [self._records[chosen[k]].spec for k in here]
            if len(here) == len(chosen):
                return fused(x, data, specs, weights).to(hidden.dtype).unsqueeze(0)
            if outputs is None:
                outputs = x.new_empty(len(chosen), x.shape[0])  # [K, H]
            part = x.new_empty(len(here), x.shape[0])
            outputs[here] = fused(x, data, specs, weights[here], part)
        total = x.new_zeros(x.shape) if outputs is None else fused.total(outputs.unsqueeze(0))[0]
        return total.to(hidden.dtype).unsqueeze(0)
