"""The one-call layer equals one expert after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moepack_formats.record import RecordSpec, plan_record
from moepack_formats.schemes import SCHEMES
from moepack_runtime.kernels.activation import recognize
from moepack_runtime.kernels.native_engine import SMALL_TOKENS, NativeEngine
from moepack_runtime.kernels.reference import ReferenceEngine
from tests.runtime.kernels.matrices import ACTIVATIONS, FakeAdapter, random_record, relative

EXACT, FAST = NativeEngine(int8=False), NativeEngine(int8=True)


def layer(*specs: RecordSpec) -> tuple[list[Tensor], list[RecordSpec], Tensor]:
    """Records, their layouts and the router's weights."""
    records = [random_record(spec, seed) for seed, spec in enumerate(specs)]
    weights = torch.rand(len(specs), generator=torch.Generator().manual_seed(9)) + 0.1
    return records, list(specs), weights


def reference_layer(
    adapter: Any, x: Tensor, records: list[Tensor], specs: list[RecordSpec], weights: Tensor
) -> Tensor:
    outputs = [
        ReferenceEngine().expert(record, spec, adapter, x.unsqueeze(0))[0] * weight
        for record, spec, weight in zip(records, specs, weights, strict=True)
    ]
    return torch.stack(outputs).sum(0)


def check(adapter: Any, *specs: RecordSpec, exact: float = 1e-5, fast: float = 2e-2) -> None:
    # Many tokens may sum in another order; a last bit can then move an intermediate's code by one,
    # 1/127 of the largest near it. Linears, where nothing is rounded after, are held to 1e-5.
    x = torch.randn(adapter.hidden_size, generator=torch.Generator().manual_seed(5))
    arguments = layer(*specs)
    wanted = reference_layer(adapter, x, *arguments)
    for engine, bound in ((EXACT, exact), (FAST, fast)):
        fused = engine.fused(adapter)
        assert fused is not None
        got = fused(x, *arguments)
        assert relative(got, wanted) < bound
        # In parts, as records that arrive one by one are computed.
        parts = torch.empty(len(specs), adapter.hidden_size)
        records, layouts, weights = arguments
        for k in range(len(specs)):
            fused(x, records[k : k + 1], layouts[k : k + 1], weights[k : k + 1], parts[k : k + 1])
        assert torch.equal(fused.total(parts.unsqueeze(0))[0], got)
        check_tokens(fused, adapter, *arguments, bound=1e-5 if engine is EXACT else 1e-2)


def check_tokens(
    fused: Any,
    adapter: Any,
    records: list[Tensor],
    specs: list[RecordSpec],
    weights: Tensor,
    bound: float,
) -> None:
    """Many tokens through some experts are as each of them alone; other rows are not touched."""
    x = torch.randn(11, adapter.hidden_size, generator=torch.Generator().manual_seed(6))
    sizes = [7, *[0] * (len(specs) - 2), 2]
    tokens, places = torch.tensor([10, 3, 3, 0, 7, 5, 1, 9, 2]), torch.arange(20, 2, -2)
    outputs = torch.full((22, adapter.hidden_size), 7.0)
    scale = torch.rand(9, generator=torch.Generator().manual_seed(7))
    fused.tokens(x, records, specs, sizes, tokens, places, scale, outputs)
    untouched = [row for row in range(22) if row not in places]
    assert torch.equal(outputs[untouched], torch.full((len(untouched), x.shape[1]), 7.0))
    experts = [number for number, size in enumerate(sizes) for _ in range(size)]
    for e, token, place, weight in zip(experts, tokens, places, scale, strict=True):
        alone = fused(x[token], records[e : e + 1], specs[e : e + 1], weight.view(1))
        assert relative(outputs[place], alone) < bound


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(isa: str, name: str) -> None:
    adapter = FakeAdapter(256, 96, ACTIVATIONS["silu"][0])
    check(adapter, *[plan_record(256, 96, name, name)] * 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(isa: str, activation: str, bias: bool) -> None:
    compute, attributes, wanted = ACTIVATIONS[activation]
    adapter = FakeAdapter(128, 80, compute, **attributes)
    assert recognize(adapter) == wanted  # type: ignore[arg-type]
    check(adapter, *[plan_record(128, 80, "q4g64", "q4g64", bias=bias)] * 2)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_gate(isa: str, activation: str, bias: bool) -> None:
    act = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda z: F.relu(z).square()}[activation]
    adapter = FakeAdapter(100, 72, lambda z, _: act(z), gated=False)
    spec = plan_record(100, 72, "q3g32s4", "q4g64", gated=False, bias=bias)
    check(adapter, *[spec] * 3)


@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(2880, 48), (48, 2880), (65, 17), (16, 1), (1, 16)]
)
def test_odd_sizes(isa: str, hidden: int, intermediate: int) -> None:
    adapter = FakeAdapter(hidden, intermediate, ACTIVATIONS["silu"][0])
    check(adapter, *[plan_record(hidden, intermediate, "q2g16s4", "q3g32s4", bias=True)] * 2)


def test_mixed_precision(isa: str) -> None:
    adapter = FakeAdapter(192, 128, ACTIVATIONS["silu"][0])
    pairs = [("q2g16s4", "q3g32s4"), ("q4g64", "q8g64"), ("bf16", "q2g64"), ("q4g128", "f16")]
    check(adapter, *(plan_record(192, 128, *pair) for pair in pairs))


def test_threads_change_no_bit(isa: str) -> None:
    adapter = FakeAdapter(640, 512, ACTIVATIONS["silu"][0])
    arguments = layer(*[plan_record(640, 512, "q3g32s4", "q3g32s4")] * 5)
    x, results = torch.randn(640), []
    for threads in (1, 2, 3):
        fused = NativeEngine(int8=True, threads=threads).fused(adapter)  # type: ignore[arg-type]
        assert fused is not None
        results.append(fused(x, *arguments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("tokens", [1, 2, 5, SMALL_TOKENS, SMALL_TOKENS + 1, 40])
@pytest.mark.parametrize("intermediate", [96, 40])
def test_an_expert_on_several_tokens(isa: str, tokens: int, intermediate: int) -> None:
    adapter: Any = FakeAdapter(128, intermediate, ACTIVATIONS["silu"][0])
    spec = plan_record(128, intermediate, "q3g32s4", "q4g64", bias=True)
    record, x = random_record(spec, 3), torch.randn(tokens, 128)
    wanted = ReferenceEngine().expert(record, spec, adapter, x)
    torch.testing.assert_close(EXACT.expert(record, spec, adapter, x), wanted, rtol=0, atol=1e-5)
    assert relative(FAST.expert(record, spec, adapter, x), wanted) < 2e-2


def test_what_the_kernels_lack_takes_the_general_path() -> None:
    square = FakeAdapter(64, 32, lambda gate, up: gate * gate * up)
    assert recognize(square) is None  # type: ignore[arg-type]
    normed: Any = FakeAdapter(64, 32, ACTIVATIONS["silu"][0])
    normed.finish = lambda y: F.rms_norm(y, y.shape[-1:])
    assert recognize(normed) is None
