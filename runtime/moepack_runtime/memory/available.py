"""How much memory there is, and how much this process has taken."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from . import cgroups

SAFE_SHARE = 0.7
"""Share of the free memory that is used when the user names no budget."""

_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


def available_nbytes() -> int:
    """Bytes that may be taken now: what the machine has free, within the limits of cgroups."""
    free, allowed = _machine_available(), cgroups.available_nbytes()
    return free if allowed is None else min(free, allowed)


def own_nbytes() -> int:
    """Bytes of memory that this process holds and that are not pages of files.

    Pages of files (code, mapped weights) are left out: the kernel takes them back when it must.
    """
    try:
        resident, shared = os.pread(_statm(os.getpid()), 256, 0).split()[1:3]
    except (OSError, ValueError, AttributeError):  # not Linux
        return 0
    return (int(resident) - int(shared)) * _PAGE_NBYTES


@functools.lru_cache(maxsize=1)
def _statm(process: int) -> int:
    """The open file: every token asks, and opening it takes longer than reading."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY)


def give_back_freed() -> None:
    """Have the C library return what was freed and it has kept; a few milliseconds.

    Loading and recording leave some 15 MB behind. Nothing happens where the library has no such
    function.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def default_budget() -> int:
    """Bytes for the whole process when the user names no budget."""
    return own_nbytes() + int(available_nbytes() * SAFE_SHARE)


def _machine_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0
