"""Compressing layer files for the Hub: one zstd frame for the header and one for each record."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import zstandard

from moepack_formats import osio
from moepack_formats.errors import IntegrityError
from moepack_formats.manifest import FileEntry
from moepack_formats.tensor_file import read_header

LEVEL = 3
"""Higher levels save another per cent and take several times as long."""


def compress_layer_file(source: Path, target: Path, facts: FileEntry) -> None:
    """Write the compressed form of a layer file; the same bytes each time.

    Args:
        source: The layer file.
        target: What to write.
        facts: What the manifest says of the layer file.

    Raises:
        IntegrityError: The layer file is not the one that the manifest lists.
        ResourceError: Reading or writing failed.
    """
    compressor = zstandard.ZstdCompressor(
        level=LEVEL, write_checksum=True, write_content_size=True, threads=0
    )
    digest = hashlib.sha256()
    descriptor = osio.open_regular(source)
    try:
        header = read_header(descriptor, source.name)
        spans = [(0, header.data_start)]
        spans += [(tensor.start, tensor.nbytes) for tensor in header.tensors.values()]
        with osio.io_errors(target), open(target, "wb") as file:
            for start, nbytes in spans:
                data = osio.read_bytes(descriptor, start, nbytes, source.name)
                digest.update(data)
                file.write(compressor.compress(data))
    finally:
        os.close(descriptor)
    if digest.hexdigest() != facts.sha256:
        raise IntegrityError(
            "the file is not the one that the manifest lists",
            where=source,
            wanted=f"sha256 {facts.sha256}",
            got=f"sha256 {digest.hexdigest()}",
            remedy="run verify, then convert again",
        )
