"""What an expert cache of any size and policy would have done on a routing trace.

The simulator keeps the books of :class:`~moepack_runtime.cache.slot_cache.SlotCache` without
records, and drives the very same policies. Tokens are decoded one at a time, whatever passes they
were recorded in, and every read is done before the next demand.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from moepack_formats.errors import UsageError

from ..cache.layer_policies import make_policy
from ..cache.slot_shares import LOOKAHEAD, divide_budget, due_layers, reserved_slots
from ..memory.budget import check_budget
from ..options import format_size
from ..policies import Key, Observing, Offline
from ..trace.trace_file import Trace, TraceInfo


@dataclass(frozen=True)
class Setting:
    """One cache to simulate.

    Attributes:
        policy: A file in ``policies``, ``belady`` included.
        slots: Slots by record size in bytes; see :func:`slots_of`.
        scope: As in :class:`moepack_runtime.options.RuntimeOptions`.
        pins: As there.
        prefetch: Whether the trace's guesses are read, as far ahead as the real cache reads them.
    """

    policy: str
    slots: dict[int, int]
    scope: str = "global"
    pins: tuple[Key, ...] = ()
    prefetch: bool = False

    @property
    def total_slots(self) -> int:
        """Slots of all sizes."""
        return sum(self.slots.values())


@dataclass(frozen=True)
class Outcome:
    """What the cache would have done.

    Attributes:
        setting: The cache.
        tokens: Tokens of the trace.
        hits: Demanded experts that were resident.
        misses: Demanded experts that were not.
        bytes_read: Bytes of records read, guesses included.
    """

    setting: Setting
    tokens: int
    hits: int
    misses: int
    bytes_read: int

    @property
    def hit_ratio(self) -> float:
        """Hits over demands."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per token."""
        return self.bytes_read / self.tokens

    def tokens_per_s(self, compute_ms: float, disk_mbps: float) -> tuple[float, float]:
        """Predicted speed: with reading after computing, and with reading all behind computing.

        Args:
            compute_ms: Milliseconds to decode a token when nothing is read.
            disk_mbps: Megabytes (10^6 bytes) a second from the disk.
        """
        compute, reading = compute_ms / 1e3, self.bytes_per_token / (disk_mbps * 1e6)
        return 1 / (compute + reading), 1 / max(compute, reading)


def slots_of(
    info: TraceInfo, *, slots: int | None = None, ram: int | None = None
) -> dict[int, int]:
    """Slots by record size, for a number of slots or for a memory budget.

    Args:
        info: Of the trace.
        slots: Slots of all sizes together.
        ram: Bytes for everything, as ``--ram`` of the commands that run a pack.

    Raises:
        ResourceError: The budget has no room for one slot of each size; the message says the need.
    """
    sizes = Counter(nbytes for layer in info.record_nbytes for nbytes in layer)
    everything = sum(nbytes * count for nbytes, count in sizes.items())
    if ram is not None:
        fixed = info.fixed_nbytes
        check_budget(ram, fixed, sum(sizes), f"{format_size(fixed)} process and trunk")
        budget = ram - fixed
    else:
        budget = everything * min(slots or 0, len(info.records)) // len(info.records)
    if len(sizes) == 1:
        (nbytes, count), *_ = sizes.items()
        return {nbytes: min(count, max(budget // nbytes, 1))}
    return divide_budget(budget, dict(sizes))


class Simulator:
    """Runs a trace through one cache after another.

    Args:
        trace: The trace.
    """

    def __init__(self, trace: Trace) -> None:
        self._info, routing = trace.info, trace.routing
        # For each token and layer, the weights by expert, in the router's order.
        self._choices: list[list[dict[int, float]]] = [
            [
                {expert: weight for expert, weight in zip(*chosen, strict=True) if expert >= 0}
                for chosen in zip(*token, strict=True)
            ]
            for token in zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)
        ]
        # By layers ahead, from 1.
        self._guesses = routing.guesses[:LOOKAHEAD, :, :, : trace.info.top_k].tolist()

    def run(self, setting: Setting) -> Outcome:
        """Run the trace through one cache.

        Raises:
            UsageError: There is no such policy, or no guesses to prefetch by.
        """
        if setting.prefetch and not self._guesses:
            raise UsageError(
                "the trace has no guesses to prefetch by",
                remedy="record one with --ahead 1 or more, or simulate without prefetch",
            )
        cache = SimulatedCache(self._info, setting)
        keys = [
            [[(layer, expert) for expert in chosen] for layer, chosen in enumerate(token)]
            for token in self._choices
        ]
        cache.foresee([demands for token in keys for demands in token])
        for t, token in enumerate(self._choices):
            for layer, chosen in enumerate(token):
                cache.observe(layer, list(chosen), list(chosen.values()))
                cache.demand(layer, list(chosen))
                if not setting.prefetch:
                    continue
                for target, guesses in enumerate(self._guesses, layer + 1):
                    if target < len(token):
                        cache.prefetch(target, [e for e in guesses[t][target] if e >= 0])
        return Outcome(setting, len(keys), cache.hits, cache.misses, cache.bytes_read)


def recall(trace: Trace) -> list[list[float]]:
    """How many of the experts used were guessed.

    Returns:
        For each number of layers ahead, from 1: the share of the experts used that are among the
        first 1, 2, ... guesses. Layers too early to be guessed for do not count.
    """
    experts = trace.routing.experts
    shares = []
    for ahead, guesses in enumerate(trace.routing.guesses, 1):
        guessed = guesses[:, ahead:]  # [T, L - ahead, G]
        used = experts[:, ahead:]  # [T, L - ahead, K]
        asked = (guessed >= 0).any(-1, keepdims=True)  # layers whose router could be asked
        right = (guessed[..., :, None] == used[..., None, :]) & (guessed[..., :, None] >= 0)
        needed = int(((used >= 0) & asked).sum())
        # Of each guess, how often it was right; then of the first 1, 2, ... together.
        counts = right.any(-1).sum((0, 1)).cumsum()
        shares.append([float(count) / needed for count in counts] if needed else [])
    return shares


@dataclass
class _Class:
    """The slots of one record size; ``staged`` are guesses not demanded yet, oldest first."""

    nbytes: int
    limit: int
    free: int
    staged: dict[Key, None] = field(default_factory=dict)
    demanded: int = 0


class SimulatedCache:
    """The books of a slot cache.

    Args:
        info: Of a trace.
        setting: The cache.

    Attributes:
        hits: Demands of resident experts.
        misses: Other demands.
        bytes_read: Bytes that were read for both demands and guesses.
    """

    def __init__(self, info: TraceInfo, setting: Setting) -> None:
        self.hits = self.misses = self.bytes_read = 0
        self._sizes = info.record_nbytes
        self._layer = 0
        self._resident: set[Key] = set()
        self._pinned: set[Key] = set()
        self._classes: dict[int, _Class] = {}
        self._policies = {}
        for nbytes, slots in setting.slots.items():
            records = [key for key in info.records if self._nbytes(key) == nbytes]
            limit = slots - reserved_slots(slots, len(records), prefetch=setting.prefetch)
            self._classes[nbytes] = _Class(nbytes, limit, slots)
            self._policies[nbytes] = make_policy(
                setting.policy, limit, records, scope=setting.scope, pins=setting.pins
            )
        policies = self._policies.values()
        self._observers = [policy for policy in policies if isinstance(policy, Observing)]

    def foresee(self, demands: Sequence[Sequence[Key]]) -> None:
        """Tell the policies that have to know the future."""
        for policy in self._policies.values():
            if isinstance(policy, Offline):
                policy.foresee(demands)

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """A layer's router has chosen."""
        for policy in self._observers:
            policy.observe(layer, experts, weights)

    def demand(self, layer: int, experts: Sequence[int]) -> None:
        """The experts of one layer are computed."""
        self._layer = layer
        keys = [(layer, expert) for expert in experts]
        ready = [key for key in keys if key in self._resident]
        missing = [key for key in keys if key not in self._resident]
        self.hits += len(ready)
        self.misses += len(missing)
        self._pinned.update(ready)
        # In the order of the real cache, on which ages depend: guesses that were right, reads, and
        # when they are computed with, those that were there before.
        used = [key for key in ready if not self._come_true(key)]
        begun = list(itertools.takewhile(self._start, missing))
        for key in used:
            self._policies[self._nbytes(key)].touch(key)
        for key in missing[len(begun) :]:
            while not self._start(key):
                # Computed with, in the real cache: no longer in use.
                self._pinned.clear()
        self._pinned.clear()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Experts of a layer to come are guessed, the likeliest first."""
        keep = {layer, *due_layers(self._layer)}
        for expert in experts:
            key = (layer, expert)
            size = self._class_of(key)
            if key in self._resident:
                continue
            if not size.free and not self._drop_staged(size, keep):
                return
            self._read(key, size)
            size.staged[key] = None

    def _nbytes(self, key: Key) -> int:
        return self._sizes[key[0]][key[1]]

    def _class_of(self, key: Key) -> _Class:
        return self._classes[self._nbytes(key)]

    def _come_true(self, key: Key) -> bool:
        """Make an ordinary record of a guess that was right, if it is one."""
        size = self._class_of(key)
        if key not in size.staged:
            return False
        del size.staged[key]
        self._count_in(key, size)
        if size.demanded > size.limit:
            self._evict(size, key)
        return True

    def _start(self, key: Key) -> bool:
        """Read a missing expert, if a slot can be had."""
        size = self._class_of(key)
        while not size.free or size.demanded >= size.limit:
            if size.demanded >= size.limit:
                if not self._evict(size, key):
                    return False
            elif not self._drop_staged(size):
                return False
        self._read(key, size)
        self._count_in(key, size)
        self._pinned.add(key)
        return True

    def _read(self, key: Key, size: _Class) -> None:
        self._resident.add(key)
        size.free -= 1
        self.bytes_read += size.nbytes

    def _count_in(self, key: Key, size: _Class) -> None:
        self._policies[size.nbytes].insert(key)
        size.demanded += 1

    def _drop_staged(self, size: _Class, keep: Collection[int] = ()) -> bool:
        key = next((key for key in size.staged if key[0] not in keep), None)
        if key is None:
            return False
        del size.staged[key]
        self._resident.remove(key)
        size.free += 1
        return True

    def _evict(self, size: _Class, incoming: Key) -> bool:
        policy = self._policies[size.nbytes]
        victim = policy.victim(lambda key: key not in self._pinned, incoming)
        if victim is None:
            return False
        policy.remove(victim)
        self._resident.remove(victim)
        size.demanded -= 1
        size.free += 1
        return True
