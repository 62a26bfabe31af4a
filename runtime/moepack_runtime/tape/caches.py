"""Which caches of transformers' are played with, and how their layers become growing ones."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from .kv import GrowingLayer
from .kv_indexed import GrowingIndexedLayer, own_indexer, taking_own, with_indexers
from .kv_states import GrowingStatesLayer, GrowingStatesWindowLayer
from .kv_window import GrowingWindowLayer
from .states import can_be_played, keeps_states_alone, state_holders

_GROW = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
_STAY = (LinearAttentionLayer, DummyLayer)


def take_over(cache: Any, *, half: bool = False) -> list[GrowingLayer] | None:
    """Turn a cache's layers of keys and values into growing ones, in place.

    Layers of states stay what they are, as do those of no content.

    Args:
        cache: What transformers made.
        half: Whether keys and values may be kept as float16.

    Returns:
        The growing layers, with those of indexers, all of the same length of at least one token, or
        None when the cache is of a kind that cannot be taken over (and is then unchanged).
    """
    if odd_kind(cache) is not None or cache.offloading or not cache.layers:
        return None
    holders = state_holders(cache)
    if not all(can_be_played(x) for x in holders):
        return None
    # A cache with states of its own has empty layers in their places.
    grow = [_grows(x) and (x.is_initialized or cache not in holders) for x in cache.layers]
    plain = [cast("DynamicLayer", x) for x, grows in zip(cache.layers, grow, strict=True) if grows]
    length = plain[0].get_seq_length() if plain else 0
    if length == 0 or any(layer.get_seq_length() != length for layer in plain):
        return None
    if not all(_fits(layer) for layer in plain):
        return None
    layers = [_growing(layer, half) for layer in plain]
    found = with_indexers(layers)
    if any(layer.get_seq_length() != length for layer in found):
        return None
    growing = iter(layers)
    cache.layers[:] = [
        next(growing) if grows else x for x, grows in zip(cache.layers, grow, strict=True)
    ]
    return found


def odd_kind(cache: Any) -> str | None:
    """The kind of cache, or of a layer in it, that keeps something a recording cannot hold."""
    # The exact types: a subclass may hold more than these.
    own = isinstance(cache, DynamicCache) and keeps_states_alone(cache)
    if type(cache) is not Cache and not own:
        return type(cache).__name__
    for layer in cache.layers:
        if not _grows(layer) and type(layer) not in _STAY:
            return type(layer).__name__
        if getattr(layer, "indexer_position_ids", None) is not None:
            return f"{type(layer).__name__} with positions"
    return None


def _grows(layer: Any) -> bool:
    if type(layer) in _GROW or isinstance(layer, GrowingLayer):
        return True
    return isinstance(layer, DynamicLayer) and own_indexer(type(layer)) is not None


def _growing(layer: DynamicLayer, half: bool) -> GrowingLayer:
    if isinstance(layer, GrowingLayer):
        return layer
    if isinstance(layer, LinearAttentionAndFullAttentionLayer):
        return GrowingStatesLayer.taking_states(layer, half)
    if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
        return GrowingStatesWindowLayer.taking_states(layer, half)
    if isinstance(layer, DynamicIndexedLayer):
        return GrowingIndexedLayer.taking_indexed(layer, half)
    if isinstance(layer, DynamicSlidingWindowLayer):
        return GrowingWindowLayer.taking_window(layer, half)
    if own_indexer(type(layer)) is not None:
        return taking_own(layer, half)
    return GrowingLayer.taking(layer, half)


def _fits(layer: DynamicLayer) -> bool:
    if isinstance(layer, GrowingLayer) and (buffers := layer.untouched) is not None:
        return buffers.one_text
    keys = layer.keys
    return keys is not None and len(keys) == 1 and keys.dtype is torch.float32
