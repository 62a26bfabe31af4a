"""Perplexity of a model on a text, in fixed windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepack_formats.errors import UsageError

WINDOW = 1024


@dataclass(frozen=True)
class Perplexity:
    """The result.

    Attributes:
        nats: Mean negative log-likelihood of a scored token, in nats.
        tokens: Scored tokens.
        windows: Windows.
    """

    nats: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean."""
        return math.exp(self.nats)


def window_length(model: Any) -> int:
    """1,024 tokens, or the model's context where that is shorter."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(WINDOW, limit) if limit else WINDOW


def windows(ids: Tensor, length: int) -> Iterator[Tensor]:
    """Cut ``[T]`` token ids into runs of ``length``; a last one of a single token is left out."""
    for start in range(0, len(ids), length):
        window = ids[start : start + length]
        if len(window) > 1:
            yield window


def measure(model: Any, ids: Tensor, progress: Any = None) -> Perplexity:
    """Score a text; the first token of each window has no context and is not scored.

    Args:
        model: A causal model of transformers.
        ids: ``[T]`` token ids.
        progress: Wraps the windows, as tqdm does.

    Raises:
        UsageError: The text has fewer than two tokens.
    """
    runs = list(windows(ids.to(model.device), window_length(model)))
    if not runs:
        raise UsageError("the text is too short to score", wanted="two tokens", got=len(ids))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for run in progress(runs) if progress is not None else runs:
            logits = model(run[None], use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, run[1:], reduction="sum").item()
            tokens += len(run) - 1
    return Perplexity(total / tokens, tokens, len(runs))


def decode_nats(model: Any, ids: Tensor, progress: Any = None) -> list[float]:
    """Score a text token by token, as it would be generated.

    Args:
        model: A causal model of transformers.
        ids: ``[T]`` token ids, at least two.
        progress: Wraps the windows, as tqdm does.

    Returns:
        For each window, the negative log-likelihood of its tokens but the first, in nats.
    """
    runs = list(windows(ids, window_length(model)))
    totals = []
    with torch.no_grad():
        for run in progress(runs) if progress is not None else runs:
            total, cache = 0.0, None
            for token, following in pairwise(run):
                output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                total += F.cross_entropy(output.logits[0].float(), following.view(1)).item()
            totals.append(total)
    return totals
