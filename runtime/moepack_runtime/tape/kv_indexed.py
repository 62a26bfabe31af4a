"""Layers whose attention reads the tokens that an indexer has picked.

An indexer keeps keys of its own and picks, for each token, so many of those before it. While there
are no more than that it picks all of them: that is what is played, and what the indexer would
compute is left out then, but for its keys.

transformers has a layer for such keys; some models have one of their own, told by what it adds to a
layer of keys and values: one tensor of a key a token, and one method that appends to it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple, cast

from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer
from typing_extensions import override

from .kv import GrowingLayer


class GrowingIndexedLayer(GrowingLayer):
    """A layer of keys and values with an indexer's keys beside them.

    Attributes:
        indexer: Holds these, ``[1, 1, tokens, width]``, with values of no width; None where the
            layer attends to what another layer's indexer has picked.
    """

    def __init__(self) -> None:
        self.indexer: GrowingLayer | None = None
        super().__init__()

    @classmethod
    def taking_indexed(cls, layer: DynamicIndexedLayer, half: bool) -> GrowingIndexedLayer:
        """A growing layer with what an indexed one holds, which must have begun."""
        new = cls()
        new.take(layer, half)
        if layer.is_indexer_initialized:
            new.indexer_keys = layer.indexer_keys
        return new

    @property
    def indexer_keys(self) -> Tensor | None:
        """``[1, tokens, width]`` float32."""
        keys = None if self.indexer is None else self.indexer.keys
        return None if keys is None else keys[:, 0]

    @indexer_keys.setter
    def indexer_keys(self, value: Tensor | None) -> None:
        self.indexer = None
        if value is not None:
            self.indexer = GrowingLayer()
            self.indexer.update(*_as_layer(value))

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether there are any."""
        return self.indexer is not None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append keys ``[1, new, width]``; all of them."""
        if self.indexer is None:
            self.indexer = GrowingLayer()
        keys, _ = self.indexer.update(*_as_layer(indexer_key_states))
        return keys[:, 0]

    @override
    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.indexer is not None:
            self.indexer.crop(tokens_to_remove)

    @override
    def reset(self) -> None:
        super().reset()
        self.indexer = None

    @override
    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        if self.indexer is not None:
            self.indexer.reorder_cache(beam_idx)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.indexer is not None:
            self.indexer.batch_repeat_interleave(repeats)

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.indexer is not None:
            self.indexer.batch_select_indices(indices)


class OwnIndexer(NamedTuple):
    """What a model's own class of layers calls what it keeps for an indexer.

    Attributes:
        keys: The attribute that holds the keys, ``[1, 1, tokens, width]``.
        append: The method that takes new ones, and returns all.
    """

    keys: str
    append: str


_SAME = {"reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}
"""Methods that such a class may write anew, to do to its keys what is done to the others."""


@functools.cache
def own_indexer(kind: type) -> OwnIndexer | None:
    """The names in a class derived from ``DynamicLayer``, or None if it adds something else."""
    if kind.__mro__[1:2] != (DynamicLayer,) or len(inspect.signature(kind).parameters) > 1:
        return None
    own = {name for name, value in vars(kind).items() if inspect.isfunction(value)} - {"__init__"}
    added = vars(kind()).keys() - vars(cast(Any, DynamicLayer)()).keys()
    append = own - _SAME
    if len(append) != 1 or len(added) != 1 or hasattr(DynamicLayer, next(iter(append))):
        return None
    return OwnIndexer(added.pop(), append.pop())


@functools.cache
def _growing_class(names: OwnIndexer) -> type[GrowingIndexedLayer]:
    """Growing layers that a model finds its own names in."""

    def keys(self: GrowingIndexedLayer) -> Tensor | None:
        return None if self.indexer is None else self.indexer.keys

    def set_keys(self: GrowingIndexedLayer, value: Tensor | None) -> None:
        self.indexer_keys = None if value is None else value[:, 0]

    def append(self: GrowingIndexedLayer, new: Tensor) -> Tensor:
        return self.update_indexer(new[:, 0]).unsqueeze(1)

    members = {names.keys: property(keys, set_keys), names.append: append}
    return type("GrowingOwnIndexedLayer", (GrowingIndexedLayer,), members)


def taking_own(layer: DynamicLayer, half: bool) -> GrowingIndexedLayer:
    """A growing layer with what one of a model's own class holds, which must have begun."""
    names = own_indexer(type(layer))
    assert names is not None
    new = _growing_class(names)()
    new.take(layer, half)
    setattr(new, names.keys, getattr(layer, names.keys))
    return new


def with_indexers(layers: list[GrowingLayer]) -> list[GrowingLayer]:
    """The layers, and after each the one that holds its indexer's keys."""
    found: list[GrowingLayer] = []
    for layer in layers:
        found.append(layer)
        if isinstance(layer, GrowingIndexedLayer) and layer.indexer is not None:
            found.append(layer.indexer)
    return found


def picked_at_most(model: Any) -> int | None:
    """How many tokens a model's indexers pick, or None where its config does not say."""
    config = model.config.get_text_config()
    limit, blocks = getattr(config, "index_topk", None), getattr(config, "index_topk_blocks", None)
    if isinstance(blocks, int) and (size := block_size(config)) is not None:
        return blocks * size
    return limit if isinstance(limit, int) else None


def block_size(config: Any) -> int | None:
    """Tokens that an indexer picks at once, or None where it picks single ones."""
    size = getattr(config, "index_block_size", None)
    return size if isinstance(size, int) else None


def _as_layer(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[1, new, width]`` and values of no width, as a layer takes them."""
    return keys.unsqueeze(1), keys.unsqueeze(1)[..., :0]
