"""Which keys of a ``config.json`` are believed: those that transformers' own family knows.

A repository may put anything into its config. Keys that name code (``auto_map``), kernels or other
repositories are read by transformers' loaders, not by a family's model, so an allow-list of what
the family's own files declare or read keeps them all out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any, cast

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_ALWAYS = frozenset({"model_type", "tie_word_embeddings", "is_encoder_decoder"})
_NEVER = frozenset(
    {
        "auto_map",
        "_name_or_path",
        "name_or_path",
        "transformers_weights",
        # May name a repository whose kernels are then downloaded and run.
        "_attn_implementation",
        "attn_implementation",
        "_experts_implementation",
        "experts_implementation",
    }
)


def allowed_config(
    values: dict[str, Any], config_class: type[PreTrainedConfig]
) -> tuple[dict[str, Any], list[str]]:
    """Keep the keys that ``config_class`` or its model knows, in sub-configs too.

    Args:
        values: A parsed ``config.json``.
        config_class: transformers' class for its model type.

    Returns:
        The believed part, and the names of the keys that were dropped.
    """
    declared = _ALWAYS | {field.name for field in dataclasses.fields(config_class)}
    declared |= _computed(config_class) | set(config_class.attribute_map)
    declared |= _read_by_model(Path(inspect.getfile(config_class)).parent)
    declared -= _NEVER
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in values.items():
        if key not in declared:
            dropped.append(key)
            continue
        inner = config_class.sub_configs.get(key)
        if isinstance(value, dict) and isinstance(inner, type):
            value, dropped_inside = _allowed_inside(value, inner)
            dropped.extend(f"{key}.{name}" for name in dropped_inside)
        kept[key] = value
    return kept, dropped


def _allowed_inside(values: dict[str, Any], config_class: type) -> tuple[dict[str, Any], list[str]]:
    """The same for a sub-config, whose class may be left to the model type that it names."""
    if not dataclasses.is_dataclass(config_class):  # AutoConfig
        named = values.get("model_type")
        if not isinstance(named, str) or named not in CONFIG_MAPPING:
            return without_references(values)
        config_class = CONFIG_MAPPING[named]
    return allowed_config(values, cast(type[PreTrainedConfig], config_class))


def without_references(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Take away, at every depth, what names code, kernels or other repositories.

    A checkpoint's own config cannot be held to the allow-list: transformers still understands keys
    of older versions, which no class declares.

    Args:
        values: A parsed ``config.json``.

    Returns:
        The rest, and the names of the keys that were dropped. Keys with a leading underscore are
        transformers' own and go silently.
    """
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in values.items():
        name = str(key)  # some keys of a parsed config are numbers
        if name in _NEVER or name.startswith("_"):
            dropped.extend([] if name.startswith("_") else [name])
            continue
        if isinstance(value, dict):
            value, dropped_inside = without_references(value)
            dropped.extend(f"{key}.{inside}" for inside in dropped_inside)
        kept[key] = value
    return kept, dropped


@functools.cache
def _read_by_model(folder: Path) -> frozenset[str]:
    """Attributes that the family's own files read; some are in no class (DBRX's ``rope_theta``)."""
    files = [*folder.glob("configuration_*.py"), *folder.glob("modeling_*.py")]
    attributes = re.compile(r"""config\.(\w+)|config, ["'](\w+)["']""")
    found = (match for file in files for match in attributes.finditer(file.read_text("utf-8")))
    return frozenset(match.group(1) or match.group(2) for match in found)


def _computed(config_class: type[PreTrainedConfig]) -> set[str]:
    """Keys that the class adds to its own fields when it is made."""
    try:
        return set(config_class().to_dict())
    except Exception:  # a class that cannot be made without arguments adds nothing here
        return set()
