"""Guessing the next layers' experts, so that their records are read while this layer computes.

The next layer is guessed for, and where a recorded pass asks for nothing (see
:mod:`moepack_runtime.tape`) the one after it as well: with a single layer's guesses read, the disk
would rest until that layer's turn. What is then guessed for a layer in its turn replaces that.

How is told in :mod:`moepack_runtime.prefetch.early_routers`, when not in
:mod:`moepack_runtime.prefetch.trial`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..cache.residency import Residency
from ..experts import ExpertsAdapter
from ..routing.cache_bias import CacheBias
from ..statistics import LayerGuesses, Statistics
from .early_routers import Answers, EarlyRouters
from .trial import PrefetchTrial

logger = logging.getLogger(__name__)

MAX_TOKENS = 4
"""A pass over more tokens needs most experts anyway: nothing is guessed."""

TRIAL_ROUNDS = 48
MIN_RECALL = 0.3
"""After so many rounds, guesses for a layer stop if a smaller share of its experts was guessed."""

FAR_PRECISION = 0.7
"""After as many, guesses two layers ahead stop if a smaller share of what was read for them was
needed. A disk that has more to read than time is slowed by every wrong one, and what a nearer guess
would find wrong is read by then."""

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
        # By layer, with the count of tokens then: a layer that is computed without coming here
        # leaves its guess behind.
        self._guesses: dict[int, tuple[int, set[int]]] = {}
        self._read_far: dict[int, tuple[int, set[int]]] = {}  # what was begun to be read
        self._far_counts: dict[int, LayerGuesses] = {}
        self._stopped: set[tuple[str, int]] = set()  # how far ahead, and for which layer
        self._said: set[tuple[str, int]] = set()
        self._trial = PrefetchTrial()
        self._token_began: float | None = None
        model.register_forward_hook(lambda *_: self._pass_ended())

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
        if self._guesses_at(layer, len(top_k_index)):
            self._guess(layer + 1, self._ask(layer, layer + 1))
            self._guess_far(layer, layer + 2)
        self.routers.forget(layer)

    def ask_ahead(self, layer: int) -> Answers:
        """What there is to ask at ``layer``, for a recording; see :class:`EarlyRouters`."""
        return self.routers.ask_ahead(layer, self._residency.lookahead)

    @contextlib.contextmanager
    def answered(self, answers: Answers) -> Iterator[None]:
        """Inside the block a recorded pass asks, and its answers are these."""
        self.routers.show(answers)
        try:
            yield
        finally:
            self.routers.show({})

    def _score(self, layer: int, needed: list[int]) -> None:
        """Count how good the guesses about a layer were."""
        for guesses, counts in (
            (self._guesses, self._stats.layers),
            (self._read_far, self._far_counts),
        ):
            tokens, guess = guesses.pop(layer, (-1, set()))
            if tokens == self._stats.tokens:
                _count(guess, needed, counts.setdefault(layer, LayerGuesses()))

    def _guesses_at(self, layer: int, tokens: int) -> bool:
        """Whether guesses are made at a layer, which may be the first of a token."""
        if tokens > MAX_TOKENS:
            self._trial.interrupted()
            self._token_began = None
            return False
        if layer == 0:
            self._start_token()
        return self._trial.guessing

    def _guesses_for(self, target: int) -> bool:
        """Whether there is such a layer, and guesses for it have been worth it."""
        if target >= len(self._experts):
            return False
        counts = self._stats.layers.get(target)
        if _tried(counts) and counts.right < MIN_RECALL * counts.needed:
            self._stopped.add(("one layer", target))
            return False
        return True

    def _ask(self, layer: int, target: int) -> Tensor | None:
        """What the router of ``target`` picks, ``[T, K]``; None where nothing is guessed."""
        if not self._guesses_for(target):
            return None
        nudged = self._bias.nudging(target) if self._bias else contextlib.nullcontext()
        with nudged:
            return self.routers.ask(layer, target)

    def _say_stopped(self) -> None:
        """One line for what has stopped since the token before."""
        for ahead in ("one layer", "two layers"):
            new = sorted(target for far, target in self._stopped - self._said if far == ahead)
            if new:
                layers = ", ".join(map(str, new))
                logger.info(
                    "prefetch %s ahead stops for layers %s: it guesses badly", ahead, layers
                )
        self._said |= self._stopped

    def _start_token(self) -> None:
        self._say_stopped()
        before = self._trial.verdict
        guessing = self._trial.token()
        self._token_began = self._clock()
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

    def _pass_ended(self) -> None:
        # A compiled pass runs no hooks: who calls it says when it ends.
        if not torch.compiler.is_compiling():
            self.end_token()

    def end_token(self) -> None:
        """A pass is over; its time counts where that of a token is measured."""
        # From the first experts to the end: what happens between tokens is the caller's.
        began, self._token_began = self._token_began, None  # other threads may come between
        if began is not None:
            self._trial.took(self._clock() - began)

    def _guess(self, target: int, indices: Tensor | None) -> None:
        """Start reading what the router of ``target`` picked."""
        if indices is not None:
            ranked = self._ranked(target, indices)
            self._guesses[target] = self._stats.tokens, set(ranked)
            self._residency.prefetch(target, ranked)

    def _guess_far(self, layer: int, target: int) -> None:
        """The same for a layer whose guess can still be replaced, if it costs no asking."""
        indices, counts = self.routers.answer(layer, target), self._far_counts.get(target)
        if indices is None:
            return
        if _tried(counts) and counts.right < FAR_PRECISION * counts.guessed:
            self._stopped.add(("two layers", target))
            return
        begun = self._residency.prefetch(target, self._ranked(target, indices))
        self._read_far[target] = self._stats.tokens, set(begun)

    def _ranked(self, target: int, indices: Tensor) -> list[int]:
        """``[T, K]`` indices as experts, first choices first."""
        choices = dict.fromkeys(indices.t().reshape(-1).tolist())
        # Some routers also pick places without an expert.
        return [expert for expert in choices if expert < self._experts[target]]


def _count(guess: set[int], needed: list[int], counts: LayerGuesses) -> None:
    counts.rounds += 1
    counts.guessed += len(guess)
    counts.needed += len(needed)
    counts.right += len(guess.intersection(needed))


def _tried(counts: LayerGuesses | None) -> TypeGuard[LayerGuesses]:
    """Whether guesses were counted for long enough to be judged."""
    return counts is not None and counts.rounds >= TRIAL_ROUNDS
