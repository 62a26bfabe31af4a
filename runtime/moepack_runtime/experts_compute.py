"""What an experts module computes when its weights are in a pack.

Shape letters: T tokens, K experts a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from moepack_formats.layer import RecordLocation

from .cache.arena import zeros_in_huge_pages
from .cache.mapped import MappedRecords
from .cache.residency import Residency
from .experts import Compute, ExpertsAdapter
from .kernels import Engine, FusedExperts
from .prefetch.guesses import Speculator
from .routing.cache_bias import CacheBias
from .statistics import Statistics
from .trunk.packed_modules import refuse_copy, refuse_gradients

Watcher = Callable[[int, Tensor, Tensor], None]
"""``watcher(layer, top_k_index [T, K], top_k_weights [T, K])``"""


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
        bias: Nudges the router; None without.

    Attributes:
        watcher: Is told what the router chose; None for nobody.
        stand_in: Is called instead, while a pass is recorded.
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
        bias: CacheBias | None = None,
    ) -> None:
        self._layer, self._adapter, self._records = layer, adapter, records
        self._residency, self._speculator, self._stats = residency, speculator, stats
        self._engine, self._bias = engine, bias
        self.watcher: Watcher | None = None
        self.stand_in: Compute | None = None
        self._fused: FusedExperts | None = None
        self._asked_for_fused = False
        self._native: Any | None = None
        self._table: Any | None = None
        self._all_in_place = False

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden`` [T, H], ``top_k_index`` [T, K], ``top_k_weights`` [T, K] to [T, H]."""
        refuse_gradients(hidden)
        if self.stand_in is not None:
            return self.stand_in(hidden, top_k_index, top_k_weights)
        return self.compute(hidden, top_k_index, top_k_weights)

    def __reduce_ex__(self, *_: object) -> NoReturn:
        refuse_copy()

    def compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What a call does unless something stands in for it."""
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
        needed = list(places)
        self._residency.make_room(self._work_nbytes(*top_k_index.shape))
        means = _mean_weights(top_k_index, top_k_weights, self._adapter.num_experts)
        self._announce(top_k_index, top_k_weights, needed, [means[expert] for expert in needed])
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

    def _work_nbytes(self, tokens: int, choices: int) -> int:
        """Memory that several tokens take.

        An expert as dense float32, every output twice, and what the layer around has of that size.
        """
        hidden, width = self._adapter.hidden_size, self._adapter.intermediate_size
        dense = max(at.spec.parameters for at in self._records)
        rows = tokens * (2 * choices * hidden + 6 * hidden + 3 * width)
        return 4 * (dense + rows)

    def _many_tokens(
        self,
        fused: FusedExperts,
        hidden: Tensor,
        top_k_weights: Tensor,
        places: dict[int, Tensor],
    ) -> Tensor:
        """All experts that are at hand in one call, each with all of its tokens."""
        if not places:
            return torch.zeros_like(hidden)
        tokens, choices = top_k_weights.shape
        x, weights = hidden.float().contiguous(), top_k_weights.float().reshape(-1)
        outputs = zeros_in_huge_pages(tokens * choices, x.shape[1])
        for records in self._residency.fetch_ready(self._layer, list(places)):
            specs = [self._records[expert].spec for expert in records]
            of_experts = [places[expert] for expert in records]
            order, sizes = torch.cat(of_experts), [len(here) for here in of_experts]
            data = list(records.values())
            fused.tokens(x, data, specs, sizes, order // choices, order, weights[order], outputs)
        self._put_in_table(places)
        return fused.total(outputs.view(tokens, choices, -1)).to(hidden.dtype)

    @property
    def reads(self) -> bool:
        """Whether records are read into slots, which takes time that something else can fill."""
        return not isinstance(self._residency, MappedRecords)

    def demand(self, top_k_index: Tensor) -> None:
        """Start reading what a token's router has chosen, ``[1, K]``, ahead of computing it."""
        chosen = dict.fromkeys(top_k_index.reshape(-1).tolist())
        needed = [expert for expert in chosen if 0 <= expert < self._adapter.num_experts]
        self._residency.demand(self._layer, needed)

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
                self._put_in_table(range(len(self._records)))
        return self._native

    @property
    def all_in_place(self) -> bool:
        """Whether a tape has every record of the layer, so that nothing is read any more."""
        if not self._all_in_place:
            self._all_in_place = self._table is not None and None not in self._table
        return self._all_in_place

    def _put_in_table(self, experts: Iterable[int]) -> None:
        """What was used and stays where it is, a tape may use from now on."""
        if self._table is not None:
            for expert in experts:
                self._table[expert] = self._residency.address(self._layer, expert)

    def settle(self) -> None:
        """Count what a tape has computed here by itself, and see that it was sound.

        Raises:
            ResourceError: A record was not there any more when it was read.
        """
        if self._native is None or not self._native.demanded:
            return
        self._stats.hits += self._native.demanded
        self._stats.tokens += self._layer == 0
        self._native.demanded = 0
        self._residency.check_used(self._layer)
        if self._layer == 0:
            self._residency.make_room(0)

    def _announce(
        self, top_k_index: Tensor, top_k_weights: Tensor, needed: list[int], weights: list[float]
    ) -> None:
        """Tell everybody what the router chose.

        Args:
            top_k_index: ``[T, K]``.
            top_k_weights: ``[T, K]``.
            needed: The experts in it.
            weights: The weight of each of them, the mean over the tokens.
        """
        # Before the next layer is guessed: what is needed now is read first.
        self._residency.demand(self._layer, needed)
        if self._layer == 0:
            self._stats.tokens += len(top_k_index)
        if self._bias is not None:
            self._bias.routed(self._layer)
        if self.watcher is not None:
            self.watcher(self._layer, top_k_index, top_k_weights)
        self._residency.observe(self._layer, needed, weights)
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
        x, weights = hidden[0].float().contiguous(), top_k_weights[0].float().contiguous()
        if len(places) < len(index):
            weights = weights[places]
        of_expert = dict(zip(chosen, weights.tolist(), strict=True))
        self._announce(top_k_index, top_k_weights, needed, list(of_expert.values()))
        if not chosen:  # nothing but places without an expert
            return torch.zeros_like(hidden)
        outputs = whole = None
        self._put_in_table(needed)
        for records in self._residency.fetch_ready(self._layer, needed):
            here = [k for k, expert in enumerate(chosen) if expert in records]
            data = [records[chosen[k]] for k in here]
            specs = [self._records[chosen[k]].spec for k in here]
            if len(here) == len(chosen):
                # Not returned from here: the residency is to see the end of the use.
                whole = fused(x, data, specs, weights)
                continue
            if outputs is None:
                outputs = x.new_empty(len(chosen), x.shape[0])  # [K, H]
            part = x.new_empty(len(here), x.shape[0])
            outputs[here] = fused(x, data, specs, weights[here], part)
        if whole is not None:
            return whole.to(hidden.dtype).unsqueeze(0)
        total = x.new_zeros(x.shape) if outputs is None else fused.total(outputs.unsqueeze(0))[0]
        return total.to(hidden.dtype).unsqueeze(0)


def _mean_weights(top_k_index: Tensor, top_k_weights: Tensor, experts: int) -> list[float]:
    """The weight of every expert of a layer, the mean over the tokens."""
    index = top_k_index.reshape(-1)
    index = index.where((index >= 0) & (index < experts), experts)
    total = top_k_weights.new_zeros(experts + 1, dtype=torch.float32)
    total.index_add_(0, index, top_k_weights.reshape(-1).float())
    means: list[float] = (total / len(top_k_index)).tolist()
    return means
