"""The bits of GPTQ tensors: codes and zero points, packed as bitstreams over 32-bit words."""

from __future__ import annotations

import torch

from .gptq_settings import GPTQSettings

# What GPTQModel 1.8 to 6.0 took off each run of three words of 3-bit zero points where it meant to
# take 1 off each zero point.
_WORDWISE_INT3 = (0x24924924, 0x92492492, 0x49249249)


def words_of(codes: int, bits: int) -> int:
    """32-bit words that so many codes take."""
    return -(-codes * bits // 32)


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack a little-endian bitstream that runs along the first dimension.

    Args:
        words: int32 ``[ceil(count * bits / 32), n]``.
        bits: Width of a code, 1 to 8.
        count: Codes in each column.

    Returns:
        uint8 ``[count, n]``.
    """
    # After `bits` words the stream is at a word boundary again, 32 codes later.
    runs = -(-words.shape[0] // bits)
    padding = runs * bits - words.shape[0]
    if padding:
        words = torch.cat([words, words.new_zeros(padding, words.shape[1])])
    words = words.view(runs, bits, -1)
    codes = torch.empty(runs, 32, words.shape[2], dtype=torch.uint8)
    mask = (1 << bits) - 1
    for code in range(32):
        word, shift = divmod(code * bits, 32)
        value = words[:, word] >> shift
        if shift + bits > 32:
            # The shift filled in copies of the sign: only the word's own bits count.
            value = (value & ((1 << (32 - shift)) - 1)) | (words[:, word + 1] << (32 - shift))
        codes[:, code] = value & mask
    return codes.view(runs * 32, -1)[:count]


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
