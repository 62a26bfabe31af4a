"""Which kind of quantization a checkpoint's config names, and who reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepack_formats.errors import UsageError

from .compressed_settings import CompressedSettings, parse_compressed
from .gptq_settings import GPTQSettings, parse_gptq
from .source_files import read_json

KEPT_METHODS = ("fp8", "mxfp4")  # dequantized later, by transformers' own weight conversion

Settings = GPTQSettings | CompressedSettings

_KEYS = ("quantization_config", "compression_config")


def source_settings(config: Mapping[str, Any], folder: Path) -> Settings | None:
    """Read how a checkpoint is quantized.

    Args:
        config: The content of ``config.json``.
        folder: The checkpoint's folder; AutoGPTQ put ``quantize_config.json`` there.

    Returns:
        The settings of a checkpoint that moepack dequantizes itself; None when the checkpoint is
        not quantized, or in a way that is dequantized later.

    Raises:
        UsageError: It is quantized in a way that is not supported.
    """
    text = config.get("text_config")
    for owner in (config, text if isinstance(text, Mapping) else {}):
        for name in _KEYS:
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


def _settings(found: Mapping[str, Any], method: str, where: Path) -> Settings | None:
    if method in KEPT_METHODS:
        return None
    if method == "gptq":
        return parse_gptq(found, where)
    if method == "compressed-tensors":
        return parse_compressed(found, where)
    raise UsageError(
        "the weights are quantized in a way that is not supported",
        where=where,
        wanted="unquantized, gptq, compressed-tensors, " + ", ".join(KEPT_METHODS),
        got=method,
        remedy="convert the unquantized checkpoint instead",
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json`` as an unquantized checkpoint would have it."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {k: v for k, v in text.items() if k not in _KEYS}
    return plain
