"""Llama 4: the router's score scales an expert's input, and the stock block runs every expert."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from typing_extensions import override

from moepack_runtime.experts import Compute, ExpertsAdapter, FusedExpertsAdapter


class Llama4Adapter(FusedExpertsAdapter):
    """Reroutes the block around the experts, which alone knows the routed indices."""

    transposed = True

    def __init__(self, name: str, module: nn.Module, block: nn.Module) -> None:
        super().__init__(name, module)
        self._block = block

    @override
    def install(self, compute: Compute) -> None:
        """Replaces the forward of the block, so that only routed experts are computed."""
        super().install(compute)
        block = cast(Any, self._block)

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden_states.reshape(-1, block.hidden_dim)
            scores, logits = block.router(hidden)
            index = torch.topk(logits, block.top_k, dim=1).indices
            # The score belongs to the input, in front of the activation, so each (token, expert)
            # pair is a row of its own with a weight of one.
            score = scores.gather(1, index)
            rows = (hidden.unsqueeze(1) * score.unsqueeze(-1)).flatten(0, 1)
            routed = compute(rows, index.reshape(-1, 1), torch.ones_like(score).reshape(-1, 1))
            out = block.shared_expert(hidden)
            out = out + routed.view(*index.shape, -1).sum(dim=1)
            return out, logits

        block.forward = forward


def adapters(model: nn.Module) -> list[ExpertsAdapter]:
    """One adapter per experts module of the text model."""
    return [
        Llama4Adapter(name, module, model.get_submodule(name.rpartition(".")[0]))
        for name, module in model.named_modules()
        if isinstance(module, Llama4TextExperts)
    ]
