"""Threads that read: demands first, guesses when nothing is demanded.

Not ``concurrent.futures``: a future has a lock of its own, and waiting for the first of several
takes all of them, which costs more than the rest of a miss. Here one lock covers the pool.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

DEMAND, SPECULATION = 0, 1

_QUEUED, _RUNNING, _DONE, _CANCELLED = range(4)


class Read:
    """A job of the pool and what became of it."""

    __slots__ = ("_job", "_state", "error")

    def __init__(self, job: Callable[[], None]) -> None:
        self._job = job
        self._state = _QUEUED
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._state == _DONE

    def result(self) -> None:
        """Raise what the job raised."""
        if self.error is not None:
            raise self.error


class IoPool:
    """A few daemon threads over two queues.

    Args:
        threads: How many.
    """

    def __init__(self, threads: int) -> None:
        self._queues: tuple[deque[Read], deque[Read]] = (deque(), deque())
        # Reentrant: the garbage collector may close a forgotten model on a thread that holds it.
        lock = threading.RLock()
        self._work, self._finished = threading.Condition(lock), threading.Condition(lock)
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"moepack-io-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None], priority: int) -> Read:
        """Queue a job."""
        read = Read(job)
        with self._work:
            self._queues[priority].append(read)
            self._work.notify()
        return read

    def promote(self, read: Read) -> None:
        """A guess that came true is as urgent as a demand."""
        with self._work:
            if read._state == _QUEUED:
                # It stays in the queue of guesses too, where it will be passed over.
                self._queues[DEMAND].append(read)

    def cancel(self, read: Read) -> bool:
        """Forget a job that no thread has taken; says whether it was so."""
        with self._work:
            if read._state == _QUEUED:
                read._state = _CANCELLED
            return read._state == _CANCELLED

    def wait(self, reads: Sequence[Read]) -> None:
        """Return when at least one of ``reads`` has ended."""
        if any(read._state == _DONE for read in reads):
            return
        with self._finished:
            while not any(read._state == _DONE for read in reads):
                self._finished.wait()

    def close(self) -> None:
        """End the threads after the jobs that are queued.

        On one of these very threads, where the garbage collector may close a forgotten model,
        nobody is waited for: another one may want the lock that this one holds.
        """
        with self._work:
            self._closing = True
            self._work.notify_all()
        if threading.current_thread() in self._threads:
            return
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        demands, guesses = self._queues
        while True:
            with self._work:
                while not demands and not guesses and not self._closing:
                    self._work.wait()
                if not demands and not guesses:
                    return
                read = demands.popleft() if demands else guesses.popleft()
                if read._state != _QUEUED:
                    continue
                read._state = _RUNNING
            try:
                read._job()
            except BaseException as error:  # the demander gets it, on its own thread
                read.error = error
            with self._finished:
                read._state = _DONE
                self._finished.notify_all()
            # Not kept alive by an idle thread: the job holds the slots.
            del read
