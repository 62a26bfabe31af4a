"""A second reader of packs, written from formats/SPEC.md alone; it shares no code with moepack.

Slow on purpose: one loop per row and input, and the bit arithmetic as the text gives it. The
section numbers are those of SPEC.md.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

BITS = {
    "q2g64": 2,
    "q3g64": 3,
    "q4g64": 4,
    "q4g128": 4,
    "q6g64": 6,
    "q8g64": 8,
    "q2g16s8": 2,
    "q2g16s4": 2,
    "q3g32s4": 3,
    "q3g16s5": 3,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
}
F16_SPAN_BLOCKS = {"q2g64": 1, "q3g64": 1, "q4g64": 1, "q4g128": 2, "q6g64": 1, "q8g64": 1}
NIBBLE_GROUP = {"q2g16s4": 16, "q3g32s4": 32}
LEVELS = (-18, -12, -7, -3, 0, 4, 8, 13)


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def align(x: int, n: int) -> int:
    return ceil_div(x, n) * n


def f16(data: bytes, at: int) -> np.float32:
    return np.float32(struct.unpack_from("<e", data, at)[0])


def f32(data: bytes, at: int) -> np.float32:
    return np.float32(struct.unpack_from("<f", data, at)[0])


def code(data: bytes, at: int, bits: int, r: int, i: int) -> int:
    """3.4: the code of row ``r`` and input ``i`` of the block at byte ``at``."""
    if bits == 32:
        return int(struct.unpack_from("<I", data, at + 64 * i + 4 * r)[0])
    if bits == 16:
        return int(struct.unpack_from("<H", data, at + 64 * (i // 2) + 4 * r + 2 * (i % 2))[0])
    p, byte = i // 4, 4 * r + i % 4
    if bits == 8:
        return data[at + 64 * p + byte]
    if bits == 4:
        return data[at + 64 * (p // 2) + byte] >> (4 if p % 2 else 0) & 15
    if bits == 2:
        return data[at + 64 * (p // 4) + byte] >> 2 * (p % 4) & 3
    if bits == 6:
        four, q = divmod(p, 4)
        a, b, c = (data[at + 64 * (3 * four + v) + byte] for v in range(3))
        if q < 3:
            return (a, b, c)[q] & 63
        return a >> 6 | (b >> 6) << 2 | (c >> 6) << 4
    half, q = divmod(p, 8)
    a, b, c = (data[at + 64 * (3 * half + v) + byte] for v in range(3))
    if q < 6:
        return (a, b, c)[q // 2] >> 3 * (q % 2) & 7
    if q == 6:
        return (a >> 6) << 1 | (b >> 6 & 1)
    return (c >> 6) << 1 | (b >> 7)


def raw_value(scheme: str, bits: int) -> np.float32:
    if scheme == "f16":
        return f16(struct.pack("<H", bits), 0)
    if scheme == "bf16":
        return f32(struct.pack("<I", bits << 16), 0)
    return f32(struct.pack("<I", bits), 0)


def span_nbytes(scheme: str, n: int) -> int:
    """3.3: bytes of a span of n blocks."""
    if scheme in F16_SPAN_BLOCKS:
        return n * 128 * BITS[scheme] + 64
    if scheme == "q2g16s8":
        return 384
    if scheme == "q2g16s4":
        return 64 + n * 320
    if scheme in ("q3g32s4", "q3g16s5"):
        return 64 + n * 416
    return n * 128 * BITS[scheme]


def span_blocks(scheme: str) -> int:
    if scheme in NIBBLE_GROUP or scheme == "q3g16s5":
        return 4
    return F16_SPAN_BLOCKS.get(scheme, 1)


def span_sizes(scheme: str, cols: int) -> list[int]:
    """3.3: blocks of each span of a tile."""
    full, rest = divmod(ceil_div(cols, 64), span_blocks(scheme))
    sizes = [span_blocks(scheme)] * full
    if rest and full and scheme in NIBBLE_GROUP:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def tile_nbytes(scheme: str, cols: int) -> int:
    head = 128 if scheme == "q2g16s8" else 0
    return head + sum(span_nbytes(scheme, n) for n in span_sizes(scheme, cols))


def span_value(scheme: str, tile: bytes, start: int, n: int, r: int, i: int) -> np.float32:
    """Value of row ``r`` and of input ``i`` of the span of ``n`` blocks at byte ``start``."""
    bits = BITS[scheme]
    block, inside = divmod(i, 64)
    if scheme in F16_SPAN_BLOCKS:
        q = code(tile, start + block * 128 * bits, bits, r, inside)
        scales = start + n * 128 * bits
        product = np.float32(q) * f16(tile, scales + 2 * r)
        return np.float32(product - f16(tile, scales + 32 + 2 * r))
    if scheme == "q2g16s8":
        q = code(tile, start, bits, r, inside)
        group = start + 256 + 32 * (inside // 16)
        scale = tile[group + r]
        (minimum,) = struct.unpack_from("<b", tile, group + 16 + r)
        s = np.float32(scale) * f32(tile, 4 * r)
        m = np.float32(minimum) * f32(tile, 64 + 4 * r)
        return np.float32(np.float32(q) * s - m)
    if scheme in NIBBLE_GROUP:
        block_at = start + 64 + block * (span_nbytes(scheme, 1) - 64)
        q = code(tile, block_at, bits, r, inside)
        both = tile[block_at + 128 * bits + 16 * (inside // NIBBLE_GROUP[scheme]) + r]
        s = np.float32(both & 15) * f16(tile, start + 2 * r)
        m = np.float32(both >> 4) * f16(tile, start + 32 + 2 * r)
        return np.float32(np.float32(q) * s - m)
    if scheme == "q3g16s5":
        block_at = start + 64 + 416 * block
        q = code(tile, block_at, bits, r, inside)
        g = inside // 16
        low = tile[block_at + 384 + 16 * (g // 2) + r] >> (4 if g % 2 else 0) & 15
        group = 4 * block + g
        fifth = tile[start + 32 + 16 * (group // 8) + r] >> group % 8 & 1
        s = np.float32(low - 16 * fifth) * f16(tile, start + 2 * r)
        return np.float32(np.float32(LEVELS[q]) * s)
    return raw_value(scheme, code(tile, start, bits, r, inside))


def read_tile(scheme: str, tile: bytes, rows: int, cols: int) -> list[list[np.float32]]:
    """Values of the first ``rows`` rows of a tile."""
    head = 128 if scheme == "q2g16s8" else 0
    result = []
    for r in range(rows):
        row: list[np.float32] = []
        start = head
        for n in span_sizes(scheme, cols):
            inputs = range(min(64 * n, cols - len(row)))
            row += [span_value(scheme, tile, start, n, r, i) for i in inputs]
            start += span_nbytes(scheme, n)
        result.append(row)
    return result


def read_matrix(scheme: str, data: bytes, rows: int, cols: int) -> np.ndarray:
    """A packed matrix as float32 ``[rows, cols]``."""
    size = tile_nbytes(scheme, cols)
    if len(data) != ceil_div(rows, 16) * size:
        raise ValueError(f"{len(data)} bytes, wanted {ceil_div(rows, 16) * size}")
    values: list[list[np.float32]] = []
    for t in range(ceil_div(rows, 16)):
        tile = data[t * size : (t + 1) * size]
        values += read_tile(scheme, tile, min(16, rows - 16 * t), cols)
    return np.array(values, np.float32)


def every_second(data: bytes, size: int, first: int) -> bytes:
    """Pieces ``first``, ``first + 2``, ... of ``size`` bytes: gate's or up's (section 4)."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(pieces[first::2])


def read_record(layout: dict[str, Any], record: bytes) -> dict[str, np.ndarray]:
    """An expert's matrices and biases as float32."""
    parts: dict[str, np.ndarray] = {}
    expected_offset = 0
    for tensor in layout["tensors"]:
        name, scheme, shape = tensor["name"], tensor["scheme"], tensor["shape"]
        if tensor["offset"] != align(expected_offset, 256):
            raise ValueError(f"{name} at {tensor['offset']}")
        expected_offset = tensor["offset"] + tensor["nbytes"]
        data = record[tensor["offset"] : expected_offset]
        if name.endswith("_bias"):
            halves = [("gate_bias", 0), ("up_bias", 1)] if name == "gate_up_bias" else [(name, -1)]
            for part, which in halves:
                mine = data if which < 0 else every_second(data, 64, which)
                count = shape[0] if which < 0 else shape[0] // 2
                parts[part] = np.array([f32(mine, 4 * j) for j in range(count)], np.float32)
        elif name == "gate_up":
            size = tile_nbytes(scheme, shape[1])
            for part, which in (("gate", 0), ("up", 1)):
                mine = every_second(data, size, which)
                parts[part] = read_matrix(scheme, mine, shape[0] // 2, shape[1])
        else:
            parts[name] = read_matrix(scheme, data, *shape)
    if layout["payload_nbytes"] != expected_offset:
        raise ValueError("payload does not end with the last sub-tensor")
    if layout["nbytes"] != align(expected_offset, 4096) or len(record) != layout["nbytes"]:
        raise ValueError("record has the wrong size")
    return parts


@dataclass
class SafetensorsFile:
    metadata: dict[str, str]
    tensors: dict[str, bytes]
    header_xxh3: str


def read_safetensors(path: Path) -> SafetensorsFile:
    """Section 5."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    start = 8 + length
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = data[start + begin : start + end]
    return SafetensorsFile(metadata, tensors, xxhash.xxh3_128(data[:start]).hexdigest())


def read_layer_file(path: Path) -> dict[int, dict[str, np.ndarray]]:
    """Section 7: every expert of a file."""
    file = read_safetensors(path)
    layer = json.loads(file.metadata["moepack"])
    if layer["format_version"] != 1:
        raise ValueError("not version 1")
    experts = {}
    for i, spec in enumerate(layer["spec_of"]):
        expert = layer["first_expert"] + i
        record = file.tensors[f"experts.{expert}"]
        if xxhash.xxh3_128(record).hexdigest() != layer["xxh3"][i]:
            raise ValueError(f"expert {expert} is damaged")
        experts[expert] = read_record(layer["specs"][spec], record)
    return experts


def read_packed_trunk(folder: Path) -> dict[str, np.ndarray]:
    """Section 6: the packed weights of the trunk, by module name."""
    manifest = json.loads((folder / "moepack.json").read_bytes())
    layer_files = {name for layer in manifest["layers"] for name in layer["files"]}
    tensors: dict[str, bytes] = {}
    for name, facts in manifest["files"].items():
        if name.endswith(".safetensors") and name not in layer_files:
            file = read_safetensors(folder / name)
            if file.header_xxh3 != facts["header_xxh3"]:
                raise ValueError(f"{name} is damaged")
            tensors |= file.tensors
    for name, digest in manifest["trunk"].items():
        if xxhash.xxh3_128(tensors[name]).hexdigest() != digest:
            raise ValueError(f"{name} is damaged")
    result = {}
    for module, entry in manifest["packed"].items():
        source = entry["tied_to"] or module
        result[module] = read_matrix(entry["scheme"], tensors[f"{source}.packed"], *entry["shape"])
    return result
