"""Tiles of a packed matrix that stay in their file: read when they are asked for.

A token needs one tile of the embedding, some 30 KB of a hundred megabytes or more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from moepack_formats import osio
from moepack_formats.errors import IntegrityError
from moepack_formats.pack import REMEDY, Pack
from moepack_formats.paths import resolve_inside
from moepack_formats.tensor_file import read_header


class TileFile:
    """The tiles of one tensor, whose bytes were compared with the manifest before.

    Args:
        pack: An open pack.
        tensor: Name of the tensor in the trunk.
        tile_nbytes: Bytes of a tile.

    Raises:
        ResourceError: The file cannot be opened or read.
    """

    def __init__(self, pack: Pack, tensor: str, tile_nbytes: int) -> None:
        self._tile_nbytes = tile_nbytes
        for name in pack.manifest.trunk_files:
            descriptor = osio.open_regular(resolve_inside(pack.folder, name))
            file = open(descriptor, "rb", buffering=0)  # noqa: SIM115 - closed with this object
            found = read_header(descriptor, name).tensors.get(tensor)
            if found is not None:
                break
            file.close()
        assert found is not None  # the trunk's tensors were checked
        self._file, self._start = file, found.start
        self._place = f"{name}: {tensor}"
        osio.set_direct(descriptor, False)  # a tile is small: through the cache, no reading ahead
        self._digests = [self._digest(tile) for tile in range(found.nbytes // tile_nbytes)]
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, tiles: Sequence[int]) -> Tensor:
        """``[len(tiles) * tile_nbytes]`` uint8.

        Raises:
            ResourceError: The file was truncated, or the disk failed.
            IntegrityError: The bytes have changed since the pack was loaded.
        """
        data = bytearray(max(len(tiles), 1) * self._tile_nbytes)
        view = memoryview(data)
        for i, tile in enumerate(tiles):
            part = view[i * self._tile_nbytes : (i + 1) * self._tile_nbytes]
            self._fill(part, tile)
            if xxhash.xxh3_64_intdigest(part) != self._digests[tile]:
                raise IntegrityError(
                    "the bytes have changed while in use", where=self._place, remedy=REMEDY
                )
        return torch.frombuffer(data, dtype=torch.uint8)

    def _fill(self, part: memoryview, tile: int) -> None:
        start = self._start + tile * self._tile_nbytes
        osio.read_at(self._file.fileno(), part, start, self._place)

    def _digest(self, tile: int) -> int:
        part = memoryview(bytearray(self._tile_nbytes))
        self._fill(part, tile)
        return xxhash.xxh3_64_intdigest(part)
