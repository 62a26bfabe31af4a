"""Write the GPTQ fixtures with the packing code of AutoGPTQ or GPTQModel themselves.

    python make_fixtures.py auto-gptq FOLDER     FOLDER holds the unpacked auto-gptq 0.7.1 wheel
    python make_fixtures.py gptqmodel FOLDER     FOLDER holds the unpacked gptqmodel sdist

README.md says which environment each of them needs. Nothing of this project is imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
AUTO_GPTQ = "0.7.1"


@dataclass(frozen=True)
class Case:
    """The settings of one fixture; `group_size` -1 is one group for all inputs."""

    bits: int
    sym: bool
    desc_act: bool
    group_size: int = 16
    checkpoint_format: str = "gptq"

    @property
    def size(self) -> tuple[int, int]:
        """(inputs, outputs). 3-bit zero points must cross a word: two runs of 32 outputs."""
        return (64, 64) if self.bits == 3 else (64, 32)

    @property
    def name(self) -> str:
        parts = [f"{self.bits}bit", "sym" if self.sym else "asym"]
        parts += ["act"] * self.desc_act + ["g-1"] * (self.group_size == -1)
        return "-".join(parts + ["v2"] * (self.checkpoint_format == "gptq_v2"))


@dataclass(frozen=True)
class Quantized:
    """A Linear with weights on the grid, and the grid, as a GPTQ run hands them to ``pack``."""

    linear: nn.Linear
    scales: torch.Tensor  # [out, groups] float32
    zeros: torch.Tensor  # [out, groups] float32
    g_idx: torch.Tensor  # [in] int32


V1_CASES = [
    Case(bits, sym, act) for bits in (4, 3) for sym in (True, False) for act in (False, True)
]
V1_CASES += [Case(bits, sym, not sym) for bits in (2, 8) for sym in (True, False)]
V1_CASES += [Case(4, False, False, group_size=-1)]
V2_CASES = [
    Case(4, False, True, checkpoint_format="gptq_v2"),
    Case(3, False, False, checkpoint_format="gptq_v2"),
    Case(4, True, False, checkpoint_format="gptq_v2"),
]
WORDWISE_CASES = [Case(3, sym, False) for sym in (True, False)]


def quantize(case: Case, seed: int, *, zero_of_zero: bool) -> Quantized:
    """Quantize a random Linear by the least and greatest value of each group of inputs.

    Args:
        case: The settings.
        seed: Of the weights and the order of the inputs.
        zero_of_zero: Make some groups positive throughout, so that their zero point is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = case.size
    size = inputs if case.group_size == -1 else case.group_size
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    g_idx = torch.arange(inputs, dtype=torch.int32) // size
    if case.desc_act:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    groups = inputs // size
    maxq = 2**case.bits - 1
    scales, zeros = torch.empty(outputs, groups), torch.empty(outputs, groups)
    for group in range(groups):
        members = g_idx == group
        if zero_of_zero and not case.sym:
            weight[::7, members] = weight[::7, members].abs()
        part = weight[:, members]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if case.sym:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, group] = (high - low) / maxq
        zeros[:, group] = (maxq + 1) / 2 if case.sym else torch.round(-low / scales[:, group])
        if not zero_of_zero:
            zeros[:, group].clamp_(min=1)
    each = g_idx.long()
    codes = torch.round(weight / scales[:, each] + zeros[:, each]).clamp(0, maxq)
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = scales[:, each] * (codes - zeros[:, each])
    return Quantized(linear.half(), scales, zeros, g_idx)


def pack_with_auto_gptq(case: Case, data: Quantized, folder: Path) -> tuple[Any, torch.Tensor, str]:
    """Pack with the class that AutoGPTQ chooses where it has no compiled kernels."""
    old = not case.desc_act or case.group_size == -1
    name = "qlinear_cuda_old" if old else "qlinear_cuda"
    # The package does not import beside current libraries; the modules of its layers do.
    path = folder / "auto_gptq" / "nn_modules" / "qlinear" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer = module.QuantLinear(case.bits, case.group_size, *case.size, False)
    layer.pack(data.linear, data.scales, data.zeros, data.g_idx)
    # It has no function that dequantizes: its forward pass does, and multiplies.
    weight = layer(torch.eye(case.size[0], dtype=torch.float16)).T
    return layer, weight, f"auto_gptq.nn_modules.qlinear.{name}.QuantLinear"


def pack_with_gptqmodel(case: Case, data: Quantized) -> tuple[Any, torch.Tensor, str]:
    """Pack, convert to the file's format and back, and dequantize, all with GPTQModel's code."""
    from gptqmodel.nn_modules.qlinear import torch as qlinear
    from gptqmodel.utils import model as utils

    cls = getattr(qlinear, "TorchLinear", None) or qlinear.TorchQuantLinear
    inputs, outputs = case.size
    layer = cls(
        bits=case.bits,
        group_size=case.group_size,
        sym=case.sym,
        desc_act=case.desc_act,
        in_features=inputs,
        out_features=outputs,
        bias=False,
    )
    layer.pack_block(data.linear, data.scales, data.zeros, data.g_idx)
    config = _gptqmodel_config(case)
    if case.checkpoint_format == "gptq":
        utils.convert_gptq_v2_to_v1_format_module(layer, config)
    stored = layer.qzeros.clone()
    if case.checkpoint_format == "gptq":
        utils.convert_gptq_v1_to_v2_format_module(layer, case.bits, torch.int32)
    layer.post_init()
    weight = layer.dequantize_weight().T
    layer.qzeros = stored
    return layer, weight, f"{cls.__module__}.{cls.__qualname__}"


def _gptqmodel_config(case: Case) -> Any:
    from gptqmodel import QuantizeConfig

    names = ("bits", "sym", "desc_act", "group_size")
    options = {name: getattr(case, name) for name in names}
    return QuantizeConfig(**options, format=case.checkpoint_format)


def quantization_config(case: Case, library: str, version: str) -> dict[str, Any]:
    """What the library writes beside the weights, less the options that do not concern a reader."""
    if library == "auto-gptq":
        settings = asdict(case)
        del settings["checkpoint_format"]
        return {**settings, "is_marlin_format": False, "quant_method": "gptq"}
    kept = ("bits", "group_size", "desc_act", "sym", "quant_method", "checkpoint_format")
    written = _gptqmodel_config(case).to_dict()
    found = {name: written[name] for name in (*kept, "pack_dtype")}
    return {**found, "meta": {"quantizer": [f"gptqmodel:{version}"]}}


def write(case: Case, library: str, folder: Path, version: str, seed: int) -> None:
    """Write ``NAME.safetensors`` and ``NAME.json`` for one case."""
    data = quantize(case, seed, zero_of_zero=library == "gptqmodel")
    if library == "auto-gptq":
        layer, weight, cls = pack_with_auto_gptq(case, data, folder)
    else:
        layer, weight, cls = pack_with_gptqmodel(case, data)
    tensors = {
        f"linear.{part}": getattr(layer, part).contiguous()
        for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    name = f"{library}-{version}-{case.name}"
    tensors["expected"] = weight.to(torch.float16).contiguous()
    save_file(tensors, HERE / f"{name}.safetensors")
    facts = {
        "library": library,
        "version": version,
        "class": cls,
        "torch": torch.__version__,
        "seed": seed,
        "quantization_config": quantization_config(case, library, version),
    }
    (HERE / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the fixtures of one library."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=["auto-gptq", "gptqmodel"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.library == "auto-gptq":
        version, cases = AUTO_GPTQ, V1_CASES
    else:
        sys.path.insert(0, str(arguments.folder))
        import gptqmodel

        version = gptqmodel.__version__
        # Until 6.1 it stored 3-bit zero points of the format "gptq" in a way of its own.
        cases = WORDWISE_CASES if int(version.split(".")[0]) < 6 else V1_CASES + V2_CASES
    for seed, case in enumerate(cases):
        write(case, arguments.library, arguments.folder, version, seed)


if __name__ == "__main__":
    main()
