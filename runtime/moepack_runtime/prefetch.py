"""Guessing the next layer's experts, so that their records are read while this layer computes.

How is told in :mod:`moepack_runtime.early_routers`, when not in
:mod:`moepack_runtime.prefetch_trial`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from torch import Tensor, nn

from .cache_bias import CacheBias
from .early_routers import EarlyRouters
from .experts import ExpertsAdapter
from .prefetch_trial import PrefetchTrial
from .residency import Residency
from .statistics import LayerGuesses, Statistics

logger = logging.getLogger(__name__)

MAX_TOKENS = 4
"""A pass over more tokens needs most experts anyway: nothing is guessed."""

TRIAL_ROUNDS = 48
MIN_RECALL = 0.3
"""After so many rounds, guesses for a layer stop if a smaller share of its experts was guessed."""

_ANSWERS = {
    (True, True): "stays on",
    (True, False): "turns itself off",
    (False, True): "is on again",
    (False, False): "stays off",
}
"""By whether it was on and whether it pays."""


class Speculator:
    """Guesses experts one layer ahead and starts reading them.

    Args:
        model: The model whose forward passes it watches.
        adapters: Its experts modules.
        residency: Where guesses are read to.
        stats: Where recall is counted.
        bias: What nudges the routers, which guesses must allow for; None without.
        clock: Gives seconds.

    Attributes:
        routers: What it asks.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: list[ExpertsAdapter],
        residency: Residency,
        stats: Statistics,
        bias: CacheBias | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._residency, self._stats, self._bias = residency, stats, bias
        self._clock = clock
        self.routers = EarlyRouters(model, adapters)
        self._experts = [adapter.num_experts for adapter in adapters]
        self._guesses: dict[int, set[int]] = {}
        self._trial = PrefetchTrial()

    @property
    def missing(self) -> list[int] | None:
        """Layers without a usable router, or None before the first pass has shown them."""
        return self.routers.missing if self.routers.found else None

    @property
    def pays(self) -> bool:
        """Whether guessing is on: it has not been measured to slow tokens down."""
        return self._trial.pays

    def describe(self) -> str | None:
        """What a user should know about guessing here, or None when there is nothing to say."""
        if not self.pays:
            return "prefetch turned itself off: tokens were slower with it"
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
        if not self.routers.found:
            self.routers.look(layer, top_k_index)
            return
        self._score(layer, needed)
        indices = self._ask(layer, top_k_index)
        if indices is not None:
            self._guess(layer + 1, indices)

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
        """What the next layer's router picks, ``[T, K]``; None where nothing is guessed."""
        indices, target = None, layer + 1
        if len(top_k_index) > MAX_TOKENS:
            self._trial.interrupted()
        else:
            if layer == 0:
                self._start_token()
            known = target < len(self._experts) and not self._given_up(target)
            if self._trial.guessing and known:
                nudged = self._bias.nudging(target) if self._bias else contextlib.nullcontext()
                with nudged:
                    indices = self.routers.ask(layer, target)
        self.routers.forget(layer)
        return indices

    def _start_token(self) -> None:
        before = self._trial.verdict
        guessing = self._trial.token(self._clock())
        self._stats.unguessed_tokens += not guessing
        verdict = self._trial.verdict
        if verdict is None or verdict is before:
            return
        was_on = before is None or before.pays
        self._stats.prefetch_stops += was_on and not verdict.pays
        logger.info(
            "prefetch %s: a token takes %.2f ms with it, %.2f ms without",
            _ANSWERS[was_on, verdict.pays],
            verdict.with_guesses * 1e3,
            verdict.without * 1e3,
        )

    def _guess(self, target: int, indices: Tensor) -> None:
        """Start reading what the router of ``target`` picked."""
        # First choices first; some routers also pick places without an expert.
        choices = dict.fromkeys(indices.t().reshape(-1).tolist())
        ranked = [expert for expert in choices if expert < self._experts[target]]
        self._guesses[target] = set(ranked)
        self._residency.prefetch(target, ranked)

    def _given_up(self, layer: int) -> bool:
        counts = self._stats.layers.get(layer)
        if counts is None or counts.rounds < TRIAL_ROUNDS:
            return False
        return counts.right < MIN_RECALL * counts.needed
