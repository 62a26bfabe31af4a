"""Quantized sources that transformers can turn back into plain weights while it loads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from moepack_formats.errors import UsageError


def dequantizer(config: dict[str, Any]) -> Any:
    """The quantizer of transformers for a quantized source, told to give plain weights.

    Args:
        config: The contents of ``config.json``.

    Returns:
        An ``HfQuantizer``, or None when the source is not quantized.

    Raises:
        UsageError: The method is unknown, or transformers cannot dequantize it while loading.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    problem = UsageError(
        "this kind of quantized checkpoint cannot be converted",
        where="config.json",
        got=f"quant_method {method!r}",
        remedy="use the unquantized checkpoint, or one in FP8, MXFP4, GPTQ or "
        "compressed-tensors form",
    )
    try:
        parsed = AutoQuantizationConfig.from_dict(settings)
        if not hasattr(parsed, "dequantize"):
            raise problem
        parsed.dequantize = True
        quantizer = AutoHfQuantizer.from_config(parsed, pre_quantized=True)
    except (AttributeError, ImportError, LookupError, TypeError, ValueError) as e:
        raise problem from e
    if "dequantize" not in quantizer.get_load_operations():
        raise problem
    return quantizer


def align_block_scales(
    quantizer: Any, patterns: Sequence[str | None], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Refines scale grids whose last blocks are cut off by the end of the matrix.

    transformers derives the block size from the ratio of the two shapes, which is wrong when the
    matrix is not a whole number of blocks: 576 rows in blocks of 128 have 5 scales. The same
    scales on a finer grid that does divide the matrix (9 blocks of 64 rows) mean the same values.

    Args:
        quantizer: What ``dequantizer`` returned.
        patterns: For each tensor the source pattern it matched; a scale's is its weight's with
            ``_scale_inv`` behind it.
        tensors: The sources of one conversion, in order.

    Returns:
        The tensors, scale grids replaced where necessary.
    """
    block = getattr(getattr(quantizer, "quantization_config", None), "weight_block_size", None)
    out = list(tensors)
    if not block or len(tensors) < 2:
        return out
    places: dict[str, list[int]] = {}
    for i, pattern in enumerate(patterns):
        places.setdefault(pattern or "", []).append(i)
    for pattern, weights in places.items():
        for weight, scale in zip(weights, places.get(f"{pattern}_scale_inv", ()), strict=False):
            out[scale] = _aligned(tuple(tensors[weight].shape[-2:]), out[scale], tuple(block))
    return out


def _aligned(matrix: tuple[int, ...], scales: Tensor, block: tuple[int, ...]) -> Tensor:
    grid = tuple(-(-length // size) for length, size in zip(matrix, block, strict=True))
    if tuple(scales.shape[-2:]) != grid:
        return scales  # per tensor, per row, or packed two to a byte: not a grid of such blocks
    for axis, (length, size) in enumerate(zip(matrix, block, strict=True), start=-2):
        if length % size:
            fine = math.gcd(length, size)
            parent = torch.arange(0, length, fine, device=scales.device) // size
            scales = scales.index_select(axis, parent)
    return scales
