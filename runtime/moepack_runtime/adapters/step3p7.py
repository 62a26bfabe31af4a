"""Step 3.7: SwiGLU with a bound that differs from layer to layer, in the module's own gate."""

from __future__ import annotations

from torch import nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from typing_extensions import override

from moepack_runtime.experts import ExpertsAdapter, FusedExpertsAdapter


class Step3p7Adapter(FusedExpertsAdapter):
    """The usual fused layout and, in some layers, a bounded gate."""

    @override
    def _describe(self) -> None:
        super()._describe()
        # An infinite bound bounds nothing, and most layers have it.
        self._own_gate = bool(self.module.limit != float("inf"))


def adapters(model: nn.Module) -> list[ExpertsAdapter]:
    """One adapter per experts module of the text model."""
    return [
        Step3p7Adapter(name, module)
        for name, module in model.named_modules()
        if isinstance(module, Step3p7Experts)
    ]
