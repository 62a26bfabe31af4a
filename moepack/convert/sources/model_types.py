"""Model types of checkpoints that transformers knows under another name.

Such a checkpoint brings code of its own, which is never run; its publisher says that the model is
the other one.
"""

from __future__ import annotations

_SAME_AS = {"kimi_k2": "deepseek_v3"}


def known_as(model_type: object) -> str | None:
    """The model type that transformers has in the place of one that it does not know, if any."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type in CONFIG_MAPPING:
        return None
    return _SAME_AS.get(model_type)
