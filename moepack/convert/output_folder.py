"""The output folder: one writer at a time, nothing overwritten by accident."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moepack_formats import osio
from moepack_formats.errors import FormatError, ResourceError, UsageError
from moepack_formats.journal import JOURNAL_NAME
from moepack_formats.manifest import MANIFEST_NAME
from moepack_formats.pack import read_manifest
from moepack_runtime.options import format_size

LOCK_NAME = ".moepack-lock"
STAGE_NAME = ".moepack-source"
"""The folder inside the output's where shards of a Hub source lie while they are needed."""
_OURS = {JOURNAL_NAME, LOCK_NAME}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if need be and hold it against other commands.

    Raises:
        ResourceError: Another process writes into it, or it cannot be written.
    """
    lock = folder / LOCK_NAME
    with osio.io_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ResourceError(
                f"in use by PID {owner}", where=folder, remedy="wait until that command ends"
            ) from None
        with osio.io_errors(lock):
            os.ftruncate(descriptor, 0)
            osio.write_at(descriptor, memoryview(f"{os.getpid()}\n".encode()), 0)
        try:
            yield
        finally:
            # While still holding it: whoever opens the name next makes a new file.
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # only succeeds when nothing at all was written
    finally:
        os.close(descriptor)


def is_unfinished(folder: Path) -> bool:
    """Whether an interrupted conversion can be resumed here."""
    return (folder / JOURNAL_NAME).exists() and not (folder / MANIFEST_NAME).exists()


def check_usable(folder: Path, *, force: bool) -> None:
    """Refuse a folder with other content, unless forced.

    Raises:
        UsageError: The folder is not empty.
        ResourceError: It is not a folder.
    """
    if not folder.exists() or force or is_unfinished(folder):
        return
    if not folder.is_dir():
        raise ResourceError("not a folder", where=folder)
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OURS)
    if others:
        what = "already holds a pack" if MANIFEST_NAME in others else "the folder is not empty"
        raise ResourceError(
            what, where=folder, got=others[0], remedy="give --force to overwrite, or another folder"
        )


def clear_old_pack(folder: Path) -> None:
    """Take away the files of an earlier pack or conversion; other files are left alone.

    The manifest goes first: from then on the folder counts as unfinished. Programs that have the
    old files open keep reading the old bytes.
    """
    names: list[str] = []
    if (folder / MANIFEST_NAME).exists():
        # A manifest that cannot be read says nothing of what is ours.
        with contextlib.suppress(FormatError, UsageError):
            names = list(read_manifest(folder).files)
    with osio.io_errors(folder):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for part in [*folder.glob("*.part"), *folder.glob("experts/*.part")]:
            part.unlink()
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder / STAGE_NAME, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        folder: The output folder; its nearest existing parent counts.
        needed: Bytes that are still to be written.

    Raises:
        ResourceError: There is less free space.
    """
    free = free_nbytes(folder)
    if free < needed:
        raise ResourceError(
            "not enough free disk space",
            where=folder,
            wanted=format_size(needed),
            got=f"{format_size(free)} free",
            remedy="free some space or choose another folder",
        )


def free_nbytes(folder: Path) -> int:
    """Free bytes on the disk that holds ``folder``, or that would hold it."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
