"""Records in slots of GPU memory, brought from host memory by one stream of copies.

The host never waits for a copy whose record is in memory already: it queues copies and kernels, and
events keep them in order. A slot is overwritten only after the kernels that read it, because the
copy waits for them on the device.

Guesses are queued behind the demands of the layer that computes, and live in *staging* slots of
their own, four of each record size, until they are demanded: a wrong guess costs no cached expert
(Eliseev & Mazur, section 3.3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moepack_formats.errors import ResourceError
from moepack_formats.pack import Pack

from ..cache.slot_cache import record_sizes
from ..options import format_size
from ..policies import Key
from ..statistics import Statistics
from .device_residency import DeviceResidency
from .device_slots import DeviceEntry, DeviceSlots, share_out
from .host_source import HostSource
from .link import Event, Link

MAX_MEASURED = 256
"""Copies whose times are kept until they are asked for."""


@dataclass(frozen=True)
class CacheOptions:
    """How a device cache behaves.

    Attributes:
        policy: Which cached expert gives way.
        keep: Whether experts stay after use; without, every use is a copy, as a measure of what
            the cache is worth.
    """

    policy: str = "lru"
    keep: bool = True


@dataclass(frozen=True)
class _Copied:
    """A slot and the copy into it."""

    number: int
    copied: Event


class DeviceCache(DeviceResidency):
    """A cache of records in GPU memory, see :class:`moepack_runtime.cache.residency.Residency`.

    What is yielded may be read by kernels that are queued before the next turn is asked for.

    Args:
        pack: An open pack.
        source: Gives records in host memory.
        budget: Bytes for all slots; at least one slot of each record size.
        options: Policy, and whether experts stay.
        stats: Where hits, misses and bytes are counted.
        link: The device.
    """

    def __init__(
        self,
        pack: Pack,
        source: HostSource,
        budget: int,
        options: CacheOptions,
        stats: Statistics,
        link: Link,
    ) -> None:
        self._pack, self._stats, self._link = pack, stats, link
        self._source, self._keep = source, options.keep
        self._entries: dict[Key, DeviceEntry] = {}
        self._guesses: deque[Key] = deque()
        self._copies: deque[tuple[int, Event]] = deque()
        sizes = record_sizes(pack)
        self._classes = {
            nbytes: DeviceSlots(nbytes, slots, sizes[nbytes], options.policy, link)
            for nbytes, slots in share_out(budget, sizes).items()
        }
        # What used the memory before may still be queued.
        link.copy_after(link.computed())

    @property
    def slots(self) -> int:
        """Slots of all sizes."""
        return sum(size.slots for size in self._classes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(size.slots * size.nbytes for size in self._classes.values())

    def describe(self) -> str:
        """See :class:`Residency`."""
        total = sum(len(layer) for layer in self._pack.layers)
        return (
            f"{self.slots} of {total} experts fit in {format_size(self.nbytes)} of GPU memory; "
            f"behind it {self._source.describe()}"
        )

    def close(self) -> None:
        """Wait for what is queued, and let go of the slots and the host's records."""
        self._link.finish()
        self._source.close()
        self._entries.clear()
        self._classes.clear()

    @property
    def backlog_nbytes(self) -> int:
        """Bytes of the copies that are queued and not done."""
        return sum(nbytes for nbytes, event in self._copies if not self._link.done(event))

    def measured(self) -> Iterator[tuple[int, float]]:
        """Bytes and seconds of the copies that are done; each is told once."""
        while self._copies and self._link.done(self._copies[0][1]):
            nbytes, event = self._copies.popleft()
            seconds = self._link.seconds(event)
            if seconds is not None:
                yield nbytes, seconds

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a record is in a slot, or being copied to one."""
        return (layer, expert) in self._entries

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Residency`."""
        for records in self.fetch_ready(layer, experts):
            yield from records.items()

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """First what is in a slot, together; then each copy as a turn of its own, in order.

        What is computed in a turn waits on the device for the turn's copy.
        """
        keys = [(layer, expert) for expert in experts]
        self._guesses = deque(key for key in self._guesses if key[0] != layer)
        hits = [self._demand_resident(key) for key in keys if key in self._entries]
        missing = deque(key for key in keys if key not in self._entries)
        self._stats.hits += len(hits)
        self._stats.misses += len(missing)
        pinned = list(hits)
        try:
            waiting: deque[DeviceEntry] = deque()
            self._queue_demands(missing, waiting, pinned)
            self._queue_guesses()
            # Guesses that came true may still be on their way; the others are not held up by them.
            here = [entry for entry in hits if self._link.done(entry.copied)]
            if here:
                yield self._turn(here)
                self._leave(here, pinned)
            waiting.extendleft(entry for entry in reversed(hits) if entry not in here)
            while waiting or missing:
                self._queue_demands(missing, waiting, pinned)
                if not waiting:
                    raise ResourceError(
                        "every slot of the GPU is in use by another pass over the model",
                        remedy="end that pass first or raise --vram",
                    )
                entry = waiting.popleft()
                self._link.compute_after(entry.copied)
                yield self._turn([entry])
                self._leave([entry], pinned)
        finally:
            # A pass may be given up in the middle of a turn, or outlive the cache.
            if self._classes:
                self._leave(list(pinned), pinned)
            if not self._keep:
                self._drop_unpinned()

    def address(self, layer: int, expert: int) -> None:
        """None: a slot may be given to another record."""

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Nothing: the router's weights stay on the device."""

    def resident(self, layer: int) -> list[int]:
        """See :class:`Residency`."""
        return [key[1] for key in self._entries if key[0] == layer]

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Remember guesses; they are copied behind the demands of the layer that asks next."""
        self._guesses = deque((layer, expert) for expert in dict.fromkeys(experts))
        absent = [expert for _, expert in self._guesses if not self._source.holds(layer, expert)]
        self._source.prefetch(layer, absent)
        return absent

    def _turn(self, entries: list[DeviceEntry]) -> dict[int, Tensor]:
        records = {entry.key[1]: self._record(entry) for entry in entries}
        self._link.reads(list(records.values()))
        return records

    def _leave(self, entries: list[DeviceEntry], pinned: list[DeviceEntry]) -> None:
        """The kernels of a turn are queued: after them its slots may be overwritten."""
        event = self._link.computed()
        for entry in entries:
            self._class_of(entry.key).used[entry.slot] = event
            entry.pins -= 1
            pinned.remove(entry)

    def _record(self, entry: DeviceEntry) -> Tensor:
        return self._class_of(entry.key).tensor(entry.slot)

    def _nbytes(self, key: Key) -> int:
        return self._pack.layers[key[0]][key[1]].spec.nbytes

    def _class_of(self, key: Key) -> DeviceSlots:
        return self._classes[self._nbytes(key)]

    def _demand_resident(self, key: Key) -> DeviceEntry:
        """Pin a record; a guess that came true becomes an ordinary one."""
        entry, size = self._entries[key], self._class_of(key)
        entry.pins += 1
        if entry.guessed:
            entry.guessed = False
            size.staged.remove(key)
            size.policy.insert(key)
            size.demanded += 1
            self._stats.speculative_used += 1
            if size.demanded > size.demanded_limit:
                self._evict(size, key)
        else:
            size.policy.touch(key)
        return entry

    def _queue_demands(
        self, missing: deque[Key], waiting: deque[DeviceEntry], pinned: list[DeviceEntry]
    ) -> None:
        """Queue copies of missing records while slots can be had."""
        granted: list[tuple[Key, int]] = []
        while missing and (slot := self._slot_for(missing[0])) is not None:
            granted.append((missing.popleft(), slot))
            self._class_of(granted[-1][0]).demanded += 1
        try:
            for key, place in self._copy(granted):
                entry = DeviceEntry(key, place.number, place.copied, guessed=False)
                self._entries[key] = entry
                entry.pins += 1
                self._class_of(key).policy.insert(key)
                waiting.append(entry)
                pinned.append(entry)
        finally:  # reading failed: what got no copy does not count
            for key, _ in granted:
                if key not in self._entries:
                    self._class_of(key).demanded -= 1

    def _slot_for(self, key: Key) -> int | None:
        """A slot for a demanded record, by eviction or in place of a guess if need be."""
        size = self._class_of(key)
        if size.free and size.demanded < size.demanded_limit:
            return size.free.pop()
        if size.demanded >= size.demanded_limit and not self._evict(size, key):
            return None
        if not size.free and not self._drop_guess(size, None):
            return None
        return size.free.pop()

    def _queue_guesses(self) -> None:
        """Queue copies of guessed records that are in host memory, best guess first."""
        granted: list[tuple[Key, int]] = []
        for key in list(self._guesses):
            size = self._class_of(key)
            if key in self._entries:
                self._guesses.remove(key)
                continue
            if not self._source.holds(*key):
                continue  # still on its way from the disk; the next layer's turn tries again
            if not size.free and not self._drop_guess(size, key[0]):
                continue
            granted.append((key, size.free.pop()))
            self._guesses.remove(key)
        for key, place in self._copy(granted):
            self._entries[key] = DeviceEntry(key, place.number, place.copied, guessed=True)
            self._class_of(key).staged.append(key)
            self._stats.speculative_reads += 1

    def _copy(self, granted: list[tuple[Key, int]]) -> Iterator[tuple[Key, _Copied]]:
        """Queue copies into slots, each after what reads its slot; in the order they are ready."""
        slots = dict(granted)
        try:
            for key, record in self._source.records([key for key, _ in granted]):
                size, slot = self._class_of(key), slots.pop(key)
                used = size.used[slot]
                if used is not None:
                    self._link.copy_after(used)
                event = self._link.copy(record, size.tensor(slot))
                self._source.copying(event)
                self._copies.append((size.nbytes, event))
                if len(self._copies) > MAX_MEASURED:
                    self._copies.popleft()
                self._stats.bytes_copied += size.nbytes
                yield key, _Copied(slot, event)
        finally:  # reading failed: the slots that got nothing are free again
            for key, slot in slots.items():
                self._class_of(key).free.append(slot)

    def _drop_guess(self, size: DeviceSlots, keep_layer: int | None) -> bool:
        """Give up the oldest guess that is not for a layer that is still to come."""
        for key in size.staged:
            if key[0] != keep_layer:
                self._release(self._entries[key])
                return True
        return False

    def _drop_unpinned(self) -> None:
        for entry in list(self._entries.values()):
            if entry.pins == 0 and not entry.guessed:
                self._release(entry)

    def _evict(self, size: DeviceSlots, incoming: Key) -> bool:
        """Give up the demanded record that the policy names."""
        victim = size.policy.victim(lambda key: self._entries[key].pins == 0, incoming)
        if victim is None:
            return False
        self._release(self._entries[victim])
        return True

    def _release(self, entry: DeviceEntry) -> None:
        """Free a slot; the next copy into it runs after this one's, and after its readers."""
        size = self._class_of(entry.key)
        del self._entries[entry.key]
        if entry.guessed:
            size.staged.remove(entry.key)
        else:
            size.policy.remove(entry.key)
            size.demanded -= 1
        size.free.append(entry.slot)
