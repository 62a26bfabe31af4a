"""The structures of ``csrc/moepack.h`` that a tape is made of, and how tensors fill them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

LOOPS = 4
"""Nested loops of a step."""


class Op(IntEnum):
    """Kinds of steps; the numbers are those of moepack.h."""

    PYTHON = 0
    UNARY = 1
    BINARY = 2
    REDUCE = 3
    SOFTMAX = 4
    TOPK = 5
    DENSE = 6
    PACKED = 7
    EMBED = 8
    APPEND = 9
    ATTEND = 10
    EXPERTS = 11
    ATTEND_LATENT = 12
    CONTRACT = 13
    GATHER = 14


UNARY = [
    *("copy", "neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos"),
    *("tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "relu", "softplus", "clamp", "fill"),
    "from_int64",
]
"""Element-wise functions of one operand, in the order of glue.h; the last reads integers."""

BINARY = ["add", "sub", "mul", "div", "maximum", "minimum"]
"""Element-wise functions of two operands, in the order of glue.h."""

REDUCE = ["sum", "mean", "max"]


class NativeStep(ctypes.Structure):
    """``moepack_step``. Operands: 0 the result, 1 to 3 what is read."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("size", ctypes.c_int64 * LOOPS),
        ("stride", ctypes.c_int64 * LOOPS * 4),
        ("data", ctypes.c_void_p * 4),
        ("scalar", ctypes.c_double * 2),
        ("number", ctypes.c_int64 * 4),
        ("extra", ctypes.c_void_p),
    )


class Kv(ctypes.Structure):
    """``moepack_kv``: keys and values of one layer."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("key_width", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("half", ctypes.c_int32),
    )


class Latent(ctypes.Structure):
    """``moepack_latent``: how latents become the keys and values of heads."""

    _fields_ = (
        ("kv", ctypes.c_void_p),
        ("key_weights", ctypes.c_void_p),
        ("value_weights", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("plain_at", ctypes.c_int64),
        ("plain", ctypes.c_int64),
        ("rotary_at", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("half", ctypes.c_int32),
    )

    def weights_nbytes(self, heads: int, latent: int) -> int:
        """What a token reads of the weights."""
        return int(heads * latent * (self.plain + self.value_width) * (2 if self.half else 4))


def is_floats(*tensors: Tensor) -> bool:
    """Whether all are float32 on the CPU."""
    return all(t.dtype is torch.float32 and t.is_cpu for t in tensors)


def loops(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]] | None:
    """The fewest loops over a shape in which every operand's place is linear.

    Args:
        shape: What is looped over.
        strides: For each operand, one stride per axis of ``shape``.

    Returns:
        Sizes and, for each operand, strides of exactly ``LOOPS`` loops (outer ones of size 1), or
        None when more are needed.
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        here = [stride[axis] for stride in strides]
        if sizes and all(s[-1] == size * h for s, h in zip(steps, here, strict=True)):
            sizes[-1] *= size
            for s, h in zip(steps, here, strict=True):
                s[-1] = h
        else:
            sizes.append(size)
            for s, h in zip(steps, here, strict=True):
                s.append(h)
    if len(sizes) > LOOPS:
        return None
    missing = LOOPS - len(sizes)
    return [1] * missing + sizes, [[0] * missing + s for s in steps]


def elementwise(op: Op, kind: int, out: Tensor, *inputs: Tensor) -> NativeStep | None:
    """A step over every element of ``out``; inputs are broadcast to it. None if it has no form."""
    if not is_floats(out, *inputs):
        return None
    return over_elements(op, kind, out, *inputs)


def over_elements(op: Op, kind: int, out: Tensor, *inputs: Tensor) -> NativeStep | None:
    """The same for numbers of any type."""
    if out.numel() == 0:
        return None
    operands = [out, *(t.expand(out.shape) for t in inputs)]
    found = loops(out.shape, [t.stride() for t in operands])
    return None if found is None else filled(op, kind, found, operands)


def along(op: Op, kind: int, axis: int, source: Tensor, *results: Tensor) -> NativeStep | None:
    """A step along one axis of ``source``.

    Args:
        op: Kind of step.
        kind: Its variant.
        axis: The axis of ``source`` that is the last loop.
        source: What is read, operand 1.
        results: One or two results with as many axes as ``source``, operands 0 and 3.

    Returns:
        The step, or None if there are more loops than a step has.
    """
    if source.numel() == 0 or any(r.dim() != source.dim() for r in results):
        return None
    axis %= source.dim()
    operands = [results[0].movedim(axis, -1), source.movedim(axis, -1)]
    operands += [r.movedim(axis, -1) for r in results[1:]]
    shape = operands[1].shape
    found = loops(shape[:-1], [t.stride()[:-1] for t in operands])
    if found is None or found[0][0] != 1:
        return None
    sizes, strides = found
    sizes = [*sizes[1:], shape[-1]]
    strides = [[*s[1:], t.stride(-1)] for s, t in zip(strides, operands, strict=True)]
    return filled(op, kind, (sizes, strides), operands, places=(0, 1, 3))


def contraction(
    out: Tensor, left: Tensor, right: Tensor, axis: int, offset: Tensor | None = None
) -> NativeStep | None:
    """``out = (left * right).sum(axis) + offset``; None if it has no form.

    Args:
        out: What is computed, without the axis.
        left: Broadcast with ``right``.
        right: Where one of the two lies across the axis in memory, the other.
        axis: The axis of the product that is summed over.
        offset: Broadcast to ``out``; None for nothing.
    """
    tensors = [out, left, right, *([] if offset is None else [offset])]
    if not is_floats(*tensors) or out.numel() == 0:
        return None
    shape = torch.broadcast_shapes(left.shape, right.shape)
    left, right = (t.expand(shape).movedim(axis, -1) for t in (left, right))
    if out.shape != left.shape[:-1]:
        return None
    operands = [out, left, right, *([] if offset is None else [offset.expand(out.shape)])]
    found = loops(out.shape, [t.stride()[: out.dim()] for t in operands])
    if found is None or found[0][0] != 1:
        return None
    strides = [s[1:] for s in found[1]]
    ends = [0, left.stride(-1), right.stride(-1), 0][: len(operands)]
    strides = [[*s, end] for s, end in zip(strides, ends, strict=True)]
    return filled(Op.CONTRACT, 0, ([*found[0][1:], left.shape[-1]], strides), operands)


def filled(
    op: Op,
    kind: int,
    how: tuple[list[int], list[list[int]]],
    operands: Sequence[Tensor],
    places: Sequence[int] = (0, 1, 2, 3),
) -> NativeStep:
    """A step with loops and operands filled in."""
    step = NativeStep(op=op, kind=kind)
    step.size[:] = how[0]
    for place, tensor, strides in zip(places, operands, how[1], strict=False):
        step.data[place] = tensor.data_ptr()
        step.stride[place][:] = strides
    return step
