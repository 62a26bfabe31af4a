"""Asking the routers of layers to come, before their turn.

The residual stream changes little from one layer to the next, so a later layer's norm and router
are asked about the residual that this layer's feed-forward block is about to read (Eliseev & Mazur,
arXiv 2312.17238, section 3.2). Where no norm is found, this layer's own router input is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..experts import ExpertsAdapter
from ..routing.routers import Router, RouterFinder
from ..routing.topk import RouterTopK

Inputs = dict[int, tuple[Tensor, bool]]
"""By layer, what its norm or router reads, and whether it has gone through a norm."""

Answers = dict[tuple[int, int], Tensor]
"""By the layer at which it was asked and the target, what a router has picked, ``[T, K]``."""


class EarlyRouters:
    """The routers of a model, found during its first forward pass.

    Args:
        model: The model.
        adapters: Its experts modules.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[ExpertsAdapter]) -> None:
        self._finder: RouterFinder | None = RouterFinder(model, list(adapters))
        self._experts = [adapter.num_experts for adapter in adapters]
        self._routers: dict[int, Router | None] = {}
        self._inputs: Inputs = {}
        self._answers: Answers = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def found(self) -> bool:
        """Whether the first pass has shown every router, or that it cannot be asked."""
        return self._finder is None

    @property
    def missing(self) -> list[int]:
        """Layers whose router cannot be asked."""
        return [layer for layer, router in self._routers.items() if router is None]

    def look(self, layer: int, top_k_index: Tensor) -> None:
        """The experts of a layer were called with these indices, ``[T, K]``, in the first pass."""
        if self._finder is None:
            return
        if layer in self._finder.routers:
            # A second pass has begun: some experts are for inputs of other kinds than text.
            self._finder.give_up()
        else:
            self._finder.found(layer, top_k_index)
        if self._finder.done:
            self._routers = self._finder.routers
            self._finder = None
            self._watch()

    def ask(self, layer: int, target: int, *, ranked: bool = False) -> Tensor | None:
        """The experts that the router of ``target`` would pick for what ``layer`` reads.

        Args:
            layer: The layer that is about to compute its experts.
            target: A later layer.
            ranked: Give all experts, the likeliest first, where the router picks by a top-k.

        Returns:
            ``[T, K]`` or ``[T, E]`` indices, or None where the router cannot be asked. An index of
            E or more is a place without an expert.
        """
        answer = None if ranked else self.answer(layer, target)
        return self._ask_now(layer, target, ranked) if answer is None else answer

    def _ask_now(self, layer: int, target: int, ranked: bool) -> Tensor | None:
        router, seen = self._routers.get(target), self._inputs.get(layer)
        if router is None or seen is None:
            return None
        x, normed = seen
        # Without a norm of the target's own, what this layer's router reads must do.
        normed = normed or router.norm is None
        with torch.no_grad():
            if not ranked:
                return router.ask(x, normed=normed)
            scores: list[Tensor] = []
            with RouterTopK(self._experts[target], scores.append):
                indices = router.ask(x, normed=normed)
            return scores[0].argsort(dim=-1, descending=True) if scores else indices

    def forget(self, layer: int) -> None:
        """What the layer has read is no longer needed."""
        self._inputs.pop(layer, None)

    def ask_ahead(self, layer: int, most: int) -> Answers:
        """What the routers of up to ``most`` following layers pick, where they can be asked.

        A recording of a pass asks here, so that a played one is asked by the same steps.
        """
        ahead = range(layer + 1, min(layer + most + 1, len(self._experts)))
        answers = {(layer, target): self.ask(layer, target) for target in ahead}
        return {key: answer for key, answer in answers.items() if answer is not None}

    def answer(self, layer: int, target: int) -> Tensor | None:
        """What a played pass has asked already, or None."""
        return self._answers.get((layer, target))

    def show(self, answers: Answers) -> None:
        """What is asked already from now on: memory that a played pass fills, or nothing."""
        self._answers = answers

    def close(self) -> None:
        """Take the hooks away."""
        if self._finder is not None:
            self._finder.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._inputs.clear()
        self._answers = {}

    def _watch(self) -> None:
        """Keep what each layer's norm (or router) reads."""
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

            self._hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
