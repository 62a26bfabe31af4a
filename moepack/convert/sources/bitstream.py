"""Codes of a few bits, packed as little-endian bitstreams over 32-bit words."""

from __future__ import annotations

import torch


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
