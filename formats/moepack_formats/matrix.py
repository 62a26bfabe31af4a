"""A quantized matrix: its codes and scales as arrays, and as packed bytes.

Shape letters: R rows (outputs), C cols (inputs), G groups of a row, S super-groups of a row (256
inputs each, see SPEC.md of the last one), T tiles of 16 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import FormatError, IntegrityError
from .schemes import BLOCK_COLS, SUPER_COLS, TILE_ROWS, Scheme
from .spans import Array, pack_span, spans, unpack_span
from .tiles import Bytes, block_nbytes, pack_codes, pad, unpack_codes

# What a file holds of each metadata array, by Scheme.scale_bits.
_STORED_AS = {
    16: {"scales": "<f2", "minima": "<f2"},
    8: {"scales": "u1", "minima": "i1", "outer_scales": "<f4", "outer_minima": "<f4"},
    5: {"scales": "i1", "outer_scales": "<f2"},
    4: {"scales": "u1", "minima": "u1", "outer_scales": "<f2", "outer_minima": "<f2"},
}
_SMALL = {5: (-16, 15), 4: (0, 15)}  # Of scales and minima that fill no whole byte.
_EXPONENTS = {"f16": ("<u2", 0x7C00), "bf16": ("<u2", 0x7F80), "f32": ("<u4", 0x7F800000)}


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes of one ``[out, in]`` matrix with the metadata its scheme stores.

    ``value = scale * outer_scale * code - minimum * outer_minimum``, the outer factors 1 where the
    scheme has none, computed in float32. Minima are signed. A scheme of levels has no minima:
    ``value = scale * outer_scale * level[code]``, and its scales are signed.

    Attributes:
        scheme: How it is stored.
        shape: True ``(rows, cols)``, padding excluded.
        codes: ``[R, C]`` uint8; raw schemes: uint16 or uint32 bit patterns.
        scales: ``[R, G]``; float16, or under ``outer_scales`` uint8 codes, int8 of 5 bits; None
            when raw.
        minima: ``[R, G]``; float16, int8 (8-bit scales) or uint8 (4-bit scales); None when raw, or
            where codes stand for levels.
        outer_scales: ``[R, 1]`` float32 (8-bit), ``[R, S]`` float16 (5 and 4 bits) or None.
        outer_minima: As ``outer_scales``; may be negative; None without minima.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Array
    scales: Array | None = None
    minima: Array | None = None
    outer_scales: Array | None = None
    outer_minima: Array | None = None


def pack_matrix(matrix: QuantizedMatrix) -> Bytes:
    """Lay a matrix out in tiles.

    Returns:
        ``[scheme.packed_nbytes(*shape)]`` uint8.

    Raises:
        FormatError: An array has another shape or type than the scheme stores, or a code is too
            large for its bits.
        IntegrityError: A scale or minimum is not finite.
    """
    scheme = matrix.scheme
    rows, cols = scheme.padded_shape(*matrix.shape)
    _check_codes(matrix)
    codes = pack_codes(pad(matrix.codes, rows, cols), scheme.bits)  # [T, B, block]
    if scheme.is_raw:
        return codes.reshape(-1)
    out = np.zeros((rows // TILE_ROWS, scheme.tile_nbytes(cols)), np.uint8)
    by_tile = _metadata_by_tile(matrix, rows, cols)
    if scheme.scale_bits == 8:
        head = out[:, : scheme.head_nbytes].reshape(-1, 2, TILE_ROWS * 4)
        head[:, 0] = by_tile["outer_scales"][:, 0].view(np.uint8)
        head[:, 1] = by_tile["outer_minima"][:, 0].view(np.uint8)
    for span in spans(scheme, cols):
        pack_span(span, span.of(out), codes[:, span.blocks], by_tile)
    return out.reshape(-1)


def unpack_matrix(buffer: Bytes, scheme: Scheme, shape: tuple[int, int]) -> QuantizedMatrix:
    """Read a matrix back from its tiles.

    Args:
        buffer: ``[scheme.packed_nbytes(*shape)]`` uint8.
        scheme: The scheme it was packed with.
        shape: True ``(rows, cols)``.

    Raises:
        FormatError: The buffer has another size.
    """
    wanted = scheme.packed_nbytes(*shape)
    if buffer.size != wanted:
        raise FormatError("packed matrix has the wrong size", wanted=wanted, got=buffer.size)
    rows, cols = scheme.padded_shape(*shape)
    true = slice(0, shape[0]), slice(0, shape[1])
    tiles = buffer.reshape(rows // TILE_ROWS, -1)
    if scheme.is_raw:
        blocks = tiles.reshape(len(tiles), cols // BLOCK_COLS, -1)
        return QuantizedMatrix(scheme, shape, unpack_codes(blocks, scheme.bits)[true])
    codes = np.empty((len(tiles), cols // BLOCK_COLS, block_nbytes(scheme.bits)), np.uint8)
    fields: dict[str, list[Array]] = {}
    for span in spans(scheme, cols):
        unpack_span(span, span.of(tiles), codes[:, span.blocks], fields)
    if scheme.scale_bits == 8:
        head = np.ascontiguousarray(tiles[:, : scheme.head_nbytes]).view("<f4")
        head = head.reshape(-1, 2, TILE_ROWS)
        fields["outer_scales"], fields["outer_minima"] = [head[:, :1]], [head[:, 1:]]
    arrays = {
        name: _by_row(np.concatenate(parts, axis=1))[: shape[0], : _width(scheme, name, shape[1])]
        for name, parts in fields.items()
    }
    return QuantizedMatrix(scheme, shape, unpack_codes(codes, scheme.bits)[true], **arrays)


def dequantize(matrix: QuantizedMatrix) -> npt.NDArray[np.float32]:
    """The float32 values ``[R, C]`` that a reader of the packed bytes computes.

    One multiplication or subtraction at a time, each rounded to float32, in the order of
    ``SPEC.md``: every reader gets the same bits.
    """
    scheme, (rows, cols) = matrix.scheme, matrix.shape
    if scheme.is_raw:
        return _raw_values(matrix)
    scales = _spread(_effective(matrix, "scales"), scheme.group, cols)
    values: npt.NDArray[np.float32]
    if scheme.levels:
        values = np.array(scheme.levels, np.float32)[matrix.codes] * scales
    else:
        minima = _spread(_effective(matrix, "minima"), scheme.group, cols)
        values = matrix.codes.astype(np.float32) * scales - minima
    return values.reshape(rows, cols)


def floats_are_finite(tiles: Bytes, scheme: Scheme, cols: int) -> bool:
    """Whether packed tiles hold no NaN or infinity, among scales and minima or raw values.

    Args:
        tiles: ``[T, scheme.tile_nbytes(cols)]`` uint8.
        scheme: Their scheme.
        cols: True inputs of a row.
    """
    padded = scheme.padded_shape(1, cols)[1]
    if scheme.is_raw:
        return _all_finite(tiles, scheme.name)
    if scheme.scale_bits == 8:
        return _all_finite(tiles[:, : scheme.head_nbytes], "f32")
    for span in spans(scheme, padded):
        if not _all_finite(span.of(tiles)[:, :, span.floats], "f16"):
            return False
    return True


def _all_finite(data: Bytes, kind: str) -> bool:
    dtype, exponent = _EXPONENTS[kind]
    bits = np.ascontiguousarray(data).view(dtype)
    return not bool(((bits & exponent) == exponent).any())


def _metadata_by_tile(matrix: QuantizedMatrix, rows: int, cols: int) -> dict[str, Array]:
    """Every metadata array padded to whole tiles and groups, as ``[T, n, 16]``."""
    arrays: dict[str, Array] = {}
    for name, dtype in _STORED_AS[matrix.scheme.scale_bits].items():
        width = _width(matrix.scheme, name, cols)
        padded = pad(_stored(matrix, name, dtype), rows, width).reshape(-1, TILE_ROWS, width)
        arrays[name] = np.ascontiguousarray(padded.transpose(0, 2, 1))
    return arrays


def _stored(matrix: QuantizedMatrix, name: str, dtype: str) -> Array:
    """One metadata array in the dtype of the file, with nothing lost on the way."""
    values, scheme = getattr(matrix, name), matrix.scheme
    wanted = matrix.shape[0], _width(scheme, name, matrix.shape[1])
    if values is None or values.shape != wanted:
        raise FormatError(
            f"a quantized matrix lacks its {name}",
            where=scheme.name,
            wanted=list(wanted),
            got=None if values is None else list(values.shape),
        )
    with np.errstate(over="ignore", invalid="ignore"):
        stored: Array = values.astype(dtype)
    if stored.dtype.kind == "f":
        if not np.isfinite(stored).all():
            raise IntegrityError(f"{name} hold a value that is not finite", where=scheme.name)
        return stored
    lowest, highest = _SMALL.get(scheme.scale_bits, (-128, 255))
    in_range = stored.size == 0 or lowest <= int(stored.min()) <= int(stored.max()) <= highest
    if (stored != values).any() or not in_range:
        raise FormatError(f"{name} do not fit their bits", where=scheme.name)
    return stored


def _width(scheme: Scheme, name: str, cols: int) -> int:
    """Values that a row of ``cols`` inputs has of a metadata array."""
    if not name.startswith("outer"):
        return scheme.groups(cols)
    return 1 if scheme.scale_bits == 8 else scheme.spans(cols)


def _check_codes(matrix: QuantizedMatrix) -> None:
    """Codes in another dtype would be converted, and large ones would spill into others."""
    codes, bits = matrix.codes, matrix.scheme.bits
    dtype = np.dtype(f"<u{max(bits, 8) // 8}")
    if codes.shape != matrix.shape or codes.dtype != dtype:
        raise FormatError(
            "codes have the wrong shape or type",
            where=matrix.scheme.name,
            wanted=f"{dtype.name} {list(matrix.shape)}",
            got=f"{codes.dtype.name} {list(codes.shape)}",
        )
    if bits < 8 and codes.max(initial=np.uint8(0)) >> bits:
        raise FormatError("a code is too large", where=matrix.scheme.name, wanted=f"{bits} bits")


def _by_row(values: Array) -> Array:
    """From ``[T, n, 16]`` to ``[16 * T, n]``."""
    return np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1, values.shape[1])


def _effective(matrix: QuantizedMatrix, name: str) -> npt.NDArray[np.float32]:
    """Scales or minima ``[R, G]``, times the factor that they lie under."""
    stored: Array | None = getattr(matrix, name)
    outer: Array | None = getattr(matrix, f"outer_{name}")
    if stored is None:
        raise FormatError(f"a quantized matrix lacks {name}")
    values = stored.astype(np.float32)
    if outer is None:
        return values
    # Each of [R, S] covers 256 inputs, the last one all that are left; [R, 1] the whole row.
    number = np.arange(values.shape[1]) // (SUPER_COLS // matrix.scheme.group)
    under = np.minimum(number, outer.shape[1] - 1)
    return values * outer[:, under].astype(np.float32)


def _spread(values: Array, repeat: int, length: int) -> npt.NDArray[np.float32]:
    """Repeat each of ``[R, n]`` along the row and cut to ``[R, length]``."""
    return np.repeat(values.astype(np.float32), repeat, axis=1)[:, :length]


def _raw_values(matrix: QuantizedMatrix) -> npt.NDArray[np.float32]:
    bits = np.ascontiguousarray(matrix.codes)
    if matrix.scheme.name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view("<f2" if matrix.scheme.name == "f16" else "<f4").astype(np.float32)
