"""Routing nudged towards resident experts when router scores are close.

A resident expert's score is raised, for the choice alone, by a share of the spread of the token's
scores; the weights of the chosen experts stay what the router makes of its own scores. The idea of
a cache-aware prior on the router: Skliar et al., "Mixture of Cache-Conditional Experts for
Efficient Mobile Device Inference", arXiv 2412.00099. This changes what the model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moepack_formats.errors import UsageError

from ..cache.residency import Residency
from ..experts import ExpertsAdapter
from ..statistics import Statistics
from .topk import RouterTopK

MAX_TOKENS = 4
"""A pass over more tokens needs most experts anyway: it is routed as the model means it."""


class CacheBias:
    """Nudges every router of a model.

    The first pass is left alone; it shows whether the routers can be nudged.

    Args:
        adapters: The model's experts modules.
        residency: Knows what is resident.
        stats: Where changed choices are counted.
        share: How much a resident expert's score is raised, as a share of the distance between the
            token's highest and lowest score.

    Attributes:
        active: Whether routing is nudged; may be changed at any time.
    """

    def __init__(
        self,
        adapters: Sequence[ExpertsAdapter],
        residency: Residency,
        stats: Statistics,
        share: float,
    ) -> None:
        self._adapters = adapters
        self._experts = [adapter.num_experts for adapter in adapters]
        self._residency, self._stats, self._share = residency, stats, share
        self._shown: set[int] = set()
        self._current: dict[int, RouterTopK] = {}
        self.active = True

    def install(self, model: nn.Module) -> None:
        """Watch the routers of a model whose experts have been installed."""
        for layer, adapter in enumerate(self._adapters):
            # Router and experts are called by the module around them.
            self._wrap(layer, model.get_submodule(adapter.name.rpartition(".")[0]))

    def nudging(self, layer: int, *, count: bool = False) -> RouterTopK:
        """A context in which the router of a layer is nudged."""

        def change(scores: Tensor) -> Tensor | None:
            if not self.active or layer not in self._shown or len(scores) > MAX_TOKENS:
                return None
            return self._raised(layer, scores)

        return RouterTopK(self._experts[layer], change, self._count_changes if count else None)

    def routed(self, layer: int) -> None:
        """The experts of a layer are about to compute.

        Raises:
            UsageError: They were not chosen by a top-k that could be nudged.
        """
        top_k = self._current.pop(layer, None)
        if top_k is not None:
            top_k.ended = True
        if layer in self._shown:
            return
        if top_k is None or not top_k.seen:
            raise UsageError(
                "--cache-bias cannot be used with this model: its router does not choose by a "
                "top-k over its experts",
                where=f"MoE layer {layer}",
                remedy="leave the option out",
            )
        self._shown.add(layer)

    def _raised(self, layer: int, scores: Tensor) -> Tensor:
        """``[T, E or more]`` scores to choose by."""
        resident = torch.ones(scores.shape[1], dtype=torch.bool)
        # A place beyond the experts needs no reading, like a resident one.
        resident[: self._experts[layer]] = False
        resident[self._residency.resident(layer)] = True
        finite = scores.isfinite()
        low = scores.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
        high = scores.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True)
        # Routers that choose groups first give the experts of other groups the lowest score.
        eligible = resident & finite & (scores > low)
        return scores + self._share * (high - low) * eligible

    def _count_changes(self, before: Tensor, after: Tensor) -> None:
        same = (before.unsqueeze(-1) == after.unsqueeze(-2)).sum()
        self._stats.nudged += before.numel() - int(same)

    def _wrap(self, layer: int, block: nn.Module) -> None:
        forward = block.forward

        def nudged(*args: Any, **kwargs: Any) -> Any:
            top_k = self._current[layer] = self.nudging(layer, count=True)
            with top_k:
                return forward(*args, **kwargs)

        cast(Any, block).forward = nudged
