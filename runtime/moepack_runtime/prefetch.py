"""Guessing the next layer's experts, so that their records are read while this layer computes.

The residual stream changes little from one layer to the next, so layer i+1's norm and router are
asked about the residual that layer i's feed-forward block is about to read (Eliseev & Mazur,
arXiv 2312.17238, section 3.2). Where no norm is found, layer i's own router input is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .experts import ExpertsAdapter
from .residency import Residency
from .routers import Router, RouterFinder
from .statistics import LayerGuesses, Statistics

MAX_TOKENS = 4
"""A pass over more tokens needs most experts anyway: nothing is guessed."""

TRIAL_ROUNDS = 48
MIN_RECALL = 0.3
"""After a trial, guesses for a layer stop when a smaller share of its experts was guessed."""


class Speculator:
    """Guesses experts one layer ahead and starts reading them.

    Args:
        model: The model whose forward passes it watches.
        adapters: Its experts modules.
        residency: Where guesses are read to.
        stats: Where recall is counted.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: list[ExpertsAdapter],
        residency: Residency,
        stats: Statistics,
    ) -> None:
        self._residency, self._stats = residency, stats
        self._finder: RouterFinder | None = RouterFinder(model, adapters)
        self._experts = [adapter.num_experts for adapter in adapters]
        self._routers: dict[int, Router | None] = {}
        self._inputs: dict[int, tuple[Tensor, bool]] = {}
        self._guesses: dict[int, set[int]] = {}

    @property
    def missing(self) -> list[int] | None:
        """Layers without a usable router, or None before the first pass has shown them."""
        if self._finder is not None:
            return None
        return [layer for layer, router in self._routers.items() if router is None]

    def describe(self) -> str | None:
        """What a user should know about guessing here, or None when there is nothing to say."""
        if not self.missing:
            return None
        if len(self.missing) == len(self._experts):
            return "no prefetch: the routers of this model cannot be asked early"
        return f"no prefetch for {len(self.missing)} layers, whose routers cannot be asked early"

    def experts_called(self, layer: int, top_k_index: Tensor, needed: list[int]) -> None:
        """The experts of ``layer`` are about to compute: score the guess, make the next.

        Args:
            layer: Ordinal of the MoE layer.
            top_k_index: ``[T, K]``.
            needed: The experts in it.
        """
        if self._looking(layer, top_k_index):
            return
        self._score(layer, needed)
        indices = self._ask(layer, top_k_index)
        if indices is not None:
            self._guess(layer + 1, indices.t().reshape(-1).tolist())
        self._inputs.pop(layer, None)

    def _looking(self, layer: int, top_k_index: Tensor) -> bool:
        """Whether routers are still being looked for."""
        if self._finder is None:
            return False
        self._finder.found(layer, top_k_index)
        if self._finder.done:
            self._routers = self._finder.routers
            self._finder = None
            self._watch()
        return True

    def _score(self, layer: int, needed: list[int]) -> None:
        """Count how good the guess about a layer was."""
        guess = self._guesses.pop(layer, None)
        if guess is not None:
            counts = self._stats.layers.setdefault(layer, LayerGuesses())
            counts.rounds += 1
            counts.guessed += len(guess)
            counts.needed += len(needed)
            counts.right += len(guess.intersection(needed))

    def _ask(self, layer: int, top_k_index: Tensor) -> Tensor | None:
        """What the next layer's router picks, ``[T, K]``; None where it is not asked."""
        router, seen = self._routers.get(layer + 1), self._inputs.get(layer)
        if len(top_k_index) > MAX_TOKENS or router is None or seen is None:
            return None
        if self._given_up(layer + 1):
            return None
        x, normed = seen
        with torch.no_grad():
            # Without a norm of the target's own, what this layer's router reads must do.
            return router.ask(x, normed=normed or router.norm is None)

    def _guess(self, target: int, indices: list[int]) -> None:
        """Start reading what a router picked, first choices of all tokens first."""
        # Some routers also pick places without an expert.
        ranked = [e for e in dict.fromkeys(indices) if e < self._experts[target]]
        self._guesses[target] = set(ranked)
        self._residency.prefetch(target, ranked)

    def _given_up(self, layer: int) -> bool:
        counts = self._stats.layers.get(layer)
        if counts is None or counts.rounds < TRIAL_ROUNDS:
            return False
        return counts.right < MIN_RECALL * counts.needed

    def _watch(self) -> None:
        """Keep what each layer's norm (or router) reads, for the guess about the next layer."""
        for layer, router in self._routers.items():
            if router is None:
                continue
            following = self._routers.get(layer + 1)
            use_norm = router.norm is not None and following is not None and following.norm
            module = router.norm if use_norm and router.norm is not None else router.module

            def keep(
                _module: nn.Module,
                args: tuple[Tensor, ...],
                kwargs: dict[str, Tensor],
                layer: int = layer,
                normed: bool = not use_norm,
            ) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self._inputs[layer] = (x, normed)

            module.register_forward_pre_hook(keep, with_kwargs=True)
