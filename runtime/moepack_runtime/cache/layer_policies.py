"""A cache's policy as the user's options say: one for all layers or one each, with or without pins.

Both are wrapped around any policy of :mod:`moepack_runtime.policies`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..policies import Key, Observing, Offline, Policy, get_policy

PINNED_SHARE = 0.5
"""Pins fill at most this share of the slots; the rest follows the text."""


def make_policy(
    name: str,
    slots: int,
    records: Sequence[Key],
    *,
    scope: str = "global",
    pins: Sequence[Key] = (),
) -> Policy:
    """The policy of one size class.

    Args:
        name: A file in ``policies``.
        slots: Slots that demanded experts may fill.
        records: The experts of this size.
        scope: ``global`` for one order of all experts, ``layer`` for one a layer.
        pins: Experts to keep, the most wanted first; as many of this size as fit in
            ``PINNED_SHARE`` of the slots are kept.

    Raises:
        UsageError: There is no such policy.
    """
    make = get_policy(name)
    layers = sorted({layer for layer, _ in records})
    policy: Policy = PerLayer(make, slots, layers) if scope == "layer" else make()
    of_size = set(records).intersection(pins)
    kept = [key for key in pins if key in of_size][: int(slots * PINNED_SHARE)]
    return Pinned(policy, frozenset(kept)) if kept else policy


class PerLayer:
    """Gives each layer an equal part of the slots, and a policy of its own.

    Args:
        make: Makes the policy of one layer.
        slots: Slots for all of them.
        layers: The layers.
    """

    def __init__(self, make: Callable[[], Policy], slots: int, layers: Sequence[int]) -> None:
        self._policies = {layer: make() for layer in layers}
        self._observing = {
            layer: policy
            for layer, policy in self._policies.items()
            if isinstance(policy, Observing)
        }
        self._counts = dict.fromkeys(layers, 0)
        share, over = divmod(slots, len(self._policies))
        self._shares = {layer: share + (i < over) for i, layer in enumerate(layers)}

    def insert(self, key: Key) -> None:
        """See :class:`Policy`."""
        self._policies[key[0]].insert(key)
        self._counts[key[0]] += 1

    def touch(self, key: Key) -> None:
        """See :class:`Policy`."""
        self._policies[key[0]].touch(key)

    def remove(self, key: Key) -> None:
        """See :class:`Policy`."""
        self._policies[key[0]].remove(key)
        self._counts[key[0]] -= 1

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """One of the layer's own if its part is full, else one of the layer most above its part."""
        excess = {layer: self._counts[layer] - self._shares[layer] for layer in self._policies}
        order = sorted(excess, key=lambda layer: -excess[layer])
        if incoming is not None and excess[incoming[0]] >= 0:
            order.remove(incoming[0])
            order.insert(0, incoming[0])
        for layer in order:
            key = self._policies[layer].victim(usable, incoming)
            if key is not None:
                return key
        return None

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """See :class:`Observing`."""
        policy = self._observing.get(layer)
        if policy is not None:
            policy.observe(layer, experts, weights)

    def foresee(self, demands: Sequence[Sequence[Key]]) -> None:
        """See :class:`Offline`."""
        for layer, policy in self._policies.items():
            if isinstance(policy, Offline):
                policy.foresee([[key for key in keys if key[0] == layer] for keys in demands])


class Pinned:
    """Gives up certain experts only when nothing else is left.

    Args:
        policy: Decides about the others.
        pins: The experts that stay.
    """

    def __init__(self, policy: Policy, pins: frozenset[Key]) -> None:
        self._policy, self._pins = policy, pins
        self._observing = policy if isinstance(policy, Observing) else None

    def insert(self, key: Key) -> None:
        """See :class:`Policy`."""
        self._policy.insert(key)

    def touch(self, key: Key) -> None:
        """See :class:`Policy`."""
        self._policy.touch(key)

    def remove(self, key: Key) -> None:
        """See :class:`Policy`."""
        self._policy.remove(key)

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """One that is not pinned; a pin only where slots have become so few that all hold pins."""
        other = self._policy.victim(lambda key: key not in self._pins and usable(key), incoming)
        return self._policy.victim(usable, incoming) if other is None else other

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """See :class:`Observing`."""
        if self._observing is not None:
            self._observing.observe(layer, experts, weights)

    def foresee(self, demands: Sequence[Sequence[Key]]) -> None:
        """See :class:`Offline`."""
        if isinstance(self._policy, Offline):
            self._policy.foresee(demands)
