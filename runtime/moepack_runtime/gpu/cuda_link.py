"""A CUDA device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .graphs import Run
from .link import Event


@dataclass(frozen=True)
class _CudaEvent:
    end: torch.cuda.Event
    start: torch.cuda.Event | None = None


class CudaRecording:
    """A CUDA graph, see :class:`moepack_runtime.gpu.graphs.Recording`."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self.outputs, self._graph = outputs, graph

    def replay(self) -> None:
        """See :class:`Recording`."""
        self._graph.replay()


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Captures that failed. torch's allocator of pinned memory may hold on to a callback into them."""


class CudaRecorder:
    """Captures CUDA graphs, see :class:`moepack_runtime.gpu.graphs.Recorder`.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self.begin()

    def begin(self) -> None:
        """See :class:`Recorder`."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run, inputs: Sequence[Any]) -> CudaRecording:
        """See :class:`Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(): it collects garbage and empties torch's cache each time.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            try:
                # Other threads may allocate while this one captures.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                outputs = run(*inputs)
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return CudaRecording(graph, outputs)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed; its error is what the caller is told, not those from here.

        Up to torch 2.11 ``capture_end`` leaves much as it is where the driver refuses the capture:
        the allocator goes on as if it was under way (pytorch/pytorch#180395), and random numbers
        can no longer be drawn.
        """
        _abandoned.append(graph)
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):  # where torch has done it
            cast(Any, torch._C)._cuda_endAllocateToPool(index, self._pool)
        self.begin()  # nothing else goes to a pool of which more may be amiss
        with contextlib.suppress(RuntimeError):
            generator: Any = torch.cuda.default_generators[index]
            fresh: Any = torch.Generator(self._device)
            fresh.set_state(generator.get_state())
            generator.graphsafe_set_state(fresh.graphsafe_get_state())


class CudaLink:
    """Two streams of a GPU, see :class:`moepack_runtime.gpu.link.Link`.

    The compute stream is whatever stream is current where computation is queued.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, 0
        self._copies = torch.cuda.Stream(device)

    def copy(self, source: Tensor, target: Tensor) -> Event:
        """See :class:`Link`."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._copies):
            start.record(self._copies)
            # Asynchronous from pinned memory; otherwise the driver stages it, and the call waits.
            target.copy_(source, non_blocking=True)
            end.record(self._copies)
        return _CudaEvent(end, start)

    def compute_after(self, event: Event) -> None:
        """See :class:`Link`."""
        torch.cuda.current_stream(self.device).wait_event(cast(_CudaEvent, event).end)

    def copy_after(self, event: Event) -> None:
        """See :class:`Link`."""
        self._copies.wait_event(cast(_CudaEvent, event).end)

    def computed(self) -> Event:
        """See :class:`Link`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _CudaEvent(event)

    def reads(self, records: list[Tensor]) -> None:
        """Nothing: the stream's order does it."""

    def done(self, event: Event) -> bool:
        """See :class:`Link`."""
        return bool(cast(_CudaEvent, event).end.query())

    def wait(self, event: Event) -> None:
        """See :class:`Link`."""
        if not self.done(event):
            self.waits += 1
            cast(_CudaEvent, event).end.synchronize()

    def seconds(self, event: Event) -> float | None:
        """See :class:`Link`."""
        marks = cast(_CudaEvent, event)
        if marks.start is None or not marks.end.query():
            return None
        return float(marks.start.elapsed_time(marks.end)) / 1000

    def to_host(self, tensors: list[Tensor]) -> list[Tensor]:
        """See :class:`Link`."""
        out = []
        for tensor in tensors:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            out.append(pinned.copy_(tensor, non_blocking=True))
        event = self.computed()
        self.waits += 1
        cast(_CudaEvent, event).end.synchronize()
        return out

    def to_device(self, tensor: Tensor) -> Tensor:
        """See :class:`Link`."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # torch's allocator gives pinned memory out again only after what uses it.
        return pinned.copy_(tensor).to(self.device, non_blocking=True)

    def host_worked(self, nbytes: int) -> None:
        """Nothing: the clock has seen it."""

    def recorder(self) -> CudaRecorder:
        """See :class:`Link`."""
        return CudaRecorder(self.device)

    def clock(self) -> float:
        """Wall time."""
        return time.perf_counter()

    def finish(self) -> None:
        """See :class:`Link`."""
        torch.cuda.synchronize(self.device)
