"""Keys and values in buffers with room to grow, read by recorded and by transformers' own passes.

transformers' dynamic cache makes a new tensor of all keys for every token. Here a layer keeps a
buffer ``[1, heads, capacity, width]`` and hands out views of what is filled.

Where activations are rounded to 8 bits a buffer holds float16, half of what attention reads, and
what is handed out is a float32 copy. A layer with numbers that float16 cannot hold keeps float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

GROWTH = 256
"""Tokens by which a full buffer grows, at least; it grows by half of itself."""


HALF_RANGE = (2.0**-8, 65504.0)
"""Where the largest of some numbers must lie for float16 to hold them: above, it has none; below,
its smallest steps would be more than 1e-5 of it."""


def fits_half(numbers: Tensor) -> bool:
    """Whether float16 holds them as well as float16 can; of none, yes."""
    if numbers.numel() == 0:
        return True
    low, high = HALF_RANGE
    return low <= float(numbers.detach().abs().amax()) <= high  # a NaN is in no range


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """What is made in inference mode cannot be written to outside, where a cache may go on."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Buffers:
    """The buffers of one layer: ``[1, heads, capacity, width]`` each, filled from the front.

    Args:
        keys: ``[1, heads, tokens, width]`` float32, to begin with.
        values: The same.
        half: Whether they may be kept as float16.

    Attributes:
        filled: Tokens that are there.
    """

    def __init__(self, keys: Tensor, values: Tensor, half: bool) -> None:
        self.filled = 0
        dtype = torch.float16 if half else keys.dtype
        with outside_inference_mode():
            self.keys = keys.new_empty((*keys.shape[:2], 0, keys.shape[3]), dtype=dtype)
            self.values = values.new_empty((*values.shape[:2], 0, values.shape[3]), dtype=dtype)
        self.write(0, keys, values)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[2]

    @property
    def one_text(self) -> bool:
        """Whether it holds a single text, in numbers that are played."""
        return len(self.keys) == 1 and self.keys.dtype in (torch.float32, torch.float16)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all."""
        if tokens <= self.capacity:
            return
        with outside_inference_mode():
            self._grow(tokens)

    def _grow(self, tokens: int) -> None:
        capacity = max(tokens, self.capacity + max(GROWTH, self.capacity // 2))
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            # Not zeros: pages that no token has reached yet take no memory.
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.filled] = old[:, :, : self.filled]
            setattr(self, name, new)

    @property
    def half(self) -> bool:
        """Whether they are float16."""
        return self.keys.dtype is torch.float16

    def widen(self) -> None:
        """Go on in float32."""
        with outside_inference_mode():
            self.keys, self.values = self.keys.float(), self.values.float()

    def write(self, at: int, keys: Tensor, values: Tensor) -> int:
        """Put tokens at a place and forget what was behind it; returns where they end."""
        with outside_inference_mode():
            return self._write(at, keys, values)

    def _write(self, at: int, keys: Tensor, values: Tensor) -> int:
        end = at + keys.shape[2]
        self.filled = min(self.filled, at)
        if self.half and not (fits_half(keys) and fits_half(values)):
            self.widen()
        self.reserve(end)
        self.keys[:, :, at:end] = keys
        self.values[:, :, at:end] = values
        self.filled = end
        return end


class GrowingLayer(DynamicLayer):
    """A full-attention cache layer over a buffer.

    ``keys`` and ``values`` are views of what is filled, or float32 copies of it, made when somebody
    looks: a played token only moves the end. Code of transformers' may also put others in their
    place.

    Attributes:
        half: Whether float16 may be kept.
    """

    buffers: Buffers | None = None
    half = False
    _keys: Tensor | None = None
    _values: Tensor | None = None
    _shown: Tensor | None = None  # the keys that were handed out

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def taking(cls, layer: DynamicLayer, half: bool) -> GrowingLayer:
        """A growing layer with what a dynamic one holds, which must have begun."""
        new = cls()
        new.take(layer, half)
        return new

    def take(self, layer: DynamicLayer, half: bool) -> None:
        """Begin with what another layer holds."""
        self.half = half
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True
        self.buffers = Buffers(cast(Tensor, layer.keys), cast(Tensor, layer.values), half)

    def first_shown(self, filled: int) -> int:
        """The first of the tokens in a buffer that transformers is shown."""
        return 0

    @property
    def keys(self) -> Tensor | None:
        """``[1, heads, tokens, width]``, or None before the first."""
        if self._keys is None and self.buffers is not None:
            # In float32: itself where it is so already.
            self._keys = self._shown = self._show(self.buffers.keys, self.buffers.filled)
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
            self._values = self._show(self.buffers.values, self.buffers.filled)
        return self._values

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    def _show(self, numbers: Tensor, filled: int) -> Tensor:
        return numbers[:, :, self.first_shown(filled) : filled].float()

    @property
    def untouched(self) -> Buffers | None:
        """The buffers, if they hold all there is: nobody has looked at it since, or replaced it."""
        return self.buffers if self._keys is None else None

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
        length = self.get_seq_length()
        self.begun(key_states, value_states).write(length, key_states, value_states)
        self.forget()
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def begun(self, keys: Tensor, values: Tensor) -> Buffers:
        """The buffers, with room for tokens like these if there are none yet."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.buffers = Buffers(keys[:, :, :0], values[:, :, :0], self.half)
            self.forget()
        return self.own()

    def reserve(self, tokens: int) -> Buffers:
        """Make room for so many tokens in all; what was handed out before is a copy then."""
        buffers = self.buffers
        if self._keys is not None or buffers is None or tokens > buffers.capacity:
            length = self.get_seq_length()
            buffers = self.own()
            buffers.reserve(tokens)
            self.rewind(length)
        return buffers

    def rewind(self, length: int) -> None:
        """Forget the tokens after the first ``length``."""
        self.own().filled = length
        self.forget()

    @override
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, ``-tokens_to_remove`` of them; nothing is copied for it."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes minus the number of tokens to remove")
        if self.is_initialized and tokens_to_remove != 0:
            self.rewind(max(0, self.get_seq_length() + tokens_to_remove))

    def played(self) -> None:
        """A played pass has put one more token behind the others."""
        self.own().filled += 1
        self.forget()

    def forget(self) -> None:
        """What was handed out does not say what there is any more."""
        self._keys = self._values = self._shown = None

    def own(self) -> Buffers:
        """The buffers, made anew if transformers has put something else in the views' place."""
        keys, values, mine, shown = self._keys, self._values, self.buffers, self._shown
        # A part of what was handed out stands for that part of the buffers.
        replaced = keys is not None and (
            mine is None
            or shown is None
            or keys.data_ptr() != shown.data_ptr()
            or len(keys) != len(shown)
        )
        if replaced:
            mine = self.buffers = Buffers(cast(Tensor, keys), cast(Tensor, values), self.half)
            self.forget()
        return cast(Buffers, mine)
