"""JetMoE: router and experts are one block; the mixture of its attention stays in the trunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE
from typing_extensions import override

from moepack_runtime.experts import Compute, ExpertsAdapter


class JetMoeAdapter(ExpertsAdapter):
    """Plain gated experts in two stacked matrices; the bias is the block's, not an expert's."""

    @override
    def _describe(self) -> None:
        self.gated, self.has_bias = True, False
        self._interleaved = self._own_gate = False
        self.parameters = ("input_linear.weight", "output_linear.weight")
        shape = self.module.get_parameter("output_linear.weight").shape
        self.num_experts, self.hidden_size, self.intermediate_size = map(int, shape)

    @override
    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gate, up = tensors["input_linear.weight"].chunk(2, dim=0)
        return {"gate": gate, "up": up, "down": tensors["output_linear.weight"]}

    @property
    @override
    def _act_fn(self) -> Callable[[Tensor], Tensor]:
        return cast("Callable[[Tensor], Tensor]", cast(Any, self.module).activation)

    @override
    def install(self, compute: Compute) -> None:
        """Replaces the block's forward, which sorts tokens by expert and computes all of them."""
        super().install(compute)
        block = cast(Any, self.module)

        def forward(layer_input: Tensor) -> Tensor:
            hidden = layer_input.reshape(-1, self.hidden_size)
            logits = block.router.layer(hidden).float()
            best, index = logits.topk(block.router.top_k, dim=1)
            weights = torch.softmax(best, dim=1).type_as(hidden)
            out: Tensor = compute(hidden, index, weights).view_as(layer_input) + block.bias
            return out

        block.forward = forward


def adapters(model: nn.Module) -> list[ExpertsAdapter]:
    """One adapter per block of experts."""
    return [
        JetMoeAdapter(name, module)
        for name, module in model.named_modules()
        if isinstance(module, JetMoeMoE)
    ]
