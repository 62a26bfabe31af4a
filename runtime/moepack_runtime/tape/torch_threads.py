"""How many threads torch uses while ``generate()`` plays tokens: one.

All that is left to torch then are operations on one row of logits. It would split each of them
among threads of its own, whose waiting for each other takes longer than the operation, and which
want the cores that the native library's threads keep for a moment after their work. Greedy decoding
at OLMoE's shape on two cores took 31 ms a token so, and 22 with one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..kernels.native_engine import NativeEngine


class TorchThreads:
    """Torch's threads, as calls of ``generate()`` need them; several threads may make such calls.

    Args:
        engine: Keeps as many threads as it has meanwhile.
    """

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._calls = 0  # of generate() under way
        self._before = 0  # the first of these
        self._here = threading.local()  # torch's number is each thread's own

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around a whole ``generate()``; afterwards torch has the threads that it had before."""
        if self._wanted is not None:  # one generate() inside another
            yield
            return
        with self._lock:
            # A thread that starts meanwhile begins with the number that another one has set.
            if self._calls == 0:
                self._before = torch.get_num_threads()
            self._calls += 1
            self._here.before = self._before
        try:
            with self._engine.threads_kept():
                yield
        finally:
            torch.set_num_threads(self._here.before)
            self._here.before = None
            with self._lock:
                self._calls -= 1

    @property
    def _wanted(self) -> int | None:
        """Threads of this thread's ``generate()``; None outside."""
        found: int | None = getattr(self._here, "before", None)
        return found

    def expect(self, *, played: bool) -> None:
        """Called ahead of every pass; does nothing outside ``generate()``."""
        before = self._wanted
        if before is None:
            return
        wanted = 1 if played else before
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)
