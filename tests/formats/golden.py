"""Matrices, a record and files whose bytes are fixed: arithmetic only, no random numbers."""

from __future__ import annotations

import numpy as np

from moepack_formats.matrix import QuantizedMatrix
from moepack_formats.record import Part, plan_record
from moepack_formats.schemes import Scheme, get_scheme

ROWS, COLS = 2, 258  # four blocks and part of a fifth


def dump(data: bytes) -> str:
    """``offset: bytes`` of every 16 bytes that are not all zero, as in SPEC.md."""
    lines = [(at, data[at : at + 16]) for at in range(0, len(data), 16)]
    return "\n".join(f"{at:04x}: {line.hex(' ')}" for at, line in lines if any(line))


def undump(text: str, size: int) -> bytes:
    """The inverse of :func:`dump`."""
    data = bytearray(size)
    for line in text.strip().splitlines():
        at, _, pairs = line.partition(": ")
        piece = bytes.fromhex(pairs)
        data[int(at, 16) : int(at, 16) + len(piece)] = piece
    return bytes(data)


def _codes(scheme: Scheme, full: bool) -> np.ndarray:
    dtype = f"<u{max(scheme.bits, 8) // 8}"
    row, col = np.indices((ROWS, COLS))
    codes = ((row * 7 + col * 13 + 5) % (1 << min(scheme.bits, 8))).astype(dtype)
    if scheme.bits >= 16:
        codes = codes * np.array(257 if scheme.bits == 16 else 16843009, dtype) & 0x3FFF
    if not full:
        keep = np.zeros((ROWS, COLS), bool)
        keep[0, [0, 1, 4, 27, 31, 63, 64, 257]] = keep[1, [2, 24, 130, 256]] = True
        codes = np.where(keep, np.maximum(codes, 1), 0)
    return codes.astype(dtype)


def golden_matrix(name: str, *, full: bool) -> QuantizedMatrix:
    """``[2, 258]``; with few codes that are not 0, for dumps, or with all kinds."""
    scheme = get_scheme(name)
    codes = _codes(scheme, full)
    if scheme.is_raw:
        return QuantizedMatrix(scheme, (ROWS, COLS), codes)
    groups = scheme.groups(COLS)
    count = np.arange(1, ROWS * groups + 1).reshape(ROWS, groups)
    if scheme.scale_bits == 16:
        both = (count / 4).astype("<f2"), (2 - count).astype("<f2")
        return QuantizedMatrix(scheme, (ROWS, COLS), codes, *both)
    outer_scales = np.array([[1, 2], [3, 4]], "<f2")
    if scheme.scale_bits == 5:
        signed = (count * 5 % 32 - 16).astype("i1")
        return QuantizedMatrix(
            scheme, (ROWS, COLS), codes, scales=signed, outer_scales=outer_scales
        )
    if scheme.scale_bits == 8:
        small = (count * 5 % 256).astype("u1"), (count * 7 % 256).astype("u1").view("i1")
        outer = np.array([[0.5], [3]], "<f4"), np.array([[-0.25], [7]], "<f4")
    else:
        small = (count % 16).astype("u1"), (15 - count % 16).astype("u1")
        outer = outer_scales[:, :1], np.array([[-1], [0.25]], "<f2")
    return QuantizedMatrix(scheme, (ROWS, COLS), codes, *small, *outer)


def _matrix(name: str, codes: object, *metadata: tuple[str, object]) -> QuantizedMatrix:
    array = np.array(codes, "u1")
    arrays = [np.array(values, dtype).reshape(len(array), -1) for dtype, values in metadata]
    return QuantizedMatrix(get_scheme(name), array.shape, array, *arrays)


# The examples of SPEC.md, section 11.
SPEC_GATE = _matrix(
    "q4g64",
    [[1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 13, 14]],
    ("<f2", [0.5, 0.25]),
    ("<f2", [1, -2]),
)
_THREE_BITS = np.zeros((1, 32), "u1")
_THREE_BITS[0, ::4] = [1, 2, 3, 4, 5, 6, 7, 4]
SPEC_THREE_BITS = _matrix("q3g64", _THREE_BITS, ("<f2", [1]), ("<f2", [0]))
_SIX_BITS = np.zeros((1, 16), "u1")
_SIX_BITS[0, ::4] = [1, 2, 3, 45]
SPEC_SIX_BITS = _matrix("q6g64", _SIX_BITS, ("<f2", [1]), ("<f2", [0]))
_SIGNED = np.full((1, 64), 4, "u1")
_SIGNED[0, ::16] = [0, 1, 5, 7]
SPEC_SIGNED = QuantizedMatrix(
    get_scheme("q3g16s5"),
    (1, 64),
    _SIGNED,
    scales=np.array([[1, -1, -16, 15]], "i1"),
    outer_scales=np.array([[0.5]], "<f2"),
)
_LEFT_OVER = {name: np.zeros((1, 20), "u1") for name in ("scales", "minima")}
_LEFT_OVER["scales"][0, [0, 16]] = [2, 3]
_LEFT_OVER["minima"][0, 16] = 1
_LEFT_OVER["codes"] = np.zeros((1, 320), "u1")
_LEFT_OVER["codes"][0, [0, 256]] = [1, 2]
SPEC_LEFT_OVER = QuantizedMatrix(
    get_scheme("q2g16s4"),
    (1, 320),
    **_LEFT_OVER,
    outer_scales=np.array([[0.5]], "<f2"),
    outer_minima=np.array([[0.25]], "<f2"),
)
SPEC_RECORD = plan_record(6, 2, "q4g64", "q3g32s4", bias=True)
SPEC_PARTS: dict[str, Part] = {
    "gate": SPEC_GATE,
    "up": _matrix(
        "q4g64",
        [[15, 0, 15, 0, 15, 0], [0, 1, 0, 1, 0, 1]],
        ("<f2", [1, 2]),
        ("<f2", [8, 0]),
    ),
    "down": _matrix(
        "q3g32s4",
        [[1, 2], [3, 4], [5, 6], [7, 0], [1, 3], [5, 7]],
        ("u1", [1, 2, 3, 4, 5, 15]),
        ("u1", [0, 1, 2, 3, 14, 15]),
        ("<f2", [0.5] * 6),
        ("<f2", [0.25] * 3 + [-0.25] * 3),
    ),
    "gate_bias": np.array([1, 2], np.float32),
    "up_bias": np.array([-1, -2], np.float32),
    "down_bias": np.array([0.5, 0, 0, 0, 0, -0.5], np.float32),
}
