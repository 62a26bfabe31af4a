"""How much memory there is, and how much a pack needs at least."""

from __future__ import annotations

from pathlib import Path

SAFE_SHARE = 0.7
"""Share of the free memory that is used when the user names no budget."""


def available_nbytes() -> int:
    """Bytes that a process may take now: what the machine has free, within its cgroup's limit."""
    free = _machine_available()
    limit = _read_number(Path("/sys/fs/cgroup/memory.max"))
    used = _read_number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(limit - used, 0))
    return free


def default_budget() -> int:
    """Bytes for a pack when the user names no budget."""
    return int(available_nbytes() * SAFE_SHARE)


def _machine_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None
