"""Packs that are not valid or are damaged, as a user of the command line meets them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moepack_formats import checksum
from moepack_formats.pack import Pack
from tests import families
from tests.commands import Command, edit_json
from tests.moepack.pack_edits import (
    LAYER,
    OTHER,
    each,
    edit_header,
    edit_layer,
    edit_manifest,
    flip,
    generate,
    record,
    reseal,
)
from tests.packs import make_pack

# --- exit 3: not a valid pack ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 4}, "with 4 experts, got model.layers.0.mlp.experts with 8"),
        ({"num_hidden_layers": 2}, "the number of MoE layers differs from the config's"),
        ({"num_hidden_layers": 4}, "the number of MoE layers differs from the config's"),
        ({"intermediate_size": 64}, "a record has another shape than the config's"),
        ({"hidden_size": 128}, "another"),
        ({"num_key_value_heads": 4}, "a packed module has another kind or shape"),
        ({"vocab_size": 5000}, "embed_tokens: a packed module has another kind or shape"),
        ({"base_model_type": "olmoe"}, "config.json names another family"),
        ({"base_model_type": "no-such"}, "no family that transformers knows"),
        ({"base_model_type": None}, "no family that transformers knows"),
        ({"hidden_act": "no-such"}, "cannot build the model"),
        ({"hidden_size": "many"}, "not a valid configuration of a mixtral model"),
        ({"quantization_config": None}, "must name its quantization"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method moepack"),
        (
            {"quantization_config": {"quant_method": "moepack", "format_version": 2}},
            "upgrade moepack",
        ),
        (
            {"quantization_config": {"quant_method": "moepack", "code": "x.py"}},
            "unknown field 'code'",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_config_and_pack_disagree(
    command: Command, damaged: Path, changes: dict[str, Any], words: str
) -> None:
    """Never on random weights: transformers would fill every gap and only warn."""
    edit_json(damaged / "config.json", **changes)
    line = generate(command, damaged).error(3)
    assert line.startswith("moepack: not a valid pack: ")
    assert words in line


def test_a_tensor_too_few_or_too_many(command: Command, tmp_path: Path) -> None:
    """A tied model whose config is made untied has no output head, and the other way round."""
    families.save_checkpoint(
        families.random_model("qwen2_moe", num_hidden_layers=1), tmp_path / "source"
    )
    pack = tmp_path / "pack"
    make_pack(tmp_path / "source", pack, attn_bits=16, expert_bits=4, quantizer="rtn")
    config = json.loads((pack / "config.json").read_text())
    for changes, words in (
        ({"qkv_bias": False}, "the trunk has a tensor that the config's model lacks"),
        ({"qkv_bias": True, "moe_intermediate_size": 56}, "another shape"),
        ({"vocab_size": 5000}, "embed_tokens.weight: a trunk tensor has another shape"),
    ):
        (pack / "config.json").write_text(json.dumps({**config, **changes}))
        assert words in command("bench", pack).error(3)


def test_the_manifest_names_fewer(command: Command, damaged: Path) -> None:
    edit_manifest(damaged, lambda manifest: manifest["layers"].pop())
    assert OTHER in generate(command, damaged).error(3)


def test_missing_expert(command: Command, damaged: Path) -> None:
    edit_header(damaged / LAYER, lambda header: header.pop("experts.5"))
    line = each(command, damaged, 3)
    assert f"{LAYER}" in line
    assert "experts.5" in line or "hole" in line


def test_missing_expert_at_the_end(command: Command, damaged: Path) -> None:
    edit_header(damaged / LAYER, lambda header: header.pop("experts.7"))
    assert "an expert is missing (wanted experts.7)" in each(command, damaged, 3)


def test_missing_layer_file(command: Command, damaged: Path) -> None:
    (damaged / LAYER).unlink()
    assert f"{LAYER}: file is missing; restore the file or convert again" in each(
        command, damaged, 3
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files(command: Command, damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    assert "not a valid pack" in generate(command, damaged).error(3)
    assert f"{name}: file is missing" in command("verify", damaged).error(3)


def test_no_manifest(command: Command, damaged: Path) -> None:
    (damaged / "moepack.json").unlink()
    assert each(command, damaged, 3).endswith("no moepack.json: run convert again")
    (damaged / ".moepack-journal").write_text("{}\n")
    assert each(command, damaged, 3).endswith("unfinished conversion: run convert again")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff{}", b'{"format": "moepack"}'])
def test_a_manifest_that_is_none(command: Command, damaged: Path, content: bytes) -> None:
    (damaged / "moepack.json").write_bytes(content)
    assert "moepack.json" in each(command, damaged, 3)


def test_newer_format(command: Command, damaged: Path) -> None:
    def newer(facts: dict[str, Any]) -> None:
        facts |= {"format_version": 2, "min_reader": 2, "colour": "blue"}

    edit_manifest(damaged, newer)
    assert each(command, damaged, 3).endswith("upgrade moepack")


def test_newer_layer_file(command: Command, damaged: Path) -> None:
    edit_layer(damaged / LAYER, lambda layer: layer.update(format_version=2))
    reseal(damaged, LAYER)
    assert each(command, damaged, 3).endswith("upgrade moepack")


def test_unknown_scheme(command: Command, damaged: Path) -> None:
    def change(layer: dict[str, Any]) -> None:
        layer["specs"][0]["tensors"][0]["scheme"] = "q5g64"

    edit_layer(damaged / LAYER, change)
    assert "q5g64" in each(command, damaged, 3)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "C:\\x", "a\0b", "experts\\x"])
def test_names_that_leave(command: Command, damaged: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["config.json"]

    edit_manifest(damaged, change)
    assert "unsafe file name" in each(command, damaged, 3)


def test_links_that_leave(command: Command, damaged: Path, tmp_path: Path) -> None:
    shutil.move(damaged / LAYER, tmp_path / "elsewhere")
    (damaged / LAYER).symlink_to(tmp_path / "elsewhere")
    assert "a symbolic link leaves the pack" in each(command, damaged, 3)


def test_links_in_a_hub_cache_pass(command: Command, pack: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--me--pack"
    snapshot = repo / "snapshots" / "0123"
    shutil.copytree(pack, snapshot)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(repo / "blobs" / str(i))
        path.symlink_to(os.path.relpath(repo / "blobs" / str(i), path.parent))
    assert command("verify", snapshot).code == 0
    assert generate(command, snapshot).out == generate(command, pack).out


@pytest.mark.parametrize("name", [LAYER, "model.safetensors", "moepack.json"])
def test_not_a_regular_file(command: Command, damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    os.mkfifo(damaged / name)
    assert f"{name}: not a regular file" in each(command, damaged, 3)


def test_saved_again_by_stock_safetensors(command: Command, damaged: Path) -> None:
    path = damaged / LAYER
    save_file(load_file(path), path)
    line = each(command, damaged, 3)
    assert f"{LAYER}: records are not aligned: another program has saved this file again" in line
    assert line.endswith("restore the original file or convert again")


# --- exit 4: damaged ------------------------------------------------------------------------------


def test_truncated_layer_file(command: Command, damaged: Path) -> None:
    offset, nbytes = record(damaged, 1, 5)
    os.truncate(damaged / LAYER, offset + nbytes - 1)
    line = each(command, damaged, 4)
    assert f"{LAYER}: layer 1, expert 5: the file is truncated" in line
    assert line.endswith("restore the file or convert again")


def test_truncated_trunk(command: Command, damaged: Path) -> None:
    path = damaged / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert "model.safetensors: the file has another size" in each(command, damaged, 4)


@pytest.mark.parametrize("place", ["codes", "scales", "padding"])
def test_flipped_bit(command: Command, damaged: Path, place: str) -> None:
    """In the codes, in a scale, in the padding: wherever it is, the expert is named."""
    with Pack(damaged) as opened:
        at = opened.layers[1][5]
        first = at.spec.tensors[0]
        # A block ends with its scales and minima.
        scale = first.offset + first.nbytes - 2
        offset = {"codes": first.offset, "scales": scale, "padding": at.spec.nbytes - 1}[place]
    for expert in range(8):  # a prompt may not need the fifth
        flip(damaged / LAYER, record(damaged, 1, expert)[0] + offset)
    for name, result in (
        ("verify", command("verify", damaged)),
        ("buffered", generate(command, damaged, "--io", "buffered")),
        ("mmap", generate(command, damaged, "--io", "mmap")),
    ):
        line = result.error(4)
        assert re.search(r"layer 1, expert \d: the record's bytes are damaged", line), name
        assert LAYER in line
        assert line.endswith("restore the file or convert again")
        assert result.out == ""
    assert command("inspect", damaged).code == 0


def test_flipped_bit_in_the_trunk(command: Command, damaged: Path) -> None:
    path = damaged / "model.safetensors"
    flip(path, path.stat().st_size - 1)
    line = generate(command, damaged).error(4)
    assert "model.safetensors: model." in line
    assert "a trunk tensor's bytes are damaged" in line
    assert "a trunk tensor's bytes are damaged" in command("verify", damaged).error(4)


def test_swapped_layer_files(command: Command, damaged: Path) -> None:
    (damaged / LAYER).rename(damaged / "x")
    (damaged / OTHER).rename(damaged / LAYER)
    (damaged / "x").rename(damaged / OTHER)
    line = each(command, damaged, 4)
    assert f"{LAYER}: this file belongs to another layer: two files were swapped" in line
    assert "wanted layer 1" in line
    assert "got layer 2" in line


def test_another_pack_with_the_same_shapes(
    command: Command, checkpoint: Path, damaged: Path, tmp_path: Path
) -> None:
    make_pack(checkpoint, tmp_path / "other", quantizer="hqq")
    shutil.copy(tmp_path / "other" / LAYER, damaged / LAYER)
    assert "layer 1: the header is not the one that was written" in each(command, damaged, 4)


def test_sha256(command: Command, damaged: Path) -> None:
    path = damaged / "generation_config.json"
    path.write_bytes(path.read_bytes() + b"\n")
    line = command("verify", damaged).error(4)
    assert "generation_config.json: the file is not the one that was written" in line
    assert "sha256" in line
    # What a user may edit by hand is no obstacle to running.
    assert generate(command, damaged).code == 0


def test_scales_that_are_not_finite(command: Command, damaged: Path) -> None:
    """Checksums that match: only the values can tell."""
    path = damaged / LAYER
    offset, nbytes = record(damaged, 1, 5)
    data = bytearray(path.read_bytes())
    with Pack(damaged) as opened:
        tensor = opened.layers[1][5].spec.tensors[-1]
    # Somewhere among 64 inputs' worth of bytes are the outer scales; all become NaN.
    start = offset + tensor.offset
    data[start : start + tensor.nbytes] = np.full(tensor.nbytes // 2, 0x7E00, "<u2").tobytes()
    path.write_bytes(data)
    digest = checksum.xxh3(bytes(data[offset : offset + nbytes]))

    def change(layer: dict[str, Any]) -> None:
        layer["xxh3"][5] = digest

    edit_layer(path, change)
    reseal(damaged, LAYER)
    line = command("verify", damaged).error(4)
    assert "layer 1, expert 5: down holds a value that is not finite" in line
    assert line.endswith("convert again from an undamaged source")
