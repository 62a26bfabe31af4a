"""Packed weights on a GPU: kernels in Triton, which is imported when the first one is needed.

The kernels read the bytes that the CPU's read. ``layout`` and ``cells`` know where codes and scales
are, ``dots`` and ``matvec`` serve one token, ``matmul`` many, ``dense`` decodes; ``sizes`` says how
much of a matrix a program takes; ``products`` and ``experts`` launch; ``engine`` is the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moepack_formats.errors import UsageError

from ..reference import ReferenceEngine

if TYPE_CHECKING:
    from .. import Engine

MIN_CAPABILITY = (8, 0)
"""What Triton's own compiler needs; also the first with bfloat16."""


class TorchCudaEngine(ReferenceEngine):
    """Decode with torch, multiply with torch: for GPUs before compute capability 8.0.

    The paper's slowest GPU, a T4, is one of them. Nobody has run this engine on one yet.
    """

    name = "torch on CUDA (for compute capabilities below 8.0; untested)"


def open_engine(engine: str, device: torch.device) -> Engine:
    """The engine for a GPU.

    Args:
        engine: ``auto`` for the fastest, or ``reference``.
        device: The GPU.

    Raises:
        UsageError: An engine that computes on the CPU, or Triton is missing.
    """
    if engine == "native":
        raise UsageError("the native kernels compute on the CPU", remedy="--device cpu, or auto")
    if engine == "reference":
        return ReferenceEngine()
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return TorchCudaEngine()
    try:
        from .engine import TritonEngine
    except ImportError as error:
        raise UsageError(
            f"Triton cannot be imported: {error}",
            remedy="pip install '.[gpu]' in a clone, or --engine reference (many times slower)",
        ) from None
    return TritonEngine(f"triton (compute capability {capability[0]}.{capability[1]})")
