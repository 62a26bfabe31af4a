"""Speed and parity of the Triton kernels.

Every figure cycles over at least ``CYCLED`` bytes of records, so that no cache of the GPU holds
them, and is the time of a CUDA graph, so that launches from Python are not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moepack_formats.record import RecordSpec, plan_record
from moepack_formats.schemes import SCHEMES
from moepack_runtime.kernels.reference import ReferenceEngine
from moepack_runtime.kernels.triton_gpu.engine import TritonEngine
from moepack_runtime.kernels.triton_gpu.experts import ExpertShape, GpuExperts
from moepack_runtime.kernels.triton_gpu.products import linear
from tests.runtime.kernels.matrices import ACTIVATIONS, FakeAdapter, random_record

CYCLED = 1_100_000_000
SILU = ("silu", 1.0, float("inf"), 0.0)
ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: inputs, intermediate size, experts of a token."""

    hidden: int
    intermediate: int
    chosen: int


MIXTRAL = Shape(4096, 14336, 2)


@dataclass(frozen=True)
class Speed:
    """Bytes of records a second, and by what."""

    what: str
    scheme: str
    bytes_per_s: float


@dataclass(frozen=True)
class Parity:
    """The largest difference to the reference over the largest value."""

    scheme: str
    dtype: str
    one_token: float
    many_tokens: float


def finite_bytes(nbytes: int, device: torch.device) -> Tensor:
    """Random bytes in which no float16, bfloat16 or float32 is infinite or not a number."""
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    return data.bitwise_and_(0xBF)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call; a graph's replay on a GPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    run()  # compiles
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(ROUNDS + 1):
        start_event = torch.cuda.Event(enable_timing=True)
        end_event = torch.cuda.Event(enable_timing=True)
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        times.append(start_event.elapsed_time(end_event) / 1000)
    return statistics.median(times[1:])


def expert_speed(scheme: str, shape: Shape, device: torch.device, cycled: int = CYCLED) -> Speed:
    """The experts of one token: gate, up, activation, down and weighted sum."""
    spec = plan_record(shape.hidden, shape.intermediate, scheme, scheme)
    count = max(shape.chosen, -(-cycled // spec.nbytes // shape.chosen) * shape.chosen)
    memory = finite_bytes(count * spec.nbytes, device)
    experts = GpuExperts(ExpertShape(shape.hidden, shape.intermediate, count, True, SILU))
    table = experts.table(list(memory.split(spec.nbytes)), [spec] * count)
    x = torch.randn(shape.hidden, device=device).to(torch.bfloat16)
    weights = torch.rand(shape.chosen, device=device)
    index = torch.arange(count, device=device).view(-1, shape.chosen)

    def run() -> None:
        for chosen in index:
            experts.token(x, chosen, weights, table)

    used = len(index) * shape.chosen * spec.payload_nbytes
    return Speed("experts, one token", scheme, used / seconds_of(run, device))


def linear_speed(
    scheme: str, rows: int, cols: int, device: torch.device, cycled: int = CYCLED
) -> Speed:
    """A packed Linear at one token."""
    packed, shape = SCHEMES[scheme], (rows, cols)
    nbytes = packed.packed_nbytes(*shape)
    count = max(1, -(-cycled // nbytes))
    stride = -(-nbytes // 256) * 256
    memory = finite_bytes(count * stride, device)
    x = torch.randn(1, cols, device=device).to(torch.bfloat16)

    def run() -> None:
        for i in range(count):
            linear(x, memory[i * stride : i * stride + nbytes], packed, shape, None)

    return Speed(f"linear {rows} x {cols}", scheme, count * nbytes / seconds_of(run, device))


def prefill_speed(
    scheme: str, shape: Shape, tokens: int, device: torch.device, experts: int = 8
) -> tuple[float, float]:
    """Tokens a second through one layer's experts, and floating-point operations a second."""
    spec = plan_record(shape.hidden, shape.intermediate, scheme, scheme)
    memory = finite_bytes(experts * spec.nbytes, device)
    layer = GpuExperts(ExpertShape(shape.hidden, shape.intermediate, experts, True, SILU))
    table = layer.table(list(memory.split(spec.nbytes)), [spec] * experts)
    x = torch.randn(tokens, shape.hidden, device=device).to(torch.bfloat16)
    index = torch.rand(tokens, experts, device=device).argsort(1)[:, : shape.chosen].contiguous()
    weights = torch.rand(tokens, shape.chosen, device=device)
    out = torch.zeros(tokens * shape.chosen, shape.hidden, device=device)
    seconds = seconds_of(lambda: layer.many_tokens(x, index, weights, table, out), device)
    operations = 2 * tokens * shape.chosen * 3 * shape.hidden * shape.intermediate
    return tokens / seconds, operations / seconds


def parity(scheme: str, dtype: torch.dtype, device: torch.device, width: int = 512) -> Parity:
    """The kernels against the reference in float32, on inputs of a 16-bit type."""
    spec = plan_record(width, width - 16, scheme, scheme, bias=True)
    adapter: FakeAdapter = FakeAdapter(width, width - 16, ACTIVATIONS["silu"][0])
    records = [random_record(spec, seed) for seed in (0, 1)]
    x = torch.randn(6, width).to(dtype)
    wanted = sum_of_experts(records, spec, adapter, x.float())
    there = [record.to(device) for record in records]
    fused = TritonEngine().fused(adapter)  # type: ignore[arg-type]
    grouped = TritonEngine().grouped(adapter)  # type: ignore[arg-type]
    assert fused is not None
    assert grouped is not None
    ones = torch.ones(2, device=device)
    one = fused(x[0].to(device), there, [spec] * 2, ones).cpu()
    index = torch.arange(2, device=device).expand(6, 2).contiguous()
    out = torch.zeros(12, width, device=device)
    table = grouped.table(there, [spec] * 2)
    grouped.many_tokens(x.to(device), index, torch.ones(6, 2, device=device), table, out)
    many = out.view(6, 2, width).sum(1).cpu()
    name = str(dtype).removeprefix("torch.")
    return Parity(scheme, name, _difference(one, wanted[0]), _difference(many, wanted))


def sum_of_experts(
    records: list[Tensor], spec: RecordSpec, adapter: FakeAdapter, x: Tensor
) -> Tensor:
    """``[T, H]`` float32: every expert on every token, unweighted."""
    total = torch.zeros_like(x)
    for record in records:
        total += ReferenceEngine().expert(record, spec, adapter, x)  # type: ignore[arg-type]
    return total


def _difference(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).abs().max() / wanted.abs().max())
