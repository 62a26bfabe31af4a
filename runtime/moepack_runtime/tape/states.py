"""States of linear attention and of convolutions, at addresses that a recording knows.

Tensors of fixed shapes, which transformers' layers of that kind write over in place, and some
models' caches put others in the place of. A recording has a set of such tensors of its own, its
*home*. The text that is played has its states there; when another one comes, the text before gets
tensors of its own again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from .record import CannotRecord, Step, storage, tensors_read

Holder = Any
"""What has states: a layer of a cache, or a cache that keeps lists of them itself."""

Place = tuple[str, int]
"""Name of a holder's attribute, and the number of the state in it."""


def state_holders(cache: Cache) -> list[Holder]:
    """What keeps states in a cache."""
    layers = [x for x in cache.layers if isinstance(x, LinearAttentionCacheLayerMixin)]
    return [*layers, cache] if _own_names(cache) else layers


def keeps_states_alone(cache: Cache) -> bool:
    """Whether all that a cache has beside layers, if it is of a model's own class, are states."""
    return all(
        isinstance(kept, list) and all(isinstance(x, Tensor) or len(x) == 0 for x in kept)
        for kept in (getattr(cache, name) for name in _own_names(cache))
    )


def can_be_played(holder: Holder) -> bool:
    """Whether states have begun, of one text in float32, with nothing kept to go back to."""
    tensors = states_of([holder])
    if isinstance(holder, LinearAttentionCacheLayerMixin) and (
        holder.record_past or not all(holder.has_previous_state.values())
    ):
        return False
    return bool(tensors) and all(
        len(t) == 1 and t.dtype is torch.float32 and t.is_cpu for t in tensors
    )


def states_of(holders: Sequence[Holder]) -> list[Tensor]:
    """All states, in order."""
    return [_get(holder, place) for holder in holders for place in _places(holder)]


class Home:
    """The tensors that a recording reads states from and writes them to.

    Args:
        holders: Of the text that is recorded, which keep their own.

    Attributes:
        tensors: The home's.
    """

    def __init__(self, holders: Sequence[Holder]) -> None:
        self._states = [{p: _get(h, p).clone() for p in _places(h)} for h in holders]
        self.tensors = [tensor for states in self._states for tensor in states.values()]
        self._owners: list[weakref.ref[Holder] | None] = [None] * len(holders)

    def load(self, holders: Sequence[Holder]) -> None:
        """Hold what some holders do, which keep their own."""
        for home, holder in self._places_of(holders):
            for place, tensor in home.items():
                tensor.copy_(_get(holder, place))

    def fits(self, holders: Sequence[Holder]) -> bool:
        """Whether some holders' states are of the shapes that were recorded."""
        shapes = [{p: tensor.shape for p, tensor in home.items()} for home in self._states]
        return [{p: _get(h, p).shape for p in _places(h)} for h in holders] == shapes

    def move_in(self, holders: Sequence[Holder]) -> None:
        """Let some holders, which fit, have their states here from now on."""
        for number, (home, holder) in enumerate(self._places_of(holders)):
            owner = self._owners[number]
            before = None if owner is None else owner()
            for place, tensor in home.items():
                if _get(holder, place) is tensor:
                    continue
                if before is not None and _get(before, place) is tensor:
                    _set(before, place, tensor.clone())
                tensor.copy_(_get(holder, place))
                _set(holder, place, tensor)
            if before is not holder:
                self._owners[number] = weakref.ref(holder)

    @contextmanager
    def lent(self, holders: Sequence[Holder]) -> Iterator[None]:
        """Let some holders have their states here for the passes that are recorded."""
        own = [{place: _get(h, place) for place in home} for home, h in self._places_of(holders)]
        try:
            for home, holder in self._places_of(holders):
                for place, tensor in home.items():
                    _set(holder, place, tensor)
            yield
        finally:
            for states, holder in zip(own, holders, strict=True):
                for place, tensor in states.items():
                    _set(holder, place, tensor)

    def take_back(self, holders: Sequence[Holder], steps: list[Step]) -> None:
        """Where a pass has put another tensor in a state's place, write it over that instead.

        Args:
            holders: That the home was lent to.
            steps: Of the pass; the copy goes to the first place at which nothing minds.
        """
        touched = [{storage(t) for t in (*tensors_read(s), *s.results)} for s in steps]
        copies: list[tuple[int, Step]] = []
        for home, holder in self._places_of(holders):
            for place, tensor in home.items():
                new = _get(holder, place)
                if new is tensor:
                    continue
                if new.shape != tensor.shape:
                    raise CannotRecord("a state of the cache changes its shape")
                both = {storage(tensor), storage(new)}
                last = max((i for i, t in enumerate(touched) if t & both), default=-1)
                copy = Step(torch.ops.aten.copy_.default, (tensor, new), {}, (tensor,))
                copies.append((last + 1, copy))
                tensor.copy_(new)
                _set(holder, place, tensor)
        for at, copy in sorted(copies, key=lambda item: item[0], reverse=True):
            steps.insert(at, copy)

    def _places_of(self, holders: Sequence[Holder]) -> Iterator[tuple[dict[Place, Tensor], Holder]]:
        yield from zip(self._states, holders, strict=True)


def _own_names(cache: Cache) -> list[str]:
    """What a cache of a model's own class keeps beside its layers."""
    if type(cache) in (Cache, DynamicCache):
        return []
    return sorted(vars(cache).keys() - vars(DynamicCache()).keys())


def _places(holder: Holder) -> Iterator[Place]:
    if isinstance(holder, LinearAttentionCacheLayerMixin):
        for name in ("conv_states", "recurrent_states"):
            for number, state in getattr(holder, name).items():
                if state is not None:
                    yield name, number
        return
    for name in _own_names(holder):
        for number, state in enumerate(getattr(holder, name)):
            if isinstance(state, Tensor):
                yield name, number


def _get(holder: Holder, place: Place) -> Tensor:
    state: Tensor = getattr(holder, place[0])[place[1]]
    return state


def _set(holder: Holder, place: Place, state: Tensor) -> None:
    getattr(holder, place[0])[place[1]] = state
