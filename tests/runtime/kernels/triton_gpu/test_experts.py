"""Triton's expert layers equal one expert after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moepack_formats.record import RecordSpec, plan_record
from moepack_formats.schemes import SCHEMES
from moepack_runtime.kernels.reference import ReferenceEngine
from moepack_runtime.kernels.triton_gpu import matvec, sizes
from moepack_runtime.kernels.triton_gpu.engine import TritonEngine
from moepack_runtime.kernels.triton_gpu.experts import sort_places
from tests.runtime.kernels.matrices import ACTIVATIONS, FakeAdapter, random_record, relative

ENGINE = TritonEngine()
SILU = ACTIVATIONS["silu"][0]


def one_token(device: torch.device, adapter: Any, specs: list[RecordSpec]) -> None:
    """At one token; several experts also in turns, which must give the same bits."""
    records = [random_record(spec, seed) for seed, spec in enumerate(specs)]
    x, weights = torch.randn(adapter.hidden_size), torch.rand(len(specs)) + 0.1
    wanted = torch.zeros_like(x)
    for record, spec, weight in zip(records, specs, weights, strict=True):
        wanted += weight * ReferenceEngine().expert(record, spec, adapter, x.unsqueeze(0))[0]
    fused = ENGINE.fused(adapter)
    assert fused is not None
    there = [record.to(device) for record in records]
    x, weights = x.to(device), weights.to(device)
    got = fused(x, there, specs, weights)
    assert relative(got.cpu(), wanted) < 2e-5
    parts = torch.empty(len(specs), len(x), device=device)
    for k in range(len(specs) if len(specs) > 1 else 0):
        fused(x, there[k : k + 1], specs[k : k + 1], weights[k : k + 1], parts[k : k + 1])
    if len(specs) > 1:
        assert torch.equal(fused.total(parts.unsqueeze(0))[0], got)


def many_tokens(
    device: torch.device, adapter: Any, specs: list[RecordSpec], tokens: int = 5
) -> None:
    """At many tokens; one of the indices is no expert."""
    records = [random_record(spec, seed) for seed, spec in enumerate(specs)]
    index = torch.stack([torch.randperm(len(specs) + 1)[:2] for _ in range(tokens)])
    x, weights = torch.randn(tokens, adapter.hidden_size), torch.rand(tokens, 2)
    wanted = torch.full((tokens * 2, adapter.hidden_size), 7.0)
    for place, expert in enumerate(index.reshape(-1).tolist()):
        if expert < len(specs):
            token = x[place // 2].unsqueeze(0)
            y = ReferenceEngine().expert(records[expert], specs[expert], adapter, token)[0]
            wanted[place] = y * weights.reshape(-1)[place]
    experts = ENGINE.grouped(adapter)
    assert experts is not None
    table = experts.table([record.to(device) for record in records], specs)
    out = torch.full_like(wanted, 7.0, device=device)
    experts.many_tokens(x.to(device), index.to(device), weights.to(device), table, out)
    assert relative(out.cpu(), wanted) < 2e-5


@pytest.mark.parametrize("run", [one_token, many_tokens])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(device: torch.device, name: str, run: Callable[..., None]) -> None:
    run(device, FakeAdapter(80, 24, SILU), [plan_record(80, 24, name, name)])


@pytest.mark.parametrize("run", [one_token, many_tokens])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(device: torch.device, activation: str, run: Callable[..., None]) -> None:
    compute, attributes, _ = ACTIVATIONS[activation]
    adapter = FakeAdapter(64, 24, compute, **attributes)
    run(device, adapter, [plan_record(64, 24, "q4g64", "q8g64", bias=True)])


@pytest.mark.parametrize("run", [one_token, many_tokens])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_gate(device: torch.device, bias: bool, run: Callable[..., None]) -> None:
    adapter = FakeAdapter(40, 72, lambda z, _: F.relu(z).square(), gated=False)
    run(device, adapter, [plan_record(40, 72, "q2g64", "q4g64", gated=False, bias=bias)] * 2)


@pytest.mark.parametrize("run", [one_token, many_tokens])
@pytest.mark.parametrize(("hidden", "intermediate"), [(330, 17), (7, 260), (1, 1)])
def test_odd_sizes(
    device: torch.device, hidden: int, intermediate: int, run: Callable[..., None]
) -> None:
    spec = plan_record(hidden, intermediate, "q2g16s4", "q4g128", bias=True)
    run(device, FakeAdapter(hidden, intermediate, SILU), [spec])


@pytest.mark.parametrize("run", [one_token, many_tokens])
def test_mixed_precision(device: torch.device, run: Callable[..., None]) -> None:
    pairs = [("q4g64", "q4g128"), ("bf16", "q8g64")]
    run(device, FakeAdapter(64, 48, SILU), [plan_record(64, 48, *pair) for pair in pairs])


def test_an_expert_on_more_tokens_than_a_tile(device: torch.device) -> None:
    spec = plan_record(64, 32, "q8g64", "q8g64")
    many_tokens(device, FakeAdapter(64, 32, SILU), [spec], 40)


def test_experts_with_all_of_their_tokens(device: torch.device) -> None:
    adapter: Any = FakeAdapter(48, 40, SILU)
    spec = plan_record(48, 40, "q4g64", "q8g64")
    records, x = [random_record(spec, seed) for seed in (1, 2, 3)], torch.randn(4, 48)
    tokens, places = torch.tensor([3, 0, 3]), torch.tensor([5, 1, 2])
    weights, sizes = torch.tensor([0.5, 2.0, -1.0]), [2, 0, 1]
    wanted = torch.zeros(6, 48)
    for record, here in ((records[0], slice(0, 2)), (records[2], slice(2, 3))):
        y = ReferenceEngine().expert(record, spec, adapter, x[tokens[here]])
        wanted[places[here]] = y * weights[here].unsqueeze(1)
    outputs, fused = torch.zeros(6, 48, device=device), ENGINE.fused(adapter)
    assert fused is not None
    assert fused.takes(2)
    numbers = tokens.to(device), places.to(device), weights.to(device)
    there = [record.to(device) for record in records]
    fused.tokens(x.to(device), there, [spec] * 3, sizes, *numbers, outputs)
    assert relative(outputs.cpu(), wanted) < 2e-5
    total = fused.total(outputs.view(3, 2, 48)).cpu()
    torch.testing.assert_close(total, wanted.view(3, 2, 48).sum(1), rtol=1e-4, atol=1e-4)


def test_the_general_path(device: torch.device) -> None:
    """An activation that the kernels lack, and a norm after down."""
    adapter: Any = FakeAdapter(48, 40, lambda gate, up: gate * gate * up)
    adapter.finish = lambda y: F.rms_norm(y, y.shape[-1:])
    assert ENGINE.fused(adapter) is None
    spec = plan_record(48, 40, "q4g64", "bf16", bias=True)
    record, x = random_record(spec, 1), torch.randn(3, 48)
    wanted = ReferenceEngine().expert(record, spec, adapter, x)
    got = ENGINE.expert(record.to(device), spec, adapter, x.to(device))
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)


def test_experts_in_turns_give_the_same_bits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tokens: an expert's tiles do not depend on which others are there with it."""
    asked: list[float] = []
    rows_tile = sizes.rows_tile
    monkeypatch.setattr(sizes, "rows_tile", lambda n, d: asked.append(n) or rows_tile(n, d))
    adapter: Any = FakeAdapter(64, 48, SILU)
    adapter.num_experts = 3
    spec = plan_record(64, 48, "q4g64", "q4g64")
    records = [random_record(spec, seed).to(device) for seed in range(3)]
    index = torch.stack([torch.randperm(3)[:2] for _ in range(30)]).to(device)
    # The interpreter multiplies no bfloat16; on GPUs tiles of float32 are all of one size.
    x, weights = torch.randn(30, 64).to(device, torch.float16), torch.rand(30, 2, device=device)
    experts = ENGINE.grouped(adapter)
    assert experts is not None
    whole = torch.zeros(60, 64, device=device)
    experts.many_tokens(x, index, weights, experts.table(records, [spec] * 3), whole)
    parts = torch.zeros_like(whole)
    for expert, record in enumerate(records):
        local = torch.where(index == expert, 0, 1)
        experts.many_tokens(x, local, weights, experts.table([record], [spec]), parts)
    assert torch.equal(parts, whole)
    assert set(asked) == {20.0}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
def test_nothing_is_compiled_once_a_layer_has_begun() -> None:
    """Whatever turns come: how many records, and where lists of them start, differs."""
    device, adapter = torch.device("cuda"), FakeAdapter(64, 48, SILU)
    specs = [plan_record(64, 48, name, name) for name in ("q4g64", "q2g16s4", "q4g64")]
    records = [random_record(spec, seed).to(device) for seed, spec in enumerate(specs)]
    experts, fused = ENGINE.grouped(adapter), ENGINE.fused(adapter)  # type: ignore[arg-type]
    assert experts is not None
    assert fused is not None
    experts.warm_up(specs, device)
    kernels = matvec.experts_up, matvec.experts_down, matvec.combine
    before = [sum(len(it[0]) for it in kernel.device_caches.values()) for kernel in kernels]
    x, weights, out = torch.randn(64, device=device), torch.rand(3, device=device), None
    for here in ([0], [1], [2], [0, 1], [1, 2], [0, 1, 2]):
        out = torch.empty(3, 64, device=device)
        for outputs in (None, out[: len(here)], out[3 - len(here) :]):
            part = weights[here[0] : here[-1] + 1]
            fused(x, [records[k] for k in here], [specs[k] for k in here], part, outputs)
        fused.total(out.unsqueeze(0))
    after = [sum(len(it[0]) for it in kernel.device_caches.values()) for kernel in kernels]
    assert after == before


def sorted_places(index: Tensor, experts: int, rows: int) -> dict[int, list[int]]:
    """The places of each expert, as the tiles name them."""
    order, tiles = sort_places(index, experts, rows)
    found: dict[int, list[int]] = {}
    for expert, first, last in zip(
        tiles.expert.tolist(), tiles.first.tolist(), tiles.last.tolist(), strict=True
    ):
        if expert < experts:
            assert first < last <= first + rows
            found.setdefault(expert, []).extend(order[first:last].tolist())
    return found


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("experts", [1, 5, 64])
def test_every_place_is_in_one_tile_of_its_expert(
    device: torch.device, tokens: int, experts: int
) -> None:
    index = torch.randint(-1, experts + 2, (tokens, 3), device=device)
    wanted: dict[int, list[int]] = {}
    for place, expert in enumerate(index.reshape(-1).tolist()):
        if 0 <= expert < experts:
            wanted.setdefault(expert, []).append(place)
    assert sorted_places(index, experts, 16) == wanted
