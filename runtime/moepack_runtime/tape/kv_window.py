"""Keys and values of layers that see a window of the last tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from typing_extensions import override

from .kv import GROWTH, Buffers, GrowingLayer


class GrowingWindowLayer(GrowingLayer):
    """A sliding-window cache layer over a buffer that keeps at least the window.

    Tokens before the window stay until the buffer is full, and are then left behind: at most
    :data:`GROWTH` of them, or those of the longest prompt.

    Args:
        window: Tokens that a token sees, itself among them.

    Attributes:
        cumulative_length: Tokens that have come in all.
        record_past: Whether none may be left behind, for ``crop``.
    """

    is_sliding = True
    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes

    def __init__(self, window: int) -> None:
        self.sliding_window = window
        self.cumulative_length = 0
        self.record_past = False
        super().__init__()

    @classmethod
    def taking_window(cls, layer: DynamicSlidingWindowLayer, half: bool) -> GrowingWindowLayer:
        """A growing layer with what a sliding one holds, which must have begun."""
        new = cls(layer.sliding_window)
        new.cumulative_length, new.record_past = layer.cumulative_length, layer.record_past
        new.take(layer, half)
        return new

    @override
    def first_shown(self, filled: int) -> int:
        return max(0, filled - self.sliding_window + 1)

    @override
    def get_seq_length(self) -> int:
        return self.cumulative_length

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; what the new tokens see. See the base class."""
        buffers = self.begun(key_states, value_states)
        end = buffers.write(buffers.filled, key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        self.forget()
        begin = max(0, end - self.sliding_window + 1 - key_states.shape[2])
        return buffers.keys[:, :, begin:end].float(), buffers.values[:, :, begin:end].float()

    @override
    def reserve(self, tokens: int) -> Buffers:
        buffers = self.own()
        new = tokens - self.cumulative_length
        keep = self.sliding_window - 1
        full = buffers.filled + new > buffers.capacity
        if full and not self.record_past and buffers.filled >= keep + GROWTH:
            begin, end = buffers.filled - keep, buffers.filled
            # A copy: somebody may have views of the others.
            last = buffers.keys[:, :, begin:end], buffers.values[:, :, begin:end]
            buffers = self.buffers = Buffers(*last, buffers.half)
        buffers.reserve(buffers.filled + new)
        self.forget()
        return buffers

    @override
    def rewind(self, length: int) -> None:
        self.own().filled -= self.cumulative_length - length
        self.cumulative_length = length
        self.forget()

    @override
    def played(self) -> None:
        self.cumulative_length += 1
        super().played()

    def activate_past_recording(self) -> None:
        """Leave no token behind from now on."""
        self.record_past = True

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, ``-tokens_to_remove`` of them, where the window is kept still."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes minus the number of tokens to remove")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        length = max(0, self.cumulative_length + tokens_to_remove)
        left = self.own().filled - (self.cumulative_length - length)
        if left < min(self.sliding_window - 1, length):
            raise RuntimeError(
                "tokens that crop would show again were left behind: call "
                "activate_past_recording() before them"
            )
        self.rewind(length)
