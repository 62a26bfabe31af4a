"""LongCat-Flash: indices beyond the routed experts mean the identity, times the router's weight."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from typing_extensions import override

from moepack_runtime.experts import Compute, ExpertsAdapter, FusedExpertsAdapter


class LongcatFlashAdapter(FusedExpertsAdapter):
    """Plain SwiGLU experts and, after them, identity experts without weights."""

    @override
    def install(self, compute: Compute) -> None:
        """Replaces the module's forward; the identity experts are added here."""
        super().install(compute)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            out = compute(hidden_states, top_k_index, top_k_weights)
            identity = top_k_weights.masked_fill(top_k_index < self.num_experts, 0.0)
            kept = hidden_states * identity.sum(dim=-1, keepdim=True)
            return out + kept.to(out.dtype)

        cast(Any, self.module).forward = forward


def adapters(model: nn.Module) -> list[ExpertsAdapter]:
    """One adapter per experts module; a layer without routed experts has no weights to pack."""
    return [
        LongcatFlashAdapter(name, module)
        for name, module in model.named_modules()
        if isinstance(module, LongcatFlashExperts) and module.num_routed_experts > 0
    ]
