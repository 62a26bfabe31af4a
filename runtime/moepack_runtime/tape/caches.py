"""Which caches of transformers' are played with, and how their layers become growing ones."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .kv import GrowingLayer
from .kv_window import GrowingWindowLayer

_KINDS = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, GrowingWindowLayer)


def take_over(cache: Any, *, half: bool = False) -> list[GrowingLayer] | None:
    """Turn a cache's layers into growing ones, in place.

    Args:
        cache: What transformers made.
        half: Whether keys and values may be kept as float16.

    Returns:
        The layers, all of the same length of at least one token, or None when the cache is of a
        kind that cannot be taken over (and is then unchanged).
    """
    if not isinstance(cache, Cache) or cache.offloading or not cache.layers:
        return None
    # The exact types: a subclass may hold more than keys and values.
    if any(type(layer) not in _KINDS for layer in cache.layers):
        return None
    plain = cast("list[DynamicLayer]", cache.layers)
    length = plain[0].get_seq_length()
    if length == 0 or any(layer.get_seq_length() != length for layer in plain):
        return None
    if not all(_fits(layer) for layer in plain):
        return None
    layers = [_growing(layer, half) for layer in plain]
    cache.layers[:] = layers
    return layers


def _growing(layer: DynamicLayer, half: bool) -> GrowingLayer:
    if isinstance(layer, GrowingLayer):
        return layer
    if isinstance(layer, DynamicSlidingWindowLayer):
        return GrowingWindowLayer.taking_window(layer, half)
    return GrowingLayer.taking(layer, half)


def _fits(layer: DynamicLayer) -> bool:
    if isinstance(layer, GrowingLayer) and (buffers := layer.untouched) is not None:
        return buffers.one_text
    keys = layer.keys
    return keys is not None and len(keys) == 1 and keys.dtype is torch.float32
