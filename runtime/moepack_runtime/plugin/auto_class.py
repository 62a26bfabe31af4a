"""Which of transformers' auto classes builds the model of a config."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

from moepack_formats.errors import UsageError

from ..experts import supported_experts

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def auto_class_of(config_class: type[PreTrainedConfig]) -> Any:
    """The auto class that generates text with this config: causal, or multimodal if need be.

    Raises:
        UsageError: transformers has none.
    """
    for auto_class in _AUTO_CLASSES:
        if config_class in auto_class._model_mapping:
            return auto_class
    raise UsageError(
        f"transformers has no text generation model of type {config_class.model_type}",
        where="config.json",
        remedy=supported_experts(),
    )


def classes_of(config_class: type[PreTrainedConfig]) -> tuple[type, ...]:
    """The model classes that generate text with this config."""
    found: list[Any] = []
    for auto_class in _AUTO_CLASSES:
        if config_class in auto_class._model_mapping:
            one = auto_class._model_mapping[config_class]
            found += one if isinstance(one, (tuple, list)) else [one]
    return tuple(dict.fromkeys(found))
