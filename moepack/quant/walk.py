"""The walk over a matrix: some rows at a time, the same result on any number of threads.

Shape letters: R rows, C cols (inputs).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.schemes import Scheme

from .grid import GroupedRows
from .signed import SignedRows
from .storage import Stored
from .weighing import importance_of_weights

T = TypeVar("T")

CHUNK_WEIGHTS = 1 << 19
"""Weights per chunk: small enough for the cache (16 bytes a weight, 8 MiB in all), large enough
that an operation takes much longer than starting it, or than waiting for Python's lock."""

MOST_WORKERS = 4
"""More threads would only wait for Python's lock."""

Fit = tuple[Stored, Stored | None]
"""Scales and minima as they will be stored; no minima where codes stand for levels."""


@dataclass(frozen=True)
class Solver:
    """What a quantizer has to do, for each kind of grid.

    Attributes:
        with_minima: Scales and minima of some rows, as they will be stored.
        signed: Scales of some rows in a scheme of levels.
        by_size: Whether large weights count more where that pays.
    """

    with_minima: Callable[[GroupedRows, Scheme], tuple[Stored, Stored]]
    signed: Callable[[SignedRows, Scheme], Stored]
    by_size: bool = True

    def encode(
        self, weight: Tensor, scheme: Scheme, importance: Tensor | None, codes: Tensor
    ) -> Fit:
        """Choose scales, then the codes that suit what the reader will see.

        Args:
            weight: ``[R, C]`` some rows.
            scheme: A quantized scheme.
            importance: ``[C]`` float32 of the inputs, above 0; None: all the same.
            codes: ``[R, C]`` uint8, overwritten.
        """
        if scheme.levels:
            signed_rows = SignedRows(weight, scheme, importance)
            signed = self.signed(signed_rows, scheme)
            signed_rows.write_codes(signed, codes)
            return signed, None
        if self.by_size:
            importance = importance_of_weights(weight, scheme, importance)
        rows = GroupedRows(weight, scheme.group, importance)
        scales, minima = self.with_minima(rows, scheme)
        rows.write_codes(scales, minima, (1 << scheme.bits) - 1, codes)
        return scales, minima


def quantize_rows(
    weight: Tensor, scheme: Scheme, solver: Solver, importance: Tensor | None = None
) -> QuantizedMatrix:
    """Quantize a matrix chunk by chunk, on up to as many threads as torch has been given.

    A chunk is the same rows, and is worked by one thread alone, whatever the number of threads, so
    the result is too. Torch's own way, every operation shared between threads, would change the
    order of additions; and with other work on the machine, passes this short spend most of their
    time waiting for the slower thread.

    Args:
        weight: ``[R, C]`` finite weights.
        scheme: A quantized scheme.
        solver: Chooses the scales and minima of a chunk.
        importance: ``[C]`` float32 of the inputs, above 0; None: all the same.
    """
    rows, cols = weight.shape
    each = max(1, CHUNK_WEIGHTS // cols)
    codes = torch.empty((rows, cols), dtype=torch.uint8)

    def work(first: int) -> Fit:
        with torch.inference_mode():  # Per thread; spares bookkeeping in every small step.
            chunk = slice(first, min(first + each, rows))
            return solver.encode(weight[chunk], scheme, importance, codes[chunk])

    parts = in_workers([partial(work, first) for first in range(0, rows, each)])
    return assemble(scheme, codes, parts)


def assemble(scheme: Scheme, codes: Tensor, parts: Sequence[Fit]) -> QuantizedMatrix:
    """Put a matrix together.

    Args:
        scheme: A quantized scheme.
        codes: ``[R, C]`` uint8.
        parts: Scales and minima of each chunk of rows.
    """
    scales = Stored.concatenate([part[0] for part in parts])
    found = [part[1] for part in parts if part[1] is not None]
    minima = Stored.concatenate(found) if found else None
    return QuantizedMatrix(
        scheme,
        (codes.shape[0], codes.shape[1]),
        codes.numpy(),
        scales.codes_as_numpy(),
        None if minima is None else minima.codes_as_numpy(),
        scales.outer_as_numpy(),
        None if minima is None else minima.outer_as_numpy(),
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
        torch.get_num_threads()  # Or the first operation would take up the number set last.
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
