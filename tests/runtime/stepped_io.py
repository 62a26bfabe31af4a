"""The cache's I/O pool without threads: a test says when records arrive."""

from __future__ import annotations

from collections.abc import Sequence

from moepack_runtime.disk import io_pool
from moepack_runtime.disk.io_pool import IoPool, Read


class SteppedPool(IoPool):
    """Reads on the thread that waits for them, demands first, and otherwise when it is stepped.

    Attributes:
        given_up: Reads that were cancelled in time.
    """

    def __init__(self) -> None:
        super().__init__(0)
        self.given_up = 0

    def step(self) -> bool:
        """Do the job that a thread would take next; says whether there was one."""
        read = self._take()
        if read is not None:
            self._do(read)
        return read is not None

    def cancel(self, read: Read) -> bool:
        """See ``IoPool``."""
        cancelled = super().cancel(read)
        self.given_up += cancelled
        return cancelled

    def wait(self, reads: Sequence[Read]) -> None:
        """Do jobs until at least one of ``reads`` has ended."""
        while not any(read.done for read in reads):
            assert self.step(), "nobody will ever do these reads"

    def _take(self) -> Read | None:
        for queue in self._queues:
            while queue:
                read = queue.popleft()
                if read._state == io_pool._QUEUED:
                    read._state = io_pool._RUNNING
                    return read
        return None

    def _do(self, read: Read) -> None:
        try:
            read._job()
        except BaseException as error:  # as in the real one: the demander gets it
            read.error = error
        read._state = io_pool._DONE


class SimulatedDisk(SteppedPool):
    """One read at a time, each as long as the others, on a clock that the test moves on.

    Args:
        read_s: Seconds that a read takes.

    Attributes:
        now: Seconds since the beginning.
    """

    def __init__(self, read_s: float) -> None:
        super().__init__()
        self.read_s, self.now = read_s, 0.0
        self._running: tuple[Read, float] | None = None  # and when it will be done

    def pass_time(self, seconds: float) -> None:
        """Something else takes so long; the disk goes on meanwhile."""
        end = self.now + seconds
        while self.now < end and self._begin() and self._running[1] <= end:  # type: ignore[index]
            self.step()
        self.now = end

    def step(self) -> bool:
        """Move the clock on to the end of the read that is under way, or of the next."""
        if not self._begin():
            return False
        assert self._running is not None
        read, self.now = self._running
        self._running = None
        self._do(read)
        return True

    def _begin(self) -> bool:
        """Whether a read is under way, now that the next has been begun if none was."""
        if self._running is None:
            read = self._take()
            self._running = None if read is None else (read, self.now + self.read_s)
        return self._running is not None
