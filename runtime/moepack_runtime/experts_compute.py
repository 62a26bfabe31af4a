"""What an experts module computes when its weights are in a pack.

Shape letters: T tokens, K experts a token, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepack_formats.layer import RecordLocation

from .experts import ExpertsAdapter
from .kernels import Engine, OneToken
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
        self._one_token: OneToken | None = None
        self._asked_for_one_token = False

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden`` [T, H], ``top_k_index`` [T, K], ``top_k_weights`` [T, K] to [T, H]."""
        tokens, choices = top_k_index.shape
        if tokens == 1 and self._fused() is not None:
            return self._call_fused(hidden, top_k_index, top_k_weights)
        chosen = top_k_index.reshape(-1)  # [T * K]
        # An index of num_experts or more is a place without an expert.
        needed = [e for e in torch.unique(chosen).tolist() if 0 <= e < self._adapter.num_experts]
        self._announce(top_k_index, needed)
        dtype = torch.promote_types(hidden.dtype, top_k_weights.dtype)
        self._residency.make_room(self._work_nbytes(tokens, choices))
        outputs = hidden.new_zeros(tokens * choices, hidden.shape[-1], dtype=dtype)
        weights = top_k_weights.reshape(-1, 1)
        for expert, record in self._residency.fetch(self._layer, needed):
            places = (chosen == expert).nonzero().squeeze(1)
            x = hidden[places // choices]
            spec = self._records[expert].spec
            y = self._engine.expert(record, spec, self._adapter, x)
            outputs[places] = y * weights[places]
        return outputs.view(tokens, choices, -1).sum(dim=1).to(hidden.dtype)

    def _work_nbytes(self, tokens: int, choices: int) -> int:
        """Memory that several tokens take.

        An expert as dense float32, every output twice, and what the layer around has of that size.
        """
        hidden, width = self._adapter.hidden_size, self._adapter.intermediate_size
        dense = max(at.spec.parameters for at in self._records)
        rows = tokens * (2 * choices * hidden + 6 * hidden + 3 * width)
        return 4 * (dense + rows)

    def _announce(self, top_k_index: Tensor, needed: list[int]) -> None:
        # Before the next layer is guessed: what is needed now is read first.
        self._residency.demand(self._layer, needed)
        if self._layer == 0:
            self._stats.tokens += len(top_k_index)
        if self._speculator is not None:
            self._speculator.experts_called(self._layer, top_k_index, needed)

    def _fused(self) -> OneToken | None:
        # Not before the first call: on the meta device an activation cannot be tried.
        if not self._asked_for_one_token:
            self._one_token = self._engine.one_token(self._adapter)
            self._asked_for_one_token = True
        return self._one_token

    def _call_fused(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """One token. Records that arrive in several turns give the same bits as all at once."""
        fused = self._fused()
        assert fused is not None  # the caller has looked
        index: list[int] = top_k_index[0].tolist()
        places = [k for k, expert in enumerate(index) if 0 <= expert < self._adapter.num_experts]
        chosen = [index[k] for k in places]
        needed = list(dict.fromkeys(chosen))
        self._announce(top_k_index, needed)
        x, weights = hidden[0].float().contiguous(), top_k_weights[0].float().contiguous()
        if len(places) < len(index):
            weights = weights[places]
        outputs = whole = None
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
        total = x.new_zeros(x.shape) if outputs is None else fused.total(outputs)
        return total.to(hidden.dtype).unsqueeze(0)
