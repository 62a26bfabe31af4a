"""The model a checkpoint belongs to, built on the meta device: names and shapes, no weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moepack.convert.sources.checkpoint import Checkpoint
from moepack.convert.sources.model_types import known_as
from moepack_formats.errors import UsageError
from moepack_runtime.experts import supported_experts
from moepack_runtime.plugin.auto_class import auto_class_of
from moepack_runtime.plugin.config_guard import without_references


def build_meta_model(
    config: Mapping[str, Any], *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Builds the model of a ``config.json`` without weights.

    Code that comes with a checkpoint is never run: ``auto_map`` is ignored, and the model has to
    be one that the installed transformers knows.

    Args:
        config: The contents of ``config.json``. ``quantization_config`` is ignored here.
        dtype: The dtype to use when the config names none (see ``stored_dtype``); float32 by
            default.

    Returns:
        The model on the meta device, in evaluation mode, in the config's dtype.

    Raises:
        UsageError: The model type is unknown or is not a text generation model, or the config
            does not fit it.
    """
    parsed = parse_config(config)
    auto_class = auto_class_of(type(parsed))
    model_type = parsed.model_type
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(
                parsed, dtype=parsed.dtype or dtype or torch.float32, trust_remote_code=False
            )
    except ImportError as e:
        raise UsageError(
            f"transformers needs another package for a {model_type} model",
            where="config.json",
            got=f"{type(e).__name__}: {e}",
            remedy="install it",
        ) from e
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise _invalid(model_type, e) from e
    model.eval()
    return model


def parse_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Turns a ``config.json`` into transformers' config object of its model type.

    Raises:
        UsageError: The model type is absent or unknown, or a value does not fit.
    """
    # Infinity is not JSON, so transformers writes it, and other such floats, as an object.
    options: dict[str, Any] = PreTrainedConfig._decode_special_floats(copy.deepcopy(dict(config)))
    options.pop("quantization_config", None)
    options, _ = without_references(options)
    model_type = options.get("model_type")
    if (known := known_as(model_type)) is not None:
        model_type = options["model_type"] = known
    if model_type == "moepack":
        raise UsageError(
            "this is already a pack", where="config.json", remedy="convert the original checkpoint"
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UsageError(
            "transformers does not know this model type",
            where="config.json",
            got=repr(model_type),
            remedy=supported_experts(),
        )
    try:
        parsed: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(options)
    except Exception as e:  # the validators of configs raise whatever they like
        raise _invalid(model_type, e) from e
    return parsed


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype to build the model in when its config names none.

    Returns:
        That of the first tensor that is plain floating point; scales and codes of quantized
        tensors do not count. None when there is no such tensor.
    """
    plain = (torch.bfloat16, torch.float16, torch.float32)
    keys = checkpoint.keys()
    dtypes = (checkpoint.dtype(key) for key in keys if "scale" not in key)
    return next((dtype for dtype in dtypes if dtype in plain), None)


def _invalid(model_type: str, error: Exception) -> UsageError:
    return UsageError(
        f"not a valid configuration of a {model_type} model",
        where="config.json",
        got=f"{type(error).__name__}: {error}",
    )
