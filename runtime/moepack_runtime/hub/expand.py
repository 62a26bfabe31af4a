"""Compressed layer files: one zstd frame for the header and one for each record.

They exist in repositories only. Frames are expanded one after the other into the layer file that
the manifest lists; whatever a frame says of itself is compared with the header first, so that
neither a bomb nor a huge window costs more than the file itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from moepack_formats import checksum, osio
from moepack_formats.errors import FormatError, IntegrityError
from moepack_formats.manifest import FileEntry
from moepack_formats.tensor_file import MAX_HEADER_NBYTES, read_header_only

MAX_WINDOW_NBYTES = 8 << 20
# A frame can hold 128 KiB in 4 bytes: small bites keep what one call gives back bounded.
_BITE = 4096
_FRAME_HEADER_NBYTES = 18
_REMEDY = "pull again, or ask for a new push"


def expand_layer_file(source: Path, target: Path, facts: FileEntry, where: str) -> None:
    """Expand a compressed layer file.

    Args:
        source: The compressed file.
        target: The layer file to write; it is removed again when anything is wrong.
        facts: What the manifest says of the layer file.
        where: What to call the file in messages.

    Raises:
        IntegrityError: A frame is truncated, damaged, one too many, or not of the size that the
            header says; names the expert.
        FormatError: The header is not one that this version reads.
        ResourceError: The disk is full or cannot be read.
    """
    with osio.io_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with osio.io_errors(where), open(source, "rb") as file:
            _Expansion(_Frames(file.read, where), descriptor, facts, where).run()
            osio.replace(part, target)
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)


class _Expansion:
    def __init__(self, frames: _Frames, descriptor: int, facts: FileEntry, where: str) -> None:
        self._frames, self._descriptor, self._facts = frames, descriptor, facts
        self._where, self._offset = where, 0

    def run(self) -> None:
        self._frame(f"{self._where}, header", None)
        header = read_header_only(self._descriptor, self._where)
        right = checksum.xxh3(header.raw) == self._facts.header_xxh3
        if not right or header.end != self._facts.size or self._offset != header.data_start:
            raise IntegrityError(
                "the header is not the one that was written", where=self._where, remedy=_REMEDY
            )
        for tensor in header.tensors.values():
            self._frame(
                f"{self._where}, {tensor.name.replace('experts.', 'expert ')}", tensor.nbytes
            )
        if self._frames.has_more():
            raise IntegrityError("bytes follow the last frame", where=self._where, remedy=_REMEDY)

    def _frame(self, where: str, nbytes: int | None) -> None:
        """Write the next frame's content, which must have ``nbytes`` if that is known."""
        declared = self._frames.declared_nbytes(where)
        if declared != nbytes if nbytes is not None else declared > MAX_HEADER_NBYTES + 8:
            raise IntegrityError(
                "a compressed frame declares another size than the manifest allows",
                where=where,
                wanted=nbytes if nbytes is not None else f"<= {MAX_HEADER_NBYTES + 8}",
                got=declared,
                remedy=_REMEDY,
            )
        stop = self._offset + declared
        for piece in self._frames.content(where):
            if self._offset + len(piece) > stop:
                raise IntegrityError(
                    "a compressed frame holds more than it declares", where=where, remedy=_REMEDY
                )
            osio.write_at(self._descriptor, memoryview(piece), self._offset)
            self._offset += len(piece)
        if self._offset != stop:
            raise IntegrityError(
                "a compressed frame is truncated", where=where, wanted=declared, remedy=_REMEDY
            )


class _Frames:
    """Reads frames from a stream of bytes, a bite at a time."""

    def __init__(self, read: Callable[[int], bytes], where: str) -> None:
        self._read, self._ahead, self._where = read, b"", where

    def has_more(self) -> bool:
        return bool(self._fill(1))

    def declared_nbytes(self, where: str) -> int:
        """The content size that the next frame declares."""
        try:
            facts = zstandard.get_frame_parameters(self._fill(_FRAME_HEADER_NBYTES))
        except zstandard.ZstdError as error:
            raise IntegrityError(
                f"not a zstd frame, or a truncated one ({error})", where=where, remedy=_REMEDY
            ) from None
        size: int = facts.content_size
        if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            raise FormatError("a compressed frame declares no size", where=where)
        if not facts.has_checksum or facts.window_size > MAX_WINDOW_NBYTES:
            raise FormatError(
                "a compressed frame without checksum or with a huge window",
                where=where,
                wanted=f"a window <= {MAX_WINDOW_NBYTES}",
                got=facts.window_size,
            )
        return size

    def content(self, where: str) -> Iterator[bytes]:
        """The next frame's content in pieces."""
        frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES).decompressobj()
        while not frame.eof:
            bite = self._fill(_BITE)
            if not bite:
                return
            self._ahead = b""
            try:
                piece = frame.decompress(bite)
            except zstandard.ZstdError as error:
                raise IntegrityError(
                    f"a compressed frame is damaged ({error})", where=where, remedy=_REMEDY
                ) from None
            if piece:
                yield piece
        self._ahead = frame.unused_data + self._ahead

    def _fill(self, nbytes: int) -> bytes:
        """Look at the next ``nbytes``, fewer at the end."""
        if len(self._ahead) < nbytes:
            self._ahead += self._read(max(nbytes - len(self._ahead), _BITE))
        return self._ahead
