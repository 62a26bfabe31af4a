"""Layers whose attention reads the tokens that an indexer has picked.

An indexer keeps keys of its own and picks, for each token, so many of those before it. While there
are no more than that it picks all of them: that is what is played, and what the indexer would
compute is left out then, but for its keys.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicIndexedLayer
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
    limit = getattr(model.config.get_text_config(), "index_topk", None)
    return limit if isinstance(limit, int) else None


def _as_layer(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[1, new, width]`` and values of no width, as a layer takes them."""
    return keys.unsqueeze(1), keys.unsqueeze(1)[..., :0]
