"""States of linear attention and of convolutions, at addresses that a recording knows.

transformers' layers of that kind keep tensors of fixed shapes and write over them in place. A
recording has a set of such tensors of its own, its *home*. The text that is played has its states
there; when another one comes, the text before gets tensors of its own again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

Place = tuple[str, int]
"""Name of a layer's attribute, and the number of the state in it."""


def state_layers(cache: Cache) -> list[LinearAttentionLayer]:
    """The layers of a cache that keep states and nothing else."""
    return [layer for layer in cache.layers if type(layer) is LinearAttentionLayer]


def can_be_played(layer: LinearAttentionLayer) -> bool:
    """Whether a layer has begun, with one text in float32, and keeps nothing to go back to."""
    tensors = [_get(layer, place) for place in _places(layer)]
    return (
        bool(tensors)
        and not layer.record_past
        and all(layer.has_previous_state.values())
        and all(len(t) == 1 and t.dtype is torch.float32 and t.is_cpu for t in tensors)
    )


class Home:
    """The tensors that a recording reads states from and writes them to.

    Args:
        layers: The state layers of the text that is recorded, which stay as they are.

    Attributes:
        layers: Layers of the same kind over the home's tensors, for the passes that are recorded.
        tensors: These tensors.
    """

    def __init__(self, layers: Sequence[LinearAttentionLayer]) -> None:
        self.layers = [_copy(layer) for layer in layers]
        self.tensors = [_get(layer, place) for layer in self.layers for place in _places(layer)]
        self._shapes = [_shapes(layer) for layer in self.layers]
        self._owners: list[weakref.ref[LinearAttentionLayer] | None] = [None] * len(layers)

    def load(self, layers: Sequence[LinearAttentionLayer]) -> None:
        """Hold what some layers hold, which keep their own."""
        for mine, layer in zip(self.layers, layers, strict=True):
            for place in _places(mine):
                _get(mine, place).copy_(_get(layer, place))

    def fits(self, layers: Sequence[LinearAttentionLayer]) -> bool:
        """Whether some layers are of the shapes that were recorded."""
        return [_shapes(layer) for layer in layers] == self._shapes

    def move_in(self, layers: Sequence[LinearAttentionLayer]) -> None:
        """Let some layers, which fit, have their states here from now on."""
        for number, (mine, layer) in enumerate(zip(self.layers, layers, strict=True)):
            owner = self._owners[number]
            before = None if owner is None else owner()
            for place in _places(mine):
                home = _get(mine, place)
                if _get(layer, place) is home:
                    continue
                if before is not None and _get(before, place) is home:
                    _set(before, place, home.clone())
                home.copy_(_get(layer, place))
                _set(layer, place, home)
            if before is not layer:
                self._owners[number] = weakref.ref(layer)


def _places(layer: LinearAttentionLayer) -> Iterator[Place]:
    for name in ("conv_states", "recurrent_states"):
        for number, state in getattr(layer, name).items():
            if state is not None:
                yield name, number


def _get(layer: LinearAttentionLayer, place: Place) -> Tensor:
    state: Tensor = getattr(layer, place[0])[place[1]]
    return state


def _set(layer: LinearAttentionLayer, place: Place, state: Tensor) -> None:
    getattr(layer, place[0])[place[1]] = state


def _shapes(layer: LinearAttentionLayer) -> dict[Place, torch.Size]:
    return {place: _get(layer, place).shape for place in _places(layer)}


def _copy(layer: LinearAttentionLayer) -> LinearAttentionLayer:
    new = LinearAttentionLayer(number_of_states=layer.number_of_states)
    for name, value in vars(layer).items():
        setattr(new, name, dict(value) if isinstance(value, dict) else value)
    for place in _places(layer):
        _set(new, place, _get(layer, place).clone())
    return new
