"""Recorded operations to steps of the native library.

An operation that has no native form stays a call of torch on the same memory, so any model that can
be recorded can be played; the more of it is native, the faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import steps as native
from .record import CannotRecord, Step, tensors_in, tensors_read
from .steps import NativeStep, Op, along, elementwise

Call = Callable[[], None]
Lowered = list[NativeStep] | Call
"""Native steps, or what Python does instead."""

aten = torch.ops.aten

_UNARY: dict[Any, str] = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.clone.default: "copy",
    aten._to_copy.default: "copy",
}
_BINARY: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.add_.Tensor: "add",
    aten.sub_.Tensor: "sub",
    aten.mul_.Tensor: "mul",
    aten.div_.Tensor: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
}
_FILLS: dict[Any, float] = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.full_like.default: math.nan,  # its argument
}
_POWERS = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}


def lower(step: Step, mutated: set[int]) -> Lowered | None:
    """What a recorded operation of torch's becomes.

    Args:
        step: The operation.
        mutated: Storages that some operation of the recording writes into after they were made.

    Returns:
        Steps, a call, or None when nothing has to be done: views, memory that is filled later, and
        constants.

    Raises:
        CannotRecord: It gives something else each time for the same arguments.
    """
    operation = step.operation
    assert isinstance(operation, torch._ops.OpOverload)  # our own are lowered by the player
    if torch.Tag.nondeterministic_seeded in operation.tags:
        raise CannotRecord(f"{operation} is random")
    read = tensors_read(step)
    storages = {t.untyped_storage().data_ptr() for t in read}
    in_place = operation._schema.is_mutable
    if not step.results:
        return _call(step) if in_place else None
    if not in_place:
        if operation in (aten.empty.memory_format, aten.empty_like.default):
            return None
        if all(t.untyped_storage().data_ptr() in storages for t in step.results):
            return None  # a view
        if not read:
            made = {t.untyped_storage().data_ptr() for t in step.results}
            return _again(step) if made & mutated else None
    return _native(step) or _call(step)


def _native(step: Step) -> list[NativeStep] | None:
    out, arguments = step.results[0], step.arguments
    found: NativeStep | None = None
    operation: Any = step.operation
    if operation in _UNARY:
        if _as_is(step.keywords):
            found = _unary(_UNARY[operation], out, arguments[0])
    elif operation in _BINARY:
        found = _binary(_BINARY[operation], out, step)
    elif operation is aten.copy_.default:
        found = _unary("copy", out, arguments[1])
    elif operation is aten.pow.Tensor_Scalar and arguments[1] in _POWERS:
        found = _unary(_POWERS[arguments[1]], out, arguments[0])
    elif operation is aten.gelu.default:
        tanh = step.keywords.get("approximate", "none") == "tanh"
        found = _unary("gelu_tanh" if tanh else "gelu", out, arguments[0])
    elif operation is aten.softplus.default and len(arguments) == 1:
        found = _unary("softplus", out, arguments[0])
    elif operation in (aten.clamp.default, aten.clamp_min.default):
        found = _clamp(out, *arguments)
    elif operation is aten.constant_pad_nd.default and not any(arguments[1]):
        found = _unary("copy", out, arguments[0])
    elif operation is aten.linalg_vector_norm.default:
        return _norm(step)
    elif operation in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default):
        found = _reduce(step)
    elif operation is aten._softmax.default and native.is_floats(out, arguments[0]):
        found = along(Op.SOFTMAX, 0, arguments[1], arguments[0], out)
    elif operation is aten.topk.default:
        found = _topk(step)
    elif operation in _FILLS:
        value = arguments[1] if operation is aten.full_like.default else _FILLS[operation]
        found = _unary("fill", out, out)
        if found is not None:
            found.scalar[0] = float(value)
    elif operation is aten.gather.default and not step.keywords:
        found = _gather(out, *arguments)
    elif operation is aten.convolution.default:
        found = _convolution(out, *arguments)
    elif operation is aten.bmm.default:
        left, right = arguments
        found = native.contraction(out, left.unsqueeze(2), right.mT.unsqueeze(1), -1)
    elif operation is aten.cat.default:
        return _cat(out, *arguments)
    elif operation is aten.mm.default:
        found = _dense(out, arguments[0], arguments[1].t(), None)
    elif operation is aten.addmm.default and not step.keywords:
        found = _dense(out, arguments[1], arguments[2].t(), arguments[0])
    elif operation is aten.linear.default:
        found = _dense(out, arguments[0], arguments[1], (*arguments, None)[2])
    elif operation is aten.embedding.default:
        found = _embedding(out, *arguments[:2])
    return None if found is None else [found]


def _as_is(keywords: dict[str, Any]) -> bool:
    """Whether a copy's keywords ask for nothing but a dtype, which is looked at elsewhere."""
    return keywords.keys() <= {"dtype", "device", "layout", "memory_format", "pin_memory"}


def _unary(kind: str, out: Tensor, source: Tensor) -> NativeStep | None:
    if kind == "copy" and source.dtype is torch.int64 and native.is_floats(out) and source.is_cpu:
        number = native.UNARY.index("from_int64")
        return native.over_elements(Op.UNARY, number, out, source)
    return elementwise(Op.UNARY, native.UNARY.index(kind), out, source)


def _binary(kind: str, out: Tensor, step: Step) -> NativeStep | None:
    left, right = step.arguments[:2]
    if step.keywords or len(step.arguments) > 2 or not isinstance(left, Tensor):
        return None  # alpha, or a rounding mode
    number = native.BINARY.index(kind)
    if isinstance(right, Tensor):
        return elementwise(Op.BINARY, number, out, left, right)
    found = elementwise(Op.BINARY, number, out, left)
    if found is not None:
        found.scalar[0] = float(right)
    return found


def _clamp(
    out: Tensor, source: Tensor, low: float | None = None, high: float | None = None
) -> NativeStep | None:
    found = _unary("clamp", out, source)
    if found is not None:
        found.scalar[:] = (-math.inf if low is None else low, math.inf if high is None else high)
    return found


def _reduce(step: Step) -> NativeStep | None:
    out, source = step.results[0], step.arguments[0]
    axes = step.arguments[1] if len(step.arguments) > 1 else None
    keep = step.arguments[2] if len(step.arguments) > 2 else False
    if not native.is_floats(out, source) or step.keywords or not axes or len(axes) != 1:
        return None
    kinds: dict[Any, str] = {aten.sum.dim_IntList: "sum", aten.mean.dim: "mean"}
    kind = kinds.get(step.operation, "max")
    result = out if keep else out.unsqueeze(axes[0] % source.dim())
    return along(Op.REDUCE, native.REDUCE.index(kind), axes[0], source, result)


def _norm(step: Step) -> list[NativeStep] | None:
    """The root of the sum of squares along the last axis."""
    out, (source, order, axes, keep) = step.results[0], (*step.arguments, 2, None, False)[:4]
    if order != 2 or axes != [-1] or step.keywords:
        return None
    squares = out.squeeze(-1) if keep else out
    summed = native.contraction(squares, source, source, -1)
    root = _unary("sqrt", squares, squares)
    return None if summed is None or root is None else [summed, root]


def _topk(step: Step) -> NativeStep | None:
    source, count, axis, largest = (*step.arguments, -1, True)[:4]
    if len(step.arguments) == 3:
        axis, largest = step.arguments[2], True
    values, indices = step.results
    if step.keywords.get("largest", largest) is not True or not native.is_floats(values, source):
        return None
    found = along(Op.TOPK, 0, step.keywords.get("dim", axis), source, values, indices)
    if found is not None:
        found.number[0] = count
    return found


def _gather(out: Tensor, source: Tensor, axis: int, index: Tensor) -> NativeStep | None:
    fits = native.is_floats(out, source) and index.dtype is torch.int64 and source.dim() == 2
    if not fits or len(source) != 1 or axis % 2 != 1 or out.numel() == 0:
        return None
    step = NativeStep(op=Op.GATHER)
    step.size[:] = (1, 1, 1, index.shape[1])
    for place, tensor in enumerate((out, source, index)):
        step.data[place], step.stride[place][3] = tensor.data_ptr(), tensor.stride(1)
    step.number[0] = source.shape[1]
    return step


def _convolution(
    out: Tensor,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> NativeStep | None:
    """``source`` [1, C, L] and ``weight`` [C, 1, K], each channel by itself.

    With ``weight`` [N, C / groups, K] only where a single window is all there is.
    """
    plain = stride == dilation == [1] and padding == [0] and not transposed
    if not plain or source.dim() != 3 or len(source) != 1:
        return None
    if weight.shape[1] > 1 and source.shape[-1] == weight.shape[-1]:
        if not all(t.is_contiguous() for t in (out, source, weight)):
            return None
        each = out.view(groups, -1)
        added = None if bias is None else bias.view(groups, -1)
        x, rows = source.view(groups, 1, -1), weight.view(*each.shape, -1)
        return native.contraction(each, x, rows, -1, added)
    if weight.shape[:2] != (groups, 1) or source.shape[1] != groups:
        return None
    windows = source[0].unfold(-1, weight.shape[-1], 1)  # [C, L - K + 1, K]
    offset = None if bias is None else bias.unsqueeze(-1)
    return native.contraction(out[0], windows, weight, -1, offset)


def _cat(out: Tensor, pieces: list[Tensor], axis: int = 0) -> list[NativeStep] | None:
    found: list[NativeStep] = []
    at = 0
    for piece in pieces:
        if piece.numel() == 0:
            continue
        size = piece.shape[axis]
        copy = _unary("copy", out.narrow(axis, at, size), piece)
        if copy is None:
            return None
        found.append(copy)
        at += size
    return found


def _dense(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> NativeStep | None:
    """``x`` [..., K] times ``weight`` [N, K], whose rows must lie in one piece."""
    tensors = [out, x, weight, *([] if bias is None else [bias])]
    if not native.is_floats(*tensors) or x.numel() == 0:
        return None
    rows, cols = weight.shape
    x, out = x.reshape(-1, cols), out.view(-1, rows)
    shared = x.data_ptr() == tensors[1].data_ptr()
    if not shared or weight.stride(1) != 1 or x.stride(1) != 1 or out.stride(1) != 1:
        return None
    if bias is not None and (bias.shape != (rows,) or not bias.is_contiguous()):
        return None
    step = NativeStep(op=Op.DENSE)
    for place, tensor in enumerate((out, x, weight)):
        step.data[place], step.stride[place][0] = tensor.data_ptr(), tensor.stride(0)
    step.data[3] = None if bias is None else bias.data_ptr()
    step.number[:3] = (len(x), rows, cols)
    return step


def _embedding(out: Tensor, weight: Tensor, ids: Tensor) -> NativeStep | None:
    plain = native.is_floats(out, weight) and out.is_contiguous() and weight.is_contiguous()
    if not plain or ids.numel() != 1 or ids.dtype is not torch.int64:
        return None
    return embedding_step(out, weight, ids, (-1, 0, *weight.shape))


def embedding_step(
    out: Tensor, weight: Tensor, ids: Tensor, numbers: tuple[int, int, int, int]
) -> NativeStep:
    """One row of a matrix; numbers are scheme (-1 for float32), bytes, rows and columns."""
    step = NativeStep(op=Op.EMBED)
    step.data[:3] = (out.data_ptr(), ids.data_ptr(), weight.data_ptr())
    step.number[:] = numbers
    return step


def _call(step: Step) -> Call:
    """Let torch do it again, into the same memory."""
    operation: Any = step.operation
    arguments, keywords, results = step.arguments, step.keywords, step.results
    in_place = operation._schema.is_mutable

    def call() -> None:
        made = operation(*arguments, **keywords)
        if in_place:
            return
        for old, new in zip(results, tensors_in(made), strict=True):
            old.copy_(new)

    return call


def _again(step: Step) -> Call:
    """Put back what something later in the pass writes over."""
    values = [result.clone() for result in step.results]

    def call() -> None:
        for result, value in zip(step.results, values, strict=True):
            result.copy_(value)

    return call
