"""The attention of a recorded pass: one query over all cached keys, as one opaque step.

transformers looks attention functions up by name; while a pass is recorded the model's is this one.
No mask is needed then, as one query sees every key before it, or those in its window. Where
attention goes back to the begin of a chunk, it is the mask that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kv import GrowingLayer
from .kv_indexed import GrowingIndexedLayer, block_size
from .kv_window import GrowingWindowLayer
from .record import CannotRecord, Opaque, Recorder

NAME = "moepack_tape"
INDEXED_NAME = "moepack_tape_indexed"
"""Of models with indexers, which want a mask. Nothing that is played is made of it."""
_CHUNK = "moepack_chunk"
"""Attribute of a mask: tokens of a chunk, beyond whose begin a token does not see."""
_recorder: Recorder | None = None
_given: list[tuple[GrowingLayer, Tensor, Tensor]] = []
"""Layers of the cache, and the keys and values that each has handed out in this pass."""
_expanded: list[tuple[GrowingLayer, Tensor, Tensor, nn.Module]] = []
"""Those whose keys and values are latents; what a module has made of these for its heads."""


@contextmanager
def recorded_attention(
    model: nn.Module, recorder: Recorder, layers: list[GrowingLayer]
) -> Iterator[None]:
    """Make a model's attention, and what it does with its cache, steps of a recording."""
    global _recorder
    indexed = any(isinstance(layer, GrowingIndexedLayer) for layer in layers)
    chosen = INDEXED_NAME if indexed else NAME
    ALL_ATTENTION_FUNCTIONS.register(chosen, _attend_indexed if indexed else _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(chosen, _no_mask if indexed else _mask)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    names = [(config, config._attn_implementation) for config in configs.values()]
    expanding = [m for m in model.modules() if callable(getattr(m, "expand_kv", None))]
    _recorder = recorder
    try:
        for config, _ in names:
            config._attn_implementation_internal = chosen
        for layer in layers:
            _watch(layer, recorder)
        for module in expanding:
            _watch_expansion(module, recorder)
        yield
    finally:
        for config, name in names:
            config._attn_implementation_internal = name
        for layer in layers:
            vars(layer).pop("update", None)
        for module in expanding:
            vars(module).pop("expand_kv", None)
        _recorder = None
        _given.clear()
        _expanded.clear()


def _watch(layer: GrowingLayer, recorder: Recorder) -> None:
    update = layer.update

    def watched(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        values = value

        def run() -> Tensor:
            nonlocal values
            keys, values = update(key, value, *args, **kwargs)
            return keys

        keys = recorder.opaque(Opaque("append", layer), (key, value), run)
        _given.append((layer, keys, values))
        return keys, values

    vars(layer)["update"] = watched


def _watch_expansion(module: Any, recorder: Recorder) -> None:
    expand_kv = module.expand_kv

    def watched(latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        layer = _layer_of(latents, rotary)
        keys, values = recorder.unrecorded(lambda: expand_kv(latents, rotary))
        if layer is not None:
            _expanded.append((layer, keys, values, module))
        return keys, values

    module.expand_kv = watched


def _layer_of(keys: Tensor, values: Tensor) -> GrowingLayer | None:
    return next((layer for layer, k, v in _given if k is keys and v is values), None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """``query`` [1, heads, 1, width] to ``[1, 1, heads, value width]``; see transformers."""
    recorder = _recorder
    if recorder is None:
        raise CannotRecord("attention was called outside of a recording")
    layer, module_of_latents = _layer_of(key, value), None
    if layer is None:
        found = [(a, m) for a, keys, values, m in _expanded if keys is key and values is value]
        layer, module_of_latents = found[0] if found else (None, None)
    added = [name for name, given in more.items() if isinstance(given, Tensor)]
    if added and added != ["position_ids"]:
        raise CannotRecord(f"attention is given more than keys and values ({added[0]})")
    chunk = getattr(attention_mask, _CHUNK, 0)
    masked = attention_mask is not None and not chunk
    if layer is None or query.shape[0] != 1 or query.shape[2] != 1 or masked:
        raise CannotRecord("attention reads something else than the cache")
    if isinstance(layer, GrowingWindowLayer) and (chunk or sliding_window) != layer.sliding_window:
        raise CannotRecord("attention has a window of another kind")
    window = sliding_window or 0
    if chunk and (window or module_of_latents is not None):
        raise CannotRecord("attention in chunks has a window, or is over latents")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    inputs = (query,) if s_aux is None else (query, s_aux)
    seen = (layer.get_seq_length() - 1) % chunk + 1 if chunk else window
    what = Opaque("attend", layer, (scale, softcap or 0.0, window, module_of_latents, chunk))

    def run() -> Tensor:
        return _reference(query, key[:, :, -seen:], value[:, :, -seen:], scale, softcap, s_aux)

    return recorder.opaque(what, inputs, run), None


def _attend_indexed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The same over the tokens that an indexer has picked, which must be all of them."""
    size = block_size(module.config) if block_indices is not None else 1
    choices = indices if block_indices is None else block_indices
    if _recorder is not None and choices is not None and size is not None:
        # Of blocks each head may have its own; -1 stands for none.
        heads = choices if block_indices is None else choices.flatten(0, -2)
        rows = _recorder.unrecorded(lambda: [set(row.unique().tolist()) - {-1} for row in heads])
        if any(row != set(range(-(-key.shape[2] // size))) for row in rows):
            raise CannotRecord("an indexer has not picked all tokens")
    return _attend(module, query, key, value, None, **keywords)


def _mask(
    *_: Any,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    **__: Any,
) -> Tensor | None:
    """None, unless a token sees those of its own chunk alone: then one that names the chunk."""
    recorder, size = _recorder, local_size
    if recorder is None or size is None:
        return None

    def goes_on() -> bool:
        # What the first token of the third chunk sees: a window would hold the second chunk's last.
        return bool(mask_function(*torch.tensor([0, 0, 2 * size, 2 * size - 1])))

    if recorder.unrecorded(goes_on):
        return None
    mask = recorder.unrecorded(lambda: torch.zeros(1, 1, 1, 1, dtype=torch.float32))
    setattr(mask, _CHUNK, size)
    return cast(Tensor, mask)


def _no_mask(q_length: int, kv_length: int, **_: Any) -> Tensor:
    return torch.zeros(1, 1, q_length, kv_length, dtype=torch.float32)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)) * scale  # [1, heads, 1, tokens]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous()
