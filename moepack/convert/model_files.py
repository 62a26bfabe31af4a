"""The small files of a pack: config, generation config, tokenizer.

Only data is carried over, never code: no ``.py``, no pickle, no ``auto_map``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moepack_formats import FORMAT_VERSION, osio
from moepack_formats.errors import FormatError
from moepack_runtime.plugin.config_guard import allowed_config, without_references
from moepack_runtime.plugin.pack_config import BASE_MODEL_TYPE_KEY, MODEL_TYPE

from .plan import ConversionPlan

_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
)
_COPIED_PATTERNS = ("*.tiktoken",)
_FILTERED = ("tokenizer_config.json", "generation_config.json", "preprocessor_config.json")
_NAMES_CODE = ("auto_map", "custom_generate", "trust_remote_code")


def write_model_files(plan: ConversionPlan, out: Path) -> tuple[list[str], list[str]]:
    """Write config and tokenizer files.

    Args:
        plan: The conversion.
        out: The output folder.

    Returns:
        Names of the files written, and one line for each thing that was left out.
    """
    config, notices = pack_config(plan)
    files, dropped = tokenizer_files(plan.checkpoint.folder)
    notices.extend(dropped)
    written = {"config.json": _json(config), **files}
    for name, data in written.items():
        osio.write_file(out / name, data)
    return sorted(written), notices


def tokenizer_files(source: Path) -> tuple[dict[str, bytes], list[str]]:
    """The small files of a source that go into a pack as they are, but for what names code.

    Returns:
        Their contents by name, and one line for each thing that was left out.
    """
    found: dict[str, bytes] = {}
    notices: list[str] = []
    for name in _FILTERED:
        if (source / name).is_file():
            found[name], dropped = _without_code(source / name)
            notices.extend(f"ignored {key!r} in {name}: code is never run" for key in dropped)
    names = [*_COPIED, *(p.name for pattern in _COPIED_PATTERNS for p in source.glob(pattern))]
    for name in names:
        if (source / name).is_file():
            with osio.io_errors(source / name):
                found[name] = (source / name).read_bytes()
    return found, notices


def pack_config(plan: ConversionPlan) -> tuple[dict[str, Any], list[str]]:
    """``config.json`` of the pack: the family's declared keys, under a type of our own.

    Without moepack's plug-in transformers does not know the type and refuses the pack.
    """
    model = plan.model
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    kept, dropped = allowed_config(values, type(model.config))
    kept.pop("transformers_version", None)
    family = kept.pop("model_type", model.config.model_type)
    config = {
        "model_type": MODEL_TYPE,
        BASE_MODEL_TYPE_KEY: family,
        **kept,
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": {"quant_method": MODEL_TYPE, "format_version": FORMAT_VERSION},
    }
    _, references = without_references(plan.checkpoint.config)
    odd = [key for key in dropped if not key.startswith("_") and values.get(key) is not None]
    notices = [f"ignored {key!r} in config.json: not a field of {family}" for key in odd]
    notices += [f"ignored {key!r} in config.json: code is never loaded" for key in references]
    return config, notices


def _without_code(path: Path) -> tuple[bytes, list[str]]:
    with osio.io_errors(path):
        data = path.read_bytes()
    try:
        values = json.loads(data)
    except ValueError as error:
        raise FormatError(f"JSON does not parse: {error}", where=path) from None
    if not isinstance(values, dict):
        raise FormatError("not a JSON object", where=path)
    dropped = [key for key in _NAMES_CODE if key in values]
    for key in dropped:
        del values[key]
    return (_json(values) if dropped else data), dropped


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"
