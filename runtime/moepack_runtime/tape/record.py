"""Recording: every operation of one pass, with the memory it read and wrote.

A pass is recorded twice, with other inputs at another position. What differs between the two, such
as a mask that grows or a number that was computed in Python, would be wrong in every later pass, so
the model is then not played (:func:`differences`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from ..experts_compute import ExpertsCompute


class CannotRecord(Exception):
    """The pass does something that a recording cannot hold."""


@dataclass(frozen=True)
class Opaque:
    """An operation of our own, recorded as one step.

    Attributes:
        kind: ``packed``, ``embed``, ``append``, ``attend``, ``experts``, ``demand``, ``contract``.
        subject: The module, cache layer or compute object it belongs to.
        numbers: What else defines it.
    """

    kind: str
    subject: Any
    numbers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        operation: What ran.
        arguments: Its positional arguments.
        keywords: Its keyword arguments.
        results: The tensors it gave back.
    """

    operation: torch._ops.OpOverload | Opaque
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[Tensor, ...]


def tensors_read(step: Step) -> list[Tensor]:
    """The tensors among a step's arguments."""
    return [*tensors_in(step.arguments), *tensors_in(step.keywords)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an operation's arguments or results, in order.

    These are nested tuples, lists and dicts only. Torch's pytree knows far more and takes longer,
    and this runs for every operation of a pass.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    found: list[Tensor] = []
    for part in value:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (tuple, list, dict)):
            found += tensors_in(part)
    return found


def storage(tensor: Tensor) -> int:
    """Address of the memory that a tensor and its views share."""
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Records what runs inside ``with``; results stay in memory at their addresses.

    Attributes:
        steps: What ran, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self._paused = False

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._paused and func is torch.ops.aten._local_scalar_dense.default:
            raise CannotRecord("the model reads a number out of a tensor")
        result = func(*args, **kwargs)
        if not self._paused:
            self.steps.append(Step(func, args, kwargs, tuple(tensors_in(result))))
        return result

    def unrecorded(self, run: Callable[[], Any]) -> Any:
        """Run something that leaves no steps."""
        before, self._paused = self._paused, True
        try:
            return run()
        finally:
            self._paused = before

    def opaque(self, what: Opaque, inputs: tuple[Tensor, ...], run: Callable[[], Tensor]) -> Tensor:
        """Run something and record it as one step, whatever operations it consists of."""
        if self._paused:
            return run()
        result: Tensor = self.unrecorded(run)
        self.steps.append(Step(what, inputs, {}, (result,)))
        return result


@contextmanager
def recording(
    recorder: Recorder,
    modules: dict[nn.Module, str],
    computes: Sequence[ExpertsCompute],
    before_experts: Callable[[int], None],
) -> Iterator[None]:
    """Record, with some modules and all experts as opaque steps.

    Args:
        recorder: Takes the steps.
        modules: The modules that are one step each, and its kind.
        computes: What computes the experts.
        before_experts: Is told the layer whose experts come next; what it does is recorded too.
    """

    def watch_experts(layer: int, compute: ExpertsCompute) -> None:
        def run(*inputs: Tensor) -> Tensor:
            before_experts(layer)
            what = Opaque("experts", compute)
            return recorder.opaque(what, inputs, lambda: compute.compute(*inputs))

        compute.stand_in = run

    def watch(module: nn.Module, kind: str) -> None:
        forward = module.forward

        def run(*inputs: Tensor, **keywords: Any) -> Any:
            if keywords:
                raise CannotRecord(f"{type(module).__name__} is called with keywords")
            return recorder.opaque(Opaque(kind, module), inputs, lambda: forward(*inputs))

        module.forward = run

    hidden = {module: vars(module).get("forward") for module in modules}
    try:
        for module, kind in modules.items():
            watch(module, kind)
        for layer, compute in enumerate(computes):
            watch_experts(layer, compute)
        with recorder, torch.no_grad():
            yield
    finally:
        for compute in computes:
            compute.stand_in = None
        for module, forward in hidden.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


_SHIFTS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


def reading_position(
    passes: tuple[list[Step], list[Step]], start: int, position: Tensor
) -> tuple[list[Step], list[Step]]:
    """Two recordings, in which numbers that are the position are read from a tensor.

    Models ask the cache how long it is and add that in Python, so that it looks like a constant.

    Args:
        passes: The recordings of two tokens in a row; what differs in more is left as it is.
        start: The position of the first token.
        position: ``[1, 1]`` int64, which holds the position whenever a recording is played.
    """
    found: tuple[list[Step], list[Step]] = ([], [])
    for pair in itertools.zip_longest(*passes):
        shifted = all(
            step is not None
            and step.operation in _SHIFTS
            and type(step.arguments[1]) is int
            and step.arguments[1] == start + number
            for number, step in enumerate(pair)
        )
        for steps, step in zip(found, pair, strict=True):
            if shifted:
                step = replace(step, arguments=(step.arguments[0], position.view(())))
            if step is not None:
                steps.append(step)
    return found


def differences(first: list[Step], second: list[Step]) -> str | None:
    """What keeps two recordings from being the same steps on other values, or None."""
    if len(first) != len(second):
        return f"one pass has {len(first)} operations, the next {len(second)}"
    places: tuple[dict[int, int], dict[int, int]] = ({}, {})  # storage -> step that made it
    for number, steps in enumerate(zip(first, second, strict=True)):
        a, b = steps
        if a.operation != b.operation:
            return f"operation {number} is {_name(a)} in one pass, {_name(b)} in the next"
        forms = [_form(step, place) for step, place in zip(steps, places, strict=True)]
        if forms[0] != forms[1]:
            return f"{_name(a)} gets other arguments from pass to pass"
        for step, place in zip(steps, places, strict=True):
            for result in step.results:
                place.setdefault(storage(result), number)
    return None


def _name(step: Step) -> str:
    return step.operation.kind if isinstance(step.operation, Opaque) else str(step.operation)


def _form(step: Step, made: dict[int, int]) -> list[Any]:
    """The arguments without addresses that a pass chose for itself."""
    if step.operation is torch.ops.aten.lift_fresh.default:  # torch.tensor(...): made in Python
        return [step.arguments[0].dtype, step.arguments[0].tolist()]
    grows = isinstance(step.operation, Opaque) and step.operation.kind == "attend"
    # The cache's keys and values, of which there are more in every pass.
    arguments = step.arguments[:1] if grows else step.arguments
    return [_without_addresses(arguments, made), _without_addresses(step.keywords, made)]


def _without_addresses(value: Any, made: dict[int, int]) -> Any:
    """An argument of an operation, nested as it was; of tensors, where they come from."""
    if isinstance(value, Tensor):
        address = storage(value)
        origin = ("step", made[address]) if address in made else ("outside", address)
        return (origin, value.storage_offset(), tuple(value.shape), value.stride())
    if isinstance(value, (tuple, list)):
        return (type(value), *[_without_addresses(part, made) for part in value])
    if isinstance(value, dict):
        return {key: _without_addresses(part, made) for key, part in value.items()}
    return value
