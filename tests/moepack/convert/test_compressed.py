"""compressed-tensors checkpoints: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.compressed import CompressedCheckpoint
from moepack.convert.sources.compressed_settings import parse_compressed
from moepack.convert.sources.folder_source import FolderCheckpoint
from moepack_formats.errors import IntegrityError, MoepackError, UsageError
from tests.commands import Command
from tests.moepack.convert.compressed_packer import (
    FORMS,
    KIMI,
    Form,
    config_of,
    named,
    quantized,
)

ASSETS = Path(__file__).parents[2] / "assets" / "compressed-tensors"
FIXTURES = sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def write(folder: Path, tensors: dict[str, Tensor], config: Any, **top: Any) -> str:
    folder.mkdir(exist_ok=True)
    document = {"model_type": "mixtral", "quantization_config": config, **top}
    (folder / "config.json").write_text(json.dumps(document))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def error_of(kind: type[MoepackError], action: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(kind) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what the library wrote ----------------------------------------------------------------------


def test_the_fixtures_are_there() -> None:
    assert len(FIXTURES) == 17
    assert sum(path.stat().st_size for path in ASSETS.iterdir() if path.is_file()) < 120_000


@pytest.mark.parametrize("name", FIXTURES)
def test_exact_weights(tmp_path: Path, name: str) -> None:
    facts = json.loads((ASSETS / f"{name}.json").read_text())
    expected = load_file(ASSETS / f"{name}.safetensors")["expected"]
    shutil.copy(ASSETS / f"{name}.safetensors", tmp_path / "model.safetensors")
    config = {"model_type": "mixtral", "quantization_config": facts["quantization_config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    assert sorted(checkpoint.keys()) == ["expected", "linear.weight"]
    assert checkpoint.shape("linear.weight") == tuple(expected.shape)
    assert checkpoint.dtype("linear.weight") is expected.dtype
    assert checkpoint.nbytes("linear.weight") == expected.nbytes
    assert checkpoint.config == {"model_type": "mixtral"}
    assert checkpoint.notices == []
    weight = checkpoint.read("linear.weight")
    assert weight.is_contiguous()
    assert torch.equal(weight, expected)


# --- a checkpoint of several forms ---------------------------------------------------------------


def test_groups_of_several_forms(tmp_path: Path) -> None:
    forms = {**FORMS, "int8-group": replace(KIMI, bits=8, tile=(1, 16))}
    tensors, expected = {"norm.weight": torch.ones(4)}, {"norm.weight": torch.ones(4)}
    for seed, (name, form) in enumerate(forms.items()):
        parts, expected[f"{name}.weight"] = quantized(seed, 80, 96, form)
        tensors |= named(name, parts)
    config = config_of(*forms.values())
    assert config["format"] == "mixed-precision"
    checkpoint = open_checkpoint(write(tmp_path, tensors, config))
    assert sorted(checkpoint.keys()) == sorted(expected)
    for key, weight in expected.items():
        assert checkpoint.shape(key) == tuple(weight.shape)
        assert checkpoint.nbytes(key) == weight.nbytes
        read = checkpoint.read(key)
        assert read.dtype is weight.dtype is checkpoint.dtype(key)
        assert torch.equal(read, weight), key
    part = checkpoint.read("kimi.weight", (slice(3, 9), slice(0, 40)))
    assert torch.equal(part, expected["kimi.weight"][3:9, :40])
    assert part.is_contiguous()
    checkpoint.close()


def test_more_outputs_than_are_decoded_at_once(tmp_path: Path) -> None:
    for name, form in FORMS.items():
        parts, weight = quantized(1, 600, 96, form)
        folder = write(tmp_path / name, named("x", parts), config_of(form))
        assert torch.equal(open_checkpoint(folder).read("x.weight"), weight), name


def test_the_stated_shape_decides_where_others_do_not(tmp_path: Path) -> None:
    """4-bit codes in groups of 32 have the shapes of half as many 8-bit codes in groups of 16."""
    bytewise = replace(KIMI, bits=8, tile=(1, 16))
    four, four_weight = quantized(0, 8, 128, KIMI)
    eight, eight_weight = quantized(1, 8, 64, bytewise)
    assert four["weight_packed"].shape == eight["weight_packed"].shape
    config = config_of(KIMI, bytewise)
    checkpoint = open_checkpoint(write(tmp_path, named("a", four) | named("b", eight), config))
    assert torch.equal(checkpoint.read("a.weight"), four_weight)
    assert torch.equal(checkpoint.read("b.weight"), eight_weight)
    del four["weight_shape"]
    folder = write(tmp_path, named("a", four), config)
    assert "config" in error_of(IntegrityError, open_checkpoint, folder)


def test_what_is_no_weight_is_left_out(tmp_path: Path) -> None:
    parts, weight = quantized(0, 16, 32, FORMS["fp8-tensor"])
    one = torch.ones(1)
    tensors = named("q_proj", parts) | {"q_proj.input_scale": one, "attn.k_scale": one.clone()}
    config = config_of(FORMS["fp8-tensor"]) | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    checkpoint = open_checkpoint(write(tmp_path, tensors, config))
    assert checkpoint.keys() == ["q_proj.weight"]
    assert torch.equal(checkpoint.read("q_proj.weight"), weight)
    assert checkpoint.notices == [
        "ignored: kv_cache_scheme in config.json (weights alone are quantized)",
        "ignored: 2 scales of activations (attn.k_scale, for instance)",
    ]


def test_group_indices_that_were_never_set(tmp_path: Path) -> None:
    parts, weight = quantized(0, 16, 64, KIMI)
    parts["weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    config = config_of(replace(KIMI, ordered=True))
    read = open_checkpoint(write(tmp_path, named("x", parts), config)).read("x.weight")
    assert torch.equal(read, weight)


def test_older_configs(tmp_path: Path) -> None:
    """The strategy followed from the group size, blocks were text, the key had another name."""
    for form, change in (
        (KIMI, {"strategy": None}),
        (FORMS["int8-channel"], {"strategy": None, "group_size": -1}),
        (FORMS["fp8-tensor"], {"strategy": None}),
        (FORMS["fp8-block"], {"block_structure": "16x48"}),
    ):
        parts, weight = quantized(0, 16, 96, form)
        config = config_of(form)
        config["config_groups"]["group_0"]["weights"] |= change
        for owner in (
            {"compression_config": config},
            {"text_config": {"compression_config": config}},
        ):
            folder = write(tmp_path, named("x", parts), None, **owner)
            checkpoint = open_checkpoint(folder)
            assert torch.equal(checkpoint.read("x.weight"), weight)
            assert "compression_config" not in str(checkpoint.config)


class _Memory:
    """Tensors in memory in the place of a folder's."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.folder, self.source, self.config = Path("memory"), None, {}
        self.notices: list[str] = []
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str, _: object = None) -> Tensor:
        return self._tensors[key].clone()


@given(
    st.sampled_from([4, 8]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([4, 6, 32, None]),
    st.integers(0, 2**32),
)
def test_packed_codes(
    bits: int, symmetric: bool, ordered: bool, rows: int, groups: int, size: int | None, seed: int
) -> None:
    """Rows whose last word is padded, zero points whose last word is, any order of groups."""
    form = Form("pack-quantized", bits, "group", (1, size or 0), symmetric, ordered)
    cols = groups * (size or 8)
    if size is None:  # by channel, where only whole words are told from padded ones
        form = replace(form, strategy="channel", ordered=False)
    parts, weight = quantized(seed, rows, cols, form)
    settings = parse_compressed(config_of(form), Path("config.json"))
    plain = cast(FolderCheckpoint, _Memory(named("x", parts)))
    checkpoint = CompressedCheckpoint(plain, settings)
    assert checkpoint.shape("x.weight") == (rows, cols)
    assert torch.equal(checkpoint.read("x.weight"), weight)


# --- what is refused -----------------------------------------------------------------------------


def _config(form: Form = KIMI, **changes: Any) -> dict[str, Any]:
    config = config_of(form)
    group = config["config_groups"]["group_0"]
    for key, value in changes.items():
        owner = group["weights"] if key in group["weights"] else group if key in group else config
        owner[key] = value
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (_config(format="nvfp4-pack-quantized"), ["format", "pack-quantized or", "'nvfp4-"]),
        (_config(format="mxfp4-pack-quantized"), ["'mxfp4-pack-quantized'"]),
        (_config(format="marlin-24"), ["'marlin-24'", "group_0"]),
        (_config(format=None) | {"format": "dense"}, ["'dense'"]),
        ({"quant_method": "compressed-tensors"}, ["format", "None"]),
        (_config(num_bits=3), ["num_bits", "4 or 8", "got 3"]),
        (_config(num_bits="4"), ["num_bits", "'4'"]),
        (_config(num_bits=None), ["num_bits", "None"]),
        (_config(FORMS["fp8-block"], num_bits=4), ["num_bits", "wanted 8"]),
        (_config(type="float"), ["type", "'float'"]),
        (_config(strategy="tensor_group"), ["strategy", "'tensor_group'"]),
        (_config(group_size=0), ["group_size", "0"]),
        (_config(group_size="32"), ["group_size", "'32'"]),
        (_config(FORMS["fp8-block"], block_structure=[16]), ["block_structure"]),
        (_config(FORMS["fp8-block"], block_structure="16xx"), ["block_structure"]),
        (_config(FORMS["fp8-block"], block_structure=[16, 0]), ["block_structure"]),
        (_config(weights="W4A16"), ["weights", "not an object"]),
        (_config() | {"config_groups": {"W4A16": ["Linear"]}}, ["not an object", "W4A16"]),
        (_config() | {"config_groups": ["Linear"]}, ["config_groups"]),
        (_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparse-24-bitmask"]),
        (_config() | {"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config"]),
    ],
)
def test_unsupported(tmp_path: Path, config: Any, words: list[str]) -> None:
    folder = write(tmp_path, {"x": torch.ones(1)}, config)
    message = error_of(UsageError, open_checkpoint, folder)
    for word in ["config.json", *words]:
        assert word in message


def test_configs_that_say_nothing_of_weights(tmp_path: Path) -> None:
    config = _config(weights=None) | {"format": "dense", "sparsity_config": {}}
    config["transform_config"] = {"config_groups": {}}
    assert open_checkpoint(write(tmp_path, {"x": torch.ones(1)}, config)).keys() == ["x"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("kimi", "weight_scale"),
        ("fp8-block", "weight_scale"),
        ("int4-asym", "weight_zero_point"),
        ("int8-plain", "weight_zero_point"),
        ("int4-asym-act", "weight_g_idx"),
    ],
)
def test_missing_part(tmp_path: Path, name: str, part: str) -> None:
    parts, _ = quantized(0, 32, 96, FORMS[name])
    del parts[part]
    folder = write(tmp_path, named("layers.3.x", parts), config_of(FORMS[name]))
    message = error_of(IntegrityError, open_checkpoint, folder)
    assert f"layers.3.x: the quantized Linear has no {part}" in message


@pytest.mark.parametrize(
    ("name", "part", "tensor"),
    [
        ("kimi", "weight_packed", torch.zeros(32, 11, dtype=torch.int32)),
        ("kimi", "weight_packed", torch.zeros(31, 12, dtype=torch.int32)),
        ("kimi", "weight_packed", torch.zeros(384, dtype=torch.int32)),
        ("kimi", "weight_packed", torch.zeros(0, 12, dtype=torch.int32)),
        ("kimi", "weight_packed", torch.zeros(32, 12, dtype=torch.int64)),
        ("kimi", "weight_packed", torch.zeros(32, 12, dtype=torch.uint8)),
        ("kimi", "weight_scale", torch.ones(32, 2)),
        ("kimi", "weight_scale", torch.ones(3)),
        ("kimi", "weight_scale", torch.ones(())),
        ("kimi", "weight_scale", torch.ones(32, 0)),
        ("kimi", "weight_scale", torch.ones(32, 3, dtype=torch.uint8)),
        ("int8-channel", "weight_scale", torch.ones(32, 3)),
        ("int8-channel", "weight_packed", torch.zeros(32, 12, 2, dtype=torch.int32)),
        ("int4-asym", "weight_zero_point", torch.zeros(32, 6, dtype=torch.int32)),
        ("int4-asym", "weight_zero_point", torch.zeros(4, 6, dtype=torch.int8)),
        ("int4-asym-act", "weight_g_idx", torch.zeros(95, dtype=torch.int32)),
        ("int4-asym-act", "weight_g_idx", torch.zeros(96)),
        ("int8-channel", "weight_g_idx", torch.zeros(96, dtype=torch.int32)),
        ("int8-plain", "weight", torch.zeros(32, 96, dtype=torch.float8_e4m3fn)),
        ("int8-plain", "weight_zero_point", torch.zeros(32, dtype=torch.int32)),
        ("fp8-tensor", "weight", torch.zeros(32, 96, dtype=torch.bfloat16)),
        ("fp8-tensor", "weight", torch.zeros(32, dtype=torch.float8_e4m3fn)),
        ("fp8-tensor", "weight_scale", torch.ones(32, 1)),
        ("fp8-block", "weight_scale", torch.ones(2, 3)),
        ("fp8-channel", "weight_scale", torch.ones(32, 1, dtype=torch.float8_e8m0fnu)),
    ],
)
def test_shapes_that_do_not_belong_together(
    tmp_path: Path, name: str, part: str, tensor: Tensor
) -> None:
    parts, _ = quantized(0, 32, 96, FORMS[name])
    parts[part] = tensor
    folder = write(tmp_path, named("layers.3.x", parts), config_of(FORMS[name]))
    assert "layers.3.x" in error_of(IntegrityError, open_checkpoint, folder)


def test_other_widths_and_groups_than_the_configs(tmp_path: Path) -> None:
    parts, _ = quantized(0, 32, 96, KIMI)
    for changes in ({"num_bits": 8}, {"group_size": 64}, {"strategy": "channel"}):
        folder = write(tmp_path, named("x", parts), _config(**changes))
        message = error_of(IntegrityError, open_checkpoint, folder)
        assert "weight_packed (32, 12), weight_scale (32, 3)" in message
        assert "in 32-bit words, a scale per" in message


@pytest.mark.parametrize("name", ["kimi", "int8-channel"])
def test_another_shape_than_stated(tmp_path: Path, name: str) -> None:
    parts, _ = quantized(0, 32, 96, FORMS[name])
    for stated in ([32, 90], [3072], [96, 32], [32, 96, 1]):
        parts["weight_shape"] = torch.tensor(stated)
        folder = write(tmp_path, named("x", parts), config_of(FORMS[name]))
        checkpoint = open_checkpoint(folder)
        message = error_of(IntegrityError, checkpoint.read, "x.weight")
        assert "weight_shape" in message
        assert f"got {tuple(stated)}" in message


@pytest.mark.parametrize("group", [-1, 6])
def test_groups_that_are_not_there(tmp_path: Path, group: int) -> None:
    parts, _ = quantized(0, 32, 96, FORMS["int4-asym-act"])
    parts["weight_g_idx"][5] = group
    folder = write(tmp_path, named("x", parts), config_of(FORMS["int4-asym-act"]))
    checkpoint = open_checkpoint(folder)
    assert f"got {group}" in error_of(IntegrityError, checkpoint.read, "x.weight")


def test_codes_that_would_pass_for_weights(tmp_path: Path) -> None:
    parts, _ = quantized(0, 32, 96, KIMI)
    both = named("x", parts) | {"x.weight": torch.ones(32, 96)}
    alone = {"x.weight_scale": torch.ones(32, 3)}
    for kind, tensors, words in (
        (IntegrityError, both, "both quantized and not"),
        (IntegrityError, alone, "without the weight"),
        (UsageError, {"experts.up_packed": parts["weight_packed"][None]}, "experts.up_packed"),
        (UsageError, {"experts.up": torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)}, "experts.up"),
    ):
        folder = write(tmp_path, tensors, config_of(KIMI))
        assert words in error_of(kind, open_checkpoint, folder)


def test_exit_codes(tmp_path: Path, command: Command) -> None:
    parts, _ = quantized(0, 32, 96, KIMI)
    folder = Path(write(tmp_path / "source", named("x", parts), _config(num_bits=3)))
    convert = ("convert", folder, tmp_path / "out")
    assert "num_bits" in command(*convert).error(2)
    del parts["weight_scale"]
    write(folder, named("x", parts), _config())
    assert "weight_scale" in command(*convert).error(4)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])
    assert "damaged safetensors file" in command(*convert).error(4)
    assert not (tmp_path / "out").exists()
