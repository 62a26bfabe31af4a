"""The threads that read."""

from __future__ import annotations

import threading

import pytest

from moepack_runtime.disk.io_pool import DEMAND, IoPool


@pytest.mark.parametrize("threads", [1, 3])
def test_the_garbage_collector_may_close_it_on_one_of_its_threads(threads: int) -> None:
    """Also while that thread holds the pool's lock."""
    pool, closed = IoPool(threads), threading.Event()

    def collect() -> None:
        with pool._work:
            pool.close()
        closed.set()

    pool.submit(collect, DEMAND)
    assert closed.wait(5)
    for thread in pool._threads:
        thread.join(5)
        assert not thread.is_alive()
