"""What a user may choose about a conversion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from moepack_formats.errors import UsageError
from moepack_formats.schemes import DEFAULT_SCHEME, SCHEMES

RAW_SCHEMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}

INTEGER_BITS = (*DEFAULT_SCHEME, 16)
HEAD_BITS = tuple(bits for bits in INTEGER_BITS if bits >= 4)

MIXES = ("expert", "layer", "none")


@dataclass(frozen=True)
class ConvertOptions:
    """Choices that decide the bytes of a pack.

    Attributes:
        attn_bits: Width of the trunk's Linears: 2, 3, 4, 6, 8 or 16.
        expert_bits: An integer as ``attn_bits``, or a decimal that caps the true bits a weight.
        head_bits: Width of embeddings and output head: 4, 6, 8 or 16.
        scheme: Exact scheme of the experts; overrides ``expert_bits``.
        budget: Largest size of the whole pack in bytes; overrides ``expert_bits``.
        quantizer: Name of the quantizer.
        mix: What ``budget`` and a decimal ``expert_bits`` choose schemes for: ``expert``, each
            expert and projection; ``layer``, each layer; ``none``, the whole model.
        calibrate: UTF-8 text that shows which inputs and experts matter.
        calibrate_tokens: How much of it is used.
        max_file_nbytes: A layer or trunk file over this is split.
    """

    attn_bits: int = 4
    expert_bits: float = 3
    head_bits: int = 6
    scheme: str | None = None
    budget: int | None = None
    quantizer: str = "hqq"
    mix: str = "expert"
    calibrate: Path | None = None
    calibrate_tokens: int = 16384
    max_file_nbytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        wanted = ", ".join(str(bits) for bits in INTEGER_BITS)
        if self.attn_bits not in INTEGER_BITS:
            raise UsageError("--attn-bits", wanted=f"one of {wanted}", got=self.attn_bits)
        if self.head_bits not in HEAD_BITS:
            heads = ", ".join(str(bits) for bits in HEAD_BITS)
            raise UsageError("--head-bits", wanted=f"one of {heads}", got=self.head_bits)
        is_cap = 0 < self.expert_bits < math.inf and not float(self.expert_bits).is_integer()
        if not is_cap and self.expert_bits not in INTEGER_BITS:
            raise UsageError(
                "--expert-bits", wanted=f"one of {wanted}, or a decimal cap", got=self.expert_bits
            )
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise UsageError(
                "--scheme", wanted=f"one of {', '.join(SCHEMES)}", got=repr(self.scheme)
            )
        if self.scheme is not None and self.budget is not None:
            raise UsageError("--scheme and --budget exclude each other")
        if self.mix not in MIXES:
            raise UsageError("--mix", wanted=f"one of {', '.join(MIXES)}", got=repr(self.mix))

    @property
    def is_mixed(self) -> bool:
        """Whether experts may differ in their schemes."""
        capped = self.budget is not None or not float(self.expert_bits).is_integer()
        return capped and self.scheme is None and self.mix != "none"


def default_quantizer(expert_bits: float, scheme: str | None, *, calibrated: bool) -> str:
    """The quantizer of who names none: what was nearest to the source of those that are fast.

    Args:
        expert_bits: As in ``ConvertOptions``.
        scheme: Likewise.
        calibrated: Whether calibration text is given.
    """
    if calibrated:
        return "gptq"
    # At 2 bits the longer search pays; at 3 it changes nothing (docs/quality.md).
    two_bits = scheme == DEFAULT_SCHEME[2] if scheme else expert_bits == 2
    return "search" if two_bits else "hqq"


def scheme_of_bits(bits: int, dtype: torch.dtype) -> str:
    """The scheme an integer width stands for.

    Args:
        bits: 2, 3, 4, 6, 8, or 16 for the source's own bits.
        dtype: The source's dtype.
    """
    if bits < 16:
        return DEFAULT_SCHEME[bits]
    return RAW_SCHEMES.get(dtype, "f32")
