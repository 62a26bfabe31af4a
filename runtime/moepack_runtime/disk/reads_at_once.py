"""How many reads at a time a disk needs to be at its fastest: measured once, then remembered."""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from moepack_formats import osio
from moepack_formats.errors import MoepackError
from moepack_formats.layer import RecordLocation
from moepack_formats.pack import Pack

from .record_reader import RecordReader

_log = logging.getLogger(__name__)

DEFAULT_THREADS = 3
CANDIDATES = (2, 3, 4, 8)
"""At least two: one reads while the other compares a checksum."""
ENOUGH = 0.95
"""Of the fastest: more threads than needed take time from those that compute."""

_SECONDS = 0.08  # for each candidate
_SMALLEST_PACK = 256 << 20
"""Packs below this are read in an instant anyway."""


def io_threads(pack: Pack, reader: RecordReader) -> int:
    """Threads to read a pack's records with.

    Measured on the pack itself, a fraction of a second, unless the cache folder
    (``$XDG_CACHE_HOME/moepack``) knows the device already.
    """
    records = [at for layer in pack.layers for at in layer]
    if not reader.direct or sum(at.spec.nbytes for at in records) < _SMALLEST_PACK:
        return DEFAULT_THREADS
    nbytes = max(at.spec.nbytes for at in records)
    # Twice the size wants half the reads: sizes share an entry by their power of two.
    device = f"{_device(records[0].descriptor)} {nbytes.bit_length()}"
    path = _cache_file()
    known = _load(path)
    if device in known:
        return known[device]
    try:
        speeds = {threads: read_speed(records, threads, _SECONDS) for threads in CANDIDATES}
    except MoepackError:  # the read that needs the record will say it with more words
        return DEFAULT_THREADS
    best = max(speeds.values())
    chosen = min(threads for threads, speed in speeds.items() if speed >= ENOUGH * best)
    _log.info("disk at %.0f MB/s; %d reads at a time", best / 1e6, chosen)
    _save(path, {**known, device: chosen})
    return chosen


def read_speed(records: Sequence[RecordLocation], threads: int, seconds: float) -> float:
    """Bytes per second of random records, ``threads`` at a time, for about so many seconds."""
    end = time.perf_counter() + seconds
    done: list[int] = []
    failed: list[MoepackError] = []

    def work() -> None:
        picks = random.Random()
        with mmap.mmap(-1, max(at.spec.nbytes for at in records)) as memory:
            view = memoryview(memory)
            while time.perf_counter() < end and not failed:
                at = picks.choice(records)
                with view[: at.spec.nbytes] as buffer:
                    try:
                        osio.read_at(at.descriptor, buffer, at.offset, at.file)
                    except MoepackError as error:
                        failed.append(error)
                done.append(at.spec.nbytes)
            view.release()

    start = time.perf_counter()
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return sum(done) / (time.perf_counter() - start)


def _device(descriptor: int) -> str:
    """A name for the disk under a file that outlives a restart, where there is one."""
    number = os.fstat(descriptor).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    for fact in ("device/serial", "device/wwid", "dm/uuid", "serial", "wwid"):
        try:
            text = Path(f"/sys/dev/block/{name}/{fact}").read_text().strip()
        except OSError:
            continue
        if text:
            return text
    return name


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return folder / "moepack" / "disks.json"


def _load(path: Path) -> dict[str, int]:
    """What is known, without what nobody of ours has written."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, int) and v in CANDIDATES}


def _save(path: Path, known: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        osio.write_file(path, (json.dumps(known, indent=1) + "\n").encode())
    except (OSError, MoepackError) as error:
        _log.info("%s cannot be written, the disk will be measured again: %s", path, error)
