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

# Codes are the values' own bits, so that both types of 16 bits have the same bytes.
_HALVES = (
    10240,
    "022c2b901dfae546a928cc81d4e7b2aa",
    """
0000: 05 05 12 12
0040: 00 00 00 00 26 26
0080: 39 39
0300: 00 00 00 00 44 04
0340: 00 00 64 24
03c0: 00 00 98 18
07c0: 00 00 38 38
0800: 45 05
1040: 00 00 00 00 a6 26
2000: 00 00 12 12 0c 0c
""",
)

# Size, xxh3 of the matrix with all codes, and a dump of the one with few.
MATRICES = {
    "q2g64": (
        1600,
        "fe08b2a18eeedf02789915ff14f03d3b",
        """
0000: 05 02 00 00 00 00 02
0040: 00 00 00 50 10
00c0: 00 00 00 40
0100: 00 34 00 3e
0120: 00 3c 00 c4
0140: 01
0240: 00 38 00 3f
0260: 00 00 00 c5
0280: 00 00 00 00 00 00 02
0380: 00 3a 00 40
03a0: 00 bc 00 c6
04c0: 00 3c 80 40
04e0: 00 c0 00 c7
0500: 00 02 00 00 01
0600: 00 3d 00 41
0620: 00 c2 00 c8
""",
    ),
    "q3g64": (
        2240,
        "2345c2877e77052cbdb072cf9ec6fe6e",
        """
0000: 0d 02 00 80 80 00 06
0040: 00 00 00 80
0100: 00 00 00 80
0180: 00 34 00 3e
01a0: 00 3c 00 c4
01c0: 05
0340: 00 38 00 3f
0360: 00 00 00 c5
0380: 00 00 00 00 00 00 06
0500: 00 3a 00 40
0520: 00 bc 00 c6
06c0: 00 3c 80 40
06e0: 00 c0 00 c7
0700: 00 02 00 00 04
0880: 00 3d 00 41
08a0: 00 c2 00 c8
""",
    ),
    "q4g64": (
        2880,
        "494f9080c2af47aec1e62e3d036c69c9",
        """
0000: 95 02 00 00 00 00 06
00c0: 00 00 00 84 04
01c0: 00 00 00 80
0200: 00 34 00 3e
0220: 00 3c 00 c4
0240: 05
0440: 00 38 00 3f
0460: 00 00 00 c5
0480: 00 00 00 00 00 00 06
0680: 00 3a 00 40
06a0: 00 bc 00 c6
08c0: 00 3c 80 40
08e0: 00 c0 00 c7
0900: 00 02 00 00 0c
0b00: 00 3d 00 41
0b20: 00 c2 00 c8
""",
    ),
    "q4g128": (
        2752,
        "ab59096ee7c4b6a30a6de403c2b04328",
        """
0000: 95 02 00 00 00 00 06
00c0: 00 00 00 84 04
01c0: 00 00 00 80
0200: 05
0400: 00 34 00 3c
0420: 00 3c 00 c0
0440: 00 00 00 00 00 00 06
0840: 00 38 00 3d
0860: 00 00 00 c2
0880: 00 02 00 00 0c
0a80: 00 3a 00 3e
0aa0: 00 bc 00 c4
""",
    ),
    "q6g64": (
        4160,
        "c35ee50fc7ff36acc55f613a4491b8e7",
        """
0000: 05 12 00 00 00 00 26
0040: 39
0100: 00 00 00 80
0140: 00 00 00 64 04
0280: 00 00 00 80
02c0: 00 00 00 c0
0300: 00 34 00 3e
0320: 00 3c 00 c4
0340: 05
0640: 00 38 00 3f
0660: 00 00 00 c5
0680: 00 00 00 00 00 00 26
0980: 00 3a 00 40
09a0: 00 bc 00 c6
0cc0: 00 3c 80 40
0ce0: 00 c0 00 c7
0d00: 00 12 00 00 0c
1000: 00 3d 00 41
1020: 00 c2 00 c8
""",
    ),
    "q8g64": (
        5440,
        "eb2d5da45ab21a01b7f389112e237f01",
        """
0000: 05 12 00 00 00 00 26
0040: 39
0180: 00 00 00 64 44
01c0: 00 00 00 98
03c0: 00 00 00 38
0400: 00 34 00 3e
0420: 00 3c 00 c4
0440: 45
0840: 00 38 00 3f
0860: 00 00 00 c5
0880: 00 00 00 00 00 00 a6
0c80: 00 3a 00 40
0ca0: 00 bc 00 c6
10c0: 00 3c 80 40
10e0: 00 c0 00 c7
1100: 00 12 00 00 0c
1500: 00 3d 00 41
1520: 00 c2 00 c8
""",
    ),
    "q2g16s8": (
        2048,
        "5d524f7ca83cbbbb0a27b6720e28d6a1",
        """
0000: 00 00 00 3f 00 00 40 40
0040: 00 00 80 be 00 00 e0 40
0080: 05 02 00 00 00 00 02
00c0: 00 00 00 50 10
0140: 00 00 00 40
0180: 05 5a
0190: 07 7e
01a0: 0a 5f
01b0: 0e 85
01c0: 0f 64
01d0: 15 8c
01e0: 14 69
01f0: 1c 93
0200: 01
0300: 19 6e
0310: 23 9a
0320: 1e 73
0330: 2a a1
0340: 23 78
0350: 31 a8
0360: 28 7d
0370: 38 af
0380: 00 00 00 00 00 00 02
0480: 2d 82
0490: 3f b6
04a0: 32 87
04b0: 46 bd
04c0: 37 8c
04d0: 4d c4
04e0: 3c 91
04f0: 54 cb
0600: 41 96
0610: 5b d2
0620: 46 9b
0630: 62 d9
0640: 4b a0
0650: 69 e0
0660: 50 a5
0670: 70 e7
0680: 00 02 00 00 01
0780: 55 aa
0790: 77 ee
""",
    ),
    "q2g16s4": (
        1664,
        "dcf47b2b0246d20be691319dd2e41be4",
        """
0000: 00 3c 00 42
0020: 00 bc 00 34
0040: 05 02 00 00 00 00 02
0080: 00 00 00 50 10
0100: 00 00 00 40
0140: e1 d2
0150: d2 c3
0160: c3 b4
0170: b4 a5
0180: 01
0280: a5 96
0290: 96 87
02a0: 87 78
02b0: 78 69
02c0: 00 00 00 00 00 00 02
03c0: 69 5a
03d0: 5a 4b
03e0: 4b 3c
03f0: 3c 2d
0500: 2d 1e
0510: 1e 0f
0520: 0f f0
0530: f0 e1
0540: 00 02 00 00 01
0640: e1 d2
""",
    ),
    "q3g32s4": (
        2144,
        "66353cf7031a55b5d7cacb7e84296a85",
        """
0000: 00 3c 00 42
0020: 00 bc 00 34
0040: 0d 02 00 80 80 00 06
0080: 00 00 00 80
0140: 00 00 00 80
01c0: e1 5a
01d0: d2 4b
01e0: 05
0360: c3 3c
0370: b4 2d
0380: 00 00 00 00 00 00 06
0500: a5 1e
0510: 96 0f
06a0: 87 f0
06b0: 78 e1
06c0: 00 02 00 00 04
0840: 69 d2
""",
    ),
    "q3g16s5": (
        2208,
        "292e23278c197380026d165866bc5762",
        """
0000: 00 3c 00 42
0020: c7 1c
0030: 71 c7
0040: 0d 02 00 80 80 00 06
0080: 00 00 00 80
0140: 00 00 00 80
01c0: a5 fa
01d0: 4f 94
01e0: 05
0360: e9 3e
0370: 83 d8
0380: 00 00 00 00 00 00 06
0500: 2d 72
0510: c7 1c
06a0: 61 b6
06b0: 0b 50
06c0: 00 40 00 44
06e0: 00 01
0700: 00 02 00 00 04
0880: 05 0a
""",
    ),
    "f16": _HALVES,
    "bf16": _HALVES,
    "f32": (
        20480,
        "b7c9954e1909edbdd608bff9920369b2",
        """
0000: 05 05
0040: 12 12
0080: 00 00 00 00 26 26
0100: 39 39
0600: 00 00 00 00 44 04
06c0: 64 24
07c0: 98 18
0fc0: 38 38
1000: 45 05
2080: 00 00 00 00 a6 26
4000: 00 00 00 00 0c 0c
4040: 12 12
""",
    ),
}
