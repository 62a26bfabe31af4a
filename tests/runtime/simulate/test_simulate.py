"""The simulator against the real cache, on traces of the same runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack_formats.errors import ResourceError, UsageError
from moepack_runtime.cache.slot_cache import SlotCache
from moepack_runtime.loading import load_pack, load_tokenizer
from moepack_runtime.options import RuntimeOptions
from moepack_runtime.policies import policy_names
from moepack_runtime.prefetch.early_routers import EarlyRouters
from moepack_runtime.simulate.simulator import (
    Outcome,
    Setting,
    SimulatedCache,
    Simulator,
    recall,
    slots_of,
)
from moepack_runtime.statistics import Statistics
from moepack_runtime.trace.trace_file import NOTHING, Routing, Trace, TraceInfo, most_used
from tests.commands import ASSETS, TINY
from tests.packs import make_pack
from tests.runtime.fake_pack import EXPERTS, LARGE, LAYERS, SMALL, opened
from tests.runtime.routed import decode
from tests.runtime.stepped_io import SteppedPool

TOKENS = 160
ONLINE = [name for name in policy_names() if name != "belady"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-moe as a pack."""
    folder = tmp_path_factory.mktemp("tiny")
    make_pack(TINY, folder, attn_bits=4, expert_bits=2, quantizer="rtn")
    return folder


def run_real(tiny: Path, slots: int, ahead: int = 1, **options: Any) -> tuple[Trace, Statistics]:
    """Decode real text with so many slots; the trace and the counters."""
    model = load_pack(tiny, io="buffered", slots=slots, **options)
    cache = model.moepack.residency
    assert isinstance(cache, SlotCache)
    assert cache.slots == slots
    text = (ASSETS / "text" / "tiny-moe-valid.txt").read_text()[: 8 * TOKENS]
    ids = torch.tensor(load_tokenizer(tiny)(text)["input_ids"][:TOKENS])
    return decode(model, ids, ahead=ahead), model.moepack.stats


@pytest.mark.parametrize(
    ("slots", "options"),
    [
        *((slots, {"policy": policy}) for policy in ONLINE for slots in (9, 24)),
        (12, {"policy": "lfu", "scope": "layer"}),
        (36, {"policy": "lru", "scope": "layer"}),
        (16, {"policy": "lfu", "pins": ((0, 0), (0, 1), (3, 4), (5, 7), (5, 6))}),
    ],
)
def test_it_agrees_with_the_real_cache(tiny: Path, slots: int, options: dict[str, Any]) -> None:
    trace, stats = run_real(tiny, slots, prefetch=False, **options)
    nbytes = trace.info.record_nbytes[0][0]
    policy = options.pop("policy")
    outcome = Simulator(trace).run(Setting(policy, {nbytes: slots}, **options))
    assert outcome.tokens == stats.tokens == TOKENS
    assert outcome.hits + outcome.misses == stats.hits + stats.misses
    assert outcome.hit_ratio == pytest.approx(stats.hit_ratio, abs=0.01)
    assert outcome.bytes_per_token == pytest.approx(stats.bytes_per_token, rel=0.02)


@pytest.mark.parametrize(("slots", "policy"), [(12, "lru"), (24, "lfu"), (40, "router-score")])
@pytest.mark.parametrize(("keeps_up", "ahead"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_it_agrees_with_the_real_cache_that_guesses(
    tiny: Path, slots: int, policy: str, keeps_up: bool, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same if reads are done before the next layer's, as is assumed.

    Where the disk reads one record a guess, wrong ones are given up before they are read: those
    bytes are saved, and the hits are within a point.
    """
    # Every token is guessed for, as in the simulator, however often in vain.
    monkeypatch.setattr("moepack_runtime.prefetch.trial.WARM_UP", 10**6)
    monkeypatch.setattr("moepack_runtime.prefetch.guesses.FAR_PRECISION", 0)
    if ahead == 2:  # as where a recorded pass asks
        monkeypatch.setattr(
            EarlyRouters,
            "answer",
            lambda routers, layer, target: routers._ask_now(layer, target, ranked=False),
        )
    pool = SteppedPool()
    monkeypatch.setattr("moepack_runtime.cache.slot_cache.IoPool", lambda threads: pool)
    prefetch = SlotCache.prefetch

    def read_then(cache: SlotCache, layer: int, experts: list[int]) -> list[int]:
        begun = prefetch(cache, layer, experts)
        while pool.step() and keeps_up:
            pass
        return begun

    monkeypatch.setattr(SlotCache, "prefetch", read_then)
    trace, stats = run_real(tiny, slots, ahead, prefetch=True, policy=policy)
    nbytes = trace.info.record_nbytes[0][0]
    outcome = Simulator(trace).run(Setting(policy, {nbytes: slots}, prefetch=True))
    if keeps_up:
        assert pool.given_up == 0
        assert (outcome.hits, outcome.bytes_read) == (stats.hits, stats.bytes_read)
    else:
        assert pool.given_up > 0
        assert outcome.hit_ratio == pytest.approx(stats.hit_ratio, abs=0.01)
        asked_for = stats.bytes_read + pool.given_up * nbytes
        assert outcome.bytes_read == pytest.approx(asked_for, rel=0.05)
    # Guesses change a lot: in a cache this small they cost more than they bring.
    without = Simulator(trace).run(Setting(policy, {nbytes: slots}))
    assert outcome.bytes_read > 1.5 * without.bytes_read


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["demand", "fetch", "prefetch"]),
            st.integers(0, LAYERS - 1),
            st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True),
        ),
        max_size=25,
    ),
    st.integers(0, 20),
)
def test_the_books_are_those_of_the_cache(
    operations: list[tuple[str, int, list[int]]], extra: int
) -> None:
    """Any demands and guesses, records of two sizes, any number of slots: the same is resident."""
    budget = SMALL.nbytes + LARGE.nbytes + extra * SMALL.nbytes
    with opened(budget, threads=1) as (cache, pack, stats):
        sizes = tuple(tuple(at.spec.nbytes for at in layer) for layer in pack.layers)
        slots = {nbytes: size.arena.slots for nbytes, size in cache._classes.items()}
        setting = Setting(RuntimeOptions.policy, slots, prefetch=True)
        simulated = SimulatedCache(TraceInfo("", "", sizes, 2, 0, 0), setting)
        for kind, layer, experts in operations:
            if kind != "prefetch":
                if len(experts) > min(slots.values()):
                    continue  # in what order records arrive decides what stays
                if kind == "demand":  # announced, as decoding does, and then fetched
                    cache.demand(layer, experts)
                for _ in cache.fetch_ready(layer, experts):
                    pass
                simulated.demand(layer, experts)
            else:
                cache.prefetch(layer, experts)
                for entry in list(cache._entries.values()):
                    cache._io.wait([entry.reading])
                simulated.prefetch(layer, experts)
            assert set(cache._entries) == simulated._resident
        assert (simulated.hits, simulated.misses) == (stats.hits, stats.misses)
        assert simulated.bytes_read == stats.bytes_read


def _info(*sizes: int, experts: int = 8) -> TraceInfo:
    return TraceInfo("", "test", tuple((size,) * experts for size in sizes), 2, 1, 1000)


def test_slots_of_a_budget() -> None:
    one = _info(4096, 4096)
    assert slots_of(one, slots=5) == {4096: 5}
    assert slots_of(one, slots=100) == {4096: 16}
    assert slots_of(one, ram=1000 + 5 * 4096 + 4095) == {4096: 5}
    assert slots_of(one, ram=1000 + 4096) == {4096: 1}
    with pytest.raises(ResourceError, match="not enough memory for the smallest working set"):
        slots_of(one, ram=1000 + 4095)
    two = _info(4096, 8192)
    shared = slots_of(two, slots=8)
    assert sum(nbytes * count for nbytes, count in shared.items()) <= 8 * 6144
    assert shared == {4096: 4, 8192: 4}


def test_predicted_speed() -> None:
    outcome = Outcome(Setting("lru", {4096: 1}), tokens=10, hits=3, misses=7, bytes_read=10**7)
    assert outcome.hit_ratio == 0.3
    assert outcome.bytes_per_token == 10**6
    serial, overlapped = outcome.tokens_per_s(compute_ms=2, disk_mbps=1000)
    assert serial == pytest.approx(1 / 0.003)
    assert overlapped == pytest.approx(1 / 0.002)
    assert outcome.tokens_per_s(compute_ms=0.5, disk_mbps=1000)[1] == pytest.approx(1000)


def test_recall() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[0, 1], [4, NOTHING]]], np.int16)
    guesses = np.full((1, 2, 2, 3), NOTHING, np.int16)
    guesses[0, 0, 1] = [3, 5, 2]
    guesses[0, 1, 1] = [0, 4, NOTHING]
    routing = Routing(experts, np.ones(experts.shape, np.float32), guesses)
    ((first, second, third),) = recall(Trace(_info(4096, 4096), routing))
    assert (first, second, third) == pytest.approx((1 / 3, 2 / 3, 1))
    none = replace(routing, guesses=np.empty((0, 2, 2, 3), np.int16))
    assert recall(Trace(_info(4096, 4096), none)) == []
    unasked = replace(routing, guesses=np.full((1, 2, 2, 3), NOTHING, np.int16))
    assert recall(Trace(_info(4096, 4096), unasked)) == [[]]


def test_prefetch_needs_guesses() -> None:
    experts = np.zeros((3, 2, 2), np.int16)
    none = np.empty((0, 3, 2, 0), np.int16)
    trace = Trace(_info(4096, 4096), Routing(experts, np.ones(experts.shape, np.float32), none))
    with pytest.raises(UsageError, match="no guesses to prefetch by"):
        Simulator(trace).run(Setting("lru", {4096: 2}, prefetch=True))


def test_pins_help_when_they_are_right() -> None:
    """Two experts that come back after a scan too long for LRU."""
    chosen = [[[0, 1]] if t % 4 == 0 else [[2 + t % 3, 5 + t % 3]] for t in range(200)]
    experts = np.array(chosen, np.int16)
    trace = Trace(
        _info(4096),
        Routing(experts, np.ones(experts.shape, np.float32), np.empty((0, 200, 1, 0), np.int16)),
    )
    assert set(most_used(trace)[:2]) == {(0, 0), (0, 1)}
    simulator = Simulator(trace)
    plain = simulator.run(Setting("lru", {4096: 4}))
    pinned = simulator.run(Setting("lru", {4096: 4}, pins=most_used(trace)))
    assert pinned.hits >= plain.hits + 90
    assert math.isclose(pinned.hit_ratio, pinned.hits / 400)
