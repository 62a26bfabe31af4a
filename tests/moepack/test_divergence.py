"""Divergence, agreement and intervals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moepack.divergence import Scores, compare
from moepack.intervals import mean_interval, paired_interval, student_t


# From any table of Student's t.
@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (1000, 1.962)],
)
def test_student_t(freedom: int, wanted: float) -> None:
    assert student_t(freedom) == pytest.approx(wanted, rel=2e-3)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)) + 3
    found = [mean_interval(row.tolist(), [1] * 6) for row in draws]
    covered = sum(one.low <= 3 <= one.high for one in found) / len(found)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_windows_weigh_as_much_as_they_have_tokens() -> None:
    found = mean_interval([10.0, 2.0], [10, 1])
    assert found.mean == pytest.approx(12 / 11)
    assert mean_interval([3.0], [2]).half_width == math.inf


def test_pairing_takes_out_what_windows_have_in_common() -> None:
    hard = [100.0, 200.0, 50.0, 300.0]
    harder = [value + 1 for value in hard]
    found = paired_interval(harder, hard, [10] * 4)
    assert found.mean == pytest.approx(0.1)
    assert found.half_width == pytest.approx(0, abs=1e-9)


def test_scores_of_one_window() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = torch.randn(2, 600, 11, generator=generator)
    ids = torch.randint(0, 11, (600,), generator=generator)
    scores = Scores()
    scores.add(ids, ours, theirs)
    p, q = F.log_softmax(theirs[:-1], -1), F.log_softmax(ours[:-1], -1)
    assert scores.tokens == [599]
    assert scores.divergence[0] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert scores.nats[0] == pytest.approx(float(F.cross_entropy(ours[:-1], ids[1:]) * 599))
    assert scores.agreement.mean == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).float().mean())
    )


def test_a_model_does_not_diverge_from_itself() -> None:
    runs = [torch.arange(6), torch.arange(4)]
    logits = [torch.randn(1, len(run), 9) for run in runs]
    given = iter(logits)
    scores = compare(runs, logits, lambda _: next(given))
    assert scores.divergence == [0.0, 0.0]
    assert scores.agreed == [5.0, 3.0]
    assert scores.loss_difference.mean == 0
