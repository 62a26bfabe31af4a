"""compressed-tensors sources all the way, Kimi-K2 among them: checkpoint, pack, model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepack_runtime.loading import load_pack
from tests import families
from tests.commands import TINY, Command, edit_json, hashes
from tests.moepack.convert.compressed_packer import FORMS, KIMI, Form, quantize_linears
from tests.moepack.convert.mapping_checks import edit, one_file

TEXT = TINY.parent / "text" / "tiny-moe-valid.txt"
RTN = ("--quantizer", "rtn")


def both(
    root: Path, family: str, experts: Form, attention: Form | None = None, **options: Any
) -> tuple[Path, Path]:
    """A checkpoint with compressed weights, and one with the same weights written out."""
    folders = root / "compressed", root / "plain"
    weights: dict[str, Tensor] = {}

    def compress(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        weights.update(quantize_linears(tensors, config, experts, attention))

    def write_out(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors |= weights

    for folder, change in zip(folders, (compress, write_out), strict=True):
        one_file(family, folder, dtype=torch.bfloat16, **options)
        edit(folder, change)
    assert len(weights) >= 2 * 8 * 3
    return folders


def packs_of(command: Command, folders: Sequence[Path], *options: object) -> list[dict[str, str]]:
    """What the files of their packs are, but for those that tell the source's size and name."""
    found = []
    for folder in folders:
        out = folder.parent / f"{folder.name}-pack"
        result = command("convert", folder, out, "--force", *options)
        assert result.code == 0, result
        files = hashes(out)
        del files["moepack.json"], files["README.md"]
        found.append(files)
    return found


@pytest.mark.parametrize("name", sorted(FORMS))
def test_same_packs_as_of_the_weights_written_out(
    name: str, command: Command, tmp_path: Path
) -> None:
    folders = both(tmp_path, "mixtral", FORMS[name], intermediate_size=96, hidden_size=96)
    one, other = packs_of(command, folders, "--expert-bits", 3, "--head-bits", 16, *RTN)
    assert one == other


def test_experts_and_attention_of_different_forms(command: Command, tmp_path: Path) -> None:
    folders = both(tmp_path, "qwen3_moe", KIMI, FORMS["fp8-channel"], moe_intermediate_size=64)
    sixteen = ("--attn-bits", 16, "--expert-bits", 16, "--head-bits", 16)
    for options in (("--expert-bits", 2, *RTN), sixteen):
        one, other = packs_of(command, folders, *options)
        assert one == other
    stock = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    ids = families.tokens()
    got = families.logits(load_pack(tmp_path / "compressed-pack"), ids)
    torch.testing.assert_close(got, families.logits(stock, ids), atol=1e-5, rtol=1e-5)


def test_calibration_evaluation_and_plans(command: Command, tmp_path: Path) -> None:
    sizes = {"vocab_size": 4096, "intermediate_size": 64}
    folders = both(tmp_path, "mixtral", KIMI, FORMS["int8-channel"], **sizes)
    for folder in folders:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
    calibrate = ("--calibrate", TEXT, "--calibrate-tokens", 512)
    one, other = packs_of(command, folders, "--expert-bits", 2.8, *calibrate)
    assert one == other

    sixteen = ("--attn-bits", 16, "--expert-bits", 16, "--head-bits", 16)
    packs_of(command, folders, *sixteen)
    source = folders[0]
    evaluate = ("eval", tmp_path / "plain-pack", "--text", TEXT, "--max-tokens", 600)
    values = command(*evaluate, "--source", source, "--json").json
    assert values["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert values["top1_agreement"] == 1

    planned = [command("plan", folder, "--json").json for folder in folders]
    assert planned[0]["expert_parameters"] == planned[1]["expert_parameters"] > 0
    assert planned[0]["trunk_bytes"] == planned[1]["trunk_bytes"]


# --- Kimi-K2 -------------------------------------------------------------------------------------


def kimi(root: Path, **sizes: Any) -> tuple[Path, Path]:
    """Checkpoints as Kimi-K2's: of DeepSeek-V3's architecture, with a name and code of its own."""
    sizes |= {"moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
    compressed, plain = both(root, "deepseek_v3", KIMI, **sizes)
    edit_json(
        compressed / "config.json",
        model_type="kimi_k2",
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        scoring_func="sigmoid",
        topk_method="noaux_tc",
    )
    bomb = "raise SystemExit('code of a checkpoint was run')\n"
    (compressed / "configuration_deepseek.py").write_text(bomb)
    return compressed, plain


def test_kimi_k2(command: Command, tmp_path: Path) -> None:
    compressed, plain = kimi(tmp_path)
    options = ("--expert-bits", 3, "--head-bits", 16, *RTN)
    result = command("convert", compressed, tmp_path / "pack", *options)
    assert result.code == 0, result
    notes = result.err.splitlines()
    assert "moepack: model type kimi_k2 is read as deepseek_v3, the same model" in notes
    assert any("auto_map" in line for line in notes)
    (expected,) = packs_of(command, [plain], *options)
    files = hashes(tmp_path / "pack")
    assert {name: files[name] for name in expected} == expected
    assert not list((tmp_path / "pack").glob("*.py"))
    config = json.loads((tmp_path / "pack" / "config.json").read_text())
    assert config["base_model_type"] == "deepseek_v3"
    assert "auto_map" not in config
    ids = families.tokens()
    logits = families.logits(load_pack(tmp_path / "pack"), ids)
    assert torch.equal(logits, families.logits(load_pack(tmp_path / "plain-pack"), ids))


def test_kimi_k2_is_planned_and_evaluated(command: Command, tmp_path: Path) -> None:
    compressed, plain = kimi(tmp_path)
    planned = [command("plan", folder, "--json").json for folder in (compressed, plain)]
    assert planned[0]["expert_parameters"] == planned[1]["expert_parameters"] > 0
    plan = command("convert", compressed, tmp_path / "out", "--dry-run", "--json").json
    assert plan["model_type"] == "deepseek_v3"


def test_a_type_that_transformers_does_not_know(command: Command, tmp_path: Path) -> None:
    compressed, _ = kimi(tmp_path)
    edit_json(compressed / "config.json", model_type="kimi_k3")
    result = command("convert", compressed, tmp_path / "out")
    assert result.code == 2
    assert "transformers does not know this model type (got 'kimi_k3')" in result.err


def test_a_tokenizer_that_names_code(command: Command, tmp_path: Path) -> None:
    folders = kimi(tmp_path, vocab_size=4096)
    for folder in folders:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
        (folder / "tiktoken.model").write_text("AA== 0\n")
    named = folders[0] / "tokenizer_config.json"
    edit_json(named, auto_map={"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]})
    calibrate = ("--calibrate", TEXT, "--calibrate-tokens", 300)
    one, other = packs_of(command, folders, "--expert-bits", 3, *calibrate)
    assert "tiktoken.model" in one
    for name in ("config.json", "tokenizer_config.json"):
        del one[name], other[name]  # they are written anew where they named code
    assert one == other
    # Without the file that stands in for the code.
    (folders[0] / "tokenizer.json").unlink()
    (folders[0] / "tiktoken.model").unlink()
    result = command("convert", folders[0], tmp_path / "out", *calibrate)
    assert result.code == 2
    assert "the tokenizer without the code that comes with it" in result.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
