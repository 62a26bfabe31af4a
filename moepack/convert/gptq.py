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

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepack.convert.folder_source import FolderCheckpoint
from moepack.convert.source_files import read_json
from moepack_formats.errors import IntegrityError, UsageError

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
KEPT_METHODS = ("fp8", "mxfp4")  # dequantized later, by transformers' own weight conversion
INPUTS_AT_ONCE = 1024  # rows of q that are widened to 16 bits at a time

# What GPTQModel 1.8 to 6.0 took off each run of three words of 3-bit zero points where it meant to
# take 1 off each zero point.
_WORDWISE_INT3 = (0x24924924, 0x92492492, 0x49249249)
_WORDWISE_INT3_UNTIL = (6, 1)

_PART_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16, torch.float32),
}


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


def gptq_settings(config: Mapping[str, Any], folder: Path) -> GPTQSettings | None:
    """Read how a checkpoint is quantized.

    Args:
        config: The content of ``config.json``.
        folder: The checkpoint's folder; AutoGPTQ put ``quantize_config.json`` there.

    Returns:
        The settings of a GPTQ checkpoint; None when the checkpoint is not quantized, or in a way
        that is dequantized later.

    Raises:
        UsageError: It is quantized in a way that is not supported.
    """
    text = config.get("text_config")
    for owner in (config, text if isinstance(text, Mapping) else {}):
        for name in ("quantization_config", "compression_config"):
            found = owner.get(name)
            if found is None:
                continue
            if not isinstance(found, Mapping):
                raise UsageError(f"{name} is not an object", where=folder / "config.json")
            return _settings(found, _method(found), folder / "config.json")
    if os.path.lexists(folder / "quantize_config.json"):
        found = read_json(folder, "quantize_config.json")
        return _settings(found, str(found.get("quant_method") or "gptq"), folder)
    return None


def _method(found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method)


def _settings(found: Mapping[str, Any], method: str, where: Path) -> GPTQSettings | None:
    if method in KEPT_METHODS:
        return None
    if method != "gptq":
        raise UsageError(
            "the weights are quantized in a way that is not supported",
            where=where,
            wanted="unquantized, gptq, " + ", ".join(KEPT_METHODS),
            got=method,
            remedy="convert the unquantized checkpoint instead",
        )
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
        self.config = _without_quantization(plain.config)
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
            if qweight == (_words(cols, bits), rows) and qzeros == (groups, _words(rows, bits))
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


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // 32)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return plain
