"""What the config of a GPTQ checkpoint says of its quantization."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepack_formats.errors import UsageError

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")

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


def parse_gptq(found: Mapping[str, Any], where: Path) -> GPTQSettings:
    """Read a GPTQ ``quantization_config``.

    Args:
        found: Its content.
        where: The file it is in, for messages.

    Raises:
        UsageError: It is a form of GPTQ that is not supported.
    """
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
