"""The knapsack against every possible choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moepack.convert.knapsack import choose


def brute(losses: np.ndarray, sizes: np.ndarray, limit: int, most: int) -> float | None:
    best = None
    for option in product(range(losses.shape[1]), repeat=len(losses)):
        if len(set(option)) > most:
            continue
        if sum(sizes[i, o] for i, o in enumerate(option)) > limit:
            continue
        loss = sum(losses[i, o] for i, o in enumerate(option))
        best = loss if best is None else min(best, loss)
    return best


@pytest.mark.parametrize("seed", range(30))
def test_close_to_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = np.sort(random.integers(1, 30, (1, 4)), axis=1).repeat(6, axis=0) * 4096
    losses = -np.sort(-random.exponential(size=(6, 4)) * random.exponential(size=(6, 1)), axis=1)
    low, high = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    limit = int(random.integers(low, high + 1))
    wanted = brute(losses, sizes, limit, 3)
    found = choose(losses, sizes, limit, most=3)
    assert found is not None
    assert wanted is not None
    assert len(set(found.option.tolist())) <= 3
    assert found.nbytes == sizes[np.arange(6), found.option].sum() <= limit
    assert found.loss == pytest.approx(losses[np.arange(6), found.option].sum())
    assert found.bound <= found.loss + 1e-12
    # Six items are few: what does not fit any more is a large part. Of many it is little.
    assert wanted - 1e-9 <= found.loss <= wanted + 0.35 * losses.max()


def test_many_items_come_close_to_the_bound() -> None:
    random = np.random.default_rng(0)
    sizes = np.array([[10, 11, 14, 18]] * 2000) * 4096
    losses = random.exponential(size=(2000, 1)) * np.array([1.0, 0.6, 0.2, 0.05])
    for share in (0.01, 0.2, 0.5, 0.9):
        limit = int(sizes[:, 0].sum() + share * (sizes[:, 3] - sizes[:, 0]).sum())
        found = choose(losses, sizes, limit)
        assert found is not None
        assert found.nbytes <= limit
        assert found.loss - found.bound < 2e-3 * found.loss


def test_nothing_fits() -> None:
    assert choose(np.ones((3, 2)), np.full((3, 2), 10), 29) is None


def test_everything_fits() -> None:
    losses, sizes = np.array([[3.0, 1.0]] * 4), np.array([[1, 2]] * 4)
    found = choose(losses, sizes, 8)
    assert found is not None
    assert found.option.tolist() == [1, 1, 1, 1]
    assert found.bound == pytest.approx(found.loss)
