"""Steps that are done slice by slice, so that what one passes to the next stays in a cache.

The state of linear attention is a matrix for each head, some megabytes in all, and several steps in
a row go through it. Each of them would read and write all of it in main memory. Where every step of
a run needs of the others nothing but the same head's part, the run is done for one head after
another, the heads divided among the threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .steps import LOOPS, UNARY, NativeStep, Op

BIG = 1 << 16
"""Turns of a step's loops from which on it is worth it."""

_SLICED = {Op.UNARY: LOOPS, Op.BINARY: LOOPS, Op.REDUCE: 3, Op.SOFTMAX: 3, Op.CONTRACT: 3}
"""Kinds of steps that can be sliced, and the loops that may be: some are summed over the last."""

OWN = 64
"""An address that stands for the start of a buffer: not 0, which is no address."""

_FLOAT_NBYTES, _ALIGNMENT = 4, 64


@dataclass(frozen=True)
class _Access:
    """What a step reads or writes of memory, in bytes.

    Attributes:
        start: Address of the first slice.
        extent: Of one slice.
        stride: From slice to slice.
        end: Of the last slice.
        written: Whether it is written.
    """

    start: int
    extent: int
    stride: int
    end: int
    written: bool


def slice_runs(steps: list[NativeStep], parts: int) -> list[range]:
    """Find runs of steps that can be done slice by slice, and make them so.

    Args:
        steps: A tape before its memory is shared; the steps of a run get a first loop over the
            slices, and its first step the numbers of steps and of parts.
        parts: Into so many the slices are divided among the threads, at most.

    Returns:
        The runs.
    """
    runs: list[range] = []
    at = 0
    while at < len(steps):
        run = _run_from(steps, at)
        if run is None:
            at += 1
            continue
        steps[at : at + len(run)] = run
        steps[at].number[1], steps[at].number[3] = parts, len(run)
        runs.append(range(at, at + len(run)))
        at += len(run)
    return runs


def make_own(uses: Sequence[tuple[NativeStep, int]]) -> int | None:
    """Let each part of a run keep one slice of a buffer, if nothing but the run uses it.

    What passes between steps of a slice stays in a cache then, and is written over by the next one.

    Args:
        uses: All steps that touch the buffer, each in its sliced form, with the operand. Their
            addresses become those in a buffer that starts at ``OWN``.

    Returns:
        The size of a slice in bytes, or None where nothing was changed.
    """
    accesses = [access for step, operand in uses for access in _accesses(step, operand)]
    start = min(access.start for access in accesses)
    nbytes = max(access.start + access.extent for access in accesses) - start
    if {access.stride for access in accesses} != {accesses[0].stride}:
        return None
    if nbytes > accesses[0].stride:
        return None
    nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    for step, operand in uses:
        step.data[operand] += OWN - start
        step.stride[operand][0] = nbytes // _FLOAT_NBYTES
        step.number[2] |= 1 << operand
    return nbytes


def _run_from(steps: Sequence[NativeStep], begin: int) -> list[NativeStep] | None:
    """The steps of a run in their new form, or None."""
    loops = _SLICED.get(Op(steps[begin].op))
    if loops is None or _turns(steps[begin]) < BIG:
        return None
    count = next((size for size in steps[begin].size[: LOOPS - 1] if size > 1), 1)
    if count < 2:
        return None
    run: list[NativeStep] = []
    accesses: list[_Access] = []
    for step in steps[begin:]:
        sliced = _sliced(step, count)
        if sliced is None:
            break
        new = [access for operand in range(4) for access in _accesses(sliced, operand)]
        if any(_clash(a, b) for i, b in enumerate(new) for a in (*accesses, *new[: i + 1])):
            break
        accesses += new
        run.append(sliced)
    while run and _turns(run[-1]) < BIG:
        run.pop()
    return run if len(run) > 1 else None


def _turns(step: NativeStep) -> int:
    return math.prod(step.size)


def _sliced(step: NativeStep, count: int) -> NativeStep | None:
    """The same step with ``count`` slices as its first loop."""
    loops = _SLICED.get(Op(step.op))
    if loops is None or (step.op == Op.UNARY and UNARY[step.kind] == "from_int64"):
        return None
    axis = next((i for i in range(loops) if step.size[i] > 1), None)
    if axis is None or step.size[axis] % count or (axis == 0 and step.size[0] != count):
        return None
    each = step.size[axis] // count
    new = NativeStep.from_buffer_copy(step)
    new.size[axis], new.size[0] = each, count
    for stride in new.stride:
        # Of a loop that is left with one turn the stride does not matter.
        stride[0] = stride[axis] * each
    return new


def _accesses(step: NativeStep, operand: int) -> Iterator[_Access]:
    address = step.data[operand]
    if address is None:
        return
    inner = range(1, LOOPS - 1 if step.op == Op.REDUCE and operand == 0 else LOOPS)
    last = sum((step.size[i] - 1) * step.stride[operand][i] for i in inner)
    extent, stride = (last + 1) * _FLOAT_NBYTES, step.stride[operand][0] * _FLOAT_NBYTES
    end = address + (step.size[0] - 1) * stride + extent
    yield _Access(address, extent, stride, end, written=operand == 0)


def _clash(a: _Access, b: _Access) -> bool:
    """Whether a slice of one may touch what another slice of the other writes, or the reverse."""
    if not (a.written or b.written) or a.end <= b.start or b.end <= a.start:
        return False
    both = max(a.start + a.extent, b.start + b.extent) - min(a.start, b.start)
    return a.stride != b.stride or both > a.stride
