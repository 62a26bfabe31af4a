"""What every residency on a device has in common."""

from __future__ import annotations

from collections.abc import Sequence


class DeviceResidency:
    """What of :class:`~moepack_runtime.cache.residency.Residency` only host memory needs."""

    lookahead = 1

    def demand(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing: a layer's copies are queued when it fetches."""

    def make_room(self, nbytes: int) -> None:
        """Nothing: work on a device takes no host memory."""

    def check_used(self, layer: int) -> None:
        """Nothing: what is on the device was checked on its way there."""
