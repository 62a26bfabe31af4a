"""What an experts module computes when its weights are in a pack.

Shape letters: T tokens, K experts a token, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepack_formats.layer import RecordLocation

from .experts import ExpertsAdapter
from .kernels import reference
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
    """

    def __init__(
        self,
        layer: int,
        adapter: ExpertsAdapter,
        records: list[RecordLocation],
        residency: Residency,
        speculator: Speculator | None,
        stats: Statistics,
    ) -> None:
        self._layer, self._adapter, self._records = layer, adapter, records
        self._residency, self._speculator, self._stats = residency, speculator, stats

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden`` [T, H], ``top_k_index`` [T, K], ``top_k_weights`` [T, K] to [T, H]."""
        tokens, choices = top_k_index.shape
        chosen = top_k_index.reshape(-1)  # [T * K]
        # An index of num_experts or more is a place without an expert.
        needed = [e for e in torch.unique(chosen).tolist() if 0 <= e < self._adapter.num_experts]
        if self._layer == 0:
            self._stats.tokens += tokens
        if self._speculator is not None:
            self._speculator.experts_called(self._layer, top_k_index, needed)
        dtype = torch.promote_types(hidden.dtype, top_k_weights.dtype)
        outputs = hidden.new_zeros(tokens * choices, hidden.shape[-1], dtype=dtype)
        weights = top_k_weights.reshape(-1, 1)
        for expert, record in self._residency.fetch(self._layer, needed):
            places = (chosen == expert).nonzero().squeeze(1)
            x = hidden[places // choices]
            spec = self._records[expert].spec
            y = reference.expert_forward(record, spec, self._adapter, x)
            outputs[places] = y * weights[places]
        return outputs.view(tokens, choices, -1).sum(dim=1).to(hidden.dtype)
