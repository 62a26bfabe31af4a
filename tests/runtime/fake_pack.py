"""A pack of nothing but records, for the tests of the expert cache."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moepack_formats import checksum
from moepack_formats.layer import RecordLocation
from moepack_formats.record import RecordSpec, plan_record
from moepack_runtime.cache import slot_cache
from moepack_runtime.cache.slot_cache import SlotCache
from moepack_runtime.options import RuntimeOptions
from moepack_runtime.statistics import Statistics
from tests.runtime.stepped_io import SteppedPool

LAYERS, EXPERTS = 3, 5
SMALL, LARGE = (plan_record(64, width, "q4g64", "q4g64") for width in (16, 80))


class FakePack:
    """What the cache needs of a pack: records of two sizes, in one file.

    Every record is filled with bytes of its own, so that one read in the wrong place shows.
    """

    def __init__(self, folder: Path, sizes: int = 2) -> None:
        path = folder / "records"
        self.layers: list[list[RecordLocation]] = []
        self.bytes: dict[tuple[int, int], bytes] = {}
        places: list[tuple[int, int, RecordSpec]] = []
        with open(path, "wb") as file:
            for layer in range(LAYERS):
                for expert in range(EXPERTS):
                    spec = LARGE if sizes == 2 and (layer + expert) % 2 else SMALL
                    data = bytes([1 + layer * EXPERTS + expert]) * spec.nbytes
                    places.append((layer, file.tell(), spec))
                    self.bytes[layer, expert] = data
                    file.write(data)
        self.descriptor = os.open(path, os.O_RDONLY)
        for layer in range(LAYERS):
            self.layers.append(
                [
                    RecordLocation(
                        "records", self.descriptor, start, spec,
                        checksum.xxh3(self.bytes[layer, expert]),
                    )
                    for expert, (_, start, spec) in enumerate(p for p in places if p[0] == layer)
                ]
            )  # fmt: skip

    def close(self) -> None:
        os.close(self.descriptor)


@contextlib.contextmanager
def opened(
    budget: int, *, sizes: int = 2, threads: int = 2, policy: str = "lfu", stepped: bool = False
) -> Iterator[tuple[SlotCache, FakePack, Statistics]]:
    """A cache over such a pack.

    Args:
        budget: Bytes for its slots.
        sizes: Of records.
        threads: That read.
        policy: Which records give way.
        stepped: Nothing is read but by a ``SteppedPool``.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if stepped:
            patch.setattr(slot_cache, "IoPool", lambda threads: SteppedPool())
        pack, stats = FakePack(Path(folder), sizes), Statistics()
        cache = SlotCache(pack, budget, RuntimeOptions(io_threads=threads, policy=policy), stats)  # type: ignore[arg-type]
        try:
            yield cache, pack, stats
        finally:
            cache.close()
            pack.close()


def check_invariants(cache: SlotCache) -> None:
    """Every slot is free or has one record, counts agree, nothing is pinned."""
    for nbytes, size in cache._classes.items():
        entries = [e for e in cache._entries.values() if cache._at(e.key).spec.nbytes == nbytes]
        used = [entry.slot for entry in entries]
        assert sorted(used + size.free + size.parked) == list(range(size.arena.slots))
        assert all(entry.pins == 0 for entry in entries)
        assert sorted(size.staged) == sorted(e.key for e in entries if e.guessed)
        assert size.demanded == len(entries) - len(size.staged)
        assert size.demanded <= size.slots


def check_reserve(cache: SlotCache, nbytes: int) -> None:
    """Guesses have their slots again: a record of this size has just been read on demand.

    Before that, tokens without guesses may have filled them, and hits leave them so.
    """
    assert cache._classes[nbytes].demanded <= cache._classes[nbytes].demanded_limit


def holds(cache: SlotCache) -> set[tuple[int, int]]:
    return set(cache._entries)
