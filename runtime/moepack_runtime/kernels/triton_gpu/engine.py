"""The engine over the Triton kernels, see :class:`moepack_runtime.kernels.Engine`.

Shape letters: T tokens, K experts of a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moepack_formats.record import RecordSpec
from moepack_formats.schemes import TILE_ROWS, Scheme, get_scheme

from ...experts import ExpertsAdapter
from ..activation import recognize
from ..reference import decode_projection
from . import products
from .experts import ExpertShape, GpuExperts
from .products import combine


class TritonEngine:
    """Packed weights on a GPU of compute capability 8.0 or more.

    Args:
        name: For a person.
    """

    def __init__(self, name: str = "triton") -> None:
        self._name = name

    @property
    def name(self) -> str:
        """See :class:`moepack_runtime.kernels.Engine`."""
        return self._name

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        scheme: Scheme,
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], shape[0])
        y = products.linear(x.reshape(-1, shape[1]), packed, scheme, shape, bias)
        return y.view(*x.shape[:-1], shape[0])

    def decode(
        self,
        packed: Tensor,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tiles: Tensor | None = None,
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        rows = shape[0] if tiles is None else TILE_ROWS * len(tiles)
        return products.decode(packed, scheme, rows, shape[1], dtype, tiles)

    def expert(
        self, record: Tensor, spec: RecordSpec, adapter: ExpertsAdapter, x: Tensor
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        first = "gate_up" if adapter.gated else "up"
        hidden = adapter.activate(self._project(record, spec, first, x))
        return adapter.finish(self._project(record, spec, "down", hidden))

    def fused(self, adapter: ExpertsAdapter) -> TritonExperts | None:
        """See :class:`moepack_runtime.kernels.Engine`."""
        experts = self.grouped(adapter)
        return None if experts is None else TritonExperts(experts)

    def grouped(self, adapter: ExpertsAdapter) -> GpuExperts | None:
        """The kernels for a layer, where they have its activation."""
        activation = recognize(adapter)
        if activation is None:
            return None
        sizes = adapter.hidden_size, adapter.intermediate_size, adapter.num_experts
        return GpuExperts(ExpertShape(*sizes, adapter.gated, activation))

    def _project(self, record: Tensor, spec: RecordSpec, name: str, x: Tensor) -> Tensor:
        """``[T, C]`` times a matrix of a record, in the canonical order of its rows."""
        tensor, bias = spec.tensor(name), spec.tensor(f"{name}_bias")
        assert tensor is not None  # check_spec has seen it
        data = record[tensor.offset : tensor.offset + tensor.nbytes]
        rows, cols = tensor.shape
        gated = name == "gate_up"
        stored = tensor.padded[0] if gated else rows
        y = self.linear(x, data, get_scheme(tensor.scheme), (stored, cols), None)
        if gated:  # tiles of gate and up alternate
            tile = torch.arange(rows // 2, device=y.device)
            gate = tile // TILE_ROWS * (2 * TILE_ROWS) + tile % TILE_ROWS
            y = y.index_select(1, torch.cat([gate, gate + TILE_ROWS]))
        return y if bias is None else y + decode_projection(record, bias, y.dtype)


class TritonExperts:
    """See :class:`moepack_runtime.kernels.FusedExperts`."""

    def __init__(self, experts: GpuExperts) -> None:
        self._experts = experts

    def __call__(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        specs: Sequence[RecordSpec],
        weights: Tensor,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.FusedExperts`."""
        table = self._experts.table(records, specs)
        index = torch.arange(len(records), device=x.device)
        partial = self._experts.partial(len(records), x.device)
        self._experts.one_token(x, index, table, partial)
        result = x.new_empty(x.shape, dtype=torch.float32) if outputs is None else outputs
        combine(partial, weights, result)
        return result

    def takes(self, tokens: int) -> bool:
        """Any number: tiles are decoded where they are multiplied."""
        return True

    def tokens(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        specs: Sequence[RecordSpec],
        sizes: Sequence[int],
        tokens: Tensor,
        places: Tensor,
        weights: Tensor,
        outputs: Tensor,
    ) -> None:
        """See :class:`moepack_runtime.kernels.FusedExperts`."""
        table = self._experts.table(records, specs)
        index = torch.arange(len(records)).repeat_interleave(torch.tensor(sizes))
        part = outputs.new_empty(len(tokens), outputs.shape[1])
        self._experts.many_tokens(
            x[tokens], index.view(-1, 1).to(x.device), weights.view(-1, 1), table, part
        )
        outputs[places] = part

    def total(self, outputs: Tensor) -> Tensor:
        """See :class:`moepack_runtime.kernels.FusedExperts`."""
        tokens, choices, width = outputs.shape
        y = outputs.new_empty(tokens * width)
        # Tokens side by side in one row for each choice.
        combine(outputs.transpose(0, 1).reshape(choices, 1, tokens * width), None, y)
        return y.view(tokens, width)
