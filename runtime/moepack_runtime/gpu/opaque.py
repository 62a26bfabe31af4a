"""Packed modules and experts as operators that torch's compiler does not look into.

Each stands for a module by a number: what it computes with (records, tables, an engine) is nothing
that a traced graph could hold. There are two for experts. ``experts`` has the host take part in
every pass, to bring records; a pass is cut there. ``resident_experts`` is queued like any kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..experts import ExpertsAdapter
from ..trunk.packed_modules import PackedEmbedding, PackedLinear, TiedHead
from .compute import DeviceCompute

_numbers = itertools.count()
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_experts: WeakValueDictionary[int, DeviceCompute] = WeakValueDictionary()


@torch.library.custom_op("moepack::packed", mutates_args=())
def _packed(x: torch.Tensor, number: int) -> torch.Tensor:
    return cast(Tensor, type(_modules[number]).forward(_modules[number], x))


@_packed.register_fake
def _(x: torch.Tensor, number: int) -> torch.Tensor:
    module: Any = _modules[number]
    if isinstance(module, PackedEmbedding):
        return x.new_empty(*x.shape, module.embedding_dim, dtype=module.dtype)
    source: Any = module.source if isinstance(module, TiedHead) else module
    return x.new_empty(*x.shape[:-1], source.shape[0])


@torch.library.custom_op("moepack::experts", mutates_args=())
def _experts_op(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    guess: torch.Tensor | None,
    number: int,
) -> torch.Tensor:
    return _experts[number].replayed(hidden, top_k_index, top_k_weights, guess)


@_experts_op.register_fake
def _(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    guess: torch.Tensor | None,
    number: int,
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("moepack::resident_experts", mutates_args=())
def _resident_op(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, number: int
) -> torch.Tensor:
    return _experts[number].replayed(hidden, top_k_index, top_k_weights, None)


@_resident_op.register_fake
def _(
    hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, number: int
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


HOST_TAKES_PART = torch.ops.moepack.experts.default
"""The operator at which a pass has to come back to the host."""


def make_opaque(
    model: nn.Module, adapters: Sequence[ExpertsAdapter], computes: Sequence[DeviceCompute]
) -> None:
    """Give a model's packed modules and experts a forward that a compiler takes as one operator."""
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedEmbedding, TiedHead)):
            _install(module)
    for adapter, compute in zip(adapters, computes, strict=True):
        adapter.install(OpaqueExperts(compute))


def _install(module: nn.Module) -> None:
    number = next(_numbers)
    _modules[number] = module
    itself = type(module).forward

    def forward(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(Tensor, torch.ops.moepack.packed.default(x, number))
        return cast(Tensor, itself(_modules[number], x))

    cast(Any, module).forward = forward


class OpaqueExperts:
    """A :class:`DeviceCompute` that a compiler takes as one operator.

    Args:
        compute: What computes.
    """

    def __init__(self, compute: DeviceCompute) -> None:
        self.compute, self._number = compute, next(_numbers)
        _experts[self._number] = compute

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See :data:`moepack_runtime.experts.Compute`."""
        if not torch.compiler.is_compiling():
            return self.compute(hidden, top_k_index, top_k_weights)
        inputs = hidden, top_k_index, top_k_weights
        if not self.compute.waits:
            return cast(Tensor, torch.ops.moepack.resident_experts.default(*inputs, self._number))
        guess = self.compute.traced_guess()
        return cast(Tensor, torch.ops.moepack.experts.default(*inputs, guess, self._number))
