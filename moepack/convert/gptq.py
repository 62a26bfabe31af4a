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

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moepack_formats.errors import IntegrityError

from .folder_source import FolderCheckpoint
from .gptq_codes import decode_zeros, unpack_bits, words_of
from .gptq_settings import BITS, GPTQSettings, without_quantization

INPUTS_AT_ONCE = 1024  # rows of q that are widened to 16 bits at a time

_PART_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class _Linear:
    """One quantized Linear: where its tensors are and what they hold."""

    name: str
    bits: int
    rows: int
    cols: int
    groups: int
    g_idx: str | None


class GPTQCheckpoint:
    """A GPTQ folder with every quantized Linear as one ``X.weight`` (a `Checkpoint`).

    Args:
        plain: The folder's own tensors.
        settings: From `gptq_settings`.

    Raises:
        IntegrityError: Tensors of a Linear are missing or their shapes do not belong together.
    """

    def __init__(self, plain: FolderCheckpoint, settings: GPTQSettings) -> None:
        self._plain = plain
        self._settings = settings
        self.folder = plain.folder
        self.source = plain.source
        self.notices = plain.notices
        self.config = without_quantization(plain.config)
        every = plain.keys()
        present = set(every)
        self._linears: dict[str, _Linear] = {}
        self._keys: list[str] = []
        parts: set[str] = set()
        for key in every:
            if key.endswith(".qweight"):
                linear = self._linear(key.removesuffix(".qweight"), present)
                parts.update(f"{linear.name}.{part}" for part in ("qzeros", "scales", "g_idx"))
                self._linears[f"{linear.name}.weight"] = linear
                self._keys.append(f"{linear.name}.weight")
            else:
                self._keys.append(key)
        self._keys = [key for key in self._keys if key not in parts]
        if twice := self._linears.keys() & present:
            raise IntegrityError(
                "a weight is there both quantized and not", where=f"{self.folder}, {min(twice)}"
            )

    def keys(self) -> list[str]:
        """The tensors' names, in the order of the shards."""
        return list(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`; ``[out, in]`` for a quantized Linear."""
        linear = self._linears.get(key)
        return self._plain.shape(key) if linear is None else (linear.rows, linear.cols)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of tensor `key`; that of the scales (float16) for a quantized Linear."""
        linear = self._linears.get(key)
        return self._plain.dtype(key if linear is None else f"{linear.name}.scales")

    def nbytes(self, key: str) -> int:
        """Bytes of tensor `key` once it is dequantized."""
        linear = self._linears.get(key)
        if linear is None:
            return self._plain.nbytes(key)
        return linear.rows * linear.cols * self.dtype(key).itemsize

    @property
    def staged_nbytes(self) -> int:
        """The most bytes of shards that lie on the disk at one time."""
        return self._plain.staged_nbytes

    def plan_reads(self, layers: Sequence[Sequence[str]]) -> None:
        """Say in which order the experts will be read, before the trunk."""
        self._plain.plan_reads(
            [[part for key in keys for part in self._parts_of(key)] for keys in layers]
        )

    def clear(self) -> None:
        """Remove what was staged."""
        self._plain.clear()

    def _parts_of(self, key: str) -> list[str]:
        """The folder's own tensors that tensor `key` is made of."""
        linear = self._linears.get(key)
        if linear is None:
            return [key]
        parts = [f"{linear.name}.{part}" for part in ("qweight", "qzeros", "scales")]
        return parts if linear.g_idx is None else [*parts, linear.g_idx]

    def close(self) -> None:
        """Let go of what the folder holds open."""
        self._plain.close()

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read tensor `key`, or the part of it that `index` selects; see `Checkpoint.read`.

        A quantized Linear is read and decoded whole, then sliced.
        """
        linear = self._linears.get(key)
        if linear is None:
            return self._plain.read(key, index)
        weight = self._dequantize(linear)
        return weight[index].clone() if index else weight

    def _linear(self, name: str, present: set[str]) -> _Linear:
        where = f"{self.folder}, {name}"
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
        return _Linear(name, fitting[0], rows, cols, groups, g_idx)

    def _dequantize(self, linear: _Linear) -> torch.Tensor:
        def read(part: str) -> torch.Tensor:
            return self._plain.read(f"{linear.name}.{part}")

        codes = unpack_bits(read("qweight"), linear.bits, linear.cols)
        scales = read("scales")
        zeros = decode_zeros(read("qzeros"), linear.bits, linear.rows, self._settings)
        group = self._groups(linear)
        weight = torch.empty(linear.rows, linear.cols, dtype=scales.dtype)
        for start in range(0, linear.cols, INPUTS_AT_ONCE):
            part = slice(start, start + INPUTS_AT_ONCE)
            steps = codes[part].to(torch.int16) - zeros[group[part]]
            weight[:, part] = (scales[group[part]] * steps).T
        return weight

    def _groups(self, linear: _Linear) -> torch.Tensor:
        """The group of each input: int64 ``[in]``."""
        if linear.g_idx is None:
            size = self._settings.group_size
            group = torch.arange(linear.cols) // (linear.cols if size == -1 else size)
        else:
            group = self._plain.read(linear.g_idx).long()
        low, high = int(group.min()), int(group.max())
        if low < 0 or high >= linear.groups:
            raise IntegrityError(
                "an input belongs to a group that is not there",
                where=f"{self.folder}, {linear.name}",
                wanted=f"0 to {linear.groups - 1}",
                got=low if low < 0 else high,
            )
        return group
