"""GPTQ: what rounding one input's weights loses is made good by the inputs after it.

The method is Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323), sections 3.2-3.3: columns are rounded one after the other, and the
error is fed into the columns that are not rounded yet, as the second moments of the inputs say.
What differs:

- Scales and minima are chosen span by span (the inputs under a super-scale) by the ``hqq`` solver,
  on the weights as the feedback has left them, and moved once more when their group's turn comes.
  An input counts there as much as its error will: ``1 / U[i, i] ** 2``, what is left of its power
  when all later inputs are known.
- The solver's stretch to full size is kept: without it the model's divergence is a sixth higher.
- Columns keep their order, and so the layout is every other quantizer's.

Shape letters: R rows of a chunk, C cols (inputs), S cols of a span, g of a group.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import Scheme

from . import hqq
from .columns import span_grid
from .inputs import InputMoments
from .storage import Stored
from .walk import Fit, assemble, in_workers

DAMPING = 0.1
"""Added to every input's power, as a share of the mean power; 0.005 to 0.1 differ little on the
text they were measured on, and more damping trusts the calibration text less."""

SMALLEST_HALF = 128
"""Triangles up to this size are inverted by substitution."""

CHUNK_ROWS = 512
"""Rows worked together, the same whatever the number of threads."""


class ErrorFeedback:
    """The ``gptq`` quantizer."""

    name = "gptq"
    needs_products = True

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedMatrix:
        """See ``Quantizer.quantize``; of unknown inputs nothing can be fed back: as ``hqq``."""
        return hqq.QUANTIZER.quantize(weight, scheme)

    def quantize_for(self, weight: Tensor, scheme: Scheme, inputs: InputMoments) -> QuantizedMatrix:
        """See ``InputAwareQuantizer.quantize_for``."""
        if inputs.products is None:
            return hqq.QUANTIZER.quantize_for(weight, scheme, inputs)
        if self.name not in inputs.derived:
            (inputs.derived[self.name],) = in_workers([partial(_factor, inputs.products)])
        upper = inputs.derived[self.name]
        rows, cols = weight.shape
        codes = torch.empty((rows, cols), dtype=torch.uint8)
        chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS)]
        work = [partial(_feed_back, weight[c], scheme, upper, codes[c]) for c in chunks]
        return assemble(scheme, codes, in_workers(work))


def _factor(products: Tensor) -> Tensor:
    """Upper ``U`` ``[C, C]`` float32 with ``U^T U`` the inverse of the damped products.

    Both are in units of the inputs' mean power, on which nothing depends. The factor is the
    inverse of the one that a Cholesky decomposition from the last input to the first gives. The
    damping bounds how ill-conditioned it is, so that float32 will mostly do.
    """
    power = max(float(products.diagonal().mean(dtype=torch.float64)), 1e-30)
    for dtype in (torch.float32, torch.float64):
        damped = products.to(dtype) / power
        damped.diagonal().add_(DAMPING)
        backwards, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            break
    else:
        raise ValueError("the products of the inputs are not positive")
    return _inverse_of_lower(backwards).flip(0, 1).to(torch.float32).contiguous()


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangle ``[C, C]`` by halves, a third of the work of substituting in it."""
    size = len(lower)
    if size <= SMALLEST_HALF:
        unit = torch.eye(size, dtype=lower.dtype)
        inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return inverse
    inverse, half = torch.zeros_like(lower), size // 2
    first, last = slice(0, half), slice(half, size)
    inverse[first, first] = _inverse_of_lower(lower[first, first])
    inverse[last, last] = _inverse_of_lower(lower[last, last])
    below = inverse[last, last] @ lower[last, first] @ inverse[first, first]
    inverse[last, first] = below.neg_()
    return inverse


def _feed_back(weight: Tensor, scheme: Scheme, upper: Tensor, codes: Tensor) -> Fit:
    """Quantize some rows.

    Args:
        weight: ``[R, C]`` any float dtype.
        scheme: A quantized scheme.
        upper: ``[C, C]`` from ``_factor``.
        codes: ``[R, C]`` uint8, overwritten.
    """
    with torch.inference_mode():
        rest = weight.t().to(torch.float32, copy=True).contiguous()  # [C, R]
        cols = len(rest)
        left = upper.diagonal().square().reciprocal()
        importance = left / left.mean()
        parts = []
        for inner in _spans(scheme, cols):
            fit, errors = _span(
                rest[inner], scheme, upper[inner, inner], importance[inner], codes[:, inner]
            )
            parts.append(fit)
            rest[inner.stop :].addmm_(upper[inner, inner.stop :].t(), errors, alpha=-1)
        minima = [part[1] for part in parts if part[1] is not None]
        scales = _side_by_side([part[0] for part in parts])
        return scales, _side_by_side(minima) if minima else None


def _spans(scheme: Scheme, cols: int) -> list[slice]:
    """The inputs of a row whose scales are chosen together."""
    if scheme.scale_bits == 8:  # Under one factor a row, which has to be known from the start.
        return [slice(0, cols)]
    starts = [scheme.span * number for number in range(scheme.spans(cols))]
    return [slice(*ends) for ends in pairwise([*starts, cols])]


def _span(
    block: Tensor, scheme: Scheme, upper: Tensor, importance: Tensor, codes: Tensor
) -> tuple[Fit, Tensor]:
    """Quantize the columns of a span.

    Args:
        block: ``[S, R]`` float32 weights, overwritten.
        scheme: A quantized scheme.
        upper: ``[S, S]``.
        importance: ``[S]``.
        codes: ``[R, S]`` uint8, overwritten.

    Returns:
        Scales and minima; ``[S, R]`` errors to be fed to later spans.
    """
    grid = span_grid(block, scheme, importance)
    errors = torch.empty_like(block)
    by_column = torch.empty(block.shape, dtype=torch.uint8)
    for index, start in enumerate(range(0, len(block), scheme.group)):
        cols = slice(start, min(start + scheme.group, len(block)))
        rounding = grid.start_group(index, block[cols], importance[cols])
        rounding.feed_back(block[cols], upper[cols, cols], by_column[cols], errors[cols])
        block[cols.stop :].addmm_(upper[cols, cols.stop :].t(), errors[cols], alpha=-1)
    codes.copy_(by_column.t())
    return grid.fit(), errors


def _side_by_side(spans: list[Stored]) -> Stored:
    """Join spans, whole super-groups each, along the row."""
    first = spans[0]
    outers = [span.outer for span in spans if span.outer is not None]
    codes = torch.cat([span.codes for span in spans], dim=1)
    return replace(first, codes=codes, outer=torch.cat(outers, dim=1) if outers else None)


QUANTIZER = ErrorFeedback()
