"""Sources that cannot be converted, and code that comes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.commands import (
    Command,
    edit_json,
    hashes,
)
from tests.moepack.conversions import convert


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("layers.1.block_sparse_moe.experts.5.w2.weight", "layers.1.mlp.experts, expert 5, down"),
        ("layers.2.self_attn.q_proj.weight", "layers.2.self_attn.q_proj.weight"),
        ("layers.2.input_layernorm.weight", "layers.2.input_layernorm.weight"),
        ("layers.0.block_sparse_moe.gate.weight", "layers.0.mlp.gate.weight"),
    ],
)
def test_source_weights_that_are_not_finite(
    command: Command, source: Path, tmp_path: Path, key: str, words: str, value: float
) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    name = f"model.{key}" if f"model.{key}" in index else key
    path = source / index[name]
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    for bits in (3, 16):
        result = convert(command, source, out, "--expert-bits", bits, "--attn-bits", 4, "--force")
        assert words in result.error(4)
        assert not (out / "moepack.json").exists()
        assert command("verify", out).error(3).endswith("unfinished conversion: run convert again")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "my-own-moe"}, "does not know this model type (got 'my-own-moe')"),
        ({"model_type": None}, "does not know this model type"),
        ({"model_type": ["mixtral"]}, "does not know this model type"),
        ({"model_type": "vit"}, "no text generation model of type vit"),
        ({"hidden_act": "my-own-act"}, "not a valid configuration of a mixtral model"),
        ({"hidden_size": "many"}, "not a valid configuration of a mixtral model"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unsupported_configs(
    command: Command, source: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    edit_json(source / "config.json", **changes)
    line = convert(command, source, tmp_path / "out").error(2)
    assert words in line
    if "model_type" in changes:
        assert "supported are all models whose experts" in line
        assert "dbrx, jetmoe, llama4, longcat_flash, step3p7" in line
    assert not (tmp_path / "out").exists()


def test_a_dense_model(command: Command, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    line = convert(command, tmp_path / "dense", tmp_path / "out").error(2)
    assert "it has no routed experts" in line
    assert "supported are all models" in line


def test_experts_of_an_unknown_kind(command: Command, tmp_path: Path) -> None:
    """Doge's experts are rows of an embedding."""
    from transformers import DogeConfig, DogeForCausalLM

    config = DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, is_moe=True, num_experts=16,
        num_experts_per_tok=2,
    )  # fmt: skip
    DogeForCausalLM(config).save_pretrained(tmp_path / "doge")
    line = convert(command, tmp_path / "doge", tmp_path / "out").error(2)
    assert "its experts (DogeCDMoE) are of a kind that cannot be packed" in line
    assert "supported are all models" in line


def test_a_source_that_is_a_pack(command: Command, pack: Path, tmp_path: Path) -> None:
    line = convert(command, pack, tmp_path / "out").error(2)
    assert line.endswith("this is already a pack; convert the original checkpoint")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("config.json", 2, "no config.json"), ("model.safetensors.index.json", 2, "no safetensors")],
)
def test_an_incomplete_source(
    command: Command, source: Path, tmp_path: Path, name: str, code: int, words: str
) -> None:
    (source / name).unlink()
    assert words in convert(command, source, tmp_path / "out").error(code)


def test_a_source_that_lacks_a_shard(command: Command, source: Path, tmp_path: Path) -> None:
    next(source.glob("model-00002*")).unlink()
    line = convert(command, source, tmp_path / "out").error(4)
    assert "missing file" in line
    assert "download the checkpoint again" in line


CODE = "open(__import__('os').environ['MARKER'], 'w').close()\n"


def test_code_in_a_checkpoint(
    command: Command,
    source: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ignored with a notice, never run, and not carried into the pack."""
    marker = tmp_path / "MARKER"
    monkeypatch.setenv("MARKER", str(marker))
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (source / name).write_text(CODE)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04\x95 no pickle")
    auto_map = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
    }
    edit_json(source / "config.json", auto_map=auto_map, attn_implementation="org/repo", odd=1)
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    edit_json(source / "generation_config.json", custom_generate="org/repo")
    out = tmp_path / "out"
    result = convert(command, source, out)
    assert result.code == 0
    assert not marker.exists()
    for words in (
        "configuration_evil.py, modeling_evil.py, tokenization_evil.py",
        "pytorch_model.bin (pickles are never opened)",
        "auto_map in config.json",
        "'auto_map' in tokenizer_config.json",
        "'custom_generate' in generation_config.json",
        "'odd' in config.json",
    ):
        assert words in result.err
    assert all(line.startswith("moepack: ignored") for line in result.err.splitlines())
    names = set(hashes(out))
    assert names == set(wanted)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        text = (out / name).read_text()
        assert "evil" not in text
        assert "auto_map" not in text
        assert "org/repo" not in text
