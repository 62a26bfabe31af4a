"""An expert cache of fixed memory: records in slots, a policy that decides which give way.

All bookkeeping happens on the thread that computes; I/O threads only fill slots. Demands overtake
guesses. A guessed expert lives in reserved slots until it is demanded, so that a wrong guess never
costs a cached expert (Eliseev & Mazur, section 3.3).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from moepack_formats import osio
from moepack_formats.errors import ResourceError
from moepack_formats.layer import RecordLocation
from moepack_formats.pack import Pack, check_record

from .arena import Arena
from .cache_policy import make_policy
from .io_pool import DEMAND, SPECULATION, IoPool
from .options import RuntimeOptions, format_size
from .policies import Key, Observing
from .slot_shares import reserved_slots
from .statistics import Statistics


def record_sizes(pack: Pack) -> dict[int, int]:
    """Number of records by size in bytes."""
    return dict(Counter(at.spec.nbytes for layer in pack.layers for at in layer))


@dataclass
class _Entry:
    """A record that is in a slot or on its way there."""

    key: Key
    slot: int
    reading: Future[None]
    guessed: bool
    pins: int = 0


class _SizeClass:
    """Slots and policy for the records of one size."""

    def __init__(self, arena: Arena, records: list[Key], options: RuntimeOptions) -> None:
        self.arena, slots = arena, arena.slots
        self.free = list(range(slots))
        self.staged: deque[Key] = deque()
        self.reserved = reserved_slots(slots, len(records), prefetch=options.prefetch)
        self.demanded = 0
        self.policy = make_policy(
            options.policy,
            self.demanded_limit,
            records,
            scope=options.scope,
            pins=options.pins,
        )

    @property
    def demanded_limit(self) -> int:
        """Slots that demanded experts may fill; the others wait for guesses."""
        return self.arena.slots - self.reserved


class SlotCache:
    """Records in slots.

    Args:
        pack: An open pack.
        budget: Bytes for all slots; at least one slot of each record size.
        options: Policy and I/O threads.
        stats: Where hits, misses and bytes are counted.
        device: Where the slots are.
        stream: The stream that fills them; None on the CPU.
    """

    def __init__(
        self,
        pack: Pack,
        budget: int,
        options: RuntimeOptions,
        stats: Statistics,
        device: torch.device | str = "cpu",
        stream: object | None = None,
    ) -> None:
        self._pack, self._stats = pack, stats
        self._entries: dict[Key, _Entry] = {}
        self._classes = {
            nbytes: _SizeClass(
                Arena(nbytes, slots, device, stream), _records_of_size(pack, nbytes), options
            )
            for nbytes, slots in divide_budget(budget, record_sizes(pack)).items()
        }
        policies = [size.policy for size in self._classes.values()]
        self._observers = [policy for policy in policies if isinstance(policy, Observing)]
        self._io = IoPool(options.io_threads)

    @property
    def slots(self) -> int:
        """Slots of all sizes."""
        return sum(size.arena.slots for size in self._classes.values())

    def describe(self) -> str:
        """See :class:`Residency`."""
        total = sum(len(layer) for layer in self._pack.layers)
        size = sum(c.arena.slots * c.arena.slot_nbytes for c in self._classes.values())
        return f"{self.slots} of {total} experts fit in {format_size(size)} of slots"

    def close(self) -> None:
        """End the I/O threads and let go of the slots."""
        self._io.close()
        self._entries.clear()
        self._classes.clear()

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """See :class:`Residency`."""
        for records in self._turns(layer, experts, together=False):
            yield from records.items()

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """See :class:`Residency`."""
        return self._turns(layer, experts, together=True)

    def _turns(
        self, layer: int, experts: Sequence[int], *, together: bool
    ) -> Iterator[dict[int, Tensor]]:
        """Yield one ready record at a time, or all that are ready; both stay pinned meanwhile."""
        keys = [(layer, expert) for expert in experts]
        self._cancel_wrong_guesses(layer, set(keys))
        self._forget_failures(keys)
        ready = [self._demand_resident(key) for key in keys if key in self._entries]
        missing = deque(key for key in keys if key not in self._entries)
        self._stats.hits += len(ready)
        self._stats.misses += len(missing)
        pending = list(ready)
        try:
            while pending or missing:
                while missing and self._start(missing[0], pending):
                    missing.popleft()
                if not pending:
                    raise ResourceError(
                        "every slot is in use by another pass over the model",
                        remedy="end that pass first or raise --ram",
                    )
                turn = [self._next_ready(pending)]
                pending.remove(turn[0])
                if together:
                    turn += [entry for entry in pending if entry.reading.done()]
                    pending = [entry for entry in pending if entry not in turn]
                try:
                    yield {entry.key[1]: self._record(entry) for entry in turn}
                finally:
                    for entry in turn:
                        entry.pins -= 1
                        if entry.reading.exception() is not None:
                            self._release(entry)
        finally:
            for entry in pending:
                entry.pins -= 1

    def address(self, layer: int, expert: int) -> int | None:
        """None: a slot may be given to another record; see :class:`Residency`."""
        return None

    def holds(self, layer: int, expert: int) -> bool:
        """See :class:`Residency`."""
        entry = self._entries.get((layer, expert))
        return entry is not None and entry.reading.done()

    def memory(self) -> list[Tensor]:
        """The slots' memory, for pinning it."""
        return [size.arena.tensor(0, size.arena.slots) for size in self._classes.values()]

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """See :class:`Residency`."""
        for expert in experts:
            key = (layer, expert)
            if key in self._entries:
                continue
            size = self._class_of(key)
            if not size.free and not self._drop_staged(size, layer):
                return
            entry = self._read(key, size.free.pop(), guessed=True)
            size.staged.append(entry.key)
            self._stats.speculative_reads += 1

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """See :class:`Residency`."""
        for policy in self._observers:
            policy.observe(layer, experts, weights)

    def resident(self, layer: int) -> list[int]:
        """See :class:`Residency`."""
        experts = range(len(self._pack.layers[layer]))
        return [expert for expert in experts if (layer, expert) in self._entries]

    def _at(self, key: Key) -> RecordLocation:
        return self._pack.layers[key[0]][key[1]]

    def _record(self, entry: _Entry) -> Tensor:
        """The bytes of a record that was read; raises what reading it raised."""
        entry.reading.result()
        arena = self._class_of(entry.key).arena
        return arena.tensor(entry.slot)[: self._at(entry.key).spec.nbytes]

    def _class_of(self, key: Key) -> _SizeClass:
        return self._classes[self._at(key).spec.nbytes]

    def _demand_resident(self, key: Key) -> _Entry:
        """Pin a resident record; a guess that came true becomes an ordinary one."""
        entry, size = self._entries[key], self._class_of(key)
        entry.pins += 1
        if entry.guessed:
            entry.guessed = False
            size.staged.remove(key)
            self._count_in(entry, size)
            self._stats.speculative_used += 1
            if size.demanded > size.demanded_limit:
                self._evict(size, key)
        else:
            size.policy.touch(key)
        return entry

    def _start(self, key: Key, pending: list[_Entry]) -> bool:
        """Begin reading a missing record if a slot can be had."""
        size = self._class_of(key)
        while not size.free or size.demanded >= size.demanded_limit:
            if size.demanded >= size.demanded_limit:
                if self._evict(size, key):
                    continue
                # What a pass that was given up had asked for may still be on its way.
                left = [e.reading for e in self._entries.values() if self._is_left(e, size)]
                if pending or not left:
                    return False
                wait(left, return_when=FIRST_COMPLETED)
            elif not self._drop_staged(size, None):
                # Every other slot is being filled by a guess; one will be done soon.
                guesses = [self._entries[k].reading for k in size.staged]
                if not guesses:
                    return False
                wait(guesses, return_when=FIRST_COMPLETED)
        entry = self._read(key, size.free.pop(), guessed=False)
        entry.pins += 1
        self._count_in(entry, size)
        pending.append(entry)
        return True

    def _is_left(self, entry: _Entry, size: _SizeClass) -> bool:
        unwanted = entry.pins == 0 and not entry.guessed and not entry.reading.done()
        return unwanted and self._class_of(entry.key) is size

    def _read(self, key: Key, slot: int, *, guessed: bool) -> _Entry:
        at, size = self._at(key), self._class_of(key)
        buffer = size.arena.buffer(slot)[: at.spec.nbytes]

        def job() -> None:
            place = f"{at.file}, layer {key[0]}, expert {key[1]}"
            osio.read_at(at.descriptor, buffer, at.offset, place)
            check_record(buffer, at, *key)

        reading = self._io.submit(job, SPECULATION if guessed else DEMAND)
        self._stats.bytes_read += at.spec.nbytes
        entry = _Entry(key, slot, reading, guessed)
        self._entries[key] = entry
        return entry

    def _next_ready(self, pending: list[_Entry]) -> _Entry:
        """A record that is there already, else the first to arrive."""
        for entry in pending:
            if entry.reading.done():
                return entry
        done, _ = wait([entry.reading for entry in pending], return_when=FIRST_COMPLETED)
        return next(entry for entry in pending if entry.reading in done)

    def _cancel_wrong_guesses(self, layer: int, needed: set[Key]) -> None:
        """Guesses for this layer that are not needed and not yet being read are not read."""
        for size in self._classes.values():
            for key in [k for k in size.staged if k[0] == layer and k not in needed]:
                entry = self._entries[key]
                if entry.reading.cancel():
                    self._stats.bytes_read -= self._at(key).spec.nbytes
                    self._stats.speculative_reads -= 1
                    self._release(entry)

    def _forget_failures(self, keys: list[Key]) -> None:
        """A read that failed for a guess or for a pass that was given up is tried again."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.pins or not entry.reading.done():
                continue
            if entry.reading.exception() is not None:
                self._release(entry)

    def _drop_staged(self, size: _SizeClass, keep_layer: int | None) -> bool:
        """Give up the oldest guess that was read and not used."""
        for key in size.staged:
            entry = self._entries[key]
            if key[0] != keep_layer and entry.reading.done():
                self._release(entry)
                return True
        return False

    def _evict(self, size: _SizeClass, incoming: Key | None = None) -> bool:
        """Give up the demanded record that the policy names."""

        def usable(key: Key) -> bool:
            entry = self._entries[key]
            return entry.pins == 0 and entry.reading.done()

        victim = size.policy.victim(usable, incoming)
        if victim is None:
            return False
        self._release(self._entries[victim])
        return True

    def _count_in(self, entry: _Entry, size: _SizeClass) -> None:
        size.policy.insert(entry.key)
        size.demanded += 1

    def _release(self, entry: _Entry) -> None:
        size = self._class_of(entry.key)
        del self._entries[entry.key]
        if entry.guessed:
            size.staged.remove(entry.key)
        else:
            size.policy.remove(entry.key)
            size.demanded -= 1
        size.free.append(entry.slot)


def _records_of_size(pack: Pack, nbytes: int) -> list[Key]:
    return [
        (layer, expert)
        for layer, records in enumerate(pack.layers)
        for expert, at in enumerate(records)
        if at.spec.nbytes == nbytes
    ]


def divide_budget(budget: int, sizes: dict[int, int]) -> dict[int, int]:
    """Slots for each record size: all that exist, or shares of the budget by total bytes."""
    everything = sum(nbytes * count for nbytes, count in sizes.items())
    if everything <= budget:
        return dict(sizes)
    slots = {n: min(c, max(1, budget * c // everything)) for n, c in sizes.items()}
    while sum(n * s for n, s in slots.items()) > budget:
        # Rounding a class up to its one slot took more than its share.
        largest = max((n for n in slots if slots[n] > 1), key=lambda n: n * slots[n], default=None)
        if largest is None:
            break
        slots[largest] -= 1
    return slots
