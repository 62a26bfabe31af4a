"""Keys and values in buffers with room to grow, read by recorded and by transformers' own passes.

transformers' dynamic cache makes a new tensor of all keys for every token. Here a layer keeps a
buffer ``[1, heads, capacity, width]`` and hands out views of what is filled.
"""

from __future__ import annotations

from typing import Any, cast

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
            # Not zeros: pages that no token has reached yet take no memory.
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
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
    """A full-attention cache layer over a buffer.

    ``keys`` and ``values`` are views of what is filled. A played token only moves the end; the
    views are made when somebody looks. Code of transformers' may also put others in their place.
    """

    def __init__(self) -> None:
        self.buffers: _Buffers | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def taking(cls, layer: DynamicLayer) -> GrowingLayer:
        """A growing layer with what a dynamic one holds, which must have begun."""
        new = cls()
        new.dtype, new.device = layer.dtype, layer.device
        new.is_initialized = True
        new.buffers = _Buffers(cast(Tensor, layer.keys), cast(Tensor, layer.values))
        return new

    @property
    def keys(self) -> Tensor | None:
        """``[1, heads, tokens, width]``, or None before the first."""
        if self._keys is None and self.buffers is not None:
            self._keys = self.buffers.keys[:, :, : self.buffers.filled]
        return self._keys

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys = value
        if value is None:
            self.buffers = None

    @property
    def values(self) -> Tensor | None:
        """``[1, heads, tokens, width]``, or None before the first."""
        if self._values is None and self.buffers is not None:
            self._values = self.buffers.values[:, :, : self.buffers.filled]
        return self._values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    @override
    def get_seq_length(self) -> int:
        if self._keys is None and self.buffers is not None:
            return self.buffers.filled
        return super().get_seq_length()

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; views of everything. See the base class."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = _Buffers(key_states[:, :, :0], value_states[:, :, :0])
            self._keys = self._values = None
        length = self.get_seq_length()
        self._own().write(length, key_states, value_states)
        self._keys = self._values = None
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def reserve(self, tokens: int) -> _Buffers:
        """Make room for so many tokens in all; what was handed out before is a copy then."""
        buffers = self.buffers
        if self._keys is not None or buffers is None or tokens > buffers.capacity:
            length = self.get_seq_length()
            buffers = self._own()
            buffers.reserve(tokens)
            self.rewind(length)
        return buffers

    def rewind(self, length: int) -> None:
        """Forget the tokens after the first ``length``."""
        self._own().filled = length
        self._keys = self._values = None

    def played(self) -> None:
        """A played pass has put one more token behind the others."""
        self._own().filled += 1
        self._keys = self._values = None

    def _own(self) -> _Buffers:
        """The buffers, made anew if transformers has put something else in the views' place."""
        keys, values, mine = self._keys, self._values, self.buffers
        replaced = keys is not None and (
            mine is None or keys.data_ptr() != mine.keys.data_ptr() or len(keys) != len(mine.keys)
        )
        if replaced:
            mine = self.buffers = _Buffers(cast(Tensor, keys), cast(Tensor, values))
            self._keys = self._values = None
        return cast(_Buffers, mine)


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
    # The exact types: a subclass may hold more than keys and values.
    if any(type(layer) not in (DynamicLayer, GrowingLayer) for layer in cache.layers):
        return None
    plain = cast("list[DynamicLayer]", cache.layers)
    length = plain[0].get_seq_length()
    if length == 0 or any(layer.get_seq_length() != length for layer in plain):
        return None
    if not all(_fits(layer) for layer in plain):
        return None
    layers = [
        layer if isinstance(layer, GrowingLayer) else GrowingLayer.taking(layer) for layer in plain
    ]
    cache.layers[:] = layers
    return layers


def _fits(layer: DynamicLayer) -> bool:
    mine = layer.buffers if isinstance(layer, GrowingLayer) else None
    keys = layer.keys if mine is None else mine.keys
    return keys is not None and len(keys) == 1 and keys.dtype is torch.float32
