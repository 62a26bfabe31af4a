"""CUDA graphs of the stretches of a compiled pass that need nothing of the host.

A backend of torch.compile. What the compiler has traced is cut at the experts for which the host
has to bring records. Each stretch between them runs as it is the first time, is recorded the second
time, and from then on is replayed: one launch for all of its kernels. They are the kernels that run
without compiling, in the same order, so no bit of a result changes.

A recording reads and writes fixed addresses. Parameters and static caches have them; other inputs
of a pass, and what experts give out, are copied to buffers that stay. Whether addresses are still
those of the recordings is looked at before each pass; where not, as with the cache of another text,
all are recorded anew: they share memory on the ground that they run in the order in which they were
recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

_log = logging.getLogger(__name__)

Run = Callable[..., Any]

MAX_IN_VAIN = 8
"""After so many recordings in a row that were used once, a pass is not recorded any more."""


class Recording(Protocol):
    """Kernels that were queued once.

    Attributes:
        outputs: What they write, a tensor or a tuple with tensors, always in the same place; there
            after the first replay.
    """

    outputs: Any

    def replay(self) -> None:
        """Queue them again."""


class Recorder(Protocol):
    """A device that can record what is queued."""

    def begin(self) -> None:
        """The recordings that follow share memory: they are replayed in their order."""

    def record(self, run: Run, inputs: Sequence[Any]) -> Recording:
        """What ``run(*inputs)`` queues: it is not done, nor anything of it.

        Raises:
            RuntimeError: It cannot be recorded.
        """


class Kept:
    """Buffers that take what comes from changing addresses."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def keep(self, number: int, value: Any) -> Any:
        """A tensor in the buffer of its number; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(number)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._buffers[number] = torch.empty_like(value)
        return buffer.copy_(value)


class HostPart:
    """A part of a pass that is done anew every time, by a host that knows what.

    Args:
        run: Does it.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._kept = run, Kept()

    def __call__(self, *inputs: Any) -> Any:
        """What it computes, always in the same place."""
        outputs = self._run(*inputs)
        if not isinstance(outputs, (tuple, list)):
            return self._kept.keep(0, outputs)
        return tuple(self._kept.keep(i, value) for i, value in enumerate(outputs))


class Stretch:
    """A part of a pass that needs nothing of the host.

    Args:
        run: Does it.
        recorder: Records it.
    """

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self._run, self._recorder = run, recorder
        self._recording: Recording | None = None
        self._numbers: list[Any] = []
        self._unrecorded: HostPart | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether it is replayed."""
        return self._recording is not None

    def forget(self) -> None:
        """Let go of the recording."""
        self._recording = None

    def __call__(self, *inputs: Any) -> Any:
        """What it computes, always in the same place. Tensors come from where they always do."""
        if self._unrecorded is None:
            self._find_recording(inputs)
        if self._recording is None:
            assert self._unrecorded is not None  # one of the two was made
            return self._unrecorded(*inputs)
        self._recording.replay()
        return self._recording.outputs

    def _find_recording(self, inputs: Sequence[Any]) -> None:
        numbers = [x for x in inputs if not isinstance(x, Tensor)]
        try:
            if self._recording is None:
                self._numbers = numbers
                self._recording = self._recorder.record(self._run, inputs)
            elif numbers != self._numbers:
                raise RuntimeError("it depends on a number that changes from token to token")
        except RuntimeError as error:  # nothing of it has been done
            why = str(error).partition("\n")[0]
            _log.warning("a part of the model is decoded without a CUDA graph: %s", why)
            self._unrecorded, self._recording = HostPart(self._run), None


class CutPass:
    """A traced pass, cut at the host's parts.

    Args:
        graph: What the compiler has traced.
        host: The operator at which the host takes part.
        recorder: Records the stretches between.

    Attributes:
        stretches: They, in order.
        recorded: How often they were recorded.
        moving: Numbers of the inputs that are copied to buffers.
    """

    def __init__(self, graph: fx.GraphModule, host: object, recorder: Recorder) -> None:
        self._whole, self._recorder, self._kept = graph, recorder, Kept()
        self._parts, names = _cut(graph, host)
        self.stretches: list[Stretch] = []
        for name, part in list(self._parts.named_children()):
            call: Any = HostPart(part.forward)
            if name not in names:
                call = Stretch(part.forward, recorder)
                self.stretches.append(call)
            delattr(self._parts, name)
            setattr(self._parts, name, call)  # a plain attribute now: it is no module
        self.moving: set[int] | None = None
        self._places: list[int] = []
        self.recorded = self._in_vain = 0

    def __call__(self, *inputs: Any) -> Any:
        """Run the pass. What it gives out is the caller's to keep."""
        if self.moving is None:
            return self._first(inputs)
        if self._in_vain > MAX_IN_VAIN:
            return self._unrecorded(inputs)
        placed = [self._kept.keep(i, x) if i in self.moving else x for i, x in enumerate(inputs)]
        places = [x.data_ptr() for x in placed if isinstance(x, Tensor)]
        if places != self._places:
            for stretch in self.stretches:
                stretch.forget()
            self._recorder.begin()
            self._places, self.recorded = places, self.recorded + 1
            self._in_vain += 1
            if self._in_vain > MAX_IN_VAIN:
                _log.warning("decoding goes without CUDA graphs: its inputs are never in one place")
                return self._unrecorded(inputs)
        else:
            self._in_vain = 0
        outputs = self._parts(*placed)
        given = {id(x) for x in inputs}
        # The next pass overwrites what is no input.
        return tuple(x.clone() if _is_new(x, given) else x for x in outputs)

    def _first(self, inputs: Sequence[Any]) -> Any:
        """Nothing is recorded: kernels are compiled, and it shows which inputs are written to.

        These must not be copies. Inference tensors do not tell, and are taken for such.
        """
        before = [_version(x) for x in inputs]
        outputs = self._unrecorded(inputs)
        after = [_version(x) for x in inputs]
        self.moving = {
            i
            for i, x in enumerate(inputs)
            if before[i] is not None and before[i] == after[i] and not _stays(x)
        }
        return outputs

    @property
    def code(self) -> str:
        """All of it as Python, to look at."""
        return self._whole.code

    def _unrecorded(self, inputs: Sequence[Any]) -> Any:
        return self._whole(*inputs)


def _version(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version


def _stays(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or marked as what stays: buffers and static caches are."""
    return isinstance(tensor, nn.Parameter) or hasattr(tensor, "_dynamo_static_input_type")


def _is_new(value: Any, given: set[int]) -> bool:
    return isinstance(value, Tensor) and id(value) not in given


def _cut(graph: fx.GraphModule, host: object) -> tuple[fx.GraphModule, set[str]]:
    """A module of parts that are called one after the other, and the names of the host's."""
    _make_constants(graph)
    number, part_of, host_parts = 1, {}, set()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        value = node.meta.get("example_value")
        if node.target is host:
            part_of[node] = number + 1
            host_parts.add(f"submod_{number + 1}")
            number += 2
        elif isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            # Lengths that the host counts would change a recording for every token.
            part_of[node] = 0
            host_parts.add("submod_0")
        else:
            part_of[node] = number
    parts = split_module(graph, graph, part_of.__getitem__, keep_original_order=True)
    return parts, host_parts


def _make_constants(graph: fx.GraphModule) -> None:
    """Make tensors of given numbers once: a copy from the host's memory cannot be recorded."""
    made = [n for n in graph.graph.nodes if n.target is torch.tensor and not n.all_input_nodes]
    for number, node in enumerate(made):
        graph.register_buffer(f"_constant_{number}", torch.tensor(*node.args, **node.kwargs))
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(f"_constant_{number}")
        # Each use has a copy of its own, as the original could be written to.
        with graph.graph.inserting_after(constant):
            copy = graph.graph.call_method("clone", (constant,))
        node.replace_all_uses_with(copy)
        graph.graph.erase_node(node)
    graph.recompile()
