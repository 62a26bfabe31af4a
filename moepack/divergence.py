"""How far a model has come from the one it was made of: KL divergence and agreement.

Shape letters: B windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .intervals import Interval, mean_interval, paired_interval

_ROWS = 256
"""Positions compared at a time: a vocabulary's worth of float32 each, a few times over."""


@dataclass
class Scores:
    """Sums over the scored tokens of each window.

    Attributes:
        tokens: Scored tokens.
        nats: Negative log-likelihood of the text under the model.
        source_nats: The same under the source.
        divergence: KL(source || model), in nats.
        agreed: Positions at which both models think the same token most likely.
    """

    tokens: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    source_nats: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)

    def add(self, ids: Tensor, logits: Tensor, source_logits: Tensor) -> None:
        """Compare on one window.

        Args:
            ids: ``[T]`` the window; its first token is not scored.
            logits: ``[T, V]`` the model's.
            source_logits: ``[T, V]`` the source's.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        for start in range(0, len(ids) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(ids) - 1))
            targets = ids[1:][rows, None]
            ours = F.log_softmax(logits[rows].float(), dim=-1)
            theirs = F.log_softmax(source_logits[rows].float(), dim=-1)
            sums[0] -= ours.gather(1, targets).sum().double()
            sums[1] -= theirs.gather(1, targets).sum().double()
            sums[2] += F.kl_div(ours, theirs, reduction="sum", log_target=True).double()
            sums[3] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
        self.tokens.append(len(ids) - 1)
        for values, value in zip(
            (self.nats, self.source_nats, self.divergence, self.agreed), sums.tolist(), strict=True
        ):
            values.append(value)

    @property
    def loss(self) -> Interval:
        """Nats a token under the model."""
        return mean_interval(self.nats, self.tokens)

    @property
    def source_loss(self) -> Interval:
        """Nats a token under the source."""
        return mean_interval(self.source_nats, self.tokens)

    @property
    def loss_difference(self) -> Interval:
        """Nats a token that the model loses against the source, paired."""
        return paired_interval(self.nats, self.source_nats, self.tokens)

    @property
    def mean_divergence(self) -> Interval:
        """Mean KL(source || model) of a token."""
        return mean_interval(self.divergence, self.tokens)

    @property
    def agreement(self) -> Interval:
        """Share of positions with the same most likely token."""
        return mean_interval(self.agreed, self.tokens)


def compare(
    runs: Sequence[Tensor],
    source: Iterable[Tensor],
    model: Callable[[Tensor], Tensor],
    wrap: Callable[[Iterable[Tensor]], Iterable[Tensor]] = lambda runs: runs,
) -> Scores:
    """Score a model against its source, window by window.

    Args:
        runs: ``[T]`` token ids of each window.
        source: ``[1, T, V]`` logits of each window.
        model: Gives ``[1, T, V]`` logits for ``[1, T]`` ids.
        wrap: Shows progress, as tqdm does.
    """
    scores = Scores()
    for run, logits in zip(wrap(runs), source, strict=True):
        with torch.no_grad():
            scores.add(run, model(run[None])[0], logits[0])
    return scores
