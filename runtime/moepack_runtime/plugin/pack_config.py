"""The config of a pack: a model type that only moepack knows, around the family's own config.

Without moepack's registration transformers refuses the type, instead of warning of missing experts
and running on random ones.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from moepack_formats.errors import FormatError

from .config_guard import allowed_config

MODEL_TYPE = "moepack"
BASE_MODEL_TYPE_KEY = "base_model_type"

logger = logging.getLogger(__name__)


class PackedModelConfig(PreTrainedConfig):
    """Reads a pack's ``config.json`` and gives the config of the family inside."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The inner config, with only the keys that its class declares.

        Raises:
            FormatError: The family is not named or not known to the installed transformers, a
                value does not fit it, or the config does not name moepack's quantization: without
                that, transformers would make up the experts.
        """
        values = dict(config_dict)
        family = values.pop(BASE_MODEL_TYPE_KEY, None)
        quantization = values.pop("quantization_config", None)
        if not isinstance(family, str) or family not in CONFIG_MAPPING or family == MODEL_TYPE:
            raise FormatError(
                "transformers does not know the model's family",
                where=f"config.json: {BASE_MODEL_TYPE_KEY}",
                got=repr(family),
                remedy="upgrade transformers",
            )
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method != MODEL_TYPE:
            raise FormatError(
                "the config of a pack must name its quantization",
                where="config.json: quantization_config",
                wanted=f"quant_method {MODEL_TYPE}",
                got=method,
                remedy="restore the file or convert again",
            )
        values["model_type"] = family
        inner = CONFIG_MAPPING[family]
        believed, dropped = allowed_config(values, inner)
        if dropped:
            logger.warning("ignored keys of config.json: %s", ", ".join(sorted(dropped)))
        believed["quantization_config"] = quantization
        try:
            return inner.from_dict(believed, **kwargs)
        except Exception as error:  # the validators of configs raise whatever they like
            raise FormatError(
                f"not a valid configuration of a {family} model",
                where="config.json",
                got=f"{type(error).__name__}: {error}",
            ) from error


AutoConfig.register(MODEL_TYPE, PackedModelConfig)
