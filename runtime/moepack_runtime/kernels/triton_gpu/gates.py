"""The experts' activations, as ``csrc/moepack.h`` defines them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, alpha, KIND: tl.constexpr):
    """``f(z)`` in float32."""
    if KIND == "silu":
        return z * tl.sigmoid(alpha * z)
    elif KIND == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return z * tl.sigmoid(2.0 * inner)
    elif KIND == "relu":
        return tl.maximum(z, 0.0)
    else:
        positive = tl.maximum(z, 0.0)
        return positive * positive


@triton.jit
def gated(gate, up, alpha, limit, up_offset, KIND: tl.constexpr):
    """``f(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)``."""
    f = activate(tl.minimum(gate, limit), alpha, KIND)
    return f * (tl.minimum(tl.maximum(up, -limit), limit) + up_offset)


@triton.jit
def ungated(up, alpha, limit, KIND: tl.constexpr):
    """``f(min(up, limit))``."""
    return activate(tl.minimum(up, limit), alpha, KIND)
