"""Loading a pack as a transformers model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moepack_formats import osio
from moepack_formats.errors import FormatError, UsageError
from moepack_formats.pack import read_manifest
from moepack_formats.paths import resolve_inside

from .gpu.tier import resolve_device
from .hub.locate import locate_pack
from .options import options
from .plugin import quantizer
from .plugin.auto_class import auto_class_of
from .plugin.pack_config import BASE_MODEL_TYPE_KEY


def load_pack(
    folder: Path | str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> Any:
    """Load a pack.

    Args:
        folder: The pack's folder, or its Hub id.
        revision: Branch, tag or commit of a Hub id.
        dtype: What the trunk computes in; None for float32 on the CPU and bfloat16 on a GPU
            (float16 where that has no bfloat16).
        changes: Fields of :class:`moepack_runtime.options.RuntimeOptions`.

    Returns:
        The transformers model; ``model.moepack`` has the counters.

    Raises:
        MoepackError: The folder is not a valid pack, or does not fit.
    """
    path = locate_pack(str(folder), revision=revision)
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # safetensors takes no other
        raise UsageError("the folder's name is not UTF-8", where=path, remedy="rename it") from None
    # Before transformers, which has longer and vaguer messages.
    for name in ("config.json", *read_manifest(path).trunk_files):
        os.close(osio.open_regular(resolve_inside(path, name)))
    auto_class = _auto_class(path)
    quantizer.model_is_built.set(False)
    try:
        with options(**changes) as chosen:
            dtype = dtype or chosen.dtype or _usual_dtype(resolve_device(chosen))
            with options(dtype=dtype):
                model: PreTrainedModel = auto_class.from_pretrained(
                    path, dtype=dtype, local_files_only=True, trust_remote_code=False
                )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if quantizer.model_is_built.get():  # a defect of ours or of transformers, not the config's
            raise
        raise FormatError(
            "transformers cannot build the model that config.json describes",
            where=path,
            got=f"{type(error).__name__}: {error}",
        ) from error
    return model


def _usual_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_tokenizer(folder: Path | str) -> Any | None:
    """The pack's tokenizer, or None when the source had none.

    Raises:
        FormatError: transformers cannot read its files, or they ask for code.
    """
    path = Path(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((path / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions
        raise FormatError(
            "transformers cannot read the tokenizer",
            where=path,
            got=f"{type(error).__name__}: {error}",
            remedy="restore the file or convert again",
        ) from error


def _auto_class(path: Path) -> Any:
    """The auto class that knows the model inside; most are causal, some are multimodal."""
    try:
        family = json.loads((path / "config.json").read_bytes())[BASE_MODEL_TYPE_KEY]
        config_class = CONFIG_MAPPING[family]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise FormatError(
            "config.json names no family that transformers knows", where=path, got=error
        ) from None
    return auto_class_of(config_class)
