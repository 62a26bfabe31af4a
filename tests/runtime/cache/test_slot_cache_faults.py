"""The expert cache when reading goes wrong or a pass is given up; its threads and memory."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from moepack_formats import osio
from moepack_formats.errors import IntegrityError, ResourceError, UsageError
from moepack_runtime.cache.arena import Arena
from moepack_runtime.disk import record_reader
from moepack_runtime.disk.io_pool import DEMAND, SPECULATION, IoPool
from moepack_runtime.policies import get_policy, policy_names
from tests.runtime.fake_pack import EXPERTS, LARGE, SMALL, check_invariants, opened


@contextlib.contextmanager
def failing(places: set[tuple[int, int]]) -> Iterator[None]:
    """Reads of these records report a broken disk."""
    real = record_reader.osio.read_at

    def read_at(
        descriptor: int, buffer: memoryview, offset: int, where: object, *, align: int = 1
    ) -> None:
        if any(f"layer {layer}, expert {expert}" in str(where) for layer, expert in places):
            raise osio.resource_error(OSError(errno.EIO, ""), where)
        real(descriptor, buffer, offset, where, align=align)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_reader.osio, "read_at", read_at)
        yield


@pytest.mark.parametrize("slots", [1, 3, 8, 15])
@pytest.mark.parametrize("guess", [False, True])
def test_a_failed_read_propagates_and_is_tried_again(slots: int, guess: bool) -> None:
    with opened(slots * SMALL.nbytes, sizes=1) as (cache, pack, stats):
        with failing({(1, 1), (1, 3)}):
            if guess:
                cache.prefetch(1, [1, 3])
            for _ in range(2):
                with pytest.raises(ResourceError, match=r"layer 1, expert [13].*input/output"):
                    list(cache.fetch(1, range(EXPERTS)))
                check_invariants(cache)
            assert sorted(e for e, _ in cache.fetch(0, range(EXPERTS))) == list(range(EXPERTS))
        # The disk works again: nothing remembers the failure.
        stats.reset()
        got = {e: bytes(d.numpy().data) for e, d in cache.fetch(1, range(EXPERTS))}
        assert got == {e: pack.bytes[1, e] for e in range(EXPERTS)}
        check_invariants(cache)


def test_a_failed_guess_alone_disturbs_nobody() -> None:
    with opened(8 * SMALL.nbytes, sizes=1) as (cache, _, _):
        with failing({(2, 2)}):
            cache.prefetch(2, [2])
            for layer in (0, 1):
                assert len(list(cache.fetch(layer, range(EXPERTS)))) == EXPERTS
            assert len(list(cache.fetch(2, [0, 1]))) == 2
        assert [e for e, _ in cache.fetch(2, [2])] == [2]
        check_invariants(cache)


@pytest.mark.parametrize("guess", [False, True])
def test_damaged_bytes_propagate(guess: bool) -> None:
    with opened(4 * SMALL.nbytes, sizes=1) as (cache, pack, _):
        right = pack.layers[1][2]
        pack.layers[1][2] = replace(right, xxh3="0" * 32)
        if guess:
            cache.prefetch(1, [2])
        for _ in range(2):
            with pytest.raises(IntegrityError, match="layer 1, expert 2"):
                list(cache.fetch(1, [2]))
            check_invariants(cache)
        pack.layers[1][2] = right
        assert [e for e, _ in cache.fetch(1, [0, 1, 2, 3])].count(2) == 1


def test_a_pass_that_ends_midway_leaves_no_pins() -> None:
    with opened(2 * SMALL.nbytes, sizes=1) as (cache, _, _):
        for _ in range(4):
            for expert, _ in cache.fetch(0, range(EXPERTS)):
                if expert >= 0:
                    break
            check_invariants(cache)
        with pytest.raises(ZeroDivisionError):
            [expert // 0 for expert, _ in cache.fetch(1, range(EXPERTS))]
        check_invariants(cache)
        assert len(list(cache.fetch(2, range(EXPERTS)))) == EXPERTS


def test_reads_that_a_pass_left_behind_are_waited_for() -> None:
    """Ctrl-C during a reply, then the next question: its only slot is still being filled."""
    with opened(SMALL.nbytes + LARGE.nbytes, stepped=True) as (cache, _, _):
        fetching = iter(cache.fetch(0, [0, 1]))
        assert next(fetching)[0] == 0
        del fetching
        left = cache._entries[0, 1].reading
        assert not left.done
        assert [e for e, _ in cache.fetch(1, [0])] == [0]  # as large as the one before
        assert left.done
        check_invariants(cache)


def test_two_passes_at_once_need_slots_for_both() -> None:
    with opened(SMALL.nbytes, sizes=1) as (cache, _, _):
        first = cache.fetch(0, [0, 1])
        assert next(iter(first))[0] == 0
        with pytest.raises(ResourceError, match="in use by another pass"):
            list(cache.fetch(1, [0]))
        assert [e for e, _ in first] == [1]
        check_invariants(cache)


def test_closing_ends_the_threads() -> None:
    with opened(4 * SMALL.nbytes, threads=3) as (cache, _, _):
        threads = cache._io._threads
        assert len(threads) == 3
        assert all(thread.is_alive() for thread in threads)
        cache.prefetch(0, [0, 1])
    assert not any(thread.is_alive() for thread in threads)


# --- parts ----------------------------------------------------------------------------------------


def until(event: threading.Event) -> Callable[[], None]:
    """A job that ends when the event comes."""

    def job() -> None:
        assert event.wait(60)

    return job


def test_demands_overtake_guesses() -> None:
    pool = IoPool(1)
    gate, order = threading.Event(), list[str]()
    pool.submit(until(gate), DEMAND)
    for i in range(3):
        pool.submit(lambda i=i: order.append(f"guess {i}"), SPECULATION)  # type: ignore[misc]
    late = pool.submit(lambda: order.append("demand"), DEMAND)
    gate.set()
    pool.wait([late])
    pool.close()
    assert order == ["demand", "guess 0", "guess 1", "guess 2"]


def test_a_pool_may_be_closed_by_one_of_its_own_threads() -> None:
    """The garbage collector runs on any thread, and may find a forgotten model there."""
    pool = IoPool(2)
    done = pool.submit(pool.close, DEMAND)
    pool.wait([done])
    done.result()
    for thread in pool._threads:
        thread.join(10)
        assert not thread.is_alive()


def test_arenas() -> None:
    arena = Arena(4096, 3)
    arena.buffer(1)[:] = b"\x07" * 4096
    assert arena.tensor(1).tolist() == [7] * 4096
    assert int(arena.tensor(0).sum()) == int(arena.tensor(2).sum()) == 0
    assert arena.tensor(0).data_ptr() % 4096 == 0
    Arena(4096, 0)
    with pytest.raises(ResourceError, match=r"cannot take .* for expert slots.*lower --ram"):
        Arena(2**50, 2**12)


def test_names_of_policies() -> None:
    assert "lru" in policy_names()
    with pytest.raises(UsageError, match=r"wanted one of .*lru.* got no-such"):
        get_policy("no-such")
    with pytest.raises(UsageError, match="unknown policy"):
        get_policy("__init__")
