"""The experts adapters: the same logits as stock transformers, for every family."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.mapping import WeightMapping, build_meta_model
from moepack_formats.errors import UsageError
from moepack_runtime.experts import (
    IMPLEMENTATION,
    ExpertsAdapter,
    find_experts,
    is_decorated,
    register_experts_function,
    undecorated_families,
)
from tests import families


@pytest.mark.parametrize("family", families.FAMILIES)
def test_installed_compute_gives_the_stock_logits(family: str, tmp_path: Path) -> None:
    model = families.random_model(family)
    ids = families.tokens()
    families.save_checkpoint(model, tmp_path)
    # In float64 what is left of a difference is not the order of sums, which memory decides.
    model.double()
    wanted = families.logits(model, ids)
    stock = {k: v.clone() for k, v in model.state_dict().items()}

    checkpoint = open_checkpoint(str(tmp_path))
    mapping = WeightMapping(build_meta_model(checkpoint.config), checkpoint)
    register_experts_function()
    adapters = find_experts(model)
    assert [a.name for a in adapters] == [a.name for a in mapping.adapters]
    asked: set[tuple[str, int]] = set()
    for adapter, source in zip(adapters, mapping.adapters, strict=True):

        def load(expert: int, source: Any = source) -> dict[str, torch.Tensor]:
            asked.add((source.name, expert))
            return {name: t.double() for name, t in mapping.experts(source, expert).items()}

        adapter.strip()
        assert not any(f"{adapter.name}.{p}" in model.state_dict() for p in adapter.parameters)
        adapter.install(families.reference_compute(adapter, load))
    if family in families.DECORATED:
        model.set_experts_implementation(IMPLEMENTATION)

    got = families.logits(model, ids)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert len({name for name, _ in asked}) == len(adapters)
    assert len({expert for _, expert in asked}) > 4, "the test does not exercise the routing"
    assert wanted.std() > 0.5
    _check_round_trip(mapping, stock)


def _check_round_trip(mapping: WeightMapping, stock: dict[str, torch.Tensor]) -> None:
    """The canonical tensors, put back into the module's order, are the module's own bytes."""
    for adapter in mapping.adapters:
        for expert in (0, adapter.num_experts - 1):
            part = mapping.experts(adapter, expert)
            assert part["down"].shape == (adapter.hidden_size, adapter.intermediate_size)
            assert part["up"].shape == (adapter.intermediate_size, adapter.hidden_size)
            assert set(part) == {
                f"{name}{suffix}"
                for name in (("gate", "up", "down") if adapter.gated else ("up", "down"))
                for suffix in (("", "_bias") if adapter.has_bias else ("",))
            }
            one = {}
            for parameter in adapter.parameters:
                whole = stock[f"{adapter.name}.{parameter}"]
                sliced = whole[adapter.expert_slice(parameter, whole.shape, expert)]
                one[parameter] = adapter.without_expert_axis(parameter, sliced)
            canonical = adapter.canonical(one)
            assert all(torch.equal(part[name], canonical[name]) for name in part)
            first = "gate_up_proj"
            if adapter.gated and first in one:
                own = one[first].t() if one[first].shape[0] == adapter.hidden_size else one[first]
                fused = torch.cat([part["gate"], part["up"]]).t()
                assert torch.equal(adapter.restore_gate_up(fused).t(), own)


def test_activation_of_interleaved_biased_experts() -> None:
    model = families.random_model("gpt_oss")
    adapter = find_experts(model)[0]
    assert adapter.parameters == (
        "gate_up_proj",
        "down_proj",
        "gate_up_proj_bias",
        "down_proj_bias",
    )
    gate_up = torch.randn(5, 192)
    restored = adapter.restore_gate_up(gate_up)
    assert torch.equal(restored[:, 0::2], gate_up[:, :96])
    assert torch.equal(restored[:, 1::2], gate_up[:, 96:])
    assert not adapter.is_plain_swiglu


@pytest.mark.parametrize("family", families.FAMILIES)
def test_plain_swiglu_is_what_it_says(family: str) -> None:
    adapter = find_experts(families.random_model(family))[-1]
    # Values beyond the bounds that some families clamp at.
    gate_up = torch.randn(4, 2 * adapter.intermediate_size) * 8
    if not adapter.gated:
        assert not adapter.is_plain_swiglu
        return
    gate, up = gate_up.chunk(2, dim=-1)
    plain = torch.allclose(adapter.activate(gate_up), nn.functional.silu(gate) * up)
    assert plain == adapter.is_plain_swiglu


def _sizes(**names: Any) -> SimpleNamespace:
    return SimpleNamespace(hidden_act="silu", _experts_implementation="eager", **names)


VARIANTS = {
    "transposed": (
        "aria.modeling_aria.AriaExperts",
        _sizes(moe_num_experts=4, hidden_size=16, intermediate_size=24),
    ),
    "transposed and biased, not interleaved": (
        "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts",
        _sizes(
            num_local_experts=4,
            hidden_size=16,
            intermediate_size=24,
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
        ),
    ),
    "with a norm behind": (
        "muse_spark.modeling_muse_spark.MuseSparkExperts",
        _sizes(
            num_local_experts=4, moe_hidden_size=16, moe_intermediate_size=24, post_norm_eps=1e-5
        ),
    ),
    "square": (
        "mixtral.modeling_mixtral.MixtralExperts",
        _sizes(num_local_experts=4, hidden_size=16, intermediate_size=16),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_that_no_tested_family_has(variant: str) -> None:
    path, config = VARIANTS[variant]
    module_name, _, class_name = f"transformers.models.{path}".rpartition(".")
    module: nn.Module = getattr(importlib.import_module(module_name), class_name)(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    hidden = torch.randn(6, 16, generator=generator)
    index = torch.randint(0, 4, (6, 2), generator=generator)
    scores = torch.rand(6, 2, generator=generator)
    adapter = ExpertsAdapter("experts", module)
    weights = {p: module.get_parameter(p).detach() for p in adapter.parameters}
    parts = [adapter.canonical({p: w[e] for p, w in weights.items()}) for e in range(4)]
    with torch.no_grad():
        wanted = module(hidden, index, scores)
        adapter.strip()
        got = families.reference_compute(adapter, parts.__getitem__)(hidden, index, scores)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.01


def test_an_empty_place_contributes_nothing() -> None:
    model = families.random_model("mixtral")
    adapter = find_experts(model)[0]
    parts = {
        e: adapter.canonical(
            {p: getattr(adapter.module, p)[e].detach() for p in adapter.parameters}
        )
        for e in range(8)
    }
    compute = families.reference_compute(adapter, parts.__getitem__)
    hidden = torch.randn(3, 64)
    index = torch.tensor([[1, 8], [8, 8], [2, 3]])
    scores = torch.rand(3, 2)
    with torch.no_grad():
        wanted = adapter.module(hidden, index, scores)
        register_experts_function()
        adapter.install(compute)
        model.set_experts_implementation(IMPLEMENTATION)
        got = adapter.module(hidden, index, scores)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert torch.count_nonzero(got[1]) == 0


def test_without_a_pack_the_implementation_says_what_is_wrong() -> None:
    register_experts_function()
    model = families.random_model("mixtral")
    model.set_experts_implementation(IMPLEMENTATION)
    with pytest.raises(UsageError, match="needs a pack"):
        families.logits(model, families.tokens())


def test_adapters_work_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.config_of("mixtral"))
    (first, *_) = find_experts(model)
    assert (first.num_experts, first.hidden_size, first.intermediate_size) == (8, 64, 40)
    assert first.shapes == {"gate_up_proj": (8, 80, 64), "down_proj": (8, 64, 40)}
    assert first.expert_slice("down_proj", (8, 64, 40), 3)[0] == slice(3, 4)


@pytest.mark.parametrize(
    ("model_type", "options", "what"),
    [
        ("llama", {"intermediate_size": 48}, "no routed experts"),
        ("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}, "DogeCDMoE"),
    ],
)
def test_other_models_are_refused(model_type: str, options: dict[str, Any], what: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    config = AutoConfig.for_model(model_type, **sizes, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match=what) as error:
        find_experts(model)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    for name in ("use_experts_implementation", *undecorated_families()):
        assert name in str(error.value)


def test_the_undecorated_families_are_not_decorated() -> None:
    # Once transformers decorates one of them, its adapter file has to go.
    assert undecorated_families() == ["dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7"]
    for family in (*families.UNDECORATED, "jetmoe"):
        model = families.random_model(family)
        assert not any(is_decorated(module) for module in model.modules())
