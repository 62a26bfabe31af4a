"""What the GPU tier needs of a GPU: two streams and events between them.

Copies from host memory run one after the other on the *copy stream*; everything that computes runs
on the *compute stream*. The host queues work on both and goes on. An event marks a place in one of
them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .graphs import Recorder


class Event(Protocol):
    """A place in a stream; only the link that made it can say more."""


class Link(Protocol):
    """A device, and the way to it.

    Attributes:
        device: Where slots are and kernels run.
        waits: How often the host has waited.
    """

    device: torch.device
    waits: int

    def copy(self, source: Tensor, target: Tensor) -> Event:
        """Queue a copy from host memory; the event comes after it.

        ``source`` must stay as it is until then.
        """

    def compute_after(self, event: Event) -> None:
        """What computes from now on waits for a copy. The host does not wait."""

    def copy_after(self, event: Event) -> None:
        """Copies queued from now on wait for a computation. The host does not wait."""

    def computed(self) -> Event:
        """An event after everything that computes so far."""

    def reads(self, records: list[Tensor]) -> None:
        """What is queued next reads these records in device memory."""

    def done(self, event: Event) -> bool:
        """Whether an event has come; nobody waits."""

    def wait(self, event: Event) -> None:
        """The host waits for an event."""

    def seconds(self, event: Event) -> float | None:
        """How long a copy took, once it is done; None before, or when it is not known."""

    def to_host(self, tensors: list[Tensor]) -> list[Tensor]:
        """Small tensors in host memory: one wait for all of them."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """A small tensor on the device, in the order of the compute stream."""

    def host_worked(self, nbytes: int) -> None:
        """The host has computed with records of so many bytes."""

    def recorder(self) -> Recorder:
        """Records what computes, to be queued again at once."""

    def clock(self) -> float:
        """Seconds, from any start."""

    def finish(self) -> None:
        """The host waits for everything."""
