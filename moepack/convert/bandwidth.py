"""How fast this machine reads its memory and its disk, measured in a second."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

from moepack_formats import osio

_TEST_NBYTES = 64 << 20


def memory_speed() -> float:
    """Bytes a second that all threads together read from memory."""
    data = torch.ones(_TEST_NBYTES // 4, dtype=torch.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return _TEST_NBYTES / min(times)


def disk_speed(folder: Path) -> float:
    """Bytes a second that one thread reads from the disk of a folder, past the page cache.

    Raises:
        ResourceError: Nothing can be written there.
    """
    with osio.io_errors(folder), NamedTemporaryFile(dir=folder, prefix=".moepack-speed-") as file:
        file.write(os.urandom(_TEST_NBYTES))
        file.flush()
        os.fsync(file.fileno())
        return max(_read_speeds(file.name))


def _read_speeds(name: str) -> Iterator[float]:
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system without direct reads
        descriptor = os.open(name, flags)
    try:
        with mmap.mmap(-1, 8 << 20) as buffer:  # aligned to pages
            for _ in range(2):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                start, done = time.perf_counter(), 0
                while count := os.preadv(descriptor, [buffer], done):
                    done += count
                yield done / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
