"""What a checkpoint's config says of its quantization: GPTQ is read, FP8 and MXFP4 pass."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack_formats.errors import UsageError

from .source_files import read_json

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
KEPT_METHODS = ("fp8", "mxfp4")  # dequantized later, by transformers' own weight conversion

_WORDWISE_INT3_UNTIL = (6, 1)  # the version of GPTQModel that stored them otherwise


@dataclass(frozen=True)
class GPTQSettings:
    """What ``quantization_config`` says that the tensors do not.

    Attributes:
        bits: Code width; a Linear whose tensors have another one (GPTQModel's ``dynamic``) is read
            at its own.
        group_size: Inputs per group, -1 for one group; used where ``g_idx`` is absent.
        zeros_less_one: Zero points are stored less one (format "gptq").
        symmetric: Every zero point is half the code range.
        wordwise_int3: 3-bit zero points were stored by a GPTQModel before 6.1.
    """

    bits: int
    group_size: int
    zeros_less_one: bool
    symmetric: bool
    wordwise_int3: bool = False


def gptq_settings(config: Mapping[str, Any], folder: Path) -> GPTQSettings | None:
    """Read how a checkpoint is quantized.

    Args:
        config: The content of ``config.json``.
        folder: The checkpoint's folder; AutoGPTQ put ``quantize_config.json`` there.

    Returns:
        The settings of a GPTQ checkpoint; None when the checkpoint is not quantized, or in a way
        that is dequantized later.

    Raises:
        UsageError: It is quantized in a way that is not supported.
    """
    text = config.get("text_config")
    for owner in (config, text if isinstance(text, Mapping) else {}):
        for name in ("quantization_config", "compression_config"):
            found = owner.get(name)
            if found is None:
                continue
            if not isinstance(found, Mapping):
                raise UsageError(f"{name} is not an object", where=folder / "config.json")
            return _settings(found, _method(found), folder / "config.json")
    if os.path.lexists(folder / "quantize_config.json"):
        found = read_json(folder, "quantize_config.json")
        return _settings(found, str(found.get("quant_method") or "gptq"), folder)
    return None


def _method(found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method)


def _settings(found: Mapping[str, Any], method: str, where: Path) -> GPTQSettings | None:
    if method in KEPT_METHODS:
        return None
    if method != "gptq":
        raise UsageError(
            "the weights are quantized in a way that is not supported",
            where=where,
            wanted="unquantized, gptq, " + ", ".join(KEPT_METHODS),
            got=method,
            remedy="convert the unquantized checkpoint instead",
        )
    form = found.get("checkpoint_format") or found.get("format") or "gptq"
    if found.get("is_marlin_format"):
        form = "marlin"
    bits, group_size = found.get("bits"), found.get("group_size", -1)
    for what, wanted, got in (
        ("GPTQ format", FORMATS, form),
        ("GPTQ bits", BITS, bits),
        ("GPTQ pack_dtype", ("int32",), found.get("pack_dtype", "int32")),
        ("GPTQ rotation", (None,), found.get("rotation")),
    ):
        if got not in wanted:
            choice = " or ".join("none" if item is None else str(item) for item in wanted)
            raise UsageError(f"{what} not supported", where=where, wanted=choice, got=repr(got))
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise UsageError(
            "GPTQ group_size not supported",
            where=where,
            wanted="-1 or a positive integer",
            got=repr(group_size),
        )
    return GPTQSettings(
        bits=int(bits or 0),
        group_size=group_size,
        zeros_less_one=form == "gptq",
        symmetric=found.get("sym") is True,
        wordwise_int3=_wrote_wordwise_int3(found.get("meta")),
    )


def _wrote_wordwise_int3(meta: object) -> bool:
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    for name in quantizer if isinstance(quantizer, list) else [quantizer]:
        if found := re.match(r"gptqmodel:(\d+)\.(\d+)", str(name)):
            return (int(found[1]), int(found[2])) < _WORDWISE_INT3_UNTIL
    return False


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json`` as an unquantized checkpoint would have it."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return plain
