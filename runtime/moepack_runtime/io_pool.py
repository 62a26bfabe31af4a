"""Threads that read: demands first, guesses when nothing is demanded."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

DEMAND, SPECULATION, _STOP = 0, 1, 2

Job = tuple[int, int, "Future[None] | None", "Callable[[], None] | None"]


class IoPool:
    """A few daemon threads over one priority queue.

    Args:
        threads: How many.
    """

    def __init__(self, threads: int) -> None:
        self._queue: queue.PriorityQueue[Job] = queue.PriorityQueue()
        self._order = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, name=f"moepack-io-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None], priority: int) -> Future[None]:
        """Queue a job. Its future can be cancelled until a thread takes it."""
        future: Future[None] = Future()
        self._queue.put((priority, next(self._order), future, job))
        return future

    def close(self) -> None:
        """End the threads after the jobs that are queued."""
        for _ in self._threads:
            self._queue.put((_STOP, next(self._order), None, None))
        for thread in self._threads:
            # The garbage collector may close a forgotten model from one of these very threads.
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        while True:
            _, _, future, job = self._queue.get()
            if future is None or job is None:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                job()
            except BaseException as error:  # the demander gets it, on its own thread
                future.set_exception(error)
            else:
                future.set_result(None)
