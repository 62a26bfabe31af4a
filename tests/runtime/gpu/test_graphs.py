"""Cutting a traced pass, and recording what lies between the cuts: on memory that does not move."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moepack_runtime.gpu.graphs import MAX_IN_VAIN, CutPass
from moepack_runtime.gpu.simulated_link import SimulatedRecorder


@torch.library.custom_op("moepack_tests::host", mutates_args=())
def host(x: Tensor) -> Tensor:
    return x + 1


@host.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unwilling(SimulatedRecorder):
    """Records nothing."""

    def record(self, run: Callable[..., Any], inputs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], recorder: SimulatedRecorder | None = None
) -> tuple[Callable[..., Any], list[CutPass]]:
    """A function compiled by the backend, and what that has made of it."""
    passes: list[CutPass] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> CutPass:
        cut = torch.ops.moepack_tests.host.default
        passes.append(CutPass(graph, cut, recorder or SimulatedRecorder()))
        return passes[-1]

    with torch.no_grad():
        return torch.compile(function, backend=backend, fullgraph=True), passes


def double_host_triple(x: Tensor) -> Tensor:
    return torch.ops.moepack_tests.host.default(x * 2) * 3


def test_a_pass_is_cut_and_replayed() -> None:
    call, passes = compiled(double_host_triple)
    results = [call(torch.full((2,), float(i))) for i in range(6)]
    (cut,) = passes
    assert len(cut.stretches) == 2
    assert all(stretch.is_recorded for stretch in cut.stretches)
    assert cut.recorded == 1
    # Also those that were given out earlier.
    assert [r.tolist() for r in results] == [[(2 * i + 1) * 3.0] * 2 for i in range(6)]


def test_what_is_written_to_is_no_copy() -> None:
    class Counter(nn.Module):
        """Keeps a sum in a buffer, and one in a tensor that is handed to it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2), requires_grad=False)
            self.register_buffer("total", torch.zeros(2))

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            self.total.add_(x)
            other.add_(torch.ops.moepack_tests.host.default(x))
            return self.total * self.weight + other

    module, other = Counter(), torch.zeros(2)
    call, passes = compiled(module)
    for i in range(1, 6):
        result = call(torch.full((2,), float(i)), other)
    assert module.total.tolist() == [15.0] * 2
    assert other.tolist() == [20.0] * 2
    assert result.tolist() == [35.0] * 2
    assert len(passes[0].moving or ()) == 1
    another = torch.zeros(2)  # as a second text's cache
    for _ in range(3):
        call(torch.ones(2), another)
    assert another.tolist() == [6.0] * 2
    assert other.tolist() == [20.0] * 2
    assert passes[0].recorded == 2


def test_what_cannot_be_recorded_is_done_and_said(caplog: pytest.LogCaptureFixture) -> None:
    call, passes = compiled(double_host_triple, Unwilling())
    with caplog.at_level(logging.WARNING):
        results = [call(torch.full((2,), float(i))).tolist() for i in range(4)]
    assert results == [[(2 * i + 1) * 3.0] * 2 for i in range(4)]
    assert not any(stretch.is_recorded for stretch in passes[0].stretches)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == len(passes[0].stretches)  # not once a token
    assert all("without a CUDA graph: operation not permitted" in line for line in said)
    assert not any("\n" in line for line in said)


def test_a_number_that_changes_stays_out_of_recordings() -> None:
    class Length:
        value = 0

    length = Length()

    def step(x: Tensor) -> Tensor:
        length.value += 1
        return torch.ops.moepack_tests.host.default(x * 2) * 3

    call, passes = compiled(step)
    for i in range(8):
        assert call(torch.full((2,), float(i))).tolist() == [(2 * i + 1) * 3.0] * 2
    assert length.value == 8
    assert len(passes) <= 3  # 0 and 1 are numbers of their own to the compiler
    assert all(stretch.is_recorded for stretch in passes[-1].stretches)


def test_a_number_that_is_computed_with_is_not_baked_in(caplog: pytest.LogCaptureFixture) -> None:
    class Length:
        value = 0

    length = Length()

    def step(x: Tensor) -> Tensor:
        length.value += 1
        return torch.ops.moepack_tests.host.default(x * length.value)

    call, _ = compiled(step)
    with caplog.at_level(logging.WARNING):
        results = [call(torch.ones(2)).tolist() for _ in range(6)]
    assert results == [[i + 1.0] * 2 for i in range(1, 7)]
    assert caplog.text.count("a number that changes from token to token") == 1


def test_numbers_become_tensors_once() -> None:
    """On a GPU each would be a copy from the host, which a recording cannot hold."""

    def step(x: Tensor) -> Tensor:
        index = torch.tensor([-1])
        x[index] = 5.0
        return x + index.add_(1)  # -1 again in the next pass

    call, passes = compiled(step)
    for _ in range(4):
        assert call(torch.ones(2)).tolist() == [1.0, 5.0]
    (stretch,) = passes[0].stretches
    assert stretch.is_recorded
    assert "torch.tensor" not in passes[0].code


def test_recording_stops_where_it_is_in_vain(caplog: pytest.LogCaptureFixture) -> None:
    call, passes = compiled(lambda x, cache: cache.add_(x) * 2)
    caches = [torch.zeros(2) for _ in range(MAX_IN_VAIN + 5)]
    with caplog.at_level(logging.WARNING):
        for cache in caches:
            assert call(torch.ones(2), cache).tolist() == [2.0, 2.0]
    assert all(cache.tolist() == [1.0, 1.0] for cache in caches)
    assert passes[0].recorded == MAX_IN_VAIN + 1
    assert caplog.text.count("never in one place") == 1
