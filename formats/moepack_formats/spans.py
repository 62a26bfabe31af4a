"""Spans: the runs of bytes in a tile that carry their own scales.

Shape letters: T tiles, N spans of a tile side by side, n blocks of a span.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .schemes import BLOCK_COLS, SUPER_COLS, TILE_ROWS, Scheme
from .tiles import Bytes, block_nbytes

Array = npt.NDArray[np.generic]

_FIFTHS = 8  # Fifth bits in a byte.


@dataclass(frozen=True)
class Span:
    """A run of equal spans in every tile: ``count`` of them from byte ``start``."""

    scheme: Scheme
    start: int
    count: int
    blocks_each: int
    first_block: int

    @property
    def blocks(self) -> slice:
        """Which blocks of a row these are."""
        return slice(self.first_block, self.first_block + self.count * self.blocks_each)

    @property
    def groups_each(self) -> int:
        """Groups of one span, padding included."""
        return -(-self.blocks_each * BLOCK_COLS // self.scheme.group)

    @property
    def groups(self) -> slice:
        """Which groups of a row these are."""
        first = self.first_block * BLOCK_COLS // self.scheme.group
        return slice(first, first + self.count * self.groups_each)

    @property
    def supers(self) -> slice:
        """Which super-groups of a row these are."""
        first = self.first_block * BLOCK_COLS // SUPER_COLS
        return slice(first, first + self.count)

    @property
    def floats(self) -> slice:
        """Where the float16 numbers of a span lie in its bytes."""
        if self.scheme.scale_bits == 16:
            return slice(self.blocks_each * block_nbytes(self.scheme.bits), None)
        return slice(0, (4 if self.scheme.has_minima else 2) * TILE_ROWS)

    def of(self, tiles: Bytes) -> Bytes:
        """View ``[T, count, span bytes]`` of these spans."""
        size = self.scheme.span_nbytes(self.blocks_each)
        run = tiles[:, self.start : self.start + self.count * size]
        return run.reshape(len(tiles), self.count, size)


def spans(scheme: Scheme, padded_cols: int) -> Iterator[Span]:
    """The full spans of a row, then its last one if it is shorter or longer."""
    start, first_block = scheme.head_nbytes, 0
    for count, blocks in scheme.span_runs(padded_cols):
        yield Span(scheme, start, count, blocks, first_block)
        start += count * scheme.span_nbytes(blocks)
        first_block += count * blocks


def pack_span(span: Span, out: Bytes, codes: Bytes, by_tile: Mapping[str, Array]) -> None:
    """Write spans.

    Args:
        span: Which ones.
        out: ``[T, N, span bytes]``, overwritten.
        codes: ``[T, N * n, block bytes]`` packed codes.
        by_tile: Metadata of whole rows, ``[T, count, 16]`` each, in the dtypes of the file.
    """
    tiles, scheme = len(out), span.scheme
    small = {
        name: by_tile[name][:, span.groups] for name in ("scales", "minima") if name in by_tile
    }
    if scheme.scale_bits == 16:
        size = span.floats.start
        out[:, :, :size] = codes.reshape(tiles, span.count, size)
        metadata = out[:, :, size:].reshape(tiles, span.count, 2, TILE_ROWS * 2)
        metadata[:, :, 0] = small["scales"].view(np.uint8)
        metadata[:, :, 1] = small["minima"].view(np.uint8)
        return
    start, code_bytes = scheme.span_head_nbytes, block_nbytes(scheme.bits)
    # Four axes: merging count and blocks would need a copy, and writes to it would be lost.
    body = out[:, :, start:].reshape(tiles, span.count, span.blocks_each, -1)
    body[..., :code_bytes] = codes.reshape(*body.shape[:3], code_bytes)
    by_block: dict[str, Bytes] = {
        name: values.view(np.uint8).reshape(*body.shape[:3], -1, TILE_ROWS)
        for name, values in small.items()
    }
    scales = by_block["scales"]
    small_bytes: Array
    if scheme.scale_bits == 8:
        small_bytes = np.stack([scales, by_block["minima"]], axis=4)
    elif scheme.scale_bits == 4:
        small_bytes = scales | by_block["minima"] << 4
    else:
        small_bytes = scales[..., 0::2, :] & 15 | scales[..., 1::2, :] << 4
    body[..., code_bytes:] = small_bytes.reshape(*body.shape[:3], -1)
    if start:
        head = out[:, :, :start].reshape(tiles, span.count, 2, -1)
        head[:, :, 0] = by_tile["outer_scales"][:, span.supers].view(np.uint8)
        if scheme.has_minima:
            head[:, :, 1] = by_tile["outer_minima"][:, span.supers].view(np.uint8)
        else:
            head[:, :, 1] = _pack_fifths(scales.reshape(tiles, span.count, -1, TILE_ROWS))


def unpack_span(span: Span, data: Bytes, codes: Bytes, fields: dict[str, list[Array]]) -> None:
    """Read spans.

    Args:
        span: Which ones.
        data: ``[T, N, span bytes]``.
        codes: ``[T, N * n, block bytes]`` packed codes, overwritten.
        fields: Metadata ``[T, count, 16]`` is appended to them by name, in the dtypes of the file.
    """
    tiles, scheme = len(data), span.scheme

    def add(name: str, values: Array) -> None:
        fields.setdefault(name, []).append(values.reshape(tiles, -1, TILE_ROWS))

    if scheme.scale_bits == 16:
        size = span.floats.start
        codes[...] = data[:, :, :size].reshape(codes.shape)
        metadata = np.ascontiguousarray(data[:, :, size:]).view("<f2")
        metadata = metadata.reshape(tiles, span.count, 2, TILE_ROWS)
        add("scales", metadata[:, :, 0])
        add("minima", metadata[:, :, 1])
        return
    start, code_bytes = scheme.span_head_nbytes, block_nbytes(scheme.bits)
    head = np.ascontiguousarray(data[:, :, :start]).reshape(tiles, span.count, -1)
    if start:
        add("outer_scales", _floats(head[:, :, : 2 * TILE_ROWS]))
    if start and scheme.has_minima:
        add("outer_minima", _floats(head[:, :, 2 * TILE_ROWS :]))
    body = data[:, :, start:].reshape(tiles, span.count * span.blocks_each, -1)
    codes[...] = body[:, :, :code_bytes]
    metadata = body[:, :, code_bytes:]
    if scheme.scale_bits == 8:
        pairs = metadata.reshape(tiles, -1, 2, TILE_ROWS)
        add("scales", pairs[:, :, 0])
        add("minima", np.ascontiguousarray(pairs[:, :, 1]).view(np.int8))
    elif scheme.scale_bits == 4:
        add("scales", metadata & 15)
        add("minima", metadata >> 4)
    else:
        vectors = metadata.reshape(tiles, -1, TILE_ROWS)
        low = np.stack([vectors & 15, vectors >> 4], axis=2)
        low = low.reshape(tiles, span.count, -1, TILE_ROWS)
        fifths = _unpack_fifths(head[:, :, 2 * TILE_ROWS :])[:, :, : span.groups_each]
        add("scales", low.astype(np.int8) - 16 * fifths.astype(np.int8))


def _pack_fifths(scales: Bytes) -> Bytes:
    """The fifth bits of scales ``[T, N, groups, 16]`` as bytes ``[T, N, 32]``.

    Bit ``k`` of byte ``16 h + r`` is that of group ``8 h + k`` and row ``r``.
    """
    tiles, count, groups = scales.shape[:3]
    whole = np.zeros((tiles, count, 2 * _FIFTHS, TILE_ROWS), np.uint8)
    whole[:, :, :groups] = scales >> 4 & 1
    by_half = whole.reshape(tiles, count, 2, _FIFTHS, TILE_ROWS)
    return np.packbits(by_half, axis=3, bitorder="little").reshape(tiles, count, -1)


def _unpack_fifths(data: Bytes) -> Bytes:
    """Undo ``_pack_fifths``: ``[T, N, 32]`` to ``[T, N, 16 groups, 16]``."""
    by_half = data.reshape(*data.shape[:2], 2, 1, TILE_ROWS)
    bits = np.unpackbits(by_half, axis=3, bitorder="little")
    return bits.reshape(*data.shape[:2], 2 * _FIFTHS, TILE_ROWS)


def _floats(data: Bytes) -> Array:
    return np.ascontiguousarray(data).view("<f2")
