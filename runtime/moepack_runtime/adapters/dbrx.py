"""DBRX: all experts of a layer lie below each other in three two-dimensional matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from typing_extensions import override

from moepack_runtime.experts import Compute, ExpertsAdapter


class DbrxAdapter(ExpertsAdapter):
    """An expert is a block of rows; ``w2`` is stored the other way round."""

    @override
    def _describe(self) -> None:
        module = cast(Any, self.module)
        self.gated, self.has_bias = True, False
        self._interleaved = self._own_gate = False
        self.parameters = ("mlp.w1", "mlp.v1", "mlp.w2")
        self.num_experts = int(module.num_experts)
        self.hidden_size = int(module.mlp.w1.shape[1])
        self.intermediate_size = int(module.mlp.w1.shape[0]) // self.num_experts

    @override
    def expert_slice(self, parameter: str, shape: Sequence[int], expert: int) -> tuple[slice, ...]:
        rows = self.intermediate_size
        return (slice(expert * rows, (expert + 1) * rows), *(slice(None) for _ in shape[1:]))

    @override
    def without_expert_axis(self, parameter: str, sliced: Tensor) -> Tensor:
        return sliced

    @override
    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "gate": tensors["mlp.w1"],
            "up": tensors["mlp.v1"],
            "down": tensors["mlp.w2"].t(),
        }

    @property
    @override
    def _act_fn(self) -> Callable[[Tensor], Tensor]:
        return cast("Callable[[Tensor], Tensor]", cast(Any, self.module).mlp.activation_fn)

    @override
    def install(self, compute: Compute) -> None:
        """Replaces the module's forward, which takes and returns ``[batch, tokens, hidden]``."""
        super().install(compute)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            rows = hidden_states.reshape(-1, self.hidden_size)
            return compute(rows, top_k_index, top_k_weights).view(
                hidden_states.shape[0], -1, self.hidden_size
            )

        cast(Any, self.module).forward = forward


def adapters(model: nn.Module) -> list[ExpertsAdapter]:
    """One adapter per experts module."""
    return [
        DbrxAdapter(name, module)
        for name, module in model.named_modules()
        if isinstance(module, DbrxExperts)
    ]
