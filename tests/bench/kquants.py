"""Round trips through llama.cpp's own quantizers, for comparison.

The quantizers are those of ``libggml-base``, which the package llama-cpp-python brings (extra
``bench``); ``MOEPACK_GGML`` may name another copy of the library. Values are read back with the
package gguf.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUPER_BLOCK = 256

NEEDS_IMPORTANCE = {"IQ2_XXS", "IQ2_XS"}


@cache
def library() -> Any | None:
    """ggml's library, or None when it is not installed."""
    named = os.environ.get("MOEPACK_GGML")
    candidates = [Path(named)] if named else []
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.origin is not None:
        candidates += sorted((Path(found.origin).parent / "lib").glob("libggml-base*"))
    if not candidates or importlib.util.find_spec("gguf") is None:
        return None
    ggml = ctypes.CDLL(str(candidates[0]))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return ggml


def true_bits(name: str) -> float:
    """Bits a weight, metadata included."""
    import gguf

    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return nbytes * 8 / block


def round_trip(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Quantize and read back.

    Rows that are no multiple of 256 inputs, which llama.cpp would not quantize this way, are put
    end to end until they are: groups of 16 or 32 inputs still lie in one row.

    Args:
        weight: ``[rows, cols]``.
        name: A type of ggml, as ``Q2_K``.
        importance: ``[cols]``, as an importance matrix has it.

    Returns:
        ``[rows, cols]`` float32.
    """
    import gguf

    ggml = library()
    assert ggml is not None
    rows, cols = weight.shape
    together = math.lcm(cols, SUPER_BLOCK) // cols
    assert rows % together == 0, "rows do not fill whole super-blocks"
    kind = gguf.GGMLQuantizationType[name]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(weight.to(torch.float32).numpy())
    out = np.empty(source.size // block * nbytes, np.uint8)
    wide = None
    if importance is not None:
        wide = np.ascontiguousarray(np.tile(importance.numpy(), together), np.float32)
    written = ggml.ggml_quantize_chunk(
        int(kind),
        source.ctypes.data,
        out.ctypes.data,
        0,
        rows // together,
        cols * together,
        None if wide is None else wide.ctypes.data,
    )
    assert written == out.size
    values = gguf.quants.dequantize(out.reshape(rows // together, -1), kind)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(rows, cols)
