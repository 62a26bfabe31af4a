"""The GPU's cache over a simulated link: right bytes, no race, no needless wait."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moepack_formats.errors import ResourceError
from moepack_runtime.gpu.device_cache import CacheOptions, DeviceCache
from moepack_runtime.gpu.device_slots import share_out
from moepack_runtime.gpu.host_source import HostSource
from moepack_runtime.gpu.simulated_link import LinkSpec, RaceError, SimulatedLink
from moepack_runtime.statistics import Statistics
from tests.runtime.fake_pack import EXPERTS, LARGE, LAYERS, SMALL, FakePack
from tests.runtime.gpu.fake_host import FakeHost, Key

SLOW = LinkSpec(bandwidth=1e9, latency=1e-6, memory_bandwidth=1e11, layer_seconds=0.0)
COPY = SLOW.latency + SMALL.nbytes / SLOW.bandwidth


@contextlib.contextmanager
def opened(
    slots: int,
    *,
    host_slots: int = 99,
    at_hand: set[Key] | None = None,
    keep: bool = True,
    delay: Callable[[], float] = lambda: 0.0,
) -> Iterator[tuple[DeviceCache, FakePack, FakeHost, SimulatedLink, Statistics]]:
    """A cache of small records."""
    with tempfile.TemporaryDirectory() as folder:
        pack, stats, link = FakePack(Path(folder), 1), Statistics(), SimulatedLink(SLOW, delay)
        host = FakeHost(pack, host_slots, at_hand)
        options = CacheOptions(keep=keep)
        cache = DeviceCache(
            pack, HostSource(host, link), slots * SMALL.nbytes, options, stats, link
        )  # type: ignore[arg-type]
        try:
            yield cache, pack, host, link, stats
        finally:
            cache.close()
            pack.close()


def use(cache: DeviceCache, pack: FakePack, layer: int, experts: list[int]) -> list[list[int]]:
    """Ask for experts, look at their bytes, and give the turns in which they came."""
    turns = []
    for records in cache.fetch_ready(layer, experts):
        for expert, record in records.items():
            assert bytes(record.numpy().data) == pack.bytes[layer, expert], (layer, expert)
        turns.append(list(records))
    assert sorted(expert for turn in turns for expert in turn) == sorted(experts)
    return turns


class Machine(RuleBasedStateMachine):
    """Any order of demands and guesses, with copies that take any time."""

    @initialize(
        slots=st.integers(1, 12), host_slots=st.integers(1, 6), sizes=st.integers(1, 2),
        keep=st.booleans(), delays=st.lists(st.floats(0, 1e-3), min_size=1, max_size=7),
    )  # fmt: skip
    def open(
        self, slots: int, host_slots: int, sizes: int, keep: bool, delays: list[float]
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.pack = FakePack(Path(self.folder.name), sizes)
        self.stats, self.number = Statistics(), 0

        def delay() -> float:
            self.number += 1
            return delays[self.number % len(delays)]

        self.link = SimulatedLink(SLOW, delay)
        self.host = FakeHost(self.pack, host_slots, at_hand=set())
        budget = slots * SMALL.nbytes + (LARGE.nbytes if sizes == 2 else 0)
        source = HostSource(self.host, self.link)
        options = CacheOptions(keep=keep)
        self.cache = DeviceCache(self.pack, source, budget, options, self.stats, self.link)  # type: ignore[arg-type]
        assert self.cache.nbytes <= budget
        self.demands = 0

    @rule(
        layer=st.integers(0, LAYERS - 1),
        experts=st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True),
    )
    def demand(self, layer: int, experts: list[int]) -> None:
        use(self.cache, self.pack, layer, experts)
        self.demands += len(experts)

    @rule(
        layer=st.integers(0, LAYERS - 1),
        experts=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True),
    )
    def abandon(self, layer: int, experts: list[int]) -> None:
        fetching = self.cache.fetch_ready(layer, experts)
        next(fetching)
        fetching.close()  # type: ignore[attr-defined]
        self.demands += len(experts)

    @rule(
        layer=st.integers(0, LAYERS - 1),
        experts=st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS),
    )
    def guess(self, layer: int, experts: list[int]) -> None:
        demanded = {key for key, entry in self.cache._entries.items() if not entry.guessed}
        self.cache.prefetch(layer, experts)
        list(self.cache.fetch_ready((layer + 1) % LAYERS, []))
        kept = self.cache._entries
        if self.cache._keep:
            assert demanded <= set(kept)  # a guess costs no cached expert

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def arrives_from_disk(self, layer: int, expert: int) -> None:
        assert self.host.at_hand is not None
        self.host.at_hand.add((layer, expert))

    @rule(seconds=st.floats(0, 1e-3))
    def time_passes(self, seconds: float) -> None:
        self.link.computing(seconds)
        self.link.host_worked(int(seconds * self.link.spec.cpu_bandwidth))

    @invariant()
    def every_slot_is_free_or_has_one_record(self) -> None:
        if not hasattr(self, "cache"):
            return
        for nbytes, size in self.cache._classes.items():
            entries = [
                e for e in self.cache._entries.values() if self.cache._nbytes(e.key) == nbytes
            ]
            assert sorted([e.slot for e in entries] + size.free) == list(range(size.slots))
            assert all(entry.pins == 0 for entry in entries)
            assert sorted(size.staged) == sorted(e.key for e in entries if e.guessed)
            assert size.demanded == len(entries) - len(size.staged)
        assert self.stats.hits + self.stats.misses == self.demands

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert self.host.closed
            self.pack.close()
            self.folder.cleanup()


Machine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=15,
)
TestAnyOrder = Machine.TestCase


def test_hits_come_first_and_together_then_copies_in_order() -> None:
    with opened(8) as (cache, pack, _, _, stats):
        use(cache, pack, 0, [1, 2])
        cache._link.finish()
        assert use(cache, pack, 0, [0, 1, 4, 2]) == [[1, 2], [0], [4]]
        assert (stats.hits, stats.misses) == (2, 4)
        assert stats.bytes_copied == 4 * SMALL.nbytes


def test_the_host_does_not_wait_when_records_are_in_memory() -> None:
    with opened(3) as (cache, pack, _, link, _):
        for layer in (0, 1, 2, 1, 0):
            link.to_host([])
            use(cache, pack, layer, [0, 1, 2, 3])  # more than there are slots
        assert link.waits == 5  # for the indices


def test_copies_run_while_kernels_do() -> None:
    with opened(8) as (cache, pack, _, link, _):
        use(cache, pack, 0, [0, 1])
        link.computing(3 * COPY)
        use(cache, pack, 1, [0, 1, 2])
        link.finish()
        kernels = 5 * SMALL.nbytes / SLOW.memory_bandwidth
        assert link.clock() < 2 * COPY + 3 * COPY + kernels + 1e-9


def test_a_slot_is_overwritten_only_after_its_kernels() -> None:
    """With slow kernels and fast copies; the simulated link raises at any overlap."""
    with opened(1) as (cache, pack, _, link, _):
        link.spec = LinkSpec(bandwidth=1e12, latency=0.0, memory_bandwidth=1e6, layer_seconds=0.0)
        for expert in range(EXPERTS):
            use(cache, pack, 0, [expert])
        assert link.waits == 0


def test_the_simulated_link_sees_races() -> None:
    link = SimulatedLink(SLOW)
    source, target = torch.ones(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    event = link.copy(source, target)
    with pytest.raises(RaceError, match="copied until"):
        link.reads([target])
    link.compute_after(event)
    link.reads([target])
    assert target.all()
    with pytest.raises(RaceError, match="overwrites"):
        link.copy(source, target)  # the kernel may still read
    link.copy_after(link.computed())
    link.copy(source, target)


def test_what_is_copied_changes_only_when_the_copy_ends() -> None:
    link = SimulatedLink(SLOW)
    source, target = torch.ones(1000, dtype=torch.uint8), torch.zeros(1000, dtype=torch.uint8)
    event = link.copy(source, target)
    assert not link.done(event)
    assert link.seconds(event) is None
    assert not target.any()
    link.wait(event)
    assert target.all()
    assert link.seconds(event) == pytest.approx(2e-6)
    assert link.waits == 1


def test_guesses_are_queued_behind_demands() -> None:
    with opened(12) as (cache, pack, _, link, stats):
        cache.prefetch(1, [3])
        assert not cache.holds(1, 3)
        order: list[int] = []
        copy = link.copy

        def noting(source: torch.Tensor, target: torch.Tensor) -> Any:
            order.append(int(source[0]) - 1)
            return copy(source, target)

        link.copy = noting  # type: ignore[method-assign]
        use(cache, pack, 0, [4, 0])
        assert order == [4, 0, EXPERTS + 3]
        assert cache.holds(1, 3)
        use(cache, pack, 1, [3])
        assert (stats.speculative_reads, stats.speculative_used) == (1, 1)
        assert (stats.hits, stats.misses) == (1, 2)


def test_guesses_on_the_disk_are_asked_for_and_copied_later() -> None:
    with opened(12, at_hand=set()) as (cache, pack, host, _, _):
        cache.prefetch(2, [1])
        assert host.asked == [(2, 1)]
        use(cache, pack, 0, [0])
        assert not cache.holds(2, 1)
        assert host.at_hand is not None
        host.at_hand.add((2, 1))
        use(cache, pack, 1, [0])
        assert cache.holds(2, 1)


def test_guesses_on_the_disk_are_asked_for_together() -> None:
    """One after the other, each would replace the guess before it."""
    with opened(12, at_hand={(2, 3)}) as (cache, _, host, _, _):
        calls: list[list[int]] = []
        host.prefetch = lambda layer, experts: calls.append(list(experts))  # type: ignore[method-assign]
        cache.prefetch(2, [1, 3, 0, 1])
        assert calls == [[1, 0]]


def test_no_more_guesses_than_staging_slots_once_the_cache_is_full() -> None:
    with opened(8) as (cache, pack, _, _, _):
        for layer in (0, 1):
            use(cache, pack, layer, [0, 1, 2, 3])
        before = {k for k, e in cache._entries.items() if not e.guessed}
        cache.prefetch(2, [0, 1, 2, 3, 4])
        use(cache, pack, 0, [])
        guessed = [k for k, e in cache._entries.items() if e.guessed]
        assert guessed == [(2, 0), (2, 1)]  # a quarter of 8, best first
        assert before == {k for k, e in cache._entries.items() if not e.guessed}
        assert len(before) == 6
        use(cache, pack, 2, [1, 4])
        (size,) = cache._classes.values()
        assert (size.demanded, list(size.staged)) == (6, [(2, 0)])


def test_without_keeping_every_use_is_a_copy() -> None:
    with opened(8, keep=False) as (cache, pack, _, _, stats):
        for _ in range(3):
            use(cache, pack, 0, [0, 1])
        assert (stats.hits, stats.misses) == (0, 6)


def test_host_slots_are_held_until_they_are_copied() -> None:
    """Host memory for one record: the host must wait, and bytes must still be right."""
    with opened(8, host_slots=1) as (cache, pack, _, link, _):
        use(cache, pack, 0, [0, 1, 2])
        use(cache, pack, 1, [3, 4])
        assert link.waits > 0


def test_a_read_that_fails_frees_its_slot() -> None:
    with opened(4) as (cache, pack, host, _, _):
        real = host.fetch_ready

        def failing(layer: int, experts: Any) -> Any:
            turns = real(layer, experts[:1])
            yield next(turns)
            raise OSError("disk")

        host.fetch_ready = failing  # type: ignore[method-assign]
        with pytest.raises(OSError, match="disk"):
            use(cache, pack, 0, [0, 1])
        host.fetch_ready = real  # type: ignore[method-assign]
        use(cache, pack, 0, [0, 1, 2])
        (size,) = cache._classes.values()
        assert len(size.free) + len(cache._entries) == size.slots


def test_another_pass_in_the_middle_is_refused_clearly() -> None:
    with opened(1) as (cache, _, _, _, _):
        fetching = cache.fetch_ready(0, [0])
        next(fetching)
        with pytest.raises(ResourceError, match="--vram"):
            next(iter(cache.fetch_ready(0, [1])))


@given(
    st.dictionaries(st.integers(1, 9).map(lambda n: n * 4096), st.integers(1, 50), min_size=1),
    st.integers(0, 10**6),
)
def test_slots_fit_the_budget(sizes: dict[int, int], extra: int) -> None:
    budget = sum(sizes) + extra
    slots = share_out(budget, sizes)
    assert sum(n * s for n, s in slots.items()) <= budget
    assert all(1 <= slots[n] <= count for n, count in sizes.items())
    if sum(n * c for n, c in sizes.items()) <= budget:
        assert slots == sizes
