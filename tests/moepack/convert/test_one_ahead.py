"""Items are made one ahead of the one in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from moepack.convert.one_ahead import one_ahead


def test_order() -> None:
    assert list(one_ahead(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert list(one_ahead(iter([None, None]))) == [None, None]
    assert list(one_ahead(iter([]))) == []


def test_the_next_is_made_meanwhile_and_no_more() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for i in range(9):
            made.append(i)
            if i == 2:
                third.set()
            yield i

    ahead = one_ahead(items())
    assert next(ahead) == 0
    assert next(ahead) == 1
    assert third.wait(10)  # Without being asked for.
    ahead.close()
    assert made == [0, 1, 2]


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("no more")

    ahead = one_ahead(items())
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="no more"):
        next(ahead)
