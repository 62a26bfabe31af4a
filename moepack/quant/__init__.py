"""Quantizers: how codes and scales are chosen for a matrix.

A quantizer is one module of this package that has a ``QUANTIZER``: an object with a ``name`` and a
``quantize``. It is found by itself; its file carries its name, ``-`` written as ``_``. Modules
without a ``QUANTIZER`` are what quantizers share.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from moepack_formats.errors import IntegrityError, UsageError
from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import Scheme

from .inputs import InputMoments

DEFAULT_QUANTIZER = "hqq"

LARGEST_WEIGHT = 65504.0
"""The largest float16: a minimum beyond it could not be stored."""

_RAW = {
    "bf16": (torch.bfloat16, torch.int16, np.uint16),
    "f16": (torch.float16, torch.int16, np.uint16),
    "f32": (torch.float32, torch.int32, np.uint32),
}


class Quantizer(Protocol):
    """Chooses codes, scales and minima of a matrix."""

    name: str

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedMatrix:
        """Quantize one matrix; ``quantize_matrix`` has checked it.

        Args:
            weight: ``[rows, cols]``, any float dtype, all finite, on the CPU.
            scheme: A quantized scheme, not a raw one.

        Raises:
            UsageError: This quantizer does not do this scheme.
        """
        ...


@runtime_checkable
class InputAwareQuantizer(Protocol):
    """A quantizer that can use what calibration text has shown of a matrix's inputs.

    Attributes:
        name: As of any quantizer.
        needs_products: Whether it uses more than the squares of single inputs.
    """

    name: str
    needs_products: bool

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedMatrix:
        """As of any quantizer, for matrices of whose inputs nothing is known."""
        ...

    def quantize_for(self, weight: Tensor, scheme: Scheme, inputs: InputMoments) -> QuantizedMatrix:
        """Quantize one matrix for the inputs it will see.

        Args:
            weight: ``[rows, cols]``, any float dtype, all finite, on the CPU.
            scheme: A quantized scheme, not a raw one.
            inputs: Moments of its ``cols`` inputs.

        Raises:
            UsageError: This quantizer does not do this scheme.
        """
        ...


def quantizer_names() -> list[str]:
    """Names of every quantizer, the default first."""
    modules = [info.name for info in pkgutil.iter_modules(__path__)]
    names = [found.name for module in modules if (found := _quantizer_in(module)) is not None]
    return sorted(names, key=lambda name: (name != DEFAULT_QUANTIZER, name))


def get_quantizer(name: str = DEFAULT_QUANTIZER) -> Quantizer:
    """Find a quantizer by its name.

    Raises:
        UsageError: There is none of this name, or a library it needs is missing.
    """
    module = name.replace("-", "_")
    found = None
    if module in {info.name for info in pkgutil.iter_modules(__path__)}:
        found = _quantizer_in(module)
    if found is None or found.name != name:
        raise UsageError(
            "unknown quantizer", wanted=f"one of {', '.join(quantizer_names())}", got=repr(name)
        )
    # A quantizer that stands on an optional library says so now, not in the middle of a model.
    require = getattr(found, "require", None)
    if require is not None:
        require()
    return found


def quantize_matrix(
    weight: Tensor,
    scheme: Scheme,
    quantizer: Quantizer,
    *,
    where: str = "",
    inputs: InputMoments | None = None,
) -> QuantizedMatrix:
    """Bring a matrix into a scheme.

    Args:
        weight: ``[rows, cols]``, any float dtype.
        scheme: Any scheme. A raw one keeps the weights' bits, rounding only where the weights have
            another dtype.
        quantizer: For the schemes that are not raw.
        where: What the matrix is called in errors.
        inputs: What is known of its inputs, for quantizers that can use it.

    Raises:
        IntegrityError: A weight is NaN or infinite, or too large for the scheme.
        UsageError: Not a float matrix, or a scheme that the quantizer does not do.
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise UsageError(
            "cannot be quantized",
            where=where or None,
            wanted="a matrix of floating-point weights",
            got=f"{weight.dtype} {list(weight.shape)}",
        )
    weight = weight.detach().to("cpu")
    if weight.element_size() == 1 or weight.element_size() == 8:
        weight = weight.to(torch.float32)  # 8-bit floats have next to no operations.
    largest = _largest(weight, where)
    if scheme.is_raw:
        return _keep_raw(weight, scheme, where)
    if largest > LARGEST_WEIGHT:
        raise _too_large(scheme, LARGEST_WEIGHT, largest, where)
    if inputs is not None and isinstance(quantizer, InputAwareQuantizer):
        return quantizer.quantize_for(weight, scheme, inputs)
    return quantizer.quantize(weight, scheme)


def _largest(weight: Tensor, where: str) -> float:
    """The largest absolute weight; refuses what is not finite."""
    low, high = (float(bound) for bound in torch.aminmax(weight))
    largest = max(-low, high)
    if not np.isfinite(largest):  # A NaN anywhere makes both bounds NaN.
        bad = ~torch.isfinite(weight)
        row, col = (int(i) for i in bad.nonzero()[0])
        raise IntegrityError(
            "weights are not finite",
            where=where or None,
            wanted="numbers",
            got=f"{float(weight[row, col])} at [{row}, {col}], {int(bad.sum())} in all",
            remedy="the source is damaged: fetch it again",
        )
    return largest


def _keep_raw(weight: Tensor, scheme: Scheme, where: str) -> QuantizedMatrix:
    dtype, bits, unsigned = _RAW[scheme.name]
    kept = weight.to(dtype).contiguous()
    if dtype != weight.dtype and not bool(torch.isfinite(kept).all()):
        raise _too_large(
            scheme, torch.finfo(dtype).max, float(weight.abs().max()), where, remedy="keep f32"
        )
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedMatrix(scheme, shape, kept.view(bits).numpy().view(unsigned))


def _too_large(
    scheme: Scheme,
    limit: float,
    largest: float,
    where: str,
    remedy: str = "keep this matrix at 16 bits",
) -> IntegrityError:
    return IntegrityError(
        f"weights are too large for {scheme.name}",
        where=where or None,
        wanted=f"at most {limit:g}",
        got=f"{largest:g}",
        remedy=remedy,
    )


def _quantizer_in(module: str) -> Quantizer | None:
    loaded = importlib.import_module(f"{__name__}.{module}")
    found: Quantizer | None = getattr(loaded, "QUANTIZER", None)
    return found
