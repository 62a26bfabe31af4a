"""Which linear layers of the trunk are packed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moepack.convert.meta_model import build_meta_model
from moepack.convert.trunk_policy import TrunkPolicy, trunk_policy
from moepack_formats.schemes import SCHEMES
from moepack_runtime.experts import find_experts
from tests import families

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
# The last part of the name of every packed layer, then of every kept one but the output head.
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "mixtral": (_ATTENTION, set()),
    "qwen2_moe": (_ATTENTION | _MLP, {"shared_expert_gate"}),
    "qwen3_moe": (_ATTENTION, set()),
    "qwen3_next": (
        _ATTENTION | _MLP | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
        {"shared_expert_gate"},
    ),
    "olmoe": (_ATTENTION, set()),
    # 16 inputs, as in the tiny configs, are too few for a scale per 64.
    "deepseek_v2": (_LATENT | _MLP, {"kv_b_proj"}),
    "deepseek_v3": (_LATENT | _MLP, {"kv_b_proj"}),
    "gpt_oss": (_ATTENTION, set()),
    "granitemoe": (_ATTENTION, set()),
    "phimoe": (_ATTENTION, {"router"}),
    "minimax_m2": (_ATTENTION, set()),
    "glm4_moe": (_ATTENTION | _MLP, set()),
    "hunyuan_v1_moe": (_ATTENTION | _MLP, {"wg"}),
    "ernie4_5_moe": (_ATTENTION | _MLP, set()),
    "jamba": (_ATTENTION | _MLP | {"in_proj", "x_proj", "out_proj"}, {"dt_proj"}),
    "nemotron_h": (_ATTENTION | {"up_proj", "down_proj", "in_proj"}, {"out_proj"}),
    "afmoe": (_ATTENTION | _MLP, {"gate"}),
    "lfm2_moe": (
        {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
        set(),
    ),
    "llama4_text": (_ATTENTION | _MLP, {"router"}),
    "longcat_flash": (_LATENT | _MLP, {"classifier", "kv_b_proj"}),
    "dbrx": ({"Wqkv", "out_proj"}, {"layer"}),
    "step3p7": (
        _ATTENTION | _MLP | {"out_proj", "fc1", "fc2", "multi_modal_projector"},
        {"g_proj"},
    ),
}


def policy_of(family: str, scheme: str = "q4g64") -> tuple[PreTrainedModel, TrunkPolicy]:
    model = families.random_model(family)
    return model, trunk_policy(model, find_experts(model), SCHEMES[scheme])


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family: str) -> None:
    model, policy = policy_of(family)
    packed, kept = EXPECTED[family]
    assert {last(linear.name) for linear in policy.packed} == packed
    assert {last(linear.name) for linear in policy.kept} == kept | {"lm_head"}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = [*(x.name for x in policy.packed), *(x.name for x in policy.kept)]
    assert sorted(names) == sorted(linears), "each linear layer is in exactly one list"
    for linear in policy.packed:
        module = model.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        assert tuple(module.weight.shape) == (linear.rows, linear.cols)


class Opaque(nn.Module):
    """A linear layer whose weight cannot be read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._hidden = (linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._hidden
        return functional.linear(x, weight, bias)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_nothing_misses_the_weights_of_packed_layers(family: str) -> None:
    model, policy = policy_of(family)
    ids = families.tokens()
    wanted = families.logits(model, ids)
    for linear in policy.packed:
        module = model.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        model.set_submodule(linear.name, Opaque(module))
    assert torch.equal(families.logits(model, ids), wanted)


def test_direct_reads_name_their_place() -> None:
    # The CPU does not take the fused path of nemotron_h that reads this weight.
    for family, layer in (("nemotron_h", "out_proj"), ("jamba", "dt_proj")):
        reasons = {last(x.name): x.reason for x in policy_of(family)[1].kept}
        assert re.search(rf"read directly \(modeling_{family}\.py, line \d+\)", reasons[layer])


def test_a_shared_expert_as_wide_as_the_router_is_still_packed() -> None:
    model = families.random_model("qwen3_next", shared_expert_intermediate_size=8)
    policy = trunk_policy(model, find_experts(model), SCHEMES["q4g64"])
    packed = {x.name for x in policy.packed}
    assert "model.layers.0.mlp.shared_expert.gate_proj" in packed
    assert not any("router" in x.reason for x in policy.kept)


def test_a_router_of_several_layers_is_kept_whole() -> None:
    model = build_meta_model({"model_type": "zaya", "num_hidden_layers": 2})
    policy = trunk_policy(model, find_experts(model), SCHEMES["q4g64"])
    routers = {re.sub(r"^.*\.gate\.", "", x.name) for x in policy.kept if "router" in x.reason}
    assert routers == {
        "down_proj",
        "router_mlp.fc1",
        "router_mlp.fc2",
        "router_mlp.out_proj",
    }
    assert not any(".gate." in x.name for x in policy.packed)


def test_layers_kept_in_float32() -> None:
    model = build_meta_model(
        {"model_type": "deepseek_v4", "num_hidden_layers": 3, "dtype": "bfloat16"}
    )
    policy = trunk_policy(model, find_experts(model), SCHEMES["q4g64"])
    reasons = {x.name: x.reason for x in policy.kept}
    assert "the model keeps it in float32" in reasons.values()
    assert any("GroupedLinear" in reason for reason in reasons.values())


def test_full_size_models_pack_their_latent_attention() -> None:
    model = build_meta_model({"model_type": "deepseek_v3", "dtype": "bfloat16"})
    policy = trunk_policy(model, find_experts(model), SCHEMES["q4g64"])
    assert [x.name for x in policy.kept] == ["lm_head"]
    kv_b = next(x for x in policy.packed if x.name.endswith("kv_b_proj"))
    assert (kv_b.rows, kv_b.cols) == (32768, 512)


def test_raw_schemes_keep_everything() -> None:
    policy = policy_of("mixtral", "bf16")[1]
    assert policy.packed == ()
    assert len(policy.kept) == 13


def test_a_tied_head_is_kept() -> None:
    model = families.random_model("mixtral", tie_word_embeddings=True)
    policy = trunk_policy(model, find_experts(model), SCHEMES["q4g64"])
    assert [x.name for x in policy.kept] == ["lm_head"]


def test_stripped_models_get_the_same_answer() -> None:
    model = families.random_model("longcat_flash")
    adapters = find_experts(model)
    before = trunk_policy(model, adapters, SCHEMES["q4g64"])
    for adapter in adapters:
        adapter.strip()
    assert trunk_policy(model, adapters, SCHEMES["q4g64"]) == before
