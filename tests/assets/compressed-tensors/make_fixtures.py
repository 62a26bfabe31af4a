"""Write the compressed-tensors fixtures with the code of the library itself.

    python make_fixtures.py

README.md says which environments it needs. Nothing of this project is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

HERE = Path(__file__).parent
WITH_G_IDX = "0.15.0"


@dataclass(frozen=True)
class Case:
    """One fixture: how its weight is quantized and stored."""

    name: str
    form: str
    weights: dict[str, Any]
    size: tuple[int, int] = (24, 64)  # outputs, inputs
    dtype: torch.dtype = torch.bfloat16  # of the scales
    activations: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", {"type": "int", "symmetric": True, **self.weights})


def _group(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "group", "group_size": size, **more}


def _byte(kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": strategy, **more}


_PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
_PACK, _INT, _FLOAT, _NAIVE = (f"{name}-quantized" for name in ("pack", "int", "float", "naive"))
CASES = [
    Case("pack-4bit-sym-g32", _PACK, _group(4, 32)),  # as in Kimi-K2-Thinking
    Case("pack-4bit-asym-g16", _PACK, _group(4, 16, symmetric=False), dtype=torch.float16),
    Case("pack-8bit-asym-g32", _PACK, _group(8, 32, symmetric=False), size=(21, 64)),
    Case("pack-4bit-g4-padded", _PACK, _group(4, 4, symmetric=False), size=(13, 60)),
    Case("pack-8bit-sym-channel", _PACK, {"num_bits": 8, "strategy": "channel"}),
    Case(
        "pack-4bit-asym-channel",
        _PACK,
        {"num_bits": 4, "strategy": "channel", "symmetric": False},
    ),
    Case("pack-4bit-sym-tensor", _PACK, {"num_bits": 4, "strategy": "tensor"}, dtype=torch.float32),
    Case("int-sym-channel", _INT, _byte("int", "channel"), activations=_PER_TOKEN),
    Case("int-asym-channel", _INT, _byte("int", "channel", symmetric=False), dtype=torch.float16),
    Case("int-sym-tensor", _INT, _byte("int", "tensor")),
    Case("float-channel", _FLOAT, _byte("float", "channel")),
    Case("float-tensor", _FLOAT, _byte("float", "tensor"), dtype=torch.float32),
    Case("float-block", _FLOAT, _byte("float", "block", block_structure=[16, 32]), size=(40, 80)),
    Case("float-group", _FLOAT, _byte("float", "group", group_size=16)),
    Case("naive-4bit", _NAIVE, {"num_bits": 4, "strategy": "channel"}),
]
CASES_WITH_G_IDX = [
    Case("pack-4bit-sym-act", _PACK, _group(4, 16, actorder="group")),
    Case("pack-8bit-asym-act", _PACK, _group(8, 16, symmetric=False, actorder="group")),
]


def _scale_shape(case: Case) -> tuple[int, ...]:
    rows, cols = case.size
    if case.weights["strategy"] == "group":
        return rows, cols // case.weights["group_size"]
    if case.weights["strategy"] == "block":
        high, wide = case.weights["block_structure"]
        return -(-rows // high), -(-cols // wide)
    return (1,) if case.weights["strategy"] == "tensor" else (rows, 1)


def write(seed: int, case: Case) -> None:
    generator = torch.Generator().manual_seed(seed)
    args = QuantizationArgs(**case.arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=case.form)
    shape = _scale_shape(case)
    bits = case.weights["num_bits"]
    top = 448 if args.type == "float" else 2 ** (bits - 1)
    weight = torch.randn(case.size, generator=generator).to(case.dtype)
    scale = (torch.rand(shape, generator=generator) + 0.5) * 2.5 / top
    state = {"weight": weight, "weight_scale": scale.to(case.dtype)}
    if not args.symmetric:
        zeros = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator)
        state["weight_zero_point"] = zeros.to(torch.int8)
    if case.weights.get("actorder"):
        groups = torch.arange(case.size[1]) // case.weights["group_size"]
        order = torch.randperm(case.size[1], generator=generator)
        state["weight_g_idx"] = groups[order].to(torch.int32)
    compressor = BaseCompressor.get_value_from_registry(case.form)
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    tensors = {f"linear.{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file({**tensors, "expected": expected.contiguous()}, HERE / f"{case.name}.safetensors")
    config = {
        "quant_method": "compressed-tensors",
        "format": case.form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": args.model_dump(mode="json"),
                "input_activations": case.activations,
                "output_activations": None,
            }
        },
    }
    facts = {
        "library": f"compressed-tensors {version('compressed-tensors')}",
        "seed": seed,
        "quantization_config": config,
    }
    (HERE / f"{case.name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    old = version("compressed-tensors") == WITH_G_IDX
    for number, one in enumerate(CASES_WITH_G_IDX if old else CASES):
        write(number, one)
