"""What every quantizer of our own shares: groups of weights, codes, and the walk over a matrix.

A matrix is worked on some rows at a time. In a chunk the groups lie side by side, one group to a
column, so that a sum over a group adds whole vectors and every pass stays in the cache.

Shape letters: R rows of a chunk, C cols (inputs), g weights in a group, G groups of a row,
N = R * G groups of a panel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import Scheme

from .storage import Stored

T = TypeVar("T")

CHUNK_WEIGHTS = 1 << 19
"""Weights per chunk: small enough for the cache (16 bytes a weight, 8 MiB in all), large enough
that an operation takes much longer than starting it, or than waiting for Python's lock."""

MOST_WORKERS = 4
"""More threads would only wait for Python's lock."""

MINIMUM_TURNS = 2
"""Turns of codes and minima once the scales are final."""

MOST_STRETCH = 1.5
"""Of groups that are hardly described by their codes, most of the power is one outlier's."""

_SMALLEST_SUM = 1e-37
_SMALLEST_STEP = 1e-30  # Below it 1 / step is no longer finite; float16 ends at 6e-8.


@dataclass(frozen=True)
class Moments:
    """Sums over each group, ``q`` its codes and ``w`` its centred weights: ``[N]`` each."""

    q: Tensor
    qq: Tensor
    qw: Tensor


class Panel:
    """Groups of one size, one to a column.

    The weights are centred on their group's mean: sums of squares then lose nothing to
    cancellation, and the sum of a group's weights is zero.

    With an importance, every sum and mean here and in ``Moments`` counts a weight as often as its
    input is important, relative to the other inputs of its group; so what is fitted to the sums is
    fitted to the important inputs, and no formula changes.

    Args:
        rows: ``[R, G * g]`` weights of any float dtype.
        group: Weights in a group, g.
        importance: ``[G * g]`` float32 of the inputs, above 0; None: all the same.

    Attributes:
        size: g.
        weights: ``[g, N]`` float32, less ``mean``.
        mean: ``[N]`` float32.
        low: ``[N]`` smallest centred weight.
        high: ``[N]`` largest centred weight.
        reach: The largest absolute centred weight of all groups.
        power: ``[N]`` sum of the squares of the centred weights.
        codes: ``[g, N]`` float32, integers, as the last ``encode`` left them.
        measure: ``[g, N]`` float32 importance, of mean 1 in each group; None: 1 everywhere.
        emphasis: ``[N]`` float32 mean importance of each group; 1 without an importance.
    """

    def __init__(self, rows: Tensor, group: int, importance: Tensor | None = None) -> None:
        by_group = rows.reshape(-1, group).t()
        self.size = group
        self.weights = torch.empty(by_group.shape, dtype=torch.float32).copy_(by_group)
        self.measure: Tensor | None = None
        self.emphasis = torch.ones(())
        if importance is not None:
            grouped = importance.reshape(-1, group).t()  # [g, G]
            emphasis = grouped.mean(dim=0)
            repeats = by_group.shape[1] // len(emphasis)
            self.emphasis = emphasis.repeat(repeats)
            self.measure = (grouped / emphasis).repeat(1, repeats)
        self.mean = self.total(self.weights) / group
        self.weights -= self.mean
        self.low = self.weights.amin(dim=0)
        self.high = self.weights.amax(dim=0)
        self.reach = float(torch.maximum(self.high, -self.low).max())
        self._scaled = torch.empty_like(self.weights)
        self.codes = torch.empty_like(self.weights)
        self._product = torch.empty_like(self.weights)
        self.power = self._sum_product(self.weights, self.weights)

    def scale_by(self, inverse: Tensor) -> None:
        """Measure the weights in steps: the argument of every ``encode`` that follows.

        Args:
            inverse: ``[N]`` one over the step, as ``invert`` gives it.
        """
        torch.mul(self.weights, inverse, out=self._scaled)

    def encode(self, zero: Tensor, top: int) -> None:
        """Choose the nearest code, 0 to ``top``, of every weight.

        Args:
            zero: ``[N]`` the code, a fraction, that stands for the group's mean.
            top: The largest code.
        """
        torch.add(self._scaled, zero, out=self.codes).round_().clamp_(0, top)

    def code_sum(self) -> Tensor:
        """Sum ``[N]`` of the present codes."""
        return self.total(self.codes)

    def moments(self) -> Moments:
        """Sums of the present codes, for fitting step and zero point to them."""
        qq = self._sum_product(self.codes, self.codes)
        return Moments(self.code_sum(), qq, self._sum_product(self.codes, self.weights))

    def squared_steps(self, zero: Tensor, top: int) -> Tensor:
        """Encode, and sum ``[N]`` the squared errors, in steps."""
        self.encode(zero, top)
        residual = torch.sub(self._scaled, self.codes, out=self._product).add_(zero)
        return self._sum_product(residual, residual)

    def total(self, values: Tensor) -> Tensor:
        """Sum ``[N]`` of ``[g, N]`` values over each group."""
        return (values if self.measure is None else values * self.measure).sum(dim=0)

    def _sum_product(self, left: Tensor, right: Tensor) -> Tensor:
        product = torch.mul(left, right, out=self._product)
        if self.measure is not None:
            product *= self.measure
        return product.sum(dim=0)


class GroupedRows:
    """Rows of a matrix cut into groups; a short last group of a row is a panel of its own.

    Padding the short group would let the padding take part in the fit.

    Args:
        rows: ``[R, C]`` weights of any float dtype.
        group: Weights in a group.
        importance: ``[C]`` float32 of the inputs, above 0; None: all the same.

    Attributes:
        panels: The full groups of all rows, then the short last groups, as far as there are any.
    """

    def __init__(self, rows: Tensor, group: int, importance: Tensor | None = None) -> None:
        self._rows, cols = rows.shape
        self._full, short = divmod(cols, group)
        self.panels: list[Panel] = []
        for part, size in (
            (slice(0, self._full * group), group),
            (slice(self._full * group, cols), short),
        ):
            if size and part.start < part.stop:
                chosen = None if importance is None else importance[part]
                self.panels.append(Panel(rows[:, part], size, chosen))

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut ``[R, G]`` values into ``[N]`` for each panel."""
        if len(self.panels) == 1:
            return [values.reshape(-1)]
        return [values[:, : self._full].reshape(-1), values[:, self._full :].reshape(-1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put ``[N]`` values of each panel together: ``[R, G]``."""
        by_row = [part.view(self._rows, -1) for part in parts]
        return by_row[0] if len(by_row) == 1 else torch.cat(by_row, dim=1)

    def gather(self, value: Callable[[Panel], Tensor]) -> Tensor:
        """One value per group, ``[R, G]``, from a function of a panel."""
        return self.join([value(panel) for panel in self.panels])

    def encode(self, scales: Tensor, minima: Tensor, top: int) -> Iterator[Panel]:
        """Each panel with the codes that suit these ``[R, G]`` scales and minima best."""
        for panel, step, minimum in zip(
            self.panels, self.split(scales), self.split(minima), strict=True
        ):
            inverse = invert(step)
            panel.scale_by(inverse)
            panel.encode((minimum + panel.mean) * inverse, top)
            yield panel

    def write_codes(self, scales: Stored, minima: Stored, top: int, out: Tensor) -> None:
        """Encode for the values that the reader will see.

        Args:
            scales: As stored.
            minima: As stored.
            top: The largest code.
            out: ``[R, C]`` uint8, overwritten.
        """
        start = 0
        effective = scales.values()
        for panel, step in zip(
            self.encode(effective, minima.values(), top), self.split(effective), strict=True
        ):
            panel.codes.mul_(step.sign())  # Codes of a step of 0 say nothing; keep them 0.
            codes = panel.codes.t().reshape(self._rows, -1)
            out[:, start : start + codes.shape[1]].copy_(codes)
            start += codes.shape[1]


def invert(step: Tensor) -> Tensor:
    """One over each step; large and finite for a step of 0, whatever the codes then are."""
    return step.clamp(min=_SMALLEST_STEP).reciprocal_()


def size_lost(power: Tensor, explained: Tensor) -> Tensor:
    """By how much to stretch values that came out smaller than the weights they stand for.

    Args:
        power: Sums of the squared weights.
        explained: Sums of weight times value, shaped alike.
    """
    lost = power.clamp(min=_SMALLEST_SUM) / explained.clamp(min=_SMALLEST_SUM)
    return lost.clamp_(1.0, MOST_STRETCH)


def take_better(best: Tensor, error: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Where ``error`` is below ``best``, take it and the second of each pair; in place.

    Blending by ones and zeros is exact, and many times faster than torch's work with booleans.

    Args:
        best: ``[N]`` least errors so far.
        error: ``[N]``.
        pairs: What belongs to ``best`` and to ``error``, ``[N]`` each, all finite.
    """
    better = torch.lt(error, best, out=torch.empty_like(best))
    for kept, found in pairs:
        kept.lerp_(found, better)
    torch.minimum(best, error, out=best)


def refit_minima(rows: GroupedRows, scales: Tensor, minima: Tensor, top: int) -> Tensor:
    """Minima ``[R, G]`` that suit these stored scales, after some turns with the codes."""
    found = []
    for panel, step, minimum in zip(
        rows.panels, rows.split(scales), rows.split(minima), strict=True
    ):
        inverse = invert(step)
        panel.scale_by(inverse)
        zero = (minimum + panel.mean) * inverse
        for _ in range(MINIMUM_TURNS):
            panel.encode(zero, top)
            zero = panel.code_sum() / panel.size
        found.append(zero * step - panel.mean)
    return rows.join(found)


Solve = Callable[[GroupedRows, Scheme], tuple[Stored, Stored]]
"""What a quantizer has to do: rows -> scales and minima, both as they will be stored."""


def quantize_rows(
    weight: Tensor, scheme: Scheme, solve: Solve, importance: Tensor | None = None
) -> QuantizedMatrix:
    """Quantize a matrix chunk by chunk, on up to as many threads as torch has been given.

    The codes are chosen last, for the scales and minima that the reader will see.

    A chunk is the same rows, and is worked by one thread alone, whatever the number of threads, so
    the result is too. Torch's own way, every operation shared between threads, would change the
    order of additions; and with other work on the machine, passes this short spend most of their
    time waiting for the slower thread.

    Args:
        weight: ``[R, C]`` finite weights.
        scheme: A quantized scheme.
        solve: Chooses the scales and minima of a chunk.
        importance: ``[C]`` float32 of the inputs, above 0; None: all the same.
    """
    rows, cols = weight.shape
    each = max(1, CHUNK_WEIGHTS // cols)
    top = (1 << scheme.bits) - 1
    codes = torch.empty((rows, cols), dtype=torch.uint8)

    def work(first: int) -> tuple[Stored, Stored]:
        with torch.inference_mode():  # Per thread; spares bookkeeping in every small step.
            chunk = slice(first, min(first + each, rows))
            grouped = GroupedRows(weight[chunk], scheme.group, importance)
            scales, minima = solve(grouped, scheme)
            grouped.write_codes(scales, minima, top, codes[chunk])
            return scales, minima

    parts = in_workers([partial(work, first) for first in range(0, rows, each)])
    return assemble(scheme, codes, parts)


def assemble(
    scheme: Scheme, codes: Tensor, parts: Sequence[tuple[Stored, Stored]]
) -> QuantizedMatrix:
    """Put a matrix together.

    Args:
        scheme: A quantized scheme.
        codes: ``[R, C]`` uint8.
        parts: Scales and minima of each chunk of rows.
    """
    scales = Stored.concatenate([part[0] for part in parts])
    minima = Stored.concatenate([part[1] for part in parts])
    return QuantizedMatrix(
        scheme,
        (codes.shape[0], codes.shape[1]),
        codes.numpy(),
        scales.codes_as_numpy(),
        minima.codes_as_numpy(),
        scales.outer_as_numpy(),
        minima.outer_as_numpy(),
    )


def in_workers(work: Sequence[Callable[[], T]]) -> list[T]:
    """Do each piece of work in a thread in which torch uses no further ones.

    The same pieces give the same results, then, whatever the number of threads.
    """
    return list(_workers(torch.get_num_threads()).map(lambda piece: piece(), work))


_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch does not share its operations with further ones."""
    count = min(threads, MOST_WORKERS)
    with _pools_lock:
        if count not in _pools:
            _pools[count] = _start_workers(count, threads)
        return _pools[count]


def _start_workers(count: int, threads: int) -> ThreadPoolExecutor:
    ready = threading.Barrier(count + 1)

    def prepare() -> None:
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(count, "moepack-quantize", initializer=prepare)
    for _ in range(count):
        pool.submit(int)  # Starts a thread each, as none is idle before the barrier.
    ready.wait()
    # set_num_threads holds for the thread that calls it, and for threads yet to start.
    torch.set_num_threads(threads)
    return pool


def _forget_workers() -> None:
    """Threads and locks do not survive a fork; the child starts its own."""
    global _pools_lock
    _pools.clear()
    _pools_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
