"""compressed-tensors checkpoints, as llm-compressor writes them, read as plain 16-bit weights.

A quantized Linear ``X`` of shape ``[out, in]`` is stored as

- ``X.weight`` float8_e4m3fn or int8 ``[out, in]``, a code q for each weight;
- or ``X.weight_packed`` int32 ``[out, in * bits / 32]``: codes q + 2**(bits - 1), of 4 or 8 bits,
  packed along the inputs, the first in the lowest bits; the last word of a row may be padded;
- ``X.weight_scale`` in a float dtype: one for the tensor ``[1]``, for each output ``[out, 1]``, for
  each group of inputs ``[out, groups]`` or each block ``[blocks, blocks]`` (the last of a row or
  column may be cut off by the end of the weight);
- ``X.weight_zero_point`` where it is asymmetric: z of the scales' shape, or beside packed codes
  z + 2**(bits - 1), packed along the outputs, int32 ``[out * bits / 32, groups]``;
- ``X.weight_shape``: ``[out, in]``, beside packed codes;
- ``X.weight_g_idx`` int32 ``[in]``: the group of each input, if they do not follow each other
  (activation order; -1 everywhere says that they do).

The weight is ``scale * (q - z)``, computed in the scale's dtype as the library does. The config's
groups say which of these to expect. Which group a Linear belongs to, the shapes tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moepack_formats.errors import IntegrityError, UsageError

from .bitstream import unpack_bits, words_of
from .compressed_settings import CompressedSettings, WeightScheme
from .dequantized import DequantizedCheckpoint, QuantizedLinear
from .folder_source import FolderCheckpoint

ROWS_AT_ONCE = 256  # outputs that are widened at a time

_PACKED, _PLAIN = ".weight_packed", ".weight"
_MORE_PARTS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BYTE_DTYPES = (torch.float8_e4m3fn, torch.int8)
_CODE_DTYPES = (*_BYTE_DTYPES, torch.uint8, torch.float8_e5m2, torch.float8_e8m0fnu)
_OF_ACTIVATIONS = tuple(
    f".{what}_{part}"
    for what in ("input", "output", "q", "k", "v")
    for part in ("scale", "zero_point", "global_scale")
)


@dataclass(frozen=True)
class _Linear(QuantizedLinear):
    """One quantized Linear: where its tensors are and what they hold."""

    scheme: WeightScheme
    grid: tuple[int, int]  # of the scales
    zeros: str | None
    stated_shape: str | None
    g_idx: str | None


class CompressedCheckpoint(DequantizedCheckpoint[_Linear]):
    """A compressed-tensors folder with every quantized Linear as one ``X.weight``.

    Args:
        plain: The folder's own tensors.
        settings: From `parse_compressed`.

    Raises:
        IntegrityError: Tensors of a Linear are missing, or their shapes are not what the config
            says.
        UsageError: A tensor is quantized that is not the weight of a Linear.
    """

    def __init__(self, plain: FolderCheckpoint, settings: CompressedSettings) -> None:
        self._plain = plain
        self._schemes = settings.schemes
        self._present = set(plain.keys())
        linears, dropped = {}, []
        for key in plain.keys():  # noqa: SIM118 - not a mapping
            if key.endswith(_PACKED):
                linears[key] = self._linear(key.removesuffix(_PACKED), key)
            elif key.endswith(_PLAIN) and (
                plain.dtype(key) in _BYTE_DTYPES or f"{key}_scale" in self._present
            ):
                if key.replace(_PLAIN, _PACKED) not in self._present:
                    linears[key] = self._linear(key.removesuffix(_PLAIN), key)
            elif key.endswith(_OF_ACTIVATIONS):
                dropped.append(key)
        super().__init__(plain, linears, dropped)
        self._check_rest()
        self.notices.extend(settings.notices)
        if dropped:
            self.notices.append(
                f"ignored: {len(dropped)} scales of activations ({dropped[0]}, for instance)"
            )

    def _check_rest(self) -> None:
        """Make sure that no code would pass for a weight."""
        suffixes = tuple(f".{part}" for part in _MORE_PARTS)
        for key in self._keys:
            where = f"{self.folder}, {key}"
            if key.endswith(suffixes):
                raise IntegrityError("a part of a quantized weight without the weight", where=where)
            if key not in self._linears and (
                key.endswith("_packed") or self._plain.dtype(key) in _CODE_DTYPES
            ):
                raise UsageError(
                    "a quantized tensor that is not the weight of a Linear",
                    where=where,
                    got=f"{self._plain.dtype(key)} {self._plain.shape(key)}",
                )

    def _linear(self, name: str, codes: str) -> _Linear:
        where, plain = f"{self._plain.folder}, {name}", self._plain
        scale, zeros, stated, g_idx = (
            key if (key := f"{name}.{part}") in self._present else None for part in _MORE_PARTS
        )
        if scale is None:
            raise IntegrityError("the quantized Linear has no weight_scale", where=where)
        wanted = (torch.int32,) if codes.endswith(_PACKED) else _BYTE_DTYPES
        for key, dtypes in ((codes, wanted), (scale, _SCALE_DTYPES)):
            if (dtype := plain.dtype(key)) not in dtypes:
                raise IntegrityError(
                    f"{key.removeprefix(f'{name}.')} is {dtype}",
                    where=where,
                    wanted=" or ".join(map(str, dtypes)),
                )
        fitting: dict[object, _Linear] = {}
        for scheme in self._schemes:
            shape = self._shape_in(scheme, codes, scale)
            if shape is None or not all(shape):
                continue
            linear = _Linear(
                name,
                shape,
                plain.dtype(scale),
                tuple(key for key in (codes, scale, zeros, stated, g_idx) if key is not None),
                scheme,
                _grid(shape, scheme),
                zeros,
                stated,
                g_idx,
            )
            if self._fits(linear):
                fitting.setdefault((scheme.bits, scheme.tile(*shape), shape), linear)
        if len(fitting) > 1 and stated is not None:
            true = self._stated_shape(stated)
            fitting = {key: one for key, one in fitting.items() if one.shape == true}
        if len(fitting) != 1:
            parts = (codes, scale, zeros, g_idx)
            raise IntegrityError(
                "the tensors of a quantized Linear do not belong together, or not to the config",
                where=where,
                wanted="; or ".join(map(str, self._schemes)) or "none quantized",
                got=", ".join(
                    f"{key.removeprefix(f'{name}.')} {plain.shape(key)}"
                    for key in parts
                    if key is not None
                ),
            )
        linear = next(iter(fitting.values()))
        for part, found, needed in (
            ("weight_zero_point", zeros, not linear.scheme.symmetric),
            ("weight_g_idx", g_idx, linear.scheme.ordered),
        ):
            if needed and found is None:
                raise IntegrityError(f"the quantized Linear has no {part}", where=where)
        return linear

    def _shape_in(self, scheme: WeightScheme, codes: str, scale: str) -> tuple[int, int] | None:
        """The shape of a weight whose codes are stored as a scheme says; None if they are not."""
        shape = self._plain.shape(codes)
        packed = codes.endswith(_PACKED)
        if len(shape) != 2 or packed != scheme.packed:
            return None
        if not packed:
            floating = self._plain.dtype(codes).is_floating_point
            return (shape[0], shape[1]) if floating == scheme.floating else None
        rows, words = shape
        cols = words * 32 // scheme.bits
        if scheme.strategy == "group" and scheme.block is not None:
            # Groups are whole, so without what may pad the last word.
            groups = self._plain.shape(scale)[-1:]
            cols = sum(groups) * scheme.block[1]
        return (rows, cols) if words_of(cols, scheme.bits) == words else None

    def _fits(self, linear: _Linear) -> bool:
        """Whether the shapes of scales, zero points and group indices are as they should be."""
        (rows, cols), scheme, plain = linear.shape, linear.scheme, self._plain
        if scheme.strategy == "group" and cols % scheme.tile(rows, cols)[1]:
            return False
        shapes: list[tuple[int, ...]] = [linear.grid]
        if scheme.strategy == "tensor":
            shapes += [(1,), ()]
        elif scheme.strategy == "channel":
            shapes.append((rows,))
        if plain.shape(f"{linear.name}.weight_scale") not in shapes:
            return False
        if linear.zeros is not None:
            if _has_packed_zeros(scheme):
                shapes = [(words_of(rows, scheme.bits), linear.grid[1])]
            dtypes = (torch.int32,) if _has_packed_zeros(scheme) else _BYTE_DTYPES
            if plain.shape(linear.zeros) not in shapes or plain.dtype(linear.zeros) not in dtypes:
                return False
        if linear.g_idx is None:
            return True
        dtype = plain.dtype(linear.g_idx)
        integers = dtype in (torch.int32, torch.int64)
        return integers and scheme.strategy == "group" and plain.shape(linear.g_idx) == (cols,)

    def _stated_shape(self, key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self._plain.read(key).flatten())

    def _dequantize(self, linear: _Linear) -> torch.Tensor:
        (rows, cols), scheme, dtype = linear.shape, linear.scheme, linear.dtype
        if linear.stated_shape is not None:
            stated = self._stated_shape(linear.stated_shape)
            if stated != linear.shape:
                raise IntegrityError(
                    "weight_shape is not what the other tensors of the quantized Linear say",
                    where=f"{self.folder}, {linear.name}",
                    wanted=linear.shape,
                    got=stated,
                )
        codes = self._codes(linear)
        scales = self._plain.read(f"{linear.name}.weight_scale").view(linear.grid)
        zeros = self._zeros(linear)
        group = self._groups(linear)
        high, wide = scheme.tile(rows, cols)

        def spread(grid: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
            """What belongs to each weight of some outputs, [n, in], of a grid like the scales'."""
            part = grid[outputs]
            if group is not None:
                return part[:, group]
            return part.repeat_interleave(wide, 1)[:, :cols]

        weight = torch.empty(rows, cols, dtype=dtype)
        for start in range(0, rows, ROWS_AT_ONCE):
            some = slice(start, min(start + ROWS_AT_ONCE, rows))
            outputs = torch.arange(some.start, some.stop) // high
            steps = codes[some]
            if isinstance(zeros, torch.Tensor):
                # Differences of bytes: 16 bits hold them, and every scale's dtype does.
                steps = steps.to(zeros.dtype) - spread(zeros, outputs)
            elif zeros:
                steps = steps.to(torch.int16) - zeros
            torch.mul(steps.to(dtype), spread(scales, outputs), out=weight[some])
        return weight

    def _codes(self, linear: _Linear) -> torch.Tensor:
        """``[out, in]``: uint8 with an offset if packed, else int8 or float8_e4m3fn."""
        if not linear.scheme.packed:
            return self._plain.read(f"{linear.name}{_PLAIN}")
        words = self._plain.read(f"{linear.name}{_PACKED}")
        return unpack_bits(words.T.contiguous(), linear.scheme.bits, linear.shape[1]).T

    def _zeros(self, linear: _Linear) -> torch.Tensor | int:
        """What is taken off codes: int16 or float ``[a scale's place]``, or one number for all."""
        scheme = linear.scheme
        offset = 1 << (scheme.bits - 1) if scheme.packed else 0
        if linear.zeros is None:
            return offset
        zeros = self._plain.read(linear.zeros)
        if _has_packed_zeros(scheme):
            return unpack_bits(zeros, scheme.bits, linear.shape[0]).to(torch.int16)
        if scheme.floating:
            return zeros.to(linear.dtype).view(linear.grid)
        return zeros.to(torch.int16).view(linear.grid) + offset

    def _groups(self, linear: _Linear) -> torch.Tensor | None:
        """The group of each input, int64 ``[in]``; None if they follow each other."""
        if linear.g_idx is None:
            return None
        group = self._plain.read(linear.g_idx).long()
        if bool((group == -1).all()):
            return None
        return self._check_groups(linear, group, linear.grid[1])


def _grid(shape: tuple[int, int], scheme: WeightScheme) -> tuple[int, int]:
    high, wide = scheme.tile(*shape)
    return -(-shape[0] // high), -(-shape[1] // wide)


def _has_packed_zeros(scheme: WeightScheme) -> bool:
    return scheme.packed and scheme.strategy in ("channel", "group")
