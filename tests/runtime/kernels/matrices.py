"""Packed matrices, records and stand-ins for experts modules, for the kernels' tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moepack.quant import get_quantizer, quantize_matrix
from moepack_formats.matrix import QuantizedMatrix, pack_matrix
from moepack_formats.record import RecordSpec, pack_record
from moepack_formats.schemes import Scheme, get_scheme
from tests.formats.builders import random_matrix

STEP = 32  # activations under one int8 step, see csrc/kernels.h

# rows and columns that are and are not multiples of tiles, blocks and super-groups
SHAPES = ((64, 256), (17, 65), (48, 100), (1, 1), (33, 700), (100, 2880))
# of 1 to 9, 11 and 12 blocks, with a whole last block and with part of one
BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)


def packed(scheme: Scheme, rows: int, cols: int, seed: int = 0) -> Tensor:
    """A packed matrix of codes, scales and minima of every size."""
    rng = np.random.default_rng([seed, rows, cols])
    return torch.from_numpy(pack_matrix(random_matrix(scheme, rows, cols, rng)))


def quantized(scheme: str, rows: int, cols: int, generator: torch.Generator) -> QuantizedMatrix:
    """A matrix as a conversion makes it: normal weights, rounded to nearest."""
    weight = torch.randn(rows, cols, generator=generator) * cols**-0.5
    return quantize_matrix(weight, get_scheme(scheme), get_quantizer("rtn"))


def as_int8(x: Tensor) -> Tensor:
    """What the kernels make of activations ``[T, C]``: multiples of a step per 32 inputs."""
    padded = F.pad(x, (0, -x.shape[1] % STEP)).view(len(x), -1, STEP)
    most = padded.abs().amax(dim=2, keepdim=True)
    # A tensor over a tensor: torch makes a number over a tensor a product with its reciprocal.
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)
    codes = (padded * inverse).round()
    return (codes * (most / 127)).view(len(x), -1)[:, : x.shape[1]]


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def random_record(spec: RecordSpec, seed: int) -> Tensor:
    """A record of weights rounded to nearest and small biases."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Any] = {}
    for tensor in spec.tensors:
        stem = tensor.name.removesuffix("_bias")
        names = ("gate", "up") if stem == "gate_up" else (stem,)
        rows = tensor.shape[0] // len(names)
        for name in names:
            if len(tensor.shape) == 1:
                parts[f"{name}_bias"] = torch.randn(rows, generator=generator).numpy() * 0.3
            else:
                parts[name] = quantized(tensor.scheme, rows, tensor.shape[1], generator)
    return torch.from_numpy(pack_record(spec, parts))


class FakeAdapter:
    """As much of an ExpertsAdapter as the engines use."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activate: Callable[[Tensor, Tensor | None], Tensor],
        *,
        gated: bool = True,
        **attributes: float,
    ) -> None:
        self.hidden_size, self.intermediate_size, self.gated = hidden, intermediate, gated
        self.num_experts = 16
        self.module = SimpleNamespace(**attributes)
        self._activate = activate

    def activate(self, projected: Tensor) -> Tensor:
        if not self.gated:
            return self._activate(projected, None)
        gate, up = projected.chunk(2, dim=-1)
        return self._activate(gate, up)

    def finish(self, output: Tensor) -> Tensor:
        return output


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)


# What the module computes, its attributes, and the activation that it must be recognized as.
ACTIVATIONS: dict[str, tuple[Any, dict[str, float], tuple[str, float, float, float]]] = {
    "silu": (lambda g, u: F.silu(g) * u, {}, ("silu", 1.0, math.inf, 0.0)),
    "gelu": (lambda g, u: F.gelu(g) * u, {}, ("gelu", 1.0, math.inf, 0.0)),
    "gelu_tanh": (
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        {},
        ("gelu_tanh", 1.0, math.inf, 0.0),
    ),
    "relu": (lambda g, u: F.relu(g) * u, {}, ("relu", 1.0, math.inf, 0.0)),
    "relu2": (lambda g, u: F.relu(g).square() * u, {}, ("relu2", 1.0, math.inf, 0.0)),
    "gpt_oss": (gpt_oss, {"alpha": 1.702, "limit": 7.0}, ("silu", 1.702, 7.0, 1.0)),
    "clamped": (clamped_swiglu, {"swiglu_limit": 0.5}, ("silu", 1.0, 0.5, 0.0)),
}
