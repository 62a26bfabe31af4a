"""The journal of an unfinished conversion: what is already on the disk, and its checksums.

One JSON object a line, in the output folder. It is a hint, never trusted: on resuming, the stored
bytes are hashed again and work goes on after the last record that matches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import osio, strict_json
from .errors import FormatError, UsageError

JOURNAL_NAME = ".moepack-journal"


@dataclass(frozen=True)
class FinishedFile:
    """A file that is complete under its final name.

    Attributes:
        size: Bytes.
        sha256: Hexadecimal digest of the whole file.
        header_xxh3: Digest of its header, or None for files without one.
        digests: xxh3-128 of each tensor or record, in file order.
    """

    size: int
    sha256: str
    header_xxh3: str | None
    digests: tuple[str, ...]


class Journal:
    """Append-only notes on one output folder.

    Args:
        folder: The output folder; it must exist.
        fingerprint: Names the source and every option that changes a byte of the output.

    Raises:
        UsageError: The folder holds an unfinished conversion with another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / JOURNAL_NAME
        self._digests: dict[str, list[str]] = {}
        self._finished: dict[str, FinishedFile] = {}
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with osio.io_errors(self.path):
            self._descriptor = os.open(self.path, flags, 0o644)
        try:
            self._read(folder, fingerprint)
        except BaseException:
            self.close()
            raise

    def digests(self, name: str) -> list[str]:
        """Checksums of the records noted for the unfinished file ``name``."""
        return list(self._digests.get(name, ()))

    def add(self, name: str, digest: str) -> None:
        """Note the next record of ``name``."""
        self._digests.setdefault(name, []).append(digest)
        self._add({"file": name, "xxh3": digest})

    def rewind(self, name: str, count: int) -> None:
        """Forget all but the first ``count`` records of ``name``."""
        if len(self.digests(name)) > count:
            self._digests[name] = self._digests[name][:count]
            self._add({"file": name, "keep": count})

    def finished(self, name: str) -> FinishedFile | None:
        """What is noted of a complete file, if it is complete."""
        return self._finished.get(name)

    def finish(self, name: str, facts: FinishedFile) -> None:
        """Note that ``name`` is complete."""
        self._finished[name] = facts
        self._add({"file": name, "finished": asdict(facts)})

    def remove(self) -> None:
        """Delete the journal: the pack is complete.

        Raises:
            ResourceError: The system refused.
        """
        self.close()
        with osio.io_errors(self.path):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the notes stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self, folder: Path, fingerprint: str) -> None:
        with osio.io_errors(self.path):
            size = os.fstat(self._descriptor).st_size
            text = osio.read_bytes(self._descriptor, 0, size, self.path)
        end = 0
        for note, length in _whole_notes(text):
            if end and note.file is not None:
                self._replay(note, note.file)
            elif end or note.fingerprint is None:
                break
            elif note.fingerprint != fingerprint:
                raise UsageError(
                    "an unfinished conversion with another source or other options is here",
                    where=folder,
                    remedy="give the same command again to resume it, or --force to start over",
                )
            end += length
        # What follows the last whole line would swallow the next one.
        with osio.io_errors(self.path):
            os.ftruncate(self._descriptor, end)
        if not end:
            self._add({"fingerprint": fingerprint})

    def _add(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with osio.io_errors(self.path):
            osio.write_at(self._descriptor, memoryview(data), os.fstat(self._descriptor).st_size)

    def _replay(self, note: _Note, name: str) -> None:
        if note.xxh3 is not None:
            self._digests.setdefault(name, []).append(note.xxh3)
        elif note.keep is not None:
            self._digests[name] = self._digests.get(name, [])[: note.keep]
        elif note.finished is not None:
            self._finished[name] = note.finished


def read_fingerprint(folder: Path) -> str | None:
    """The fingerprint in a folder's journal; None without a journal, or of a damaged one.

    Raises:
        ResourceError: The system refused.
    """
    path = folder / JOURNAL_NAME
    try:
        with open(path, "rb") as file:
            first = file.readline()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise osio.resource_error(error, path) from error
    return next((note.fingerprint for note, _ in _whole_notes(first)), None)


@dataclass(frozen=True)
class _Note:
    """A line: the fingerprint, or a file with one of the other three."""

    fingerprint: str | None = None
    file: str | None = None
    xxh3: str | None = None
    keep: int | None = None
    finished: FinishedFile | None = None


def _whole_notes(text: bytes) -> Iterator[tuple[_Note, int]]:
    """Notes and their lengths up to the first damaged one: a kill may leave half a line."""
    for line in text.split(b"\n")[:-1]:
        try:
            note = strict_json.decode(_Note, strict_json.loads(line, "journal"), "journal")
        except FormatError:
            return
        yield note, len(line) + 1
