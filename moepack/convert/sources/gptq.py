"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them, read as plain 16-bit weights.

A quantized Linear ``X`` of shape ``[out, in]`` is stored as

- ``X.qweight`` int32 ``[in * bits / 32, out]``: codes q, packed along the inputs;
- ``X.qzeros`` int32 ``[groups, out * bits / 32]``: zero points z, packed along the outputs;
- ``X.scales`` float16 ``[groups, out]``;
- ``X.g_idx`` int32 ``[in]``: the group of each input (absent in some: consecutive groups);

each packed as one little-endian bitstream over 32-bit words, so that a 3-bit code may straddle two
words. The weight is ``scales[g] * (q - z)``, computed in the scales' dtype as both libraries do.
Format "gptq" stores z - 1, format "gptq_v2" stores z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepack_formats.errors import IntegrityError

from .bitstream import unpack_bits, words_of
from .dequantized import DequantizedCheckpoint, QuantizedLinear
from .folder_source import FolderCheckpoint
from .gptq_codes import decode_zeros
from .gptq_settings import BITS, GPTQSettings

INPUTS_AT_ONCE = 1024  # rows of q that are widened to 16 bits at a time

_PART_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class _Linear(QuantizedLinear):
    """One quantized Linear: where its tensors are and what they hold."""

    bits: int
    groups: int
    g_idx: str | None


class GPTQCheckpoint(DequantizedCheckpoint[_Linear]):
    """A GPTQ folder with every quantized Linear as one ``X.weight`` (a `Checkpoint`).

    Args:
        plain: The folder's own tensors.
        settings: From `parse_gptq`.

    Raises:
        IntegrityError: Tensors of a Linear are missing or their shapes do not belong together.
    """

    def __init__(self, plain: FolderCheckpoint, settings: GPTQSettings) -> None:
        self._plain = plain
        self._settings = settings
        every = plain.keys()
        present = set(every)
        linears = {
            key: self._linear(key.removesuffix(".qweight"), present)
            for key in every
            if key.endswith(".qweight")
        }
        super().__init__(plain, linears)

    def _linear(self, name: str, present: set[str]) -> _Linear:
        where = f"{self._plain.folder}, {name}"
        for part in ("qzeros", "scales"):
            if f"{name}.{part}" not in present:
                raise IntegrityError(f"the quantized Linear has no {part}", where=where)
        g_idx = f"{name}.g_idx" if f"{name}.g_idx" in present else None
        qweight, qzeros, scales = (
            self._plain.shape(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")
        )
        if not len(qweight) == len(qzeros) == len(scales) == 2:
            raise IntegrityError("the tensors of a quantized Linear are not matrices", where=where)
        groups, rows = scales
        if g_idx is None:
            cols = qweight[0] * 32 // self._settings.bits
        else:
            cols = self._plain.shape(g_idx)[0] if len(self._plain.shape(g_idx)) == 1 else 0
        # GPTQModel can give single modules other bits; the shapes tell which.
        fitting = [
            bits
            for bits in (self._settings.bits, *BITS)
            if qweight == (words_of(cols, bits), rows) and qzeros == (groups, words_of(rows, bits))
        ]
        if not fitting or not rows or not cols or not groups:
            raise IntegrityError(
                "the shapes of a quantized Linear do not belong together",
                where=where,
                got=f"qweight {qweight}, qzeros {qzeros}, scales {scales}, {cols} inputs",
            )
        for part, dtypes in _PART_DTYPES.items():
            if (dtype := self._plain.dtype(f"{name}.{part}")) not in dtypes:
                raise IntegrityError(f"{part} is {dtype}", where=where, wanted=dtypes[0])
        parts = tuple(f"{name}.{part}" for part in _PART_DTYPES)
        return _Linear(
            name,
            (rows, cols),
            self._plain.dtype(f"{name}.scales"),
            parts if g_idx is None else (*parts, g_idx),
            fitting[0],
            groups,
            g_idx,
        )

    def _dequantize(self, linear: _Linear) -> torch.Tensor:
        def read(part: str) -> torch.Tensor:
            return self._plain.read(f"{linear.name}.{part}")

        rows, cols = linear.shape
        codes = unpack_bits(read("qweight"), linear.bits, cols)
        scales = read("scales")
        zeros = decode_zeros(read("qzeros"), linear.bits, rows, self._settings)
        group = self._groups(linear)
        weight = torch.empty(rows, cols, dtype=scales.dtype)
        for start in range(0, cols, INPUTS_AT_ONCE):
            part = slice(start, start + INPUTS_AT_ONCE)
            steps = codes[part].to(torch.int16) - zeros[group[part]]
            weight[:, part] = (scales[group[part]] * steps).T
        return weight

    def _groups(self, linear: _Linear) -> torch.Tensor:
        """The group of each input: int64 ``[in]``."""
        if linear.g_idx is None:
            size, cols = self._settings.group_size, linear.shape[1]
            group = torch.arange(cols) // (cols if size == -1 else size)
        else:
            group = self._plain.read(linear.g_idx).long()
        return self._check_groups(linear, group, linear.groups)
