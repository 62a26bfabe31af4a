"""An expert cache of fixed memory: records in slots, a policy that decides which give way.

All bookkeeping happens on the thread that computes; I/O threads only fill slots. Demands overtake
guesses. A guessed expert lives in reserved slots until it is demanded, so that a wrong guess never
costs a cached expert (Eliseev & Mazur, section 3.3).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from torch import Tensor

from moepack_formats.errors import ResourceError
from moepack_formats.layer import RecordLocation
from moepack_formats.pack import Pack

from ..disk.io_pool import DEMAND, SPECULATION, IoPool
from ..disk.reads_at_once import io_threads
from ..disk.record_reader import RecordReader
from ..memory.available import give_back_freed
from ..memory.budget import MemoryLimit
from ..options import RuntimeOptions, format_size
from ..policies import Key, Observing
from ..statistics import Statistics
from .arena import Arena
from .size_class import Entry, SizeClass, records_of_size
from .slot_shares import LOOKAHEAD, divide_budget, due_layers

UNGUESSED = 4
"""Tokens without a guess after which no slot waits for guesses any longer: a trial of prefetch goes
without for two in a row."""

SLACK = 8 << 20
"""Bytes left free for what a token may take before the next look at the process's memory."""


def record_sizes(pack: Pack) -> dict[int, int]:
    """Number of records by size in bytes."""
    return dict(Counter(at.spec.nbytes for layer in pack.layers for at in layer))


class SlotCache:
    """Records in slots.

    Args:
        pack: An open pack.
        budget: Bytes for all slots; at least one slot of each record size.
        options: Policy, I/O mode and threads, and the most slots.
        stats: Where hits, misses and bytes are counted.
        limit: What slots give way to.
    """

    lookahead = LOOKAHEAD

    def __init__(
        self,
        pack: Pack,
        budget: int,
        options: RuntimeOptions,
        stats: Statistics,
        limit: MemoryLimit | None = None,
    ) -> None:
        self._pack, self._stats, self._limit = pack, stats, limit
        self._entries: dict[Key, Entry] = {}
        self._wanted: set[Key] = set()  # demanded and not fetched yet: not to be given up
        self._layer = 0  # the last that experts were demanded of
        self._unguessed = 0  # tokens since the last guess
        self._classes = {
            nbytes: SizeClass(Arena(nbytes, slots), records_of_size(pack, nbytes), options)
            for nbytes, slots in divide_budget(budget, record_sizes(pack), options.slots).items()
        }
        policies = [size.policy for size in self._classes.values()]
        self._observers = [policy for policy in policies if isinstance(policy, Observing)]
        self._reader = RecordReader(pack, direct=options.io != "buffered")
        self._threads = options.io_threads or io_threads(pack, self._reader)
        self._io = IoPool(self._threads)

    @property
    def slots(self) -> int:
        """Slots of all sizes."""
        return sum(size.slots for size in self._classes.values())

    def describe(self) -> str:
        """See :class:`Residency`."""
        total = sum(len(layer) for layer in self._pack.layers)
        nbytes = sum(size.slots * size.nbytes for size in self._classes.values())
        reads = "direct" if self._reader.direct else "buffered"
        return (
            f"{self.slots} of {total} experts fit in {format_size(nbytes)} of slots; "
            f"{reads} reads, {self._threads} at a time"
        )

    def close(self) -> None:
        """End the I/O threads and let go of the slots."""
        self._io.close()
        self._entries.clear()
        self._classes.clear()

    def make_room(self, nbytes: int) -> None:
        """See :class:`Residency`. Slots give way to whatever else the process has taken."""
        if self._limit is None:
            return
        classes = self._classes.values()
        taken = sum(len(size.untouched) * size.nbytes for size in classes)
        room = self._limit.room(nbytes + taken)
        if room < SLACK:
            give_back_freed()
            room = self._limit.room(nbytes + taken)
        while room < SLACK:
            size = max(classes, key=lambda size: (size.slots > 1, size.slots * size.nbytes))
            if size.slots == 1 or not self._park(size):
                break
            room += size.nbytes
        if room < 0:
            raise self._limit.error()
        for size in classes:
            while size.parked and room > 2 * SLACK + size.nbytes:
                size.unpark()
                room -= size.nbytes

    def _park(self, size: SizeClass) -> bool:
        """Give back one slot, if one can be emptied."""
        if not size.free and not self._drop_staged(size) and not self._evict(size):
            return False
        size.park()
        return True

    def demand(self, layer: int, experts: Sequence[int]) -> None:
        """See :class:`Residency`."""
        keys = [(layer, expert) for expert in experts]
        self._turn_to(layer, keys)
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.guessed:
                self._come_true(entry)
                entry.counted = True
        for key in keys:
            if key not in self._entries:
                size = self._class_of(key)
                # More than one may have to go: slots that wait for guesses again were in use.
                while size.demanded >= size.demanded_limit:
                    if not self._evict(size, key):
                        return
                if not size.free and not self._drop_staged(size):
                    return
                entry = self._read_demanded(key, size)
                entry.missed = entry.counted = True

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
        if layer == 0:
            self.make_room(0)
            self._unguessed += 1
            if self._unguessed > UNGUESSED:
                self._expect_guesses(False)
        keys = [(layer, expert) for expert in experts]
        self._turn_to(layer, keys)
        ready = [self._pin(key) for key in keys if key in self._entries]
        missing = deque(key for key in keys if key not in self._entries)
        started = sum(entry.missed for entry in ready)
        self._stats.hits += len(ready) - started
        self._stats.misses += len(missing) + started
        for entry in ready:
            entry.missed = False
        self._wanted.clear()
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
                    turn += [entry for entry in pending if entry.reading.done]
                    pending = [entry for entry in pending if entry not in turn]
                try:
                    yield {entry.key[1]: self._record(entry) for entry in turn}
                finally:
                    for entry in turn:
                        entry.pins -= 1
                        if entry.reading.error is not None:
                            self._release(entry)
        finally:
            for entry in pending:
                entry.pins -= 1

    def address(self, layer: int, expert: int) -> int | None:
        """None: a slot may be given to another record; see :class:`Residency`."""
        return None

    def check_used(self, layer: int) -> None:
        """Nothing: addresses are never given; see :class:`Residency`."""

    def holds(self, layer: int, expert: int) -> bool:
        """See :class:`Residency`."""
        entry = self._entries.get((layer, expert))
        return entry is not None and entry.reading.done

    def memory(self) -> list[Tensor]:
        """The slots' memory, for pinning it: ``[slots, bytes of a slot]`` of each size."""
        arenas = [size.arena for size in self._classes.values()]
        return [it.tensor(0, it.slots).view(it.slots, it.slot_nbytes) for it in arenas]

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """See :class:`Residency`."""
        self._unguessed = 0
        self._expect_guesses(True)
        keys = [(layer, expert) for expert in experts]
        self._cancel_wrong_guesses(layer, set(keys))
        keep = {layer, *due_layers(self._layer)}
        begun: list[int] = []
        for key in keys:
            if key in self._entries:
                continue
            size = self._class_of(key)
            if not size.free and not self._drop_staged(size, keep):
                break
            entry = self._read(key, size.free.pop(), guessed=True)
            size.staged.append(entry.key)
            begun.append(key[1])
        self._stats.speculative_reads += len(begun)
        return begun

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """See :class:`Residency`."""
        for policy in self._observers:
            policy.observe(layer, experts, weights)

    def resident(self, layer: int) -> list[int]:
        """See :class:`Residency`."""
        experts = range(len(self._pack.layers[layer]))
        return [expert for expert in experts if (layer, expert) in self._entries]

    def _turn_to(self, layer: int, keys: list[Key]) -> None:
        """These experts of a layer are needed now: none of them gives way before its use."""
        self._layer, self._wanted = layer, set(keys)
        self._cancel_wrong_guesses(layer, self._wanted)
        self._forget_failures(keys)

    def _expect_guesses(self, expected: bool) -> None:
        for size in self._classes.values():
            size.guessing = expected

    def _at(self, key: Key) -> RecordLocation:
        return self._pack.layers[key[0]][key[1]]

    def _record(self, entry: Entry) -> Tensor:
        """The bytes of a record that was read; raises what reading it raised."""
        entry.reading.result()
        arena = self._class_of(entry.key).arena
        return arena.tensor(entry.slot)[: self._at(entry.key).spec.nbytes]

    def _class_of(self, key: Key) -> SizeClass:
        return self._classes[self._at(key).spec.nbytes]

    def _pin(self, key: Key) -> Entry:
        """Keep a resident record until its use is over."""
        entry = self._entries[key]
        entry.pins += 1
        if entry.guessed:
            self._come_true(entry)
        elif not entry.counted:
            self._class_of(key).policy.touch(key)
        entry.counted = False
        return entry

    def _come_true(self, entry: Entry) -> None:
        """A guess was right: its record becomes an ordinary one, and its read a demand."""
        size = self._class_of(entry.key)
        entry.guessed = False
        self._io.promote(entry.reading)
        size.staged.remove(entry.key)
        self._count_in(entry, size)
        self._stats.speculative_used += 1
        if size.demanded > size.demanded_limit:
            self._evict(size, entry.key)

    def _start(self, key: Key, pending: list[Entry]) -> bool:
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
                self._io.wait(left)
            elif not self._drop_staged(size):
                # Every other slot is being filled by a guess; one will be done soon.
                guesses = [self._entries[k].reading for k in size.staged]
                if not guesses:
                    return False
                self._io.wait(guesses)
        entry = self._read_demanded(key, size)
        entry.pins += 1
        pending.append(entry)
        return True

    def _read_demanded(self, key: Key, size: SizeClass) -> Entry:
        entry = self._read(key, size.free.pop(), guessed=False)
        self._count_in(entry, size)
        return entry

    def _is_left(self, entry: Entry, size: SizeClass) -> bool:
        unwanted = entry.pins == 0 and not entry.guessed and not entry.reading.done
        return unwanted and self._class_of(entry.key) is size

    def _read(self, key: Key, slot: int, *, guessed: bool) -> Entry:
        at, size = self._at(key), self._class_of(key)
        buffer = size.arena.buffer(slot)[: at.spec.nbytes]
        size.untouched.discard(slot)
        job = partial(self._reader.read, at, buffer, *key)
        reading = self._io.submit(job, SPECULATION if guessed else DEMAND)
        self._stats.bytes_read += at.spec.nbytes
        entry = Entry(key, slot, reading, guessed)
        self._entries[key] = entry
        return entry

    def _next_ready(self, pending: list[Entry]) -> Entry:
        """A record that is there already, else the first to arrive."""
        for entry in pending:
            if entry.reading.done:
                return entry
        self._io.wait([entry.reading for entry in pending])
        return next(entry for entry in pending if entry.reading.done)

    def _cancel_wrong_guesses(self, layer: int, needed: set[Key]) -> None:
        """Guesses for this layer that are not needed and not yet being read are not read."""
        for size in self._classes.values():
            for key in [k for k in size.staged if k[0] == layer and k not in needed]:
                entry = self._entries[key]
                if self._io.cancel(entry.reading):
                    self._stats.bytes_read -= self._at(key).spec.nbytes
                    self._stats.speculative_reads -= 1
                    self._release(entry)

    def _forget_failures(self, keys: list[Key]) -> None:
        """A read that failed for a guess or for a pass that was given up is tried again."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.pins or not entry.reading.done:
                continue
            if entry.reading.error is not None:
                self._release(entry)

    def _drop_staged(self, size: SizeClass, keep: Collection[int] = ()) -> bool:
        """Give up the oldest guess that was read and not used, but of no layer in ``keep``."""
        for key in size.staged:
            entry = self._entries[key]
            if entry.reading.done and key[0] not in keep:
                self._release(entry)
                return True
        return False

    def _evict(self, size: SizeClass, incoming: Key | None = None) -> bool:
        """Give up the demanded record that the policy names."""

        def usable(key: Key) -> bool:
            entry = self._entries[key]
            return entry.pins == 0 and entry.reading.done and key not in self._wanted

        victim = size.policy.victim(usable, incoming)
        if victim is None:
            return False
        self._release(self._entries[victim])
        return True

    def _count_in(self, entry: Entry, size: SizeClass) -> None:
        size.policy.insert(entry.key)
        size.demanded += 1

    def _release(self, entry: Entry) -> None:
        size = self._class_of(entry.key)
        del self._entries[entry.key]
        if entry.guessed:
            size.staged.remove(entry.key)
        else:
            size.policy.remove(entry.key)
            size.demanded -= 1
        size.free.append(entry.slot)
