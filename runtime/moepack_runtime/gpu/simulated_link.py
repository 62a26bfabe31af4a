"""A device that is not there: host memory, a set speed, and a clock that only waiting moves.

Copies change their target at the moment at which they end, not when they are queued, so that who
reads too early reads old bytes. Reads and copies that touch the same bytes at the same time are an
error: on a real device they would be a race.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .graphs import Run
from .link import Event


class RaceError(AssertionError):
    """Bytes are written while something reads or writes them."""


@dataclass(frozen=True)
class LinkSpec:
    """How fast a simulated device is.

    Attributes:
        bandwidth: Of copies from host memory, bytes a second.
        latency: Of a copy, seconds.
        memory_bandwidth: At which experts are computed: bytes of records a second.
        cpu_bandwidth: At which the CPU computes experts.
        layer_seconds: Everything else in a layer: attention, norms, router.
    """

    bandwidth: float = 16e9
    latency: float = 10e-6
    memory_bandwidth: float = 400e9
    cpu_bandwidth: float = 20e9
    layer_seconds: float = 100e-6


@dataclass(frozen=True)
class _Mark:
    time: float
    start: float | None = None


@dataclass(frozen=True)
class _Span:
    """Bytes of memory from a time to another."""

    first: int
    last: int
    start: float
    end: float

    def meets(self, other: _Span) -> bool:
        """Whether two spans share bytes and time."""
        bytes_too = self.first < other.last and other.first < self.last
        return bytes_too and self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class _Copy:
    span: _Span
    source: Tensor
    target: Tensor


class SimulatedLink:
    """See :class:`moepack_runtime.gpu.link.Link`.

    Args:
        spec: Speeds.
        delay: Seconds by which a copy takes longer, asked for each; for tests.
    """

    def __init__(
        self, spec: LinkSpec | None = None, delay: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.device, self.waits = torch.device("cpu"), 0
        self.spec, self._delay = spec or LinkSpec(), delay
        self._now = self._copies_end = self._computing_ends = 0.0
        self._pending: list[_Copy] = []
        self._reads: list[_Span] = []
        self.copied = 0

    def copy(self, source: Tensor, target: Tensor) -> Event:
        """See :class:`Link`."""
        start = max(self._now, self._copies_end)
        nbytes = target.numel() * target.element_size()
        took = self.spec.latency + nbytes / self.spec.bandwidth + self._delay()
        self._copies_end = start + took
        span = _Span(target.data_ptr(), target.data_ptr() + nbytes, start, self._copies_end)
        for read in self._reads:
            if span.meets(read):
                raise RaceError(f"a copy overwrites what is read until {read.end:.6f} s")
        self._pending.append(_Copy(span, source, target))
        self.copied += nbytes
        return _Mark(self._copies_end, start)

    def compute_after(self, event: Event) -> None:
        """See :class:`Link`."""
        self._computing_ends = max(self._computing_ends, cast(_Mark, event).time)

    def copy_after(self, event: Event) -> None:
        """See :class:`Link`."""
        self._copies_end = max(self._copies_end, cast(_Mark, event).time)

    def computed(self) -> Event:
        """See :class:`Link`."""
        return _Mark(self._computing_ends)

    def reads(self, records: list[Tensor]) -> None:
        """See :class:`Link`; computing takes as long as reading them does."""
        start = max(self._now, self._computing_ends)
        self._land(start)
        end = start + sum(r.numel() for r in records) / self.spec.memory_bandwidth
        for record in records:
            first = record.data_ptr()
            span = _Span(first, first + record.numel(), start, end)
            for copy in self._pending:
                if span.meets(copy.span):
                    raise RaceError(f"read at {start:.6f} s, copied until {copy.span.end:.6f} s")
            self._reads.append(span)
        self._computing_ends = end

    def computing(self, seconds: float) -> None:
        """Something else computes for so long."""
        self._computing_ends = max(self._now, self._computing_ends) + seconds

    def host_worked(self, nbytes: int) -> None:
        """See :class:`Link`."""
        self._reach(self._now + nbytes / self.spec.cpu_bandwidth)

    def done(self, event: Event) -> bool:
        """See :class:`Link`."""
        return cast(_Mark, event).time <= self._now

    def wait(self, event: Event) -> None:
        """See :class:`Link`."""
        if not self.done(event):
            self.waits += 1
            self._reach(cast(_Mark, event).time)

    def seconds(self, event: Event) -> float | None:
        """See :class:`Link`."""
        mark = cast(_Mark, event)
        return None if mark.start is None or not self.done(event) else mark.time - mark.start

    def to_host(self, tensors: list[Tensor]) -> list[Tensor]:
        """See :class:`Link`; a layer's other computation comes before it."""
        self.waits += 1
        self.computing(self.spec.layer_seconds)
        self._reach(self._computing_ends + self.spec.latency)
        return [tensor.clone() for tensor in tensors]

    def to_device(self, tensor: Tensor) -> Tensor:
        """See :class:`Link`."""
        self.computing(self.spec.latency)
        return tensor

    def recorder(self) -> SimulatedRecorder:
        """See :class:`Link`."""
        return SimulatedRecorder()

    def clock(self) -> float:
        """Simulated seconds."""
        return self._now

    def finish(self) -> None:
        """See :class:`Link`."""
        self._reach(max(self._copies_end, self._computing_ends, self._now))

    def _reach(self, time: float) -> None:
        """The host's clock moves on."""
        self._now = max(self._now, time)
        self._land(self._now)
        self._reads = [read for read in self._reads if read.end > self._now]

    def _land(self, time: float) -> None:
        """Copies that have ended by then change their targets."""
        while self._pending and self._pending[0].span.end <= time:
            copy = self._pending.pop(0)
            copy.target.copy_(copy.source)


class SimulatedRecording:
    """See :class:`moepack_runtime.gpu.graphs.Recording`: reads and writes the places it was given.

    Who expects it to follow inputs to other places gets what the old ones hold.
    """

    def __init__(self, run: Run, inputs: Sequence[Any]) -> None:
        self.outputs: Any = None
        self._run, self._inputs = run, inputs

    def replay(self) -> None:
        """See :class:`Recording`."""
        outputs = self._run(*self._inputs)
        if self.outputs is None:
            self.outputs = outputs
            return
        whole = isinstance(outputs, Tensor)
        old, new = ((self.outputs,), (outputs,)) if whole else (self.outputs, outputs)
        for place, value in zip(old, new, strict=True):
            if isinstance(value, Tensor) and value.data_ptr() != place.data_ptr():
                place.copy_(value)


class SimulatedRecorder:
    """See :class:`moepack_runtime.gpu.graphs.Recorder`."""

    def begin(self) -> None:
        """Nothing: memory is not shared."""

    def record(self, run: Run, inputs: Sequence[Any]) -> SimulatedRecording:
        """See :class:`Recorder`."""
        return SimulatedRecording(run, inputs)
