"""Keys and values in buffers with room to grow, read by recorded and by transformers' own passes.

transformers' dynamic cache makes a new tensor of all keys for every token. Here a layer keeps a
buffer ``[1, heads, capacity, width]`` and hands out views of what is filled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import override

GROWTH = 256
"""Tokens by which a full buffer grows, at least; it grows by half of itself."""


class _Buffers:
    """The buffers of one layer: ``[1, heads, capacity, width]`` each, filled from the front."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.filled = 0
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.write(0, keys, values)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, self.capacity + max(GROWTH, self.capacity // 2))
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.filled] = old[:, :, : self.filled]
            setattr(self, name, new)

    def write(self, at: int, keys: Tensor, values: Tensor) -> int:
        """Put tokens at a place and forget what was behind it; returns where they end."""
        end = at + keys.shape[2]
        self.filled = min(self.filled, at)
        self.reserve(end)
        self.keys[:, :, at:end] = keys
        self.values[:, :, at:end] = values
        self.filled = end
        return end


class GrowingLayer(DynamicLayer):
    """A full-attention cache layer over a buffer; ``keys`` and ``values`` are views of it."""

    buffers: _Buffers

    @classmethod
    def taking(cls, layer: DynamicLayer) -> GrowingLayer:
        """A growing layer with what a dynamic one holds."""
        new = cls()
        new.dtype, new.device = layer.dtype, layer.device
        new.is_initialized = True
        new.buffers = _Buffers(layer.keys, layer.values)
        new._show(new.buffers.filled)
        return new

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = _Buffers(key_states[:, :, :0], value_states[:, :, :0])
        self._show(0)

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; views of everything. See the base class."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._own()
        self._show(self.buffers.write(self.get_seq_length(), key_states, value_states))
        return self.keys, self.values

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all; what was handed out before is a copy then."""
        self._own()
        self.buffers.reserve(tokens)
        self._show(self.get_seq_length())

    def _show(self, end: int) -> None:
        self.keys, self.values = self.buffers.keys[:, :, :end], self.buffers.values[:, :, :end]

    def _own(self) -> None:
        """After transformers has replaced the views, as beam search does, take over what it made."""
        if self.keys.data_ptr() != self.buffers.keys.data_ptr() or len(self.keys) != len(
            self.buffers.keys
        ):
            self.buffers = _Buffers(self.keys, self.values)
            self._show(self.buffers.filled)

    def rewind(self, length: int) -> None:
        """Forget the tokens after the first ``length``."""
        self.buffers.filled = min(self.buffers.filled, length)
        self._show(length)

    def played(self) -> None:
        """A played pass has put one more token behind the others."""
        end = self.get_seq_length() + 1
        self.buffers.filled = end
        self._show(end)


def take_over(cache: Any) -> list[GrowingLayer] | None:
    """Turn a cache's layers into growing ones, in place.

    Args:
        cache: What transformers made.

    Returns:
        The layers, all of the same length of at least one token, or None when the cache is of a
        kind that cannot be taken over (and is then unchanged).
    """
    if not isinstance(cache, Cache) or cache.offloading or not cache.layers:
        return None
    if all(type(layer) is GrowingLayer for layer in cache.layers):
        layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
    else:
        if not all(_plain(layer) for layer in cache.layers):
            return None
        layers = [
            layer if isinstance(layer, GrowingLayer) else GrowingLayer.taking(layer)  # type: ignore[arg-type]
            for layer in cache.layers
        ]
    first = layers[0].keys
    if first.shape[2] == 0 or any(
        layer.keys.shape[2] != first.shape[2]
        or layer.keys.shape[0] != 1
        or layer.keys.dtype != torch.float32
        for layer in layers
    ):
        return None
    cache.layers[:] = layers
    return layers


def _plain(layer: Any) -> bool:
    # The exact types: a subclass may hold more than keys and values.
    if type(layer) not in (DynamicLayer, GrowingLayer) or not layer.is_initialized:
        return False
    return layer.keys is not None and layer.keys.dim() == 4
