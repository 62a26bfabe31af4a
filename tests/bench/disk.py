"""What a disk gives at most, measured between the tokens of a run.

Disks of rented machines change their speed by a factor of two within seconds, so that a ceiling
measured before a run says little about it. Their hosts have caches of their own, so what is read is
what the run itself has to read: records that are not in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from moepack_formats.osio import set_direct
from moepack_formats.pack import Pack
from moepack_runtime.disk.reads_at_once import read_speed


class Disk:
    """Reads random records past the page cache, a few at a time.

    Args:
        pack: A pack that was opened for this: its descriptors are switched to direct reads.
        depth: Reads at a time.
        holds: Whether the record of ``(layer, expert)`` is in memory.
        share: Seconds of reading for each second that passes between two calls of ``turn``.
    """

    def __init__(
        self, pack: Pack, depth: int, holds: Callable[[int, int], bool], share: float = 0.5
    ) -> None:
        self._records = {
            (i, j): at for i, layer in enumerate(pack.layers) for j, at in enumerate(layer)
        }
        for descriptor in {at.descriptor for at in self._records.values()}:
            set_direct(descriptor, True)
        self._holds = holds
        self._depth, self._share = depth, share
        self._last = time.perf_counter()
        self._nbytes, self._seconds = 0.0, 0.0

    def turn(self) -> None:
        """Read for a part of the time since the last call."""
        records = [at for key, at in self._records.items() if not self._holds(*key)]
        begin = time.perf_counter()
        if records:
            seconds = self._share * (begin - self._last)
            speed = read_speed(records, self._depth, seconds)
            took = time.perf_counter() - begin
            self._nbytes += speed * took
            self._seconds += took
        self._last = time.perf_counter()

    @property
    def bytes_per_s(self) -> float:
        """The mean of all turns; 0 before the first."""
        return self._nbytes / self._seconds if self._seconds else 0.0
