"""Checking every byte of a pack: what ``moepack verify`` does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from . import osio
from .errors import IntegrityError
from .layer import LayerFile
from .manifest import Manifest
from .matrix import floats_are_finite
from .pack import REMEDY, Pack, check_record
from .paths import resolve_inside
from .record import RecordSpec
from .schemes import TILE_ROWS, get_scheme
from .tiles import Bytes
from .trunk import TrunkTensor, check_complete, read_trunk_file

Progress = Callable[[int], object]
"""Called with the number of bytes checked since the last call."""

_CHUNK = 1 << 24


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and found good.

    Attributes:
        files: Files whose sha256 was compared.
        records: Expert records.
        trunk_tensors: Tensors of the trunk.
        nbytes: Bytes read.
    """

    files: int
    records: int
    trunk_tensors: int
    nbytes: int


def verify_pack(folder: Path, progress: Progress | None = None) -> VerifyReport:
    """Read a whole pack once and check all that it says of itself.

    Checked are the sha256 of every file, the checksum of every record and trunk tensor, and that
    no scale, minimum, bias or raw expert weight is infinite or NaN.

    Args:
        folder: The pack's folder.
        progress: Told how far it has come.

    Raises:
        UsageError: There is no such folder.
        FormatError: Not a complete pack of a known version.
        IntegrityError: Something is damaged; names layer and expert, tensor or file.
        ResourceError: A file could not be read.
    """
    with Pack(folder) as pack:
        manifest = pack.manifest
        nbytes, seen = 0, set[str]()
        layer_files = {file.name: file for file in pack.files}
        trunk_files = set(manifest.trunk_files)
        for name, facts in manifest.files.items():
            if name in layer_files:
                reader = _Reader(layer_files[name].descriptor, name, progress)
                _check_layer_file(layer_files[name], reader)
            else:
                descriptor = osio.open_regular(resolve_inside(folder, name))
                try:
                    reader = _Reader(descriptor, name, progress)
                    if name in trunk_files:
                        seen |= _check_trunk_file(manifest, reader, seen)
                    reader.skip_to_end()
                finally:
                    os.close(descriptor)
            if (reader.offset, reader.sha256.hexdigest()) != (facts.size, facts.sha256):
                raise IntegrityError(
                    "the file is not the one that was written",
                    where=name,
                    wanted=f"{facts.size} bytes, sha256 {facts.sha256}",
                    got=f"{reader.offset} bytes, sha256 {reader.sha256.hexdigest()}",
                    remedy=REMEDY,
                )
            nbytes += reader.offset
        check_complete(manifest, seen)
        records = sum(len(layer) for layer in pack.layers)
        return VerifyReport(len(manifest.files), records, len(seen), nbytes)


class _Reader:
    """Reads a file front to back, and hashes all of it on the way."""

    def __init__(self, descriptor: int, name: str, progress: Progress | None) -> None:
        self.descriptor = descriptor
        self.name = name
        self.offset = 0
        self.sha256 = hashlib.sha256()
        self._progress = progress

    def take(self, nbytes: int) -> Bytes:
        """The next bytes as ``[nbytes]`` uint8."""
        data = np.empty(nbytes, np.uint8)
        osio.read_at(self.descriptor, data.data, self.offset, self.name)
        self.sha256.update(data.data)
        self.offset += nbytes
        if self._progress is not None:
            self._progress(nbytes)
        return data

    def pieces(self, nbytes: int, multiple: int = 1) -> Iterator[Bytes]:
        """The next ``nbytes`` in pieces of some megabytes, each a multiple of ``multiple``."""
        each = max(_CHUNK // multiple, 1) * multiple
        while nbytes:
            piece = self.take(min(each, nbytes))
            nbytes -= len(piece)
            yield piece

    def skip_to_end(self) -> None:
        """Hash what is left of the file."""
        for _ in self.pieces(max(os.fstat(self.descriptor).st_size - self.offset, 0)):
            pass


def _check_layer_file(file: LayerFile, reader: _Reader) -> None:
    layer = file.layer.layer
    reader.take(file.header.data_start)  # compared with the manifest when the pack was opened
    for expert, location in file.locations.items():
        record = reader.take(location.spec.nbytes)
        check_record(record.data, location, layer, expert)
        damaged = _not_finite(record, location.spec)
        if damaged is not None:
            raise IntegrityError(
                f"layer {layer}, expert {expert}: {damaged} holds a value that is not finite",
                where=file.name,
                remedy="convert again from an undamaged source",
            )


def _not_finite(record: Bytes, spec: RecordSpec) -> str | None:
    """Name of the first sub-tensor with a NaN or infinity among its scales or values."""
    for tensor in spec.tensors:
        data = record[tensor.offset : tensor.offset + tensor.nbytes].reshape(
            tensor.padded[0] // TILE_ROWS, -1
        )
        cols = tensor.shape[1] if len(tensor.shape) == 2 else 1
        if not floats_are_finite(data, get_scheme(tensor.scheme), cols):
            return tensor.name
    return None


def _check_trunk_file(manifest: Manifest, reader: _Reader, seen: set[str]) -> set[str]:
    header, tensors = read_trunk_file(manifest, reader.descriptor, reader.name, seen)
    reader.take(header.data_start)
    for tensor in tensors:
        _check_trunk_tensor(reader, tensor)
    return set(header.tensors)


def _check_trunk_tensor(reader: _Reader, tensor: TrunkTensor) -> None:
    digest, finite = xxhash.xxh3_128(), True
    if tensor.packed is None:
        for piece in reader.pieces(tensor.entry.nbytes):
            digest.update(piece.data)
    else:
        scheme, cols = get_scheme(tensor.packed.scheme), tensor.packed.shape[1]
        tile = scheme.tile_nbytes(cols)
        for piece in reader.pieces(tensor.entry.nbytes, tile):
            digest.update(piece.data)
            finite = finite and floats_are_finite(piece.reshape(-1, tile), scheme, cols)
    tensor.check(digest.hexdigest())
    if not finite:
        raise IntegrityError(
            "a packed tensor holds a value that is not finite",
            where=tensor.place,
            remedy="convert again from an undamaged source",
        )
