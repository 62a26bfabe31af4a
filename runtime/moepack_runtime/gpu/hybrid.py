"""Which missing experts the CPU computes while the others are copied.

An expert that is not in GPU memory costs either a copy or a pass of the CPU over its record in host
memory. Both speeds are measured as the model runs; each missing expert goes to whichever is done
first, given what the two have to do already.
"""

from __future__ import annotations

from collections.abc import Sequence

_RECENT = 0.1
"""Weight of a new measurement."""


class Costs:
    """Measured costs of a missing expert.

    Args:
        mode: ``off`` copies every expert, ``on`` copies none, ``auto`` does what is faster.
        copy_rate: Bytes a second of the link, as a first estimate.
    """

    def __init__(self, mode: str, copy_rate: float = 16e9) -> None:
        self.mode = mode
        self.copy_rate = copy_rate
        self.cpu_rate: float | None = None

    def copied(self, nbytes: int, seconds: float) -> None:
        """A copy took so long."""
        self.copy_rate = _mixed(self.copy_rate, nbytes / max(seconds, 1e-9))

    def computed(self, nbytes: int, seconds: float) -> None:
        """The CPU took so long for records of so many bytes."""
        rate = nbytes / max(seconds, 1e-9)
        self.cpu_rate = rate if self.cpu_rate is None else _mixed(self.cpu_rate, rate)

    def choose(self, missing: Sequence[tuple[int, int]], backlog: float) -> list[int]:
        """The experts that the CPU should compute.

        Args:
            missing: ``(expert, nbytes)`` of missing experts whose records are in host memory.
            backlog: Seconds of copies that are queued already.
        """
        if self.mode == "off" or not missing:
            return []
        if self.mode == "on":
            return [expert for expert, _ in missing]
        if self.cpu_rate is None:
            return [missing[0][0]]  # to know what it costs
        copies, cpu, chosen = backlog, 0.0, []
        for expert, nbytes in missing:
            if cpu + nbytes / self.cpu_rate < copies + nbytes / self.copy_rate:
                cpu += nbytes / self.cpu_rate
                chosen.append(expert)
            else:
                copies += nbytes / self.copy_rate
        return chosen


def _mixed(old: float, new: float) -> float:
    return (1 - _RECENT) * old + _RECENT * new
