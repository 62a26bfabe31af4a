"""What is known of the inputs that a matrix is multiplied with: its quantizer may use it.

Shape letters: N tokens, C cols (inputs) of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

IMPORTANCE_FLOOR = 0.01
"""Share of the mean importance that every input has at least: calibration text is never all."""


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a matrix's inputs.

    Attributes:
        squares: ``[C]`` float32, the mean of each input's square.
        products: ``[C, C]`` float32, the mean of ``x x^T``; None when it was not gathered.
        tokens: Over how many inputs.
        derived: What quantizers have computed from the products; gate and up share their inputs.
    """

    squares: Tensor
    products: Tensor | None
    tokens: int
    derived: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, inputs: Tensor, weights: Tensor | None = None, *, full: bool) -> InputMoments:
        """Gather from inputs.

        Args:
            inputs: ``[N, C]`` float32, at least one.
            weights: ``[N]`` how much each counts; None: all the same.
            full: Whether to gather products too.
        """
        total = float(len(inputs))
        if weights is not None:
            total = float(weights.sum().clamp(min=torch.finfo(torch.float32).tiny))
            inputs = inputs * weights.sqrt()[:, None]
        if not full:
            return cls(inputs.square().sum(dim=0) / total, None, len(inputs))
        products = inputs.t() @ inputs / total
        return cls(products.diagonal().clone(), products, len(inputs))

    def importance(self) -> Tensor:
        """``[C]`` float32 importance of mean 1, nowhere 0."""
        mean = self.squares.mean().clamp(min=torch.finfo(torch.float32).tiny)
        relative = self.squares / mean + IMPORTANCE_FLOOR
        return relative / relative.mean()
