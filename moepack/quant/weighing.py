"""How much each weight's error counts when scales and minima are fitted at 2 bits.

Large weights count more. A plain sum of squares clips them: at 2 bits, weights beyond four standard
deviations of their row come out 6 to 9 per cent too small, all in the same direction. In real
models a few of them make activations hundreds of times the usual size, which all later layers build
on. llama.cpp weighs errors by ``sqrt(mean w^2 + w^2)``; the sum of both roots does as well and
takes no root of every weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepack_formats.schemes import Scheme

WEIGHED = frozenset({"q2g16s4"})
"""Schemes where it was measured to pay; grids of 3 bits and more gain nothing (docs/log.md)."""


def importance_of_weights(
    rows: Tensor, scheme: Scheme, importance: Tensor | None = None
) -> Tensor | None:
    """How much each weight's error counts.

    Args:
        rows: ``[R, C]`` weights of any float dtype.
        scheme: A quantized scheme.
        importance: ``[C]`` float32 of the inputs, above 0; None: all the same.

    Returns:
        ``[R, C]`` float32, above 0, or ``importance`` itself where size plays no part.
    """
    if scheme.name not in WEIGHED:
        return importance
    counted = rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    typical = counted.square().mean(dim=1, keepdim=True).sqrt_()
    counted.abs_().add_(typical.clamp_(min=torch.finfo(torch.float32).tiny))
    return counted if importance is None else counted.mul_(importance)
