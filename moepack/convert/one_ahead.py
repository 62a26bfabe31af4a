"""An iterator that works on its next item while the present one is used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items, in order, each made in a thread while the one before it is used.

    Never more than two are alive. An error in making an item is raised where that item would have
    been yielded. Items are no longer asked for once this iterator is closed.
    """
    end = object()
    with ThreadPoolExecutor(1, "moepack-ahead") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]  # Not the end.
