"""Writes checkpoints in the compressed-tensors format, with nothing of the reader's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """One way to store weights, as a group of the config names it.

    Attributes:
        form: The format's name.
        bits: Code width.
        strategy: What shares a scale.
        tile: Outputs and inputs that do, for "group" and "block".
        symmetric: Without zero points.
        ordered: The groups' inputs are permuted.
        dtype: Of the scales.
    """

    form: str
    bits: int
    strategy: str
    tile: tuple[int, int] = (0, 0)
    symmetric: bool = True
    ordered: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_packed(self) -> bool:
        return self.form == "pack-quantized"

    @property
    def is_float(self) -> bool:
        return self.form == "float-quantized"

    def group(self) -> dict[str, Any]:
        """Its entry in ``config_groups``."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "float" if self.is_float else "int",
            "strategy": self.strategy,
            "symmetric": self.symmetric,
            "group_size": self.tile[1] if self.strategy == "group" else None,
            "block_structure": list(self.tile) if self.strategy == "block" else None,
            "actorder": "group" if self.ordered else None,
            "dynamic": False,
        }
        return {"targets": ["Linear"], "weights": weights, "format": self.form}


KIMI = Form("pack-quantized", 4, "group", (1, 32))
FORMS = {
    "kimi": KIMI,
    "int4-asym": replace(KIMI, tile=(1, 16), symmetric=False),
    "int4-asym-act": replace(KIMI, tile=(1, 16), symmetric=False, ordered=True),
    "int8-channel": Form("pack-quantized", 8, "channel"),
    "int8-plain": Form("int-quantized", 8, "channel", symmetric=False),
    "fp8-tensor": Form("float-quantized", 8, "tensor", dtype=torch.float32),
    "fp8-channel": Form("float-quantized", 8, "channel"),
    "fp8-block": Form("float-quantized", 8, "block", (16, 48), dtype=torch.float32),
}


def config_of(*forms: Form) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with weights of some forms."""
    names = {form.form for form in forms}
    return {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": form.group() for i, form in enumerate(forms)},
    }


def pack_rows(codes: np.ndarray[Any, Any], bits: int) -> Tensor:
    """Pack signed codes ``[n, m]`` along m, as offset binary, word by word."""
    count = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // count)), dtype=np.int64)
    for column in range(codes.shape[1]):
        code = codes[:, column].astype(np.int64) + 2 ** (bits - 1)
        words[:, column // count] |= code << (bits * (column % count))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def quantized(seed: int, rows: int, cols: int, form: Form) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random Linear, by the part's name, and its weight ``[rows, cols]``."""
    generator = np.random.default_rng(seed)
    high, wide = {"tensor": (rows, cols), "channel": (1, cols)}.get(form.strategy, form.tile)
    grid = -(-rows // high), -(-cols // wide)
    scales = torch.from_numpy(generator.uniform(0.005, 0.02, grid)).to(form.dtype)
    low = -(2 ** (form.bits - 1))
    zeros = np.zeros(grid, dtype=np.int64)
    if not form.symmetric:
        zeros = generator.integers(low, -low, grid)
    group = np.arange(cols) // wide
    if form.ordered:
        group = generator.permutation(group)
    if form.is_float:
        codes = torch.from_numpy(generator.normal(0, 30, (rows, cols))).to(torch.float8_e4m3fn)
    else:
        integers = generator.integers(low, -low, (rows, cols))
        codes = torch.from_numpy(integers).to(torch.int8)
    place = np.arange(rows)[:, None] // high, group[None, :]
    steps = codes.double() - torch.from_numpy(zeros[place])
    weight = (steps * scales.double()[place]).to(form.dtype)
    # A scale of the whole tensor is stored in one dimension.
    parts = {"weight_scale": scales.view(1) if form.strategy == "tensor" else scales}
    if form.is_packed:
        parts["weight_packed"] = pack_rows(integers, form.bits)
        parts["weight_shape"] = torch.tensor([rows, cols])
    else:
        parts["weight"] = codes
    if not form.symmetric and form.is_packed:
        parts["weight_zero_point"] = pack_rows(zeros.T, form.bits).T.contiguous()
    elif not form.symmetric:
        parts["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
    if form.ordered:
        parts["weight_g_idx"] = torch.from_numpy(group).int()
    return parts, weight


def named(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of Linear ``name`` as a checkpoint names them."""
    return {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}


def quantize_linears(
    tensors: dict[str, Tensor], config: dict[str, Any], experts: Form, attention: Form | None = None
) -> dict[str, Tensor]:
    """Put a quantized Linear in the place of each expert's, and of each of the attention's.

    Returns:
        What their weights are now, by key.
    """
    weights: dict[str, Tensor] = {}
    for seed, (key, value) in enumerate(sorted(tensors.items())):
        form = experts if ".experts." in key else attention if "self_attn" in key else None
        if form is None or value.dim() != 2:
            continue
        rows, cols = value.shape
        parts, weights[key] = quantized(seed, rows, cols, form)
        del tensors[key]
        tensors |= named(key.removesuffix(".weight"), parts)
    config["quantization_config"] = config_of(*dict.fromkeys([experts, attention or experts]))
    return weights
