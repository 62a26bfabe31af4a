"""The zero points of GPTQ tensors, which its writers stored in several ways."""

from __future__ import annotations

import torch

from .bitstream import unpack_bits
from .gptq_settings import GPTQSettings

# What GPTQModel 1.8 to 6.0 took off each run of three words of 3-bit zero points where it meant to
# take 1 off each zero point.
_WORDWISE_INT3 = (0x24924924, 0x92492492, 0x49249249)


def decode_zeros(
    words: torch.Tensor, bits: int, outputs: int, settings: GPTQSettings
) -> torch.Tensor:
    """Decode zero points.

    Args:
        words: int32 ``[groups, ceil(outputs * bits / 32)]``.
        bits: Width of a zero point.
        outputs: Zero points in each group.
        settings: How they were stored.

    Returns:
        int16 ``[groups, outputs]``.
    """

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return unpack_bits(packed.T.contiguous(), bits, outputs).T.to(torch.int16)

    stored = unpack(words)
    if not settings.zeros_less_one:
        return stored
    half = 1 << (bits - 1)
    if settings.symmetric and bool((stored == half).all()):
        # Published checkpoints exist that say "gptq" and store z. A symmetric one gives itself
        # away, since z is half the code range in every group of it.
        return stored
    if bits != 3:
        # Added to the word and not to each zero point: GPTQModel took the ones off that way, and
        # only so does the borrow from a zero point of 0 come back.
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return unpack(_wrapping_add(words, torch.tensor(ones)))
    plain = (stored + 1) & 7
    offsets = torch.tensor(_WORDWISE_INT3)[torch.arange(words.shape[1]) % 3]
    wordwise = unpack(_wrapping_add(words, offsets))
    if settings.symmetric:
        for zeros in (plain, wordwise):
            if bool((zeros == half).all()):
                return zeros
    return wordwise if settings.wordwise_int3 else plain


def _wrapping_add(words: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
    """Add modulo 2**32: int32 words plus int64 addend."""
    total = (words.long() + addend) & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)
