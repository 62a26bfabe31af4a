"""How many threads torch uses while ``generate()`` plays tokens: one.

All that is left to torch then are operations on one row of logits. It would split each of them
among threads of its own, whose waiting for each other takes longer than the operation, and which
want the cores that the native library's threads keep for a moment after their work. Greedy decoding
at OLMoE's shape on two cores took 31 ms a token so, and 22 with one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..kernels.native_engine import NativeEngine


class TorchThreads:
    """Torch's threads, as a call of ``generate()`` needs them.

    Args:
        engine: Keeps as many threads as it has meanwhile.
    """

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine
        self._before: int | None = None  # None outside generate()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around a whole ``generate()``; afterwards torch has the threads that it had before."""
        if self._before is not None:  # one generate() inside another
            yield
            return
        self._before = torch.get_num_threads()
        try:
            with self._engine.threads_kept():
                yield
        finally:
            torch.set_num_threads(self._before)
            self._before = None

    def expect(self, *, played: bool) -> None:
        """Called ahead of every pass; does nothing outside ``generate()``."""
        if self._before is None:
            return
        wanted = 1 if played else self._before
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
