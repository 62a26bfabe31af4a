"""Quantized sources all the way: checkpoint, pack, model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from moepack_runtime.loading import load_pack
from tests import families
from tests.commands import Command, hashes
from tests.moepack.convert.mapping_checks import edit, one_file
from tests.moepack.convert.test_gptq import quantize_linears
from tests.moepack.convert.test_mapping_quantized import fp8_blocks
from tests.packs import make_pack


def test_gptq(command: Command, tmp_path: Path) -> None:
    """The pack of a GPTQ checkpoint is the pack of its weights written out."""
    for name in ("gptq", "plain"):
        one_file("mixtral", tmp_path / name / "model", intermediate_size=64, dtype=torch.float16)
    weights: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        weights.update(quantize_linears(tensors, config))

    def write_out(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors |= weights

    edit(tmp_path / "gptq" / "model", quantize)
    edit(tmp_path / "plain" / "model", write_out)
    assert len(weights) == 3 * (4 + 8 * 3)
    for bits in (16, 3):
        for name in ("gptq", "plain"):
            out = tmp_path / f"{name}-{bits}"
            words = ["--attn-bits", min(bits + 1, 16), "--expert-bits", bits, "--quantizer", "rtn"]
            words += ["--head-bits", 16]
            result = command("convert", tmp_path / name / "model", out, *words)
            assert result.code == 0, result
        packs = [hashes(tmp_path / f"{name}-{bits}") for name in ("gptq", "plain")]
        for pack in packs:
            # They hold the size of the source, which is another.
            del pack["moepack.json"], pack["README.md"]
        assert packs[0] == packs[1]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "model", dtype=torch.float32)
    ids = families.tokens()
    got = families.logits(load_pack(tmp_path / "gptq-16"), ids)
    torch.testing.assert_close(got, families.logits(stock, ids), atol=1e-5, rtol=1e-5)


def test_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pack gives the logits of transformers' own dequantized loading."""
    # It only asks whether accelerate is installed, which dequantizing does not use.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    source = tmp_path / "source"
    one_file("deepseek_v3", source, dtype=torch.bfloat16)
    edit(source, fp8_blocks(8))
    stock = AutoModelForCausalLM.from_pretrained(
        source,
        dtype="auto",
        quantization_config=FineGrainedFP8Config(weight_block_size=(8, 8), dequantize=True),
    ).float()
    make_pack(source, tmp_path / "16", attn_bits=16, expert_bits=16)
    ids = families.tokens()
    model = load_pack(tmp_path / "16")
    assert model.moepack.pack.manifest.recipe.expert_schemes == ("bf16",)
    torch.testing.assert_close(
        families.logits(model, ids), families.logits(stock, ids), atol=1e-5, rtol=1e-5
    )
    make_pack(source, tmp_path / "3", expert_bits=3, quantizer="rtn")
    few = load_pack(tmp_path / "3")
    assert few.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
