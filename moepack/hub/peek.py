"""Looking into a pack on the Hub: the manifest and the headers, by range requests."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

from moepack_formats import osio
from moepack_formats.errors import FormatError, IntegrityError, NetworkError
from moepack_formats.manifest import MANIFEST_NAME
from moepack_formats.pack import Pack
from moepack_formats.tensor_file import MAX_HEADER_NBYTES
from moepack_runtime.hub.cache import cached_pack
from moepack_runtime.hub.listing import PackListing, list_pack
from moepack_runtime.hub.remote import RemoteRepo

_FIRST_NBYTES = 64 << 10
"""Enough for most headers, so that one request does."""


@contextlib.contextmanager
def remote_pack(repo_id: str, revision: str | None = None) -> Iterator[Pack]:
    """Open a pack on the Hub for what its manifest and its headers tell.

    The headers are put into files that are holes otherwise, so that everything that is checked of
    a pack on the disk is checked here; the records read as zeros. Where the Hub cannot be reached,
    what the Hub cache holds is opened instead.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit.

    Raises:
        NetworkError: The Hub cannot be reached or refuses.
        FormatError: The repository holds no whole pack.
    """
    place: contextlib.AbstractContextManager[Path]
    try:
        place = _holes(list_pack(RemoteRepo.at(repo_id, revision)))
    except NetworkError as error:
        place = contextlib.nullcontext(cached_pack(repo_id, revision, error))
    with place as folder, Pack(folder) as pack:
        yield pack


@contextlib.contextmanager
def _holes(listing: PackListing) -> Iterator[Path]:
    """A folder with the pack's files, of which only the headers are there."""
    with (
        osio.io_errors("temporary file"),
        tempfile.TemporaryDirectory(prefix="moepack-") as name,
    ):
        folder = Path(name)
        _write_holes(listing, folder)
        yield folder


def _write_holes(listing: PackListing, folder: Path) -> None:
    layers = {name for layer in listing.manifest.layers for name in layer.files}
    for name, facts in listing.manifest.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            if name in layers:
                file.write(_header(listing, name))
            file.truncate(facts.size)
    (folder / MANIFEST_NAME).write_bytes(listing.manifest_data)


def _header(listing: PackListing, name: str) -> bytes:
    """A layer file's header, length word and padding included."""
    where = f"{listing.remote.repo_id}, {name}"
    if listing.is_compressed(name):
        return _compressed_header(listing, name, where)
    size = listing.remote_nbytes(name)
    start = listing.remote.read_range(name, 0, min(_FIRST_NBYTES, size))
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_NBYTES:
        raise FormatError("header is over the cap", where=where, got=length)
    if 8 + length > len(start):
        start += listing.remote.read_range(name, len(start), min(8 + length, size))
    return start[: 8 + length]


def _compressed_header(listing: PackListing, name: str, where: str) -> bytes:
    """The content of a compressed layer file's first frame."""
    size, data = listing.remote_nbytes(name), b""
    while len(data) < size:
        stop = min(max(2 * len(data), _FIRST_NBYTES), size)
        data += listing.remote.read_range(listing.remote_names[name], len(data), stop)
        try:
            declared = zstandard.get_frame_parameters(data).content_size
            if declared > MAX_HEADER_NBYTES + 8:
                raise FormatError("header is over the cap", where=where, got=declared)
            reader = zstandard.ZstdDecompressor(max_window_size=8 << 20).stream_reader(
                io.BytesIO(data), read_across_frames=False
            )
            header = reader.read(declared)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"the first frame is damaged: {error}", where=where) from None
        if len(header) == declared:
            return header
        if len(data) > MAX_HEADER_NBYTES + _FIRST_NBYTES:
            raise FormatError("the first frame is over the cap", where=where, got=len(data))
    raise IntegrityError("the first frame is truncated", where=where, got=os.fspath(name))
