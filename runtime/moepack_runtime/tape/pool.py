"""Memory of a tape's intermediate results, shared between steps that do not overlap.

A recording gives every result memory of its own: megabytes that a token walks through once, so that
each step waits for main memory. Most results are read by the next few steps only. They are moved
into one small pool, which stays in the cache.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .slices import OWN, make_own
from .steps import NativeStep, Op

ALIGNMENT = 64


@dataclass
class _Buffer:
    """A result: where it is, and the first and last step that touch it."""

    start: int
    nbytes: int
    first: int
    last: int
    place: int = -1
    constant: bool = False  # read before anything has written it


def compact(
    steps: Sequence[NativeStep],
    results: Iterable[Tensor],
    fixed: set[int],
    together: Iterable[range] = (),
) -> Tensor:
    """Move results that only native steps touch into a pool.

    Args:
        steps: The tape; their addresses are changed.
        results: What the recording computed.
        fixed: Addresses of storages that stay where they are, as others read or write them.
        together: Runs of steps that are not done one after the other.

    Returns:
        The pool, uint8, which must live as long as the steps.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (r.untyped_storage() for r in results)}
    buffers = [
        _Buffer(start, nbytes, len(steps), -1)
        for start, nbytes in sorted(storages.items())
        if start not in fixed and nbytes > 0
    ]
    starts = [b.start for b in buffers]
    touched: list[tuple[int, int, _Buffer]] = []
    for number, step in enumerate(steps):
        for operand, address in enumerate(step.data):
            buffer = _at(buffers, starts, address)
            if buffer is None:
                continue
            buffer.first, buffer.last = min(buffer.first, number), max(buffer.last, number)
            if buffer.first == number and not _is_written(step, operand):
                buffer.constant = True
            touched.append((number, operand, buffer))
    touched = [item for item in touched if not item[2].constant]
    for run in together:
        for buffer in buffers:
            if buffer.first in run and buffer.last in run and not buffer.constant:
                uses = [(steps[n], operand) for n, operand, b in touched if b is buffer]
                nbytes = make_own(uses)
                if nbytes is not None:
                    buffer.start, buffer.nbytes = OWN, nbytes * steps[run[0]].number[1]
            buffer.first = run[0] if buffer.first in run else buffer.first
            buffer.last = run[-1] if buffer.last in run else buffer.last
    used = [b for b in buffers if b.last >= 0 and not b.constant]
    pool = torch.zeros(_place(used) + ALIGNMENT, dtype=torch.uint8)
    base = -(-pool.data_ptr() // ALIGNMENT) * ALIGNMENT
    for number, operand, buffer in touched:
        step = steps[number]
        step.data[operand] = base + buffer.place + step.data[operand] - buffer.start
    return pool


def _is_written(step: NativeStep, operand: int) -> bool:
    return operand == 0 or bool(operand == 3 and step.op == Op.TOPK)


def _at(buffers: list[_Buffer], starts: list[int], address: int | None) -> _Buffer | None:
    number = bisect.bisect_right(starts, address or 0) - 1
    if number < 0 or address is None:
        return None
    buffer = buffers[number]
    return buffer if address < buffer.start + buffer.nbytes else None


def _place(buffers: list[_Buffer]) -> int:
    """Give each buffer a place that nothing else has while it is alive; returns the size."""
    size = 0
    alive: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda b: b.first):
        alive = sorted((b for b in alive if b.last >= buffer.first), key=lambda b: b.place)
        place = 0
        for other in alive:
            if place + buffer.nbytes <= other.place:
                break
            end = other.place + other.nbytes
            place = max(place, -(-end // ALIGNMENT) * ALIGNMENT)
        buffer.place = place
        alive.append(buffer)
        size = max(size, place + buffer.nbytes)
    return size
