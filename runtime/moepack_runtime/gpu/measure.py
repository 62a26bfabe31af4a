"""The speeds of a GPU that others are compared with."""

from __future__ import annotations

import statistics

import torch

from .link import Link
from .simulated_link import SimulatedLink

_PIECE, _ROUNDS = 256 << 20, 5


def pinned_copy_peak(link: Link) -> float:
    """Bytes a second of large copies from pinned memory; the set speed of a simulated link."""
    if isinstance(link, SimulatedLink):
        return link.spec.bandwidth
    source = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_PIECE, dtype=torch.uint8, device=link.device)
    rates = []
    for _ in range(_ROUNDS):
        event = link.copy(source, target)
        link.finish()
        rates.append(_PIECE / (link.seconds(event) or float("inf")))
    return max(rates)


def device_copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy within GPU memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_ROUNDS + 1):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * nbytes / float(statistics.median(seconds[1:]))
