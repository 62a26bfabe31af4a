"""Guessing for a GPU: guesses for the next layer reach the host with this layer's indices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prefetch.guesses import Speculator


class DeviceSpeculator(Speculator):
    """A :class:`Speculator` that leaves the transfer of indices to its caller."""

    def ask(self, layer: int, top_k_index: Tensor) -> Tensor | None:
        """What the router of the next layer picks, on the device.

        Args:
            layer: Ordinal of the MoE layer that is about to compute.
            top_k_index: ``[T, K]``.

        Returns:
            ``[T, K]`` indices, or None where nothing is guessed.
        """
        if not self.routers.found:
            self.routers.look(layer, top_k_index)
            return None
        guesses = self._guesses_at(layer, len(top_k_index))
        guess = self._ask(layer, layer + 1) if guesses else None
        self.routers.forget(layer)
        return guess

    def traced(self, layer: int) -> Tensor | None:
        """The same where the pass is being compiled: asked always, used where :meth:`wants` says.

        A compiled pass holds no decisions of the host's. Routers must be found already.
        """
        guess = self.routers.ask(layer, layer + 1)
        self.routers.forget(layer)
        return guess

    def wants(self, layer: int, tokens: int) -> bool:
        """Whether a guess made at a layer of a compiled pass over so many tokens is used."""
        return self._guesses_at(layer, tokens) and self._guesses_for(layer + 1)

    def told(self, layer: int, needed: list[int], guess: torch.Tensor | None) -> None:
        """The indices are on the host: score the guess about this layer, use that about the next.

        Args:
            layer: The layer that is about to compute.
            needed: Its experts.
            guess: What :meth:`ask` gave, in host memory.
        """
        self._score(layer, needed)
        self._guess(layer + 1, guess)
