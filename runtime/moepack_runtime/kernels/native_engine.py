"""The engine over the native kernels: a few tokens from packed bytes, many as dense matrices.

Shape letters: T tokens, H hidden size, I intermediate size, K experts of a token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepack_formats.record import RecordSpec, SubTensor
from moepack_formats.schemes import TILE_ROWS, Scheme, get_scheme

from ..experts import ExpertsAdapter
from . import native
from .activation import recognize
from .reference import decode_projection

SMALL_TOKENS = 8
"""Up to this many tokens float activations are multiplied with packed bytes; above, decoding the
matrix once is faster. For int8 activations it never is."""

_keeping = threading.Lock()


class NativeEngine:
    """The library in ``csrc``.

    Args:
        int8: Whether activations are rounded to 8 bits, see :func:`moepack_runtime.kernels.select`.
        threads: How many compute; None for as many as torch has.
    """

    def __init__(self, *, int8: bool, threads: int | None = None) -> None:
        self.int8, self._own_threads = int8, threads
        self._kept: int | None = None
        self._keepers = 0

    @contextmanager
    def threads_kept(self) -> Iterator[None]:
        """As many threads as now, whatever becomes of torch's; blocks may overlap."""
        with _keeping:
            if self._keepers == 0:
                self._kept = self.threads
            self._keepers += 1
        try:
            yield
        finally:
            with _keeping:
                self._keepers -= 1
                if self._keepers == 0:
                    self._kept = None

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._own_threads or self._kept or torch.get_num_threads()

    @property
    def name(self) -> str:
        """See :class:`moepack_runtime.kernels.Engine`."""
        return f"native ({native.available()}, {'int8' if self.int8 else 'float'} activations)"

    @contextmanager
    def float_activations(self) -> Iterator[None]:
        """Do not round activations inside the block."""
        int8, self.int8 = self.int8, False
        try:
            yield
        finally:
            self.int8 = int8

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        scheme: Scheme,
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        tokens = x.numel() // shape[1]
        if not self._from_packed(tokens, scheme):
            return F.linear(x, self.decode(packed, scheme, shape, x.dtype), bias)
        y = native.linear(
            x.reshape(tokens, -1).float().contiguous(),
            packed,
            scheme,
            shape,
            None if bias is None else bias.float(),
            int8=self.int8,
            threads=self.threads,
        )
        return y.view(*x.shape[:-1], shape[0]).to(x.dtype)

    def _from_packed(self, tokens: int, scheme: Scheme) -> bool:
        return 0 < tokens <= SMALL_TOKENS or (tokens > 0 and self.int8 and not scheme.is_raw)

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
        return native.decode(
            packed, scheme, shape[1], rows, dtype, tiles=tiles, threads=self.threads
        )

    def expert(
        self, record: Tensor, spec: RecordSpec, adapter: ExpertsAdapter, x: Tensor
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        first = "gate_up" if adapter.gated else "up"
        hidden = adapter.activate(self._project(record, spec, first, x))
        return adapter.finish(self._project(record, spec, "down", hidden))

    def fused(self, adapter: ExpertsAdapter) -> _Fused | None:
        """See :class:`moepack_runtime.kernels.Engine`."""
        activation = recognize(adapter)
        if activation is None:
            return None
        fused = native.FusedExperts(
            adapter.hidden_size, adapter.intermediate_size, adapter.gated, activation
        )
        return _Fused(fused, self)

    def _project(self, record: Tensor, spec: RecordSpec, name: str, x: Tensor) -> Tensor:
        """``[T, C]`` times a matrix of a record, in the canonical order of its rows."""
        tensor, bias = spec.tensor(name), spec.tensor(f"{name}_bias")
        assert tensor is not None  # check_spec has seen it
        data = record[tensor.offset : tensor.offset + tensor.nbytes]
        scheme, (rows, cols) = get_scheme(tensor.scheme), tensor.shape
        if self._from_packed(len(x), scheme):
            stored = tensor.padded[0] if name == "gate_up" else rows
            y = self.linear(x, data, scheme, (stored, cols), None)
            if name == "gate_up":  # tiles of gate and up alternate
                y = y.view(len(x), -1, 2, TILE_ROWS).transpose(1, 2)
                y = y.reshape(len(x), 2, -1)[:, :, : rows // 2].reshape(len(x), rows)
            return y if bias is None else y + decode_projection(record, bias, y.dtype)
        weight = self._dense(data, tensor, x.dtype)
        return F.linear(
            x, weight, None if bias is None else decode_projection(record, bias, x.dtype)
        )

    def _dense(self, data: Tensor, tensor: SubTensor, dtype: torch.dtype) -> Tensor:
        """A matrix of a record, dense; ``gate_up`` as all rows of gate, then all of up."""
        scheme, (rows, cols) = get_scheme(tensor.scheme), tensor.shape
        if tensor.name != "gate_up":
            return self.decode(data, scheme, (rows, cols), dtype)
        tiles = torch.arange(tensor.padded[0] // TILE_ROWS).view(-1, 2).t().reshape(-1)
        dense = self.decode(data, scheme, (rows, cols), dtype, tiles)
        if len(dense) == rows:
            return dense
        return dense.view(2, -1, cols)[:, : rows // 2].reshape(rows, cols)


class _Fused:
    """See :class:`moepack_runtime.kernels.FusedExperts`."""

    def __init__(self, fused: native.FusedExperts, engine: NativeEngine) -> None:
        self._fused, self._engine = fused, engine

    def __call__(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        specs: Sequence[RecordSpec],
        weights: Tensor,
        outputs: Tensor | None = None,
    ) -> Tensor:
        int8, threads = self._engine.int8, self._engine.threads
        return self._fused(x, records, specs, weights, int8=int8, threads=threads, outputs=outputs)

    def takes(self, tokens: int) -> bool:
        return self._engine.int8 or tokens <= SMALL_TOKENS

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
        self._fused.tokens(
            x,
            records,
            specs,
            sizes,
            tokens,
            places,
            weights,
            outputs,
            int8=self._engine.int8,
            threads=self._engine.threads,
        )

    def total(self, outputs: Tensor) -> Tensor:
        return native.sum_rows(outputs, self._engine.threads)

    def layer(self, specs: Sequence[RecordSpec]) -> tuple[native.ExpertsLayer, Any]:
        """See :meth:`moepack_runtime.kernels.native.FusedExperts.layer`."""
        return self._fused.layer(specs)
