"""Which of the kernels' activations an experts module applies, found by what it computes.

Names and attributes differ from family to family; values do not. A module is asked for some
outputs, and the native kernel is used only where a formula of its own gives the same ones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts import ExpertsAdapter

Activation = tuple[str, float, float, float]
"""Kind, alpha, limit and the offset of up: ``f(min(gate, limit)) * (clamp(up) + offset)``."""

_PROBES = 64


def recognize(adapter: ExpertsAdapter) -> Activation | None:
    """The kernels' activation that equals the module's, or None when there is none.

    None also when something else follows ``down``.
    """
    width = adapter.intermediate_size
    generator = torch.Generator().manual_seed(0)
    # Beyond every bound at which a family clamps, on both sides.
    gate = torch.randn(_PROBES, width, generator=generator, dtype=torch.float32) * 8
    up = torch.randn(_PROBES, width, generator=generator, dtype=torch.float32) * 8
    output = gate.new_ones(1, adapter.hidden_size)
    try:
        if adapter.finish(output) is not output:
            return None
        wanted = adapter.activate(torch.cat([gate, up], dim=-1) if adapter.gated else gate)
    except (RuntimeError, TypeError, ValueError):
        return None  # it wants something else than a float32 tensor of these sizes
    for candidate in _candidates(adapter):
        got = _apply(candidate, gate, up if adapter.gated else None)
        if wanted.shape == got.shape and torch.allclose(got, wanted, rtol=1e-4, atol=1e-4):
            return candidate
    return None


def _candidates(adapter: ExpertsAdapter) -> list[Activation]:
    def numbers(*names: str) -> list[float]:
        values = [getattr(adapter.module, name, None) for name in names]
        return [float(value) for value in values if isinstance(value, int | float)]

    plain: list[Activation] = [
        (kind, 1.0, math.inf, 0.0) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    ]
    clamped: list[Activation] = [
        ("silu", alpha, limit, offset)
        for limit in numbers("limit", "swiglu_limit")
        for alpha in [1.0, *numbers("alpha", "swiglu_alpha")]
        for offset in (0.0, 1.0)
    ]
    return plain + clamped


def _apply(activation: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
    """The formula of csrc/moepack.h."""
    kind, alpha, limit, offset = activation
    z = gate.clamp(max=limit)
    f = {
        "silu": lambda: z * torch.sigmoid(alpha * z),
        "gelu": lambda: F.gelu(z),
        "gelu_tanh": lambda: F.gelu(z, approximate="tanh"),
        "relu": lambda: F.relu(z),
        "relu2": lambda: F.relu(z).square(),
    }[kind]()
    return f if up is None else f * (up.clamp(-limit, limit) + offset)
