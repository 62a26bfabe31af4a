"""The expert cache against a model of it that is a dict."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moepack_runtime.cache.slot_cache import UNGUESSED, record_sizes
from moepack_runtime.disk import record_reader
from tests.runtime.fake_pack import (
    EXPERTS,
    LARGE,
    LAYERS,
    SMALL,
    check_invariants,
    check_reserve,
    holds,
    opened,
)

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["fetch", "fetch", "prefetch", "abandon"]),
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), max_size=EXPERTS, unique=True),
    ),
    max_size=25,
)


@settings(max_examples=150)
@given(OPERATIONS, st.integers(0, 20), st.integers(1, 2), st.integers(1, 3))
def test_any_sequence(
    operations: list[tuple[str, int, list[int]]], extra: int, sizes: int, threads: int
) -> None:
    """Whatever is asked in whatever order: the right bytes, within the slots, counted right."""
    smallest = SMALL.nbytes + (LARGE.nbytes if sizes == 2 else 0)
    budget = smallest + extra * SMALL.nbytes
    with opened(budget, sizes=sizes, threads=threads) as (cache, pack, stats):
        slots = sum(s.arena.slots * s.arena.slot_nbytes for s in cache._classes.values())
        assert slots <= budget
        demands = reads = 0
        real = record_reader.osio.read_at
        lock = threading.Lock()

        def counting(*arguments: object, **named: int) -> None:
            nonlocal reads
            buffer = arguments[1]
            assert isinstance(buffer, memoryview)
            with lock:
                reads += len(buffer)
            real(*arguments, **named)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record_reader.osio, "read_at", counting)
            for kind, layer, experts in operations:
                before = holds(cache)
                if kind == "prefetch":
                    demanded = {k for k in before if not cache._entries[k].guessed}
                    cache.prefetch(layer, experts)
                    assert demanded <= holds(cache)  # a guess costs no cached expert
                    continue
                demands += len(experts)
                seen = []
                fetching = cache.fetch(layer, experts)
                for expert, data in fetching:
                    wanted = pack.bytes[layer, expert]
                    assert data.dtype == torch.uint8
                    assert bytes(data.numpy().data) == wanted
                    seen.append(expert)
                    if kind == "abandon":
                        break
                del fetching
                if kind == "fetch":
                    assert sorted(seen) == sorted(experts)
                    for expert in experts:
                        if (layer, expert) not in before:
                            check_reserve(cache, pack.layers[layer][expert].spec.nbytes)
                check_invariants(cache)
            # What is on its way arrives; then every byte is accounted for.
            for entry in list(cache._entries.values()):
                cache._io.wait([entry.reading])
                entry.reading.result()
            assert stats.hits + stats.misses == demands
            assert stats.bytes_read == reads
            assert stats.speculative_used <= stats.speculative_reads


@settings(max_examples=40)
@given(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=40), st.integers(1, EXPERTS))
@example([0, 0, 1, 2, 3], 4)
def test_least_recently_used(demands: list[int], slots: int) -> None:
    """Without guesses: exactly the hits of a dict that forgets its oldest key."""
    with opened(slots * SMALL.nbytes, sizes=1, policy="lru") as (cache, _, stats):
        size = cache._classes[SMALL.nbytes]
        model: dict[int, None] = {}
        hits = 0
        for expert in demands:
            hits += expert in model
            model.pop(expert, None)
            model[expert] = None
            assert [e for e, _ in cache.fetch(0, [expert])] == [expert]
            if len(model) > size.demanded_limit:  # a token may have freed what waits for guesses
                del model[next(iter(model))]
            assert {key[1] for key in holds(cache)} == set(model)
        assert (stats.hits, stats.misses) == (hits, len(demands) - hits)
        assert stats.bytes_read == stats.misses * SMALL.nbytes


def test_one_slot_is_enough() -> None:
    with opened(SMALL.nbytes, sizes=1) as (cache, _, stats):
        assert cache.slots == 1
        for layer in range(LAYERS):
            assert sorted(e for e, _ in cache.fetch(layer, range(EXPERTS))) == list(range(EXPERTS))
        assert stats.misses == LAYERS * EXPERTS
        assert cache.describe().startswith(
            f"1 of 15 experts fit in {SMALL.nbytes / 1024:.1f} KiB of slots; "
        )


def test_everything_fits() -> None:
    with opened(10**9) as (cache, _, stats):
        for _ in range(3):
            for layer in range(LAYERS):
                list(cache.fetch(layer, range(EXPERTS)))
        assert cache.slots == LAYERS * EXPERTS
        assert (stats.misses, stats.hits) == (15, 30)


def test_budgets_are_shared_by_size() -> None:
    with opened(SMALL.nbytes + LARGE.nbytes) as (cache, _, _):
        assert {n: s.arena.slots for n, s in cache._classes.items()} == {
            SMALL.nbytes: 1,
            LARGE.nbytes: 1,
        }
    with opened(3 * SMALL.nbytes + 3 * LARGE.nbytes) as (cache, pack, _):
        sizes = record_sizes(pack)  # type: ignore[arg-type]
        assert sizes == {SMALL.nbytes: 8, LARGE.nbytes: 7}
        assert all(size.arena.slots >= 2 for size in cache._classes.values())


def test_a_right_guess_is_a_hit() -> None:
    with opened(8 * SMALL.nbytes, sizes=1) as (cache, pack, stats):
        cache.prefetch(1, [3])
        ((expert, data),) = [(e, bytes(d.numpy().data)) for e, d in cache.fetch(1, [3])]
        assert (expert, data) == (3, pack.bytes[1, 3])
        assert (stats.hits, stats.misses) == (1, 0)
        assert (stats.speculative_reads, stats.speculative_used) == (1, 1)
        assert stats.bytes_read == SMALL.nbytes
        check_invariants(cache)


def test_a_wrong_guess_costs_no_cached_expert() -> None:
    with opened(8 * SMALL.nbytes, sizes=1) as (cache, _, stats):
        limit = cache._classes[SMALL.nbytes].demanded_limit
        assert limit == 6
        for expert in range(5):
            list(cache.fetch(0, [expert]))
        list(cache.fetch(1, [0]))
        cached = holds(cache)
        for layer in (1, 2, 1, 2):
            cache.prefetch(layer, [1, 2, 3, 4])
            assert cached <= holds(cache)
        stats.reset()
        list(cache.fetch(0, range(5)))
        assert stats.misses == 0


def test_guesses_further_ahead_leave_nearer_ones_alone() -> None:
    with opened(8 * SMALL.nbytes, sizes=1) as (cache, _, stats):
        size = cache._classes[SMALL.nbytes]
        for _ in cache.fetch(0, range(4)):
            pass
        reserved = size.slots - size.demanded_limit
        near = list(range(reserved))
        cache.prefetch(1, near)
        for entry in list(cache._entries.values()):
            cache._io.wait([entry.reading])
        cache.prefetch(2, range(EXPERTS))  # takes what is free, and nothing from layer 1
        assert {(1, expert) for expert in near} <= holds(cache)
        assert sorted(e for e, _ in cache.fetch(1, near)) == near
        assert stats.speculative_used == len(near)
        check_invariants(cache)


def test_guesses_get_their_slots_back() -> None:
    """Tokens without guesses use every slot; the next demand after a guess gives some back."""
    with opened(8 * SMALL.nbytes, sizes=1) as (cache, _, stats):
        size = cache._classes[SMALL.nbytes]

        def token(guess: bool) -> None:
            for layer in range(LAYERS):
                cache.demand(layer, range(EXPERTS))
                if guess and layer + 1 < LAYERS:
                    cache.prefetch(layer + 1, range(EXPERTS))
                for _ in cache.fetch(layer, range(EXPERTS)):
                    pass

        for _ in range(UNGUESSED + 1):
            token(guess=False)
        assert size.demanded == size.demanded_limit == size.slots
        token(guess=True)
        token(guess=True)
        assert size.demanded <= size.demanded_limit < size.slots
        assert stats.speculative_used > 0


def test_a_later_guess_replaces_an_earlier_one() -> None:
    """What is not being read yet is not read."""
    with opened(15 * SMALL.nbytes, sizes=1, stepped=True) as (cache, _, stats):
        cache.prefetch(2, [0, 1, 2])
        cache.prefetch(2, [2, 3])
        assert holds(cache) == {(2, 2), (2, 3)}
        assert sorted(e for e, _ in cache.fetch(2, [2, 3])) == [2, 3]
        assert (stats.speculative_reads, stats.speculative_used) == (2, 2)
        assert stats.bytes_read == 2 * SMALL.nbytes


def test_guesses_that_are_not_being_read_are_dropped() -> None:
    """A guess that turns out wrong before a thread takes it costs no bytes."""
    with opened(12 * SMALL.nbytes, sizes=1, stepped=True) as (cache, _, stats):
        cache.prefetch(1, [0, 1, 2])
        assert [e for e, _ in cache.fetch(1, [1])] == [1]
        assert stats.speculative_reads == stats.speculative_used == 1
        assert stats.bytes_read == SMALL.nbytes
        assert holds(cache) == {(1, 1)}


def test_guesses_that_are_being_read_are_kept() -> None:
    with opened(12 * SMALL.nbytes, sizes=1, stepped=True) as (cache, _, stats):
        cache.prefetch(1, [0, 1, 2])
        assert cache._io.step()  # type: ignore[attr-defined]
        assert [e for e, _ in cache.fetch(1, [1])] == [1]
        assert (stats.speculative_reads, stats.speculative_used) == (2, 1)
        assert stats.bytes_read == 2 * SMALL.nbytes
        assert holds(cache) == {(1, 0), (1, 1)}
