"""What every cache policy must hold; each file in the package is picked up by itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack_formats.errors import UsageError
from moepack_runtime.cache.layer_policies import PINNED_SHARE, PerLayer, Pinned, make_policy
from moepack_runtime.loading import load_pack
from moepack_runtime.options import SCOPES, RuntimeOptions
from moepack_runtime.policies import (
    Key,
    Observing,
    Offline,
    Policy,
    check_runnable,
    get_policy,
    policy_names,
)
from moepack_runtime.simulate.simulator import Setting, Simulator
from moepack_runtime.trace.trace_file import Routing, Trace, TraceInfo

NAMES = policy_names()
ONLINE = [name for name in NAMES if not isinstance(get_policy(name)(), Offline)]
LAYERS, EXPERTS, NBYTES = 3, 6, 4096
ALL = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]

ROUTING = st.lists(
    st.lists(
        st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2, unique=True),
        min_size=LAYERS,
        max_size=LAYERS,
    ),
    min_size=1,
    max_size=30,
)


def trace_of(chosen: list[list[list[int]]], seed: int = 0) -> Trace:
    """A trace with these experts, and weights drawn at random."""
    experts = np.array(chosen, np.int16)
    weights = np.random.default_rng(seed).random(experts.shape, np.float32)
    weights /= weights.sum(-1, keepdims=True)
    sizes = ((NBYTES,) * EXPERTS,) * experts.shape[1]
    info = TraceInfo("0" * 64, "test", sizes, experts.shape[2], 0, 0)
    return Trace(info, Routing(experts, weights, np.empty((0, *experts.shape), np.int16)))


def every(_: Key) -> bool:
    return True


def test_the_policies_of_the_issue_exist() -> None:
    assert {"lru", "lfu", "least-stale", "router-score", "belady"} <= set(NAMES)
    assert set(NAMES) - set(ONLINE) == {"belady"}
    assert [n for n in NAMES if isinstance(get_policy(n)(), Observing)] == ["router-score"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(
    operations=st.lists(st.tuples(st.sampled_from("dddrv"), st.sampled_from(ALL)), max_size=60),
    data=st.data(),
)
def test_any_sequence(name: str, operations: list[tuple[str, Key]], data: st.DataObject) -> None:
    """A victim is resident and usable, and there is one whenever anything usable is resident."""
    policy: Policy = get_policy(name)()
    if isinstance(policy, Offline):
        policy.foresee([[key] for kind, key in operations if kind == "d"])
    resident: set[Key] = set()
    for kind, key in operations:
        if kind == "d":
            if isinstance(policy, Observing):
                policy.observe(key[0], [key[1]], [data.draw(st.floats(0, 1))])
            (policy.touch if key in resident else policy.insert)(key)
            resident.add(key)
        elif kind == "r" and key in resident:
            policy.remove(key)
            resident.remove(key)
        elif kind == "v":
            usable = set(data.draw(st.lists(st.sampled_from(ALL), unique=True)))
            victim = policy.victim(usable.__contains__, data.draw(st.sampled_from([key, None])))
            if usable & resident:
                assert victim in usable & resident
                # Asking changes nothing: it is still there to be named again.
                assert policy.victim(usable.__contains__, key) == victim
            else:
                assert victim is None
    # All of them can be given up, one after another.
    for left in range(len(resident), 0, -1):
        victim = policy.victim(every, None)
        assert victim is not None
        policy.remove(victim)
        resident.remove(victim)
        assert len(resident) == left - 1
    assert policy.victim(every, None) is None


@settings(max_examples=60)
@given(ROUTING, st.integers(2, LAYERS * EXPERTS), st.sampled_from(SCOPES))
def test_belady_is_never_beaten(chosen: list[list[list[int]]], slots: int, scope: str) -> None:
    simulator = Simulator(trace_of(chosen))
    # A layer with less room than a token needs is not what the optimum is optimal for.
    slots = max(slots, 2 * LAYERS) if scope == "layer" else slots
    hits = {name: simulator.run(Setting(name, {NBYTES: slots}, scope)).hits for name in NAMES}
    assert hits["belady"] == max(hits.values())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NAMES)
def test_more_slots_than_experts_miss_once(name: str, scope: str) -> None:
    generator = random.Random(1)
    chosen = [[generator.sample(range(EXPERTS), 2) for _ in range(LAYERS)] for _ in range(100)]
    outcome = Simulator(trace_of(chosen)).run(Setting(name, {NBYTES: len(ALL)}, scope))
    assert outcome.misses == len(ALL)
    assert outcome.bytes_read == len(ALL) * NBYTES
    assert outcome.hits + outcome.misses == 100 * LAYERS * 2


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(st.lists(st.sampled_from(ALL), max_size=60), st.sets(st.sampled_from(ALL), max_size=4))
def test_pins_are_never_given_up(name: str, demands: list[Key], pins: set[Key]) -> None:
    policy = Pinned(get_policy(name)(), frozenset(pins))
    policy.foresee([[key] for key in demands])
    resident: set[Key] = set()
    for key in demands:
        policy.observe(key[0], [key[1]], [1.0])
        if key in resident:
            policy.touch(key)
            continue
        while len(resident) >= 6:
            victim = policy.victim(every, key)
            assert victim in resident - pins
            policy.remove(victim)
            resident.remove(victim)
        policy.insert(key)
        resident.add(key)
    assert pins & set(demands) <= resident


@pytest.mark.parametrize("name", NAMES)
def test_pins_fill_at_most_their_share(name: str) -> None:
    """As many as fit of the most wanted ones; a single slot is never pinned."""
    for slots in (1, 2, 5, 8):
        policy = make_policy(name, slots, ALL, pins=[(9, 9), *ALL])
        kept = list(ALL[: int(slots * PINNED_SHARE)])
        assert isinstance(policy, Pinned) == bool(kept)
        policy = Pinned(policy, frozenset())  # so that all have foresee
        policy.foresee([ALL])
        for key in ALL[:slots]:
            policy.insert(key)
        given_up = []
        while (victim := policy.victim(every, None)) is not None:
            policy.remove(victim)
            given_up.append(victim)
        others = len(given_up) - len(kept)
        assert set(given_up[:others]) == set(ALL[:slots]) - set(kept)
        assert set(given_up[others:]) == set(kept)  # last, where nothing else is left


@pytest.mark.parametrize("name", ONLINE)
def test_a_part_for_each_layer(name: str) -> None:
    """A layer at its part gives up one of its own; below it, the layer most above pays."""
    policy = PerLayer(get_policy(name), 7, range(3))  # parts of 3, 2 and 2
    keys = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
    for key in keys:
        policy.observe(key[0], [key[1]], [0.5])
        policy.insert(key)
    assert _layer(policy.victim(every, (2, 1))) == 0  # has four
    assert _layer(policy.victim(every, (0, 4))) == 0
    assert _layer(policy.victim(every, (1, 2))) == 1
    assert _layer(policy.victim(lambda key: key[0] == 2, (1, 2))) == 2
    assert _layer(policy.victim(every, None)) == 0


def _layer(key: Key | None) -> int:
    assert key is not None
    return key[0]


def test_lfu_keeps_what_is_used_often_and_forgets() -> None:
    policy = get_policy("lfu")()
    for key in ((0, 0), (0, 1), (0, 2)):
        policy.insert(key)
    for _ in range(5):
        policy.touch((0, 0))
    policy.touch((0, 2))
    assert policy.victim(every, None) == (0, 1)
    policy.remove((0, 1))
    assert policy.victim(every, None) == (0, 2)
    # Enough demands of another expert make old ones count for little.
    for _ in range(100):
        policy.touch((0, 2))
    policy.insert((0, 1))
    policy.touch((0, 1))
    policy.touch((0, 1))
    assert policy.victim(every, None) == (0, 0)


def test_router_score_goes_by_weight() -> None:
    policy = get_policy("router-score")()
    assert isinstance(policy, Observing)
    for _ in range(3):
        policy.observe(0, [0, 1], [0.2, 0.8])
    for expert in (0, 1):
        policy.insert((0, expert))
    assert policy.victim(every, None) == (0, 0)
    # As many uses as the other, and now with more weight.
    for _ in range(3):
        policy.observe(0, [0, 1], [0.95, 0.05])
    assert policy.victim(every, None) == (0, 1)


def test_least_stale_counts_turns_of_the_layer() -> None:
    policy = get_policy("least-stale")()
    for turn in range(3):
        for layer in range(2):
            (policy.insert if turn == 0 else policy.touch)((layer, 0))
            if turn == 0:
                policy.insert((layer, 1))
    # Both layers have passed over their expert 1 twice; layer 1 comes round last.
    assert policy.victim(every, (0, 2)) == (1, 1)
    policy.remove((1, 1))
    assert policy.victim(every, (0, 2)) == (0, 1)


def test_lru_gives_up_the_oldest() -> None:
    policy = get_policy("lru")()
    for expert in range(3):
        policy.insert((0, expert))
    policy.touch((0, 0))
    assert policy.victim(every, None) == (0, 1)
    assert policy.victim(lambda key: key != (0, 1), None) == (0, 2)


def test_names_that_do_not_run() -> None:
    with pytest.raises(UsageError, match=r"unknown policy .*lfu"):
        get_policy("fifo")
    with pytest.raises(UsageError, match=r"belady has to know .*moepack simulate"):
        check_runnable("belady")
    with pytest.raises(UsageError, match="belady has to know"):
        RuntimeOptions(policy="belady")
    for name in ONLINE:
        check_runnable(name)
        assert RuntimeOptions(policy=name).policy == name


@pytest.mark.parametrize("name", ONLINE)
def test_a_policy_takes_about_a_microsecond(name: str) -> None:
    """Not the time, which a busy machine stretches, but that it does not grow with the cache."""
    counts = [_calls(get_policy(name), size) for size in (100, 1000)]
    assert counts[1] < 3 * counts[0]


def _calls(make: Callable[[], Policy], size: int) -> int:
    """How often ``usable`` is asked in a thousand evictions."""
    asked = 0

    def usable(_: Key) -> bool:
        nonlocal asked
        asked += 1
        return True

    policy, generator = make(), random.Random(0)
    resident = {(i % 4, i) for i in range(size)}
    for key in sorted(resident):
        policy.insert(key)
    for _ in range(1000):
        victim = policy.victim(usable, None)
        assert victim is not None
        policy.remove(victim)
        resident.remove(victim)
        new = (generator.randrange(4), generator.randrange(size, 2 * size))
        if new not in resident:
            policy.insert(new)
            resident.add(new)
        else:
            policy.insert(victim)
            resident.add(victim)
    return asked


def test_pins_give_way_where_nothing_else_is_left(pack: Path) -> None:
    """Slots that are given back under a shrinking budget may leave none but pins."""
    pins = ((0, 0), (0, 1))
    model = load_pack(pack, io="buffered", slots=4, pins=pins, prefetch=False, device="cpu")
    cache: Any = model.moepack.residency
    for layer, experts in ((0, [0, 1]), (1, [0, 1])):
        for _ in cache.fetch(layer, experts):
            pass
    (size,) = cache._classes.values()
    while size.slots > 2:
        assert cache._park(size)
    assert cache.resident(0) == [0, 1]
    assert [expert for expert, _ in cache.fetch(2, [5])] == [5]
    model.moepack.close()
