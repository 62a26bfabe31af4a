"""Recording what routers choose while a loaded pack runs.

Shape letters: T tokens, L MoE layers, K experts a token, A layers ahead, G guesses kept.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from moepack_formats.errors import UsageError

from ..prefetch.early_routers import EarlyRouters
from .trace_file import NOTHING, Experts, Routing, Weights


class RoutingRecorder:
    """Records one pass after another, as a context manager.

    Args:
        model: A loaded pack.
        ahead: How many layers ahead routers are asked; 0 for not at all.
        guesses: Experts kept of each answer; None for as many as the largest layer has.

    Raises:
        UsageError: The model runs on a GPU.
    """

    def __init__(self, model: Any, ahead: int = 0, guesses: int | None = None) -> None:
        self._model, self._runtime = model, model.moepack
        if self._runtime.tier is not None:
            raise UsageError(
                "routing is recorded on the CPU", remedy='load the pack with device="cpu"'
            )
        adapters = self._runtime.adapters
        self._sizes = [adapter.num_experts for adapter in adapters]
        self._ahead, self._kept = ahead, guesses or max(self._sizes)
        self._routers = EarlyRouters(model, adapters) if ahead else None
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}
        self._guessed: dict[tuple[int, int], Tensor] = {}  # by (layers ahead, layer)

    def __enter__(self) -> Self:
        for compute in self._runtime.layers:
            compute.watcher = self._note
        return self

    def __exit__(self, *_: object) -> None:
        for compute in self._runtime.layers:
            compute.watcher = None
        if self._routers is not None:
            self._routers.close()

    def find_routers(self) -> None:
        """Run a pass of which nothing is kept; without it, nothing is guessed in the first pass."""
        if self._routers is not None and not self._routers.found:
            with torch.no_grad():
                self._model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
            self._chosen.clear()

    @property
    def missing(self) -> list[int]:
        """Layers whose router cannot be asked ahead."""
        return self._routers.missing if self._routers is not None else []

    def take(self, tokens: int) -> Routing:
        """What the pass that has just ended chose.

        Args:
            tokens: T, the tokens of the pass.
        """
        layers = len(self._sizes)
        # Where a router's weight belongs to the input, each (token, expert) pair came as a row.
        index = [self._chosen[layer][0].reshape(tokens, -1) for layer in range(layers)]
        weight = [self._chosen[layer][1].reshape(tokens, -1) for layer in range(layers)]
        width = max(one.shape[1] for one in index)
        experts: Experts = np.full((tokens, layers, width), NOTHING, np.int16)
        weights: Weights = np.zeros((tokens, layers, width), np.float32)
        for layer in range(layers):
            experts[:, layer, : index[layer].shape[1]] = _valid(index[layer], self._sizes[layer])
            weights[:, layer, : index[layer].shape[1]] = weight[layer].float().numpy()
        guesses: Experts = np.full((self._ahead, tokens, layers, self._kept), NOTHING, np.int16)
        for (ahead, layer), ranked in self._guessed.items():
            kept = _valid(ranked.reshape(tokens, -1), self._sizes[layer])[:, : self._kept]
            guesses[ahead - 1, :, layer, : kept.shape[1]] = kept
        self._chosen.clear()
        self._guessed.clear()
        return Routing(experts, weights, guesses)

    def _note(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        self._chosen[layer] = top_k_index.detach().clone(), top_k_weights.detach().clone()
        if self._routers is None:
            return
        if not self._routers.found:
            self._routers.look(layer, top_k_index)
            return
        for ahead in range(1, self._ahead + 1):
            if layer + ahead < len(self._sizes):
                ranked = self._routers.ask(layer, layer + ahead, ranked=True)
                if ranked is not None:
                    self._guessed[ahead, layer + ahead] = ranked
        self._routers.forget(layer)


def _valid(index: Tensor, experts: int) -> Experts:
    """Indices as int16, ``NOTHING`` for a place without an expert."""
    valid = index.where((index >= 0) & (index < experts), NOTHING)
    array: Experts = valid.to(torch.int16).numpy()
    return array
