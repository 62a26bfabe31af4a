from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moepack.convert.sources.bitstream import unpack_bits
from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.gptq_codes import decode_zeros
from moepack.convert.sources.gptq_settings import GPTQSettings
from moepack_formats.errors import IntegrityError, MoepackError, UsageError

ASSETS = Path(__file__).parents[2] / "assets" / "gptq"
FIXTURES = sorted(path.stem for path in ASSETS.glob("*.safetensors"))
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}


def pack(codes: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """Pack codes [n, m] along n into int32 words, one bit at a time."""
    count, columns = codes.shape
    stream = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    flat = stream.reshape(count * bits, columns).astype(np.uint8)
    flat = np.pad(flat, ((0, -len(flat) % 32), (0, 0)))
    packed = np.packbits(flat, axis=0, bitorder="little")  # u8 [bytes, m]
    words = np.ascontiguousarray(packed.T).view("<i4").T
    return torch.from_numpy(words.copy())


def linear(
    seed: int, outputs: int, inputs: int, bits: int = 4, group: int = 32
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A Linear packed in the way of the format "gptq", and its weight [out, in]."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**bits, (inputs, outputs))
    groups = inputs // group
    zeros = generator.integers(1, 2**bits, (groups, outputs))
    scales = torch.from_numpy(generator.uniform(0.01, 0.1, (groups, outputs))).half()
    g_idx = torch.from_numpy(generator.permutation(np.arange(inputs) // group)).int()
    tensors = {
        "qweight": pack(codes, bits),
        "qzeros": pack((zeros - 1).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx,
    }
    steps = torch.from_numpy(codes - zeros[g_idx.numpy()]).short()
    return tensors, (scales[g_idx.long()] * steps).T.contiguous()


def write(folder: Path, tensors: dict[str, torch.Tensor], config: Any = None, **top: Any) -> str:
    folder.mkdir(exist_ok=True)
    document = {"model_type": "mixtral", **top}
    if config is not None:
        document["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(document))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def named(name: str, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}


def quantize_linears(
    tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Put a GPTQ Linear in the place of each of a model's experts' and attentions'.

    Returns:
        What their weights are now, by key.
    """
    weights: dict[str, torch.Tensor] = {}
    for seed, (key, value) in enumerate(sorted(tensors.items())):
        if "experts" not in key and "self_attn" not in key:
            continue
        parts, weights[key] = linear(seed, *value.shape)
        del tensors[key]
        tensors |= named(key.removesuffix(".weight"), parts)
    config["quantization_config"] = CONFIG
    return weights


# --- what the real libraries wrote ---------------------------------------------------------------


def test_the_fixtures_are_there() -> None:
    assert len(FIXTURES) == 31
    assert sum(path.stat().st_size for path in ASSETS.iterdir() if path.is_file()) < 300_000


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("beside", [False, True], ids=["config.json", "quantize_config.json"])
def test_exact_weights(tmp_path: Path, name: str, beside: bool) -> None:
    facts = json.loads((ASSETS / f"{name}.json").read_text())
    expected = load_file(ASSETS / f"{name}.safetensors")["expected"]
    shutil.copy(ASSETS / f"{name}.safetensors", tmp_path / "model.safetensors")
    config = facts["quantization_config"]
    if beside:
        (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    top = {} if beside else {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **top}))
    checkpoint = open_checkpoint(str(tmp_path))
    assert sorted(checkpoint.keys()) == ["expected", "linear.weight"]
    assert checkpoint.shape("linear.weight") == tuple(expected.shape)
    assert checkpoint.dtype("linear.weight") is torch.float16
    assert checkpoint.nbytes("linear.weight") == expected.nbytes
    assert checkpoint.config == {"model_type": "mixtral"}
    assert torch.equal(checkpoint.read("linear.weight"), expected)


def test_the_fixtures_hold_what_is_hard() -> None:
    def zeros(name: str) -> torch.Tensor:
        tensors = load_file(ASSETS / f"{name}.safetensors")
        config = json.loads((ASSETS / f"{name}.json").read_text())["quantization_config"]
        form = GPTQSettings(
            bits=config["bits"],
            group_size=config["group_size"],
            zeros_less_one=config["checkpoint_format"] == "gptq",
            symmetric=config["sym"],
        )
        return decode_zeros(tensors["linear.qzeros"], form.bits, 32, form)

    # Zero points of 0 are stored as -1: the borrow reaches into the next zero point.
    assert int(zeros("gptqmodel-7.7.0-4bit-asym").min()) == 0
    order = load_file(ASSETS / "gptqmodel-7.7.0-4bit-asym-act.safetensors")["linear.g_idx"]
    assert not torch.equal(order, order.sort().values)


# --- a whole checkpoint --------------------------------------------------------------------------


def test_small_mixtral(tmp_path: Path) -> None:
    hidden, intermediate = 32, 64
    tensors = {"model.embed_tokens.weight": torch.randn(50, hidden).half()}
    expected = dict(tensors)
    moe = "model.layers.0.block_sparse_moe"
    tensors[f"{moe}.gate.weight"] = expected[f"{moe}.gate.weight"] = torch.randn(2, hidden).half()
    shapes = {f"{moe}.experts.{e}.w{w}": (intermediate, hidden) for e in range(2) for w in (1, 3)}
    shapes |= {f"{moe}.experts.{e}.w2": (hidden, intermediate) for e in range(2)}
    shapes |= {f"model.layers.0.self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    for seed, (name, (outputs, inputs)) in enumerate(shapes.items()):
        parts, weight = linear(seed, outputs, inputs)
        tensors |= named(name, parts)
        expected[f"{name}.weight"] = weight
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors[bias] = expected[bias] = torch.randn(hidden).half()
    checkpoint = open_checkpoint(write(tmp_path, tensors, CONFIG, num_local_experts=2))
    assert sorted(checkpoint.keys()) == sorted(expected)
    assert checkpoint.config == {"model_type": "mixtral", "num_local_experts": 2}
    assert checkpoint.source.id == tmp_path.name
    for key, tensor in expected.items():
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert checkpoint.dtype(key) is torch.float16
        assert checkpoint.nbytes(key) == tensor.nbytes
        assert torch.equal(checkpoint.read(key), tensor)
    key = f"{moe}.experts.1.w2.weight"
    part = checkpoint.read(key, (slice(3, 9), slice(0, 40)))
    assert torch.equal(part, expected[key][3:9, :40])
    assert part.is_contiguous()
    checkpoint.close()


def test_file_names_of_auto_gptq(tmp_path: Path) -> None:
    parts, weight = linear(0, 32, 32)
    write(tmp_path, named("x", parts))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert torch.equal(open_checkpoint(str(tmp_path)).read("x.weight"), weight)


@pytest.mark.parametrize("group_size", [32, -1])
def test_without_g_idx(tmp_path: Path, group_size: int) -> None:
    parts, _ = linear(0, 32, 64, group=64 if group_size == -1 else 32)
    parts["g_idx"] = torch.arange(64).int() // (64 if group_size == -1 else 32)
    config = CONFIG | {"group_size": group_size}
    whole = open_checkpoint(write(tmp_path / "a", named("x", parts), config)).read("x.weight")
    del parts["g_idx"]
    without = open_checkpoint(write(tmp_path / "b", named("x", parts), config)).read("x.weight")
    assert torch.equal(whole, without)


def test_modules_of_other_widths(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[int, torch.Tensor] = {}
    for bits in (2, 3, 4, 8):
        parts, expected[bits] = linear(bits, 64, 96, bits)
        tensors |= named(f"x{bits}", parts)
    checkpoint = open_checkpoint(
        write(tmp_path, tensors, CONFIG | {"dynamic": {"+:x2": {"bits": 2}}})
    )
    for bits, weight in expected.items():
        assert torch.equal(checkpoint.read(f"x{bits}.weight"), weight)


def test_many_inputs_are_decoded_in_parts(tmp_path: Path) -> None:
    parts, weight = linear(1, 32, 2592)
    checkpoint = open_checkpoint(write(tmp_path, named("x", parts), CONFIG))
    assert torch.equal(checkpoint.read("x.weight"), weight)


def test_scales_in_bfloat16(tmp_path: Path) -> None:
    parts, _ = linear(1, 32, 32)
    parts["scales"] = parts["scales"].bfloat16()
    checkpoint = open_checkpoint(write(tmp_path, named("x", parts), CONFIG))
    assert checkpoint.dtype("x.weight") is torch.bfloat16
    assert checkpoint.read("x.weight").dtype is torch.bfloat16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_points_stored_as_they_are(bits: int) -> None:
    form = GPTQSettings(bits=bits, group_size=32, zeros_less_one=True, symmetric=True)
    half = 2 ** (bits - 1)
    for stored in (half, half - 1):
        words = pack(np.full((64, 3), stored), bits).T.contiguous()
        assert torch.equal(decode_zeros(words, bits, 64, form), torch.full((3, 64), half).short())


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 150), st.integers(1, 3), st.integers(0, 2**32))
def test_bitstream(bits: int, count: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (count, columns))
    unpacked = unpack_bits(pack(codes, bits), bits, count)
    assert unpacked.dtype is torch.uint8
    assert np.array_equal(unpacked.numpy(), codes)


@given(st.sampled_from([2, 4, 8]), st.integers(0, 2**32))
def test_zero_points_less_one_in_whole_words(bits: int, seed: int) -> None:
    zeros = np.random.default_rng(seed).integers(0, 2**bits, (64, 2))
    words = pack(zeros, bits).T.contiguous()
    ones = sum(1 << shift for shift in range(0, 32, bits))
    less = torch.from_numpy((words.numpy().astype(np.int64) - ones).astype(np.int32))
    form = GPTQSettings(bits=bits, group_size=32, zeros_less_one=True, symmetric=False)
    assert np.array_equal(decode_zeros(less, bits, 64, form).numpy(), zeros.T)


# --- what is refused -----------------------------------------------------------------------------


def error_of(kind: type[MoepackError], folder: str) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, ["awq", "gptq", "fp8", "mxfp4"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes"]),
        ({"load_in_8bit": True}, ["bitsandbytes"]),
        ({"quant_method": "auto-round", "bits": 4}, ["auto-round"]),
        ({"bits": 4}, ["None"]),
        (CONFIG | {"bits": 5}, ["bits", "2 or 3 or 4 or 8", "5"]),
        (CONFIG | {"bits": "4"}, ["bits"]),
        (CONFIG | {"bits": None}, ["bits"]),
        (CONFIG | {"bits": [4]}, ["bits"]),
        (CONFIG | {"checkpoint_format": "marlin"}, ["marlin", "gptq_v2"]),
        (CONFIG | {"checkpoint_format": "gptq_p"}, ["gptq_p"]),
        (CONFIG | {"is_marlin_format": True}, ["marlin"]),
        (CONFIG | {"group_size": 0}, ["group_size"]),
        (CONFIG | {"group_size": "128"}, ["group_size"]),
        (CONFIG | {"pack_dtype": "int16"}, ["pack_dtype"]),
        (CONFIG | {"rotation": "hadamard"}, ["rotation"]),
        ("gptq", ["not an object"]),
    ],
)
def test_unsupported(tmp_path: Path, config: Any, words: list[str]) -> None:
    message = error_of(UsageError, write(tmp_path, {"x": torch.ones(1)}, config))
    for word in words:
        assert word in message


def test_unsupported_beside_and_nested(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.ones(1)})
    (tmp_path / "quantize_config.json").write_text('{"quant_method": "awq"}')
    assert "awq" in error_of(UsageError, str(tmp_path))
    text = {"quantization_config": {"quant_method": "vptq"}}
    assert "vptq" in error_of(UsageError, write(tmp_path, {"x": torch.ones(1)}, text_config=text))


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_kept_for_later(tmp_path: Path, method: str) -> None:
    config = {"quant_method": method}
    checkpoint = open_checkpoint(write(tmp_path, {"x": torch.ones(1)}, config))
    assert checkpoint.config["quantization_config"] == config


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_part(tmp_path: Path, part: str) -> None:
    parts, _ = linear(0, 32, 32)
    del parts[part]
    message = error_of(IntegrityError, write(tmp_path, named("layers.3.x", parts), CONFIG))
    assert "layers.3.x" in message
    assert part in message


def test_quantized_and_not(tmp_path: Path) -> None:
    tensors = named("x", linear(0, 32, 32)[0]) | {"x.weight": torch.ones(32, 32)}
    assert "x.weight" in error_of(IntegrityError, write(tmp_path, tensors, CONFIG))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("qweight", torch.zeros(5, 32, dtype=torch.int32)),
        ("qweight", torch.zeros(4, dtype=torch.int32)),
        ("qweight", torch.zeros(4, 32, dtype=torch.int64)),
        ("qzeros", torch.zeros(1, 5, dtype=torch.int32)),
        ("scales", torch.zeros(1, 31, dtype=torch.float16)),
        ("scales", torch.zeros(1, 32, dtype=torch.int32)),
        ("scales", torch.zeros(0, 32, dtype=torch.float16)),
        ("g_idx", torch.zeros(40, dtype=torch.int32)),
        ("g_idx", torch.zeros(0, dtype=torch.int32)),
        ("g_idx", torch.zeros(32, 1, dtype=torch.int32)),
    ],
)
def test_shapes_that_do_not_belong_together(
    tmp_path: Path, part: str, tensor: torch.Tensor
) -> None:
    parts, _ = linear(0, 32, 32)
    parts[part] = tensor
    assert "x" in error_of(IntegrityError, write(tmp_path, named("x", parts), CONFIG))


@pytest.mark.parametrize("group", [-1, 1])
def test_groups_that_are_not_there(tmp_path: Path, group: int) -> None:
    parts, _ = linear(0, 32, 32)
    parts["g_idx"][5] = group
    checkpoint = open_checkpoint(write(tmp_path, named("x", parts), CONFIG))
    with pytest.raises(IntegrityError, match=f"got {group}"):
        checkpoint.read("x.weight")
