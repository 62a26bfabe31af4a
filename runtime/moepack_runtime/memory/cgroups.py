"""The memory limits of the control groups that this process is in, versions 1 and 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 60
"""Version 1 writes the largest page-aligned number for "no limit"."""


@dataclass(frozen=True)
class _Names:
    """What the files of a version are called."""

    limit: str
    usage: str
    reclaimable: str


_VERSIONS = {
    "cgroup2": _Names("memory.max", "memory.current", "inactive_file"),
    "cgroup": _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_nbytes() -> int | None:
    """Bytes that this process's groups, and those around them, still allow; None without a limit.

    Pages of files that nobody has used lately count as free: the kernel drops them first.
    """
    rooms = [room for folder, names in _groups() if (room := _room(folder, names)) is not None]
    return min(rooms, default=None)


def _groups() -> Iterator[tuple[Path, _Names]]:
    """This process's memory groups, from the innermost outwards."""
    for kind, root, mount in _mounts():
        path = _path_in(kind)
        if path is None:
            continue
        # In a container the mount shows a part of the tree, and the path may be the host's.
        inside = PurePosixPath(path)
        inside = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
        if ".." in inside.parts:
            inside = PurePosixPath()
        folder = mount / inside
        while True:
            yield folder, _VERSIONS[kind]
            if folder == mount:
                break
            folder = folder.parent


def _mounts() -> Iterator[tuple[str, str, Path]]:
    """``(kind, root, mount point)`` of each hierarchy that may limit memory."""
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        fields, facts = left.split(), right.split()
        if len(fields) < 5 or len(facts) < 3 or facts[0] not in _VERSIONS:
            continue
        if facts[0] == "cgroup" and "memory" not in facts[2].split(","):
            continue
        yield facts[0], _unescape(fields[3]), Path(_unescape(fields[4]))


def _path_in(kind: str) -> str | None:
    """This process's group in a hierarchy, as a path from the hierarchy's root."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if kind == "cgroup2" and number == "0" and not controllers:
            return path
        if kind == "cgroup" and "memory" in controllers.split(","):
            return path
    return None


def _room(folder: Path, names: _Names) -> int | None:
    """What a group still allows; None when it has no limit."""
    limit, usage = _number(folder / names.limit), _number(folder / names.usage)
    if limit is None or usage is None or limit >= _UNLIMITED:
        return None
    facts = re.search(rf"^{names.reclaimable} (\d+)$", _read(folder / "memory.stat"), re.M)
    return max(limit - usage + (int(facts.group(1)) if facts else 0), 0)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # version 2 says "max"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # no such system, controller or group
        return ""


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of spaces and the like."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), field)
