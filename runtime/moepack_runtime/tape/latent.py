"""Attention over compressed keys and values (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one latent a token, and keys that rotary embeddings have gone into. transformers
expands all of them to every head's keys and values for each new token. The expansion is linear, so
a head's query can be taken into the space of latents instead, and what it has attended to out of
it: with ``k = A l`` and ``v = C l`` scores are ``(A^T q) . l`` and the result ``C (sum of w l)``.

A and C are read off the model's own ``expand_kv``: what it makes of unit vectors.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kv import fits_half
from .record import CannotRecord
from .steps import Kv, Latent

_FLOAT = torch.float32


@dataclass(frozen=True)
class Expansion:
    """How latents and rotary keys become the keys and values of heads.

    Attributes:
        key_weights: ``[heads, latent, plain]``: what each number of a latent adds to a key.
        value_weights: ``[heads, latent, value width]``: and to a value.
        width: Of a key.
        plain_at: Where in a key the part that is made of latents begins.
        rotary_at: Where in a key the rotary key stands, as it is.
    """

    key_weights: Tensor
    value_weights: Tensor
    width: int
    plain_at: int
    rotary_at: int

    def step(self, kv: Kv) -> Latent:
        """The native form, which holds no references."""
        return Latent(
            kv=ctypes.addressof(kv),
            key_weights=self.key_weights.data_ptr(),
            value_weights=self.value_weights.data_ptr(),
            width=self.width,
            plain_at=self.plain_at,
            plain=self.key_weights.shape[2],
            rotary_at=self.rotary_at,
            value_width=self.value_weights.shape[2],
            half=self.key_weights.dtype is torch.float16,
        )


def read_off(module: Any, latent: int, rotary: int, *, half: bool) -> Expansion:
    """The expansion that a module does.

    Args:
        module: Has ``expand_kv(latents [1, 1, tokens, latent], rotary [1, 1, tokens, rotary])``,
            which gives keys and values ``[1, heads, tokens, width]``.
        latent: Numbers of a latent.
        rotary: Numbers of a rotary key.
        half: Whether weights may be kept as float16.

    Raises:
        CannotRecord: It does something else than a linear map, or changes rotary keys.
    """
    with torch.no_grad():
        # One more token of zeros, which has to stay zeros.
        unit = torch.eye(latent + 1, latent, dtype=_FLOAT)[None, None]
        keys, values = module.expand_kv(unit, torch.zeros(1, 1, latent + 1, rotary, dtype=_FLOAT))
        some = max(rotary, 1)  # there may be no rotary keys
        nothing = torch.zeros(1, 1, some, latent, dtype=_FLOAT)
        moved, none = module.expand_kv(nothing, torch.eye(some, rotary, dtype=_FLOAT)[None, None])
    if keys[:, :, -1].any() or values[:, :, -1].any() or none.any():
        raise CannotRecord("keys or values are no linear map of what the cache holds")
    keys, values = keys[0, :, :-1], values[0, :, :-1]  # [heads, latent, width]
    made = keys.abs().amax(dim=(0, 1)).nonzero().flatten()
    placed = moved[0, 0, 0].nonzero().flatten() if rotary else made.new_zeros(1)
    if len(made) == 0 or len(placed) != 1:
        raise CannotRecord("keys are made in an unknown way")
    first, at = int(made[0]), int(placed[0])
    wanted = torch.zeros_like(moved)
    wanted[..., at : at + rotary] = torch.eye(some, rotary, dtype=_FLOAT)[
        :, : wanted.shape[-1] - at
    ]
    if not torch.equal(moved, wanted):
        raise CannotRecord("rotary keys are changed on the way to the heads")
    key_weights = keys[:, :, first : int(made[-1]) + 1].contiguous()
    value_weights = values.contiguous()
    if half and fits_half(key_weights) and fits_half(value_weights):
        key_weights, value_weights = key_weights.half(), value_weights.half()
    return Expansion(key_weights, value_weights, keys.shape[2], first, at)
