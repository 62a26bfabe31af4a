"""The hqq library itself, for comparison: slower than ``hqq``, and for fewer schemes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moepack_formats.errors import IntegrityError, UsageError
from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import SCHEMES, Scheme

SUPPORTED = tuple(name for name, scheme in SCHEMES.items() if scheme.scale_bits == 16)


class HqqLibrary:
    """The ``hqq-lib`` quantizer: ``hqq.core.quantize.Quantizer`` as published.

    Its scales and zero points are rounded to float16 after the fact, as the library's own
    half-precision layers do; its codes are kept as they are.
    """

    name = "hqq-lib"

    def require(self) -> None:
        """Check that the library is there.

        Raises:
            UsageError: It is not, or cannot be imported.
        """
        _library()

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedMatrix:
        """See ``Quantizer.quantize``.

        Raises:
            IntegrityError: The library's result does not fit float16.
        """
        if scheme.name not in SUPPORTED:
            raise UsageError(
                f"hqq-lib cannot write {scheme.name}",
                wanted=f"one of {', '.join(SUPPORTED)}",
                remedy="use --quantizer hqq",
            )
        rows, cols = weight.shape
        groups = scheme.groups(cols)
        padded = torch.nn.functional.pad(
            weight.to(torch.float32)[None], (0, groups * scheme.group - cols), mode="replicate"
        )[0]
        codes, meta = _library().quantize(
            padded,
            nbits=scheme.bits,
            group_size=scheme.group,
            axis=1,
            # As in the library's own configuration.
            round_zero=scheme.bits == 4,
            bitpack=False,
            device="cpu",
        )
        scales = meta["scale"].view(rows, groups)  # Inverted on return: the step, not 1 / step.
        minima = scales * meta["zero"].view(rows, groups)
        stored = [values.to(torch.float16).numpy() for values in (scales, minima)]
        if not all(np.isfinite(values).all() for values in stored):
            raise IntegrityError("hqq-lib found a scale or minimum that float16 cannot hold")
        by_row = codes.view(rows, -1)[:, :cols].to(torch.uint8).contiguous()
        return QuantizedMatrix(scheme, (rows, cols), by_row.numpy(), *stored)


def _library() -> Any:
    try:
        return importlib.import_module("hqq.core.quantize").Quantizer
    except ImportError as error:
        raise UsageError(
            "hqq-lib needs the hqq library",
            got=str(error),
            remedy="pip install '.[hqq]' in a clone",
        ) from error


QUANTIZER = HqqLibrary()
