"""Streaming through transformers' conversion table: the bytes that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moepack.convert.meta_model import build_meta_model, stored_dtype
from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.mapping import WeightMapping
from moepack_formats.errors import UsageError
from tests import families
from tests.moepack.convert.mapping_checks import (
    CountingCheckpoint,
    assert_same_as,
    edit,
    one_file,
    open_mapping,
)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_same_as_from_pretrained(family: str, tmp_path: Path) -> None:
    families.save_checkpoint(families.random_model(family), tmp_path, dtype=torch.bfloat16)
    auto = AutoModelForImageTextToText if family == "step3p7" else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, dtype="auto")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint, mapping = open_mapping(tmp_path)
    assert_same_as(model, mapping)
    assert mapping.unexpected == ()
    checkpoint.close()


def test_llama4_with_vision_gives_the_text_model(tmp_path: Path) -> None:
    text = families.config_of("llama4_text").to_dict()
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    families.FAMILIES["llama4"] = {"text_config": text, "vision_config": vision}
    try:
        config = families.config_of("llama4")
    finally:
        del families.FAMILIES["llama4"]
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    checkpoint, mapping = open_mapping(tmp_path)
    assert_same_as(AutoModelForCausalLM.from_pretrained(tmp_path), mapping)
    assert any("vision" in key for key in mapping.unexpected)
    checkpoint.close()


def test_transposing_conversion_that_looks_at_its_target(tmp_path: Path) -> None:
    """Square experts whose layout the table tells from the shape of all experts together."""
    from transformers.core_model_loading import Transpose, WeightConverter

    model = one_file("qwen3_moe", tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"

    def fuse(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        keys = [f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in range(8)]
        tensors[name] = torch.stack([tensors.pop(key) for key in keys])

    edit(tmp_path, fuse)
    checkpoint = open_checkpoint(str(tmp_path))
    mapping = WeightMapping(build_meta_model(checkpoint.config), checkpoint)
    group = mapping._groups[name]
    group.converter = WeightConverter(name, name, operations=[Transpose(1, 2, check_dims=True)])
    group.sources = [(name, name)]
    got = mapping.experts(mapping.adapters[0], 2)["down"]
    assert torch.equal(got, model.state_dict()[name][2])
    checkpoint.close()


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss", "dbrx", "llama4_text"])
def test_one_expert_reads_one_expert(family: str, tmp_path: Path) -> None:
    families.save_checkpoint(families.random_model(family), tmp_path)
    checkpoint = CountingCheckpoint(open_checkpoint(str(tmp_path)))
    mapping = WeightMapping(build_meta_model(checkpoint.config), checkpoint)
    assert checkpoint.bytes == 0, "planning must not read data"
    mapping.trunk_targets()
    assert checkpoint.bytes == 0
    parts = mapping.experts(mapping.adapters[0], 3)
    assert checkpoint.bytes == sum(part.nbytes for part in parts.values())


def test_trunk_goes_on_where_it_stopped(tmp_path: Path) -> None:
    families.save_checkpoint(families.random_model("dbrx"), tmp_path)
    checkpoint = CountingCheckpoint(open_checkpoint(str(tmp_path)))
    mapping = WeightMapping(build_meta_model(checkpoint.config), checkpoint)
    everything = list(mapping.trunk())
    for start in (1, len(everything) - 2, len(everything)):
        checkpoint.keys_read.clear()
        rest = list(mapping.trunk(start))
        assert [name for name, _ in rest] == [name for name, _ in everything[start:]]
        assert len(checkpoint.keys_read) <= len(rest) + 1


def test_tied_head_may_be_absent(tmp_path: Path) -> None:
    model = one_file("qwen3_moe", tmp_path, tie_word_embeddings=True)
    checkpoint, mapping = open_mapping(tmp_path)
    assert "lm_head.weight" not in set(checkpoint.keys())
    assert mapping.missing == ("lm_head.weight",)
    assert "lm_head.weight" not in [t.name for t in mapping.trunk_targets()]
    assert_same_as(model, mapping)
    checkpoint.close()


def test_extra_keys_are_reported(tmp_path: Path) -> None:
    one_file("deepseek_v3", tmp_path)

    def add(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
        tensors["model.layers.3.mlp.experts.0.gate_proj.weight"] = torch.zeros(40, 64)

    edit(tmp_path, add)
    checkpoint, mapping = open_mapping(tmp_path)
    assert set(mapping.unexpected) == {
        "model.layers.3.eh_proj.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
    }
    checkpoint.close()


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.2.mlp.experts.gate_up_proj"),
    ],
)
def test_a_missing_tensor_is_named(lost: str, named: str, tmp_path: Path) -> None:
    one_file("qwen3_moe", tmp_path)

    def lose(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors[lost]

    edit(tmp_path, lose)
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(UsageError, match=named.replace(".", r"\.")) as error:
        WeightMapping(build_meta_model(checkpoint.config), checkpoint)
    assert error.value.exit_code == 2
    checkpoint.close()


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    one_file("qwen3_moe", tmp_path)

    def shrink(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key in (
            "model.layers.0.self_attn.o_proj.weight",
            "model.layers.0.mlp.experts.1.down_proj.weight",
        ):
            tensors[key] = tensors[key][:-1].clone()

    edit(tmp_path, shrink)
    checkpoint, mapping = open_mapping(tmp_path)
    with pytest.raises(UsageError, match=r"0\.self_attn\.o_proj\.weight.*wanted \(64, 64\)"):
        list(mapping.trunk())
    assert mapping.experts(mapping.adapters[0], 0)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.experts\.down_proj, expert 1"):
        mapping.experts(mapping.adapters[0], 1)
    checkpoint.close()


def test_the_model_is_built_from_transformers_alone() -> None:
    config = families.config_of("mixtral").to_dict()
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    model = build_meta_model(config)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not model.training
    assert "auto_map" in config, "the caller's config is left alone"


def test_the_dtype_is_the_configs() -> None:
    config = families.config_of("mixtral").to_dict()
    assert build_meta_model(config | {"dtype": "bfloat16"}).dtype == torch.bfloat16
    assert build_meta_model(config | {"torch_dtype": "float16"}).dtype == torch.float16
    config.pop("dtype", None)
    assert build_meta_model(config).dtype == torch.float32
    assert build_meta_model(config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_config_without_dtype_goes_by_the_tensors(tmp_path: Path) -> None:
    one_file("mixtral", tmp_path, dtype=torch.float16)

    def forget(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del config["dtype"]
        tensors["a.codes"] = torch.ones(2, dtype=torch.uint8)

    edit(tmp_path, forget)
    checkpoint = open_checkpoint(str(tmp_path))
    assert stored_dtype(checkpoint) == torch.float16
    model = build_meta_model(checkpoint.config, dtype=stored_dtype(checkpoint))
    assert_same_as(AutoModelForCausalLM.from_pretrained(tmp_path), WeightMapping(model, checkpoint))
    checkpoint.close()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "no_such_model"}, "llama4.*step3p7"),
        ({"model_type": None}, "llama4.*step3p7"),
        ({"model_type": ["mixtral"]}, "llama4.*step3p7"),
        ({"model_type": "../../etc"}, "llama4.*step3p7"),
        ({"model_type": "vit"}, "no text generation model.*llama4.*step3p7"),
        ({"model_type": "moepack"}, "already a pack"),
        ({"hidden_size": "many"}, "not a valid configuration of a mixtral model"),
        ({"num_attention_heads": 0}, "not a valid configuration of a mixtral model"),
    ],
)
def test_unusable_configs(changes: dict[str, Any], what: str) -> None:
    config = families.config_of("mixtral").to_dict() | changes
    if changes.get("model_type") == "vit":
        config = {"model_type": "vit"}
    with pytest.raises(UsageError, match=what) as error:
        build_meta_model(config)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
