"""Computing with packed weights.

An engine multiplies with packed matrices and runs experts. ``reference`` is plain torch and defines
the results; ``native`` is the library in ``csrc``; ``triton_gpu`` computes on GPUs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moepack_formats.errors import UsageError
from moepack_formats.record import RecordSpec
from moepack_formats.schemes import Scheme

from ..experts import ExpertsAdapter
from ..options import ENGINES

_log = logging.getLogger(__name__)


class FusedExperts(Protocol):
    """The experts of one MoE layer, each call a whole expert or more."""

    def __call__(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        specs: Sequence[RecordSpec],
        weights: Tensor,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """``x`` [H] and ``weights`` [K] float32 to the sum [H] in the order of ``records``.

        With ``outputs`` [K, H] the weighted outputs are left there instead; ``total`` of them is
        the same sum, to the bit.
        """

    def takes(self, tokens: int) -> bool:
        """Whether a pass of so many tokens is faster through ``tokens`` than by matrices."""

    def tokens(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        specs: Sequence[RecordSpec],
        sizes: Sequence[int],
        tokens: Tensor,
        places: Tensor,
        weights: Tensor,
        outputs: Tensor,
    ) -> None:
        """Rows ``tokens`` [N] of ``x`` [T, H], weighted, to rows ``places`` of ``outputs``.

        The first ``sizes[0]`` of them go through the first expert, and so on.
        """

    def total(self, outputs: Tensor) -> Tensor:
        """``[T, K, H]`` to ``[T, H]``, summed in the order of K."""


class Engine(Protocol):
    """What computes with packed weights. R rows (outputs), C cols (inputs) of a matrix."""

    @property
    def name(self) -> str:
        """For a person: engine, instruction set, activations."""

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        scheme: Scheme,
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> Tensor:
        """``x`` [..., C] times a packed [R, C] to [..., R] in the dtype of ``x``."""

    def decode(
        self,
        packed: Tensor,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tiles: Tensor | None = None,
    ) -> Tensor:
        """Dense ``[R, C]``, or the rows ``[16 * len(tiles), C]`` of some tiles."""

    def expert(
        self, record: Tensor, spec: RecordSpec, adapter: ExpertsAdapter, x: Tensor
    ) -> Tensor:
        """One expert on its tokens, ``[N, H]`` to ``[N, H]``, without the router's weight."""

    def fused(self, adapter: ExpertsAdapter) -> FusedExperts | None:
        """Whole experts in one call, where this engine has that for the module's activation."""


def select(
    engine: str = "auto",
    activations: str = "int8",
    threads: int | None = None,
    device: torch.device | str = "cpu",
) -> Engine:
    """Choose what computes.

    Args:
        engine: ``native``, ``reference``, or ``auto`` for native where it was built. The
            environment variable ``MOEPACK_ENGINE`` says what ``auto`` stands for.
        activations: ``int8`` rounds the inputs of quantized matrices, at a few tokens, to 8 bits
            (0.5-1% of relative error, several times faster); ``float`` does not.
        threads: Threads of the native kernels; None for as many as torch has. They are not
            torch's: with torch itself at one thread, which is enough between the matrices of a
            token, nothing competes with them.
        device: Where to compute.

    Raises:
        UsageError: No such engine, or the native library was asked for and is not there.
    """
    from . import native
    from .native_engine import NativeEngine
    from .reference import ReferenceEngine

    if engine == "auto":
        engine = os.environ.get("MOEPACK_ENGINE") or "auto"
    if engine not in ENGINES:
        raise UsageError("unknown engine", wanted=" or ".join(ENGINES), got=engine)
    chosen: Engine
    if torch.device(device).type == "cuda":
        from .triton_gpu import open_engine

        chosen = open_engine(engine, torch.device(device))
    elif engine == "reference" or (engine == "auto" and native.available() is None):
        chosen = ReferenceEngine()
        if engine == "auto":
            _warn_once(
                f"{native.why_not()}; packed weights are computed with by torch, many times slower "
                "(--engine reference if that is meant)"
            )
    elif native.available() is None:
        raise UsageError(native.why_not(), remedy="install again with a C++17 compiler")
    else:
        chosen = NativeEngine(int8=activations == "int8", threads=_started(threads))
    _log.info("packed weights are computed with by: %s", chosen.name)
    return chosen


def _started(threads: int | None) -> int | None:
    """``threads``, or as many as the system gives; None still follows torch."""
    from . import native

    wanted = threads or torch.get_num_threads()
    got = native.start_threads(wanted)
    if got == wanted:
        return threads
    _warn_once(f"the system gives {got} of {wanted} threads; computing is slower for it")
    return got


@functools.cache
def _warn_once(line: str) -> None:
    _log.warning("%s", line)
