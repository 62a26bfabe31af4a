"""File names that may be followed: plain, relative, inside their folder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from .errors import FormatError

_DRIVE = re.compile(r"^[A-Za-z]:")
_MAX_PART_NBYTES = 240
_MAX_NAME_NBYTES = 1_000


def is_plain(name: str) -> bool:
    """Whether a name cannot point outside its folder, on any system.

    False for one that is absolute, has ``..``, a backslash, a drive letter, a NUL or another
    control character, an empty part, or is too long for a file system.
    """
    parts = name.split("/")
    return not (
        not name
        or not name.isprintable()
        or "\\" in name
        or _DRIVE.match(name) is not None
        or any(part in ("", ".", "..") for part in parts)
        or len(name.encode()) > _MAX_NAME_NBYTES
        or any(len(part.encode()) > _MAX_PART_NBYTES for part in parts)
    )


def check_relative(name: str) -> str:
    """Refuse a name that could point outside the pack on any system.

    Raises:
        FormatError: It is not plain, see :func:`is_plain`.
    """
    if not is_plain(name):
        raise FormatError("unsafe file name", where=repr(name), wanted="a plain relative path")
    return name


def check_names(names: Iterable[str]) -> None:
    """Check every name, and that no two differ only by case or by Unicode composition.

    Raises:
        FormatError: A name is unsafe, or two would be one file on some systems.
    """
    seen: dict[str, str] = {}
    for name in names:
        check_relative(name)
        folded = unicodedata.normalize("NFC", name.casefold())
        other = seen.setdefault(folded, name)
        if other != name:
            raise FormatError("file names differ only by case", where=f"{other} and {name}")


def resolve_inside(root: Path, name: str) -> Path:
    """The path of ``name`` in the pack at ``root``; symbolic links may not leave the pack.

    Links into the blobs of the same Hub cache entry are how the Hub client stores files, and pass.

    Raises:
        FormatError: The name is unsafe or a link leaves the pack.
    """
    path = root / check_relative(name)
    try:
        real = path.resolve()
        inside = root.resolve()
    except (OSError, RuntimeError) as error:
        raise FormatError(f"cannot follow the path: {error}", where=name) from None
    if not is_inside(real, inside):
        raise FormatError("a symbolic link leaves the pack", where=name, got=real)
    return path


def is_inside(real: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, or in the Hub cache's blobs that the folder links to.

    Args:
        real: The path, with its links followed.
        folder: The folder, with its links followed.
    """
    allowed = [folder]
    snapshot = hub_snapshot(folder)
    if snapshot is not None:
        # The repository's own blobs, and the store that a cache's repositories share.
        repository = snapshot.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    return any(real.is_relative_to(root) for root in allowed)


def hub_snapshot(folder: Path) -> Path | None:
    """The snapshot folder of a Hub cache that ``folder`` is or lies in."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path
    return None
