"""The cache's I/O pool without threads: a test says when records arrive."""

from __future__ import annotations

from collections.abc import Sequence

from moepack_runtime import io_pool
from moepack_runtime.io_pool import IoPool, Read


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
        for queue in self._queues:
            while queue:
                read = queue.popleft()
                if read._state == io_pool._QUEUED:
                    self._do(read)
                    return True
        return False

    def cancel(self, read: Read) -> bool:
        """See ``IoPool``."""
        cancelled = super().cancel(read)
        self.given_up += cancelled
        return cancelled

    def wait(self, reads: Sequence[Read]) -> None:
        """Do jobs until at least one of ``reads`` has ended."""
        while not any(read.done for read in reads):
            assert self.step(), "nobody will ever do these reads"

    @staticmethod
    def _do(read: Read) -> None:
        try:
            read._job()
        except BaseException as error:  # as in the real one: the demander gets it
            read.error = error
        read._state = io_pool._DONE
