"""Layers that keep states of convolutions or linear attention beside their keys and values."""

from __future__ import annotations

from typing import cast

from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from typing_extensions import override

from .kv import GrowingLayer
from .kv_window import GrowingWindowLayer


# mypy sees what transformers' own classes of this kind put together.
class GrowingStatesLayer(  # type: ignore[misc, override]
    GrowingLayer, LinearAttentionAndFullAttentionLayer
):
    """Full attention and states."""

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states)

    @classmethod
    def taking_states(
        cls, layer: LinearAttentionAndFullAttentionLayer, half: bool
    ) -> GrowingStatesLayer:
        """A growing layer with what such a layer holds, which must have begun."""
        new = cls(number_of_states=layer.number_of_states)
        _hand_over(layer, new)
        new.take(layer, half)
        return new

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; of states none can be."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        GrowingLayer.crop(self, tokens_to_remove)


class GrowingStatesWindowLayer(  # type: ignore[misc, override]
    GrowingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer
):
    """A window of the last tokens, and states."""

    def __init__(self, sliding_window: int, number_of_states: int = 1) -> None:
        LinearAttentionAndSlidingWindowAttentionLayer.__init__(
            self, sliding_window, number_of_states
        )

    @classmethod
    def taking_states(
        cls, layer: LinearAttentionAndSlidingWindowAttentionLayer, half: bool
    ) -> GrowingStatesWindowLayer:
        """A growing layer with what such a layer holds, which must have begun."""
        new = cls(layer.sliding_window, layer.number_of_states)
        new.cumulative_length = layer.cumulative_length
        _hand_over(layer, new)
        new.take(layer, half)
        return new

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; of states none can be."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        GrowingWindowLayer.crop(self, tokens_to_remove)


def _hand_over(old: LinearAttentionLayer, new: LinearAttentionLayer) -> None:
    for name in vars(cast(object, LinearAttentionLayer())):
        setattr(new, name, getattr(old, name))
