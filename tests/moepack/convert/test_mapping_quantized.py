"""FP8 and MXFP4 sources: exactly the weights that transformers dequantizes them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import Mxfp4Config

from moepack.convert.meta_model import build_meta_model
from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.mapping import WeightMapping
from moepack_formats.errors import UsageError
from tests.moepack.convert.mapping_checks import (
    CountingCheckpoint,
    Edit,
    assert_same_as,
    edit,
    one_file,
    open_mapping,
)


def fp8_blocks(block: int) -> Edit:
    """Turns a checkpoint into one with FP8 weights and a scale per block x block."""

    def quantize(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for key, value in list(tensors.items()):
            if "proj" not in key or value.dim() != 2:
                continue
            rows, cols = value.shape
            padded = torch.zeros(-(-rows // block) * block, -(-cols // block) * block)
            padded[:rows, :cols] = value
            tiles = padded.view(padded.shape[0] // block, block, -1, block)
            scale = tiles.abs().amax((1, 3)) / 448
            codes = (tiles / scale[:, None, :, None]).view_as(padded)[:rows, :cols]
            tensors[key] = codes.to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = scale
        # Real checkpoints have a few tensors wider than the rest.
        key = "model.layers.1.input_layernorm.weight"
        tensors[key] = tensors[key].float() + 1e-4
        config["quantization_config"] = {
            "quant_method": "fp8",
            "weight_block_size": [block, block],
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
        }

    return quantize


def test_fp8_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It only asks whether accelerate is installed, which dequantizing does not use.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    one_file("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    edit(tmp_path, fp8_blocks(8))
    wanted = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype="auto",
        quantization_config=FineGrainedFP8Config(weight_block_size=(8, 8), dequantize=True),
    )
    checkpoint, mapping = open_mapping(tmp_path)
    assert checkpoint.dtype("model.layers.1.mlp.experts.0.up_proj.weight") == torch.float8_e4m3fn
    assert_same_as(wanted, mapping)
    assert mapping.unexpected == ()
    checkpoint.close()


@pytest.mark.parametrize("block", [16, 32, 48])
def test_fp8_matrices_that_are_not_whole_blocks(block: int, tmp_path: Path) -> None:
    """DeepSeek-V3 has 576 rows in blocks of 128, which transformers itself refuses."""
    one_file("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    edit(tmp_path, fp8_blocks(block))
    stored = load_file(tmp_path / "model.safetensors")
    checkpoint, mapping = open_mapping(tmp_path)

    def plain(key: str) -> Tensor:
        codes, scale = stored[f"{key}.weight"], stored[f"{key}.weight_scale_inv"]
        whole = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        return (codes.float() * whole[: codes.shape[0], : codes.shape[1]]).to(torch.bfloat16)

    trunk = dict(mapping.trunk())
    for key in ("self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj", "self_attn.o_proj"):
        name = f"model.layers.1.{key}"
        assert torch.equal(trunk[f"{name}.weight"], plain(name)), name
    part = mapping.experts(mapping.adapters[0], 5)
    for proj in ("gate", "up", "down"):
        assert torch.equal(part[proj], plain(f"model.layers.1.mlp.experts.5.{proj}_proj"))
    checkpoint.close()


def test_mxfp4_blocks(tmp_path: Path) -> None:
    one_file("gpt_oss", tmp_path, dtype=torch.bfloat16)

    def quantize(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(5)
        for key, value in list(tensors.items()):
            if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                continue
            experts, inputs, outputs = value.shape
            shape = (experts, outputs, inputs // 32)
            del tensors[key]
            tensors[f"{key}_blocks"] = torch.randint(
                0, 256, (*shape, 16), dtype=torch.uint8, generator=generator
            )
            tensors[f"{key}_scales"] = torch.randint(
                118, 124, shape, dtype=torch.uint8, generator=generator
            )
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }

    edit(tmp_path, quantize)
    wanted = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", quantization_config=Mxfp4Config(dequantize=True)
    )
    checkpoint, mapping = open_mapping(tmp_path)
    assert_same_as(wanted, mapping)
    checkpoint.close()

    # One expert's share of the blocks and scales (17 bytes per 32 weights) and of the biases.
    counting = CountingCheckpoint(open_checkpoint(str(tmp_path)))
    mapping = WeightMapping(build_meta_model(counting.config), counting)
    part = mapping.experts(mapping.adapters[0], 3)
    weights = sum(part[name].numel() for name in ("gate", "up", "down"))
    biases = sum(part[f"{name}_bias"].nbytes for name in ("gate", "up", "down"))
    assert counting.bytes == weights // 32 * 17 + biases


def test_other_quantized_sources_are_refused(tmp_path: Path) -> None:
    one_file("qwen3_moe", tmp_path)
    for settings in (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "aqlm"},
        {"quant_method": "something-new"},
        {},
    ):
        checkpoint = open_checkpoint(str(tmp_path))
        model = build_meta_model(checkpoint.config)
        checkpoint.config["quantization_config"] = settings
        with pytest.raises(UsageError, match="FP8, MXFP4, GPTQ or compressed-tensors"):
            WeightMapping(model, checkpoint)
        checkpoint.close()
