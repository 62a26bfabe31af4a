"""The torch reference: decode tiles to dense weights, then ordinary matrix products.

It runs on any device and defines what faster kernels must equal.

Shape letters: T tiles of 16 rows, B blocks of 64 inputs, R rows, C cols, N tokens, H hidden size,
I intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moepack_formats.record import RecordSpec, SubTensor
from moepack_formats.schemes import BLOCK_COLS, TILE_ROWS, Scheme, get_scheme

from ..experts import ExpertsAdapter

_RAW_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_QUADS = BLOCK_COLS // 4


def decode_matrix(
    packed: Tensor, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Decode a packed matrix.

    Args:
        packed: ``[scheme.packed_nbytes(*shape)]`` uint8 on any device.
        scheme: Its scheme.
        shape: True ``(R, C)``.
        dtype: Of the result; values are computed in float32 and rounded once.

    Returns:
        ``[R, C]`` in ``dtype``.
    """
    tiles = packed.view(-(-shape[0] // TILE_ROWS), -1)
    return decode_tiles(tiles, scheme, shape[1], dtype)[: shape[0]]


def decode_tiles(tiles: Tensor, scheme: Scheme, cols: int, dtype: torch.dtype) -> Tensor:
    """Decode whole tiles.

    Args:
        tiles: ``[T, scheme.tile_nbytes(cols)]`` uint8.
        scheme: Their scheme.
        cols: True inputs of a row.
        dtype: Of the result.

    Returns:
        ``[16 * T, cols]`` in ``dtype``.
    """
    if scheme.is_raw:
        return _decode_raw(tiles, scheme)[:, :cols].to(dtype)
    padded = scheme.padded_shape(1, cols)[1]
    outer = None
    if scheme.head_nbytes:
        outer = tiles[:, : scheme.head_nbytes].contiguous().view(torch.float32)
        outer = outer.view(len(tiles), 2, 1, 1, TILE_ROWS, 1)
    start, parts = scheme.head_nbytes, []
    for count, blocks in scheme.span_runs(cols):
        size = scheme.span_nbytes(blocks)
        spans = tiles[:, start : start + count * size].reshape(len(tiles), count, size)
        parts.append(_decode_spans(spans, scheme, blocks, outer))
        start += count * size
    values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # [T, B, 16 q, 16 r, 4]
    rows = values.permute(0, 3, 1, 2, 4).reshape(len(tiles) * TILE_ROWS, padded)
    return rows[:, :cols].to(dtype)


def _decode_spans(spans: Tensor, scheme: Scheme, blocks: int, outer: Tensor | None) -> Tensor:
    """``[T, count, bytes]`` to float32 values ``[T, count * blocks, 16 quads, 16 rows, 4]``."""
    tiles, count = spans.shape[:2]
    code_bytes = TILE_ROWS * BLOCK_COLS * scheme.bits // 8
    if scheme.scale_bits == 16:
        codes, metadata = spans.split([blocks * code_bytes, 4 * TILE_ROWS], dim=2)
        pair = metadata.contiguous().view(torch.float16).view(tiles, count, 2, TILE_ROWS).float()
        pair = pair.repeat_interleave(blocks, dim=1).view(tiles, -1, 2, 1, 1, TILE_ROWS, 1)
        scale, minimum = pair[:, :, 0], pair[:, :, 1]  # [T, B, 1 group, 1, 16, 1]
        codes = codes.reshape(tiles, count * blocks, code_bytes)
    elif scheme.scale_bits == 5:
        return _decode_levels(spans, scheme, blocks)
    else:
        if scheme.scale_bits == 4:
            head = spans[:, :, : 4 * TILE_ROWS].contiguous().view(torch.float16).float()
            head = head.view(tiles, count, 2, TILE_ROWS).repeat_interleave(blocks, dim=1)
            outer = head.transpose(1, 2).reshape(tiles, 2, -1, 1, 1, TILE_ROWS, 1)
            spans = spans[:, :, 4 * TILE_ROWS :]
        elif outer is not None:
            outer = outer.unsqueeze(2)  # [T, 2, 1 block, 1, 1, 16, 1]
        body = spans.reshape(tiles, count * blocks, -1)
        codes, metadata = body.split([code_bytes, body.shape[2] - code_bytes], dim=2)
        stored_scale, stored_minimum = _stored_scales(metadata, scheme)
        assert outer is not None  # every scheme with small scales has an outer factor
        scale, minimum = stored_scale * outer[:, 0], stored_minimum * outer[:, 1]
    quads = _unpack_codes(codes, scheme.bits).float()
    groups = scale.shape[2]
    by_group = quads.view(*quads.shape[:2], groups, _QUADS // groups, TILE_ROWS, 4)
    # Two roundings, never a fused multiply-add: every reader computes the same bits.
    values: Tensor = by_group * scale
    values -= minimum
    return values.view(quads.shape)


def _decode_levels(spans: Tensor, scheme: Scheme, blocks: int) -> Tensor:
    """As :func:`_decode_spans` where codes stand for levels, under signed scales of 5 bits."""
    tiles, count = spans.shape[:2]
    outer, fifths, body = spans.split([32, 32, spans.shape[2] - 64], dim=2)
    outer = outer.contiguous().view(torch.float16).float()
    outer = outer.view(tiles, count, 1, 1, TILE_ROWS)
    body = body.reshape(tiles, count * blocks, -1)
    codes, nibbles = body.split([body.shape[2] - 32, 32], dim=2)
    both = nibbles.reshape(tiles, count, blocks, 2, TILE_ROWS)
    low = torch.stack([both & 15, both >> 4], dim=4).view(tiles, count, blocks, 4, TILE_ROWS)
    places = torch.arange(8, dtype=torch.uint8, device=spans.device).view(8, 1)
    fifth = fifths.reshape(tiles, count, 2, 1, TILE_ROWS) >> places & 1
    fifth = fifth.view(tiles, count, 4, 4, TILE_ROWS)[:, :, :blocks]
    scale = (low.float() - 16 * fifth.float()) * outer  # [T, count, blocks, 4 groups, 16]
    levels = torch.tensor(scheme.levels, dtype=torch.float32, device=spans.device)
    quads = levels[_unpack_codes(codes, scheme.bits).int()]
    by_group = quads.view(*quads.shape[:2], 4, 4, TILE_ROWS, 4)
    values: Tensor = by_group * scale.view(tiles, count * blocks, 4, 1, TILE_ROWS, 1)
    return values.view(quads.shape)


def _stored_scales(metadata: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and minimum codes as float32 ``[T, B, groups, 1, 16, 1]``."""
    tiles, blocks = metadata.shape[:2]
    groups = BLOCK_COLS // scheme.group
    if scheme.scale_bits == 8:
        pairs = metadata.reshape(tiles, blocks, groups, 2, TILE_ROWS)
        scale, minimum = pairs[:, :, :, 0], pairs[:, :, :, 1].contiguous().view(torch.int8)
    else:
        both = metadata.reshape(tiles, blocks, groups, TILE_ROWS)
        scale, minimum = both & 15, both >> 4
    shape = (tiles, blocks, groups, 1, TILE_ROWS, 1)
    return scale.float().view(shape), minimum.float().view(shape)


def _unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """``[T, B, block bytes]`` to uint8 ``[T, B, 16 quads, 16 rows, 4]``; see formats' tiles.py."""
    shape = (*codes.shape[:2], _QUADS, TILE_ROWS, 4)
    vectors = codes.reshape(*codes.shape[:2], -1, TILE_ROWS * 4)
    if bits == 8:
        return vectors.reshape(shape)
    if bits == 4:
        return torch.stack([vectors & 15, vectors >> 4], dim=3).view(shape)
    if bits == 2:
        parts = [vectors & 3, vectors >> 2 & 3, vectors >> 4 & 3, vectors >> 6]
        return torch.stack(parts, dim=3).view(shape)
    if bits == 6:
        a, b, c = vectors.view(*codes.shape[:2], 4, 3, TILE_ROWS * 4).unbind(3)
        top = a >> 6 | b >> 6 << 2 | c >> 6 << 4
        return torch.stack([a & 63, b & 63, c & 63, top], dim=3).view(shape)
    a, b, c = vectors.view(*codes.shape[:2], 2, 3, TILE_ROWS * 4).unbind(3)
    low = [part for vector in (a, b, c) for part in (vector & 7, vector >> 3 & 7)]
    p6 = (a >> 6) << 1 | b >> 6 & 1
    p7 = (c >> 6) << 1 | b >> 7
    return torch.stack([*low, p6, p7], dim=3).view(shape)


def _decode_raw(tiles: Tensor, scheme: Scheme) -> Tensor:
    """``[16 * T, padded cols]`` in the source's own dtype."""
    per_cell = 32 // scheme.bits
    values = tiles.contiguous().view(_RAW_DTYPES[scheme.name])
    values = values.view(len(tiles), -1, TILE_ROWS, per_cell)
    return values.transpose(1, 2).reshape(len(tiles) * TILE_ROWS, -1)


def decode_projection(record: Tensor, tensor: SubTensor, dtype: torch.dtype) -> Tensor:
    """Decode a sub-tensor of a record.

    Args:
        record: The record's bytes, uint8.
        tensor: ``gate_up`` (or its bias), ``up``, ``down``...
        dtype: Of the result.

    Returns:
        ``[rows, cols]`` or ``[rows]``; ``gate_up`` holds all rows of gate, then all of up.
    """
    data = record[tensor.offset : tensor.offset + tensor.nbytes]
    share = 2 if tensor.name.startswith("gate_up") else 1
    rows = tensor.shape[0] // share
    # Tiles of gate and up alternate: bring all of gate in front.
    tiles = data.view(tensor.padded[0] // TILE_ROWS // share, share, -1).transpose(0, 1)
    tiles = tiles.reshape(tensor.padded[0] // TILE_ROWS, -1)
    if len(tensor.shape) == 1:
        values = tiles.contiguous().view(torch.float32).view(share, -1)[:, :rows]
        return values.reshape(-1).to(dtype)
    dense = decode_tiles(tiles, get_scheme(tensor.scheme), tensor.shape[1], dtype)
    if share == 1:
        return dense[:rows]
    return dense.view(share, -1, tensor.shape[1])[:, :rows].reshape(-1, tensor.shape[1])


def expert_forward(record: Tensor, spec: RecordSpec, adapter: ExpertsAdapter, x: Tensor) -> Tensor:
    """One expert on its tokens, without the router's weight.

    Args:
        record: ``[spec.nbytes]`` uint8 on the device of ``x``.
        spec: Its layout.
        adapter: Gives the activation and what follows ``down``.
        x: ``[N, H]``.

    Returns:
        ``[N, H]`` in the dtype of ``x``.
    """

    def part(name: str) -> Tensor | None:
        tensor = spec.tensor(name)
        return None if tensor is None else decode_projection(record, tensor, x.dtype)

    first = "gate_up" if adapter.gated else "up"
    weight, down = part(first), part("down")
    assert weight is not None  # check_spec has seen both
    assert down is not None
    hidden = adapter.activate(F.linear(x, weight, part(f"{first}_bias")))
    return adapter.finish(F.linear(hidden, down, part("down_bias")))


class ReferenceEngine:
    """Plain torch, see :class:`moepack_runtime.kernels.Engine`."""

    name = "reference (torch)"

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        scheme: Scheme,
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        return F.linear(x, decode_matrix(packed, scheme, shape, x.dtype), bias)

    def decode(
        self,
        packed: Tensor,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: torch.dtype,
        tiles: Tensor | None = None,
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        if tiles is None:
            return decode_matrix(packed, scheme, shape, dtype)
        stored = packed.view(-(-shape[0] // TILE_ROWS), -1)
        return decode_tiles(stored[tiles], scheme, shape[1], dtype)

    def expert(
        self, record: Tensor, spec: RecordSpec, adapter: ExpertsAdapter, x: Tensor
    ) -> Tensor:
        """See :class:`moepack_runtime.kernels.Engine`."""
        return expert_forward(record, spec, adapter, x)

    def fused(self, adapter: ExpertsAdapter) -> None:
        """No fused call."""
