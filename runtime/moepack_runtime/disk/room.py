"""Room on a disk, asked for before anything large is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from moepack_formats.errors import ResourceError

from ..options import format_size


def check_space(folder: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        folder: Where they will be written; its nearest existing parent counts.
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
