"""What a recording knows of an operation's arguments, and what it takes for a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from moepack_runtime.tape.record import Recorder, Step, differences, tensors_in, tensors_read

aten = torch.ops.aten
A, B, C = (torch.zeros(2, 3) for _ in range(3))


@pytest.mark.parametrize(
    "value",
    [A, None, 3, (A, 2, B), [A, [B, (C,)]], {"a": A, "b": [B, {"c": C}]}, (torch.Size([2]), A), ()],
)
def test_tensors_are_found_wherever_they_are(value: Any) -> None:
    wanted = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    assert [id(tensor) for tensor in tensors_in(value)] == [id(tensor) for tensor in wanted]


def test_arguments_in_lists_and_results_in_tuples_are_recorded() -> None:
    with Recorder() as recorder:
        torch.cat([A, B])
        torch.topk(A, 2)  # a named tuple
        torch.split(A, 1)  # a list
    joined, largest, parts = recorder.steps
    assert [id(t) for t in tensors_read(joined)] == [id(A), id(B)]
    assert [len(step.results) for step in (joined, largest, parts)] == [1, 2, 2]


def _index(*arguments: Any, **keywords: Any) -> list[Step]:
    return [Step(aten.index.Tensor, arguments, keywords, ())]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_index(A, [A, B]), _index(A, [A, C])),  # other memory
        (_index(A, [A, B]), _index(A, [A, B, B])),
        (_index(A, [None, A]), _index(A, [A, None])),
        (_index(A, [1, [2]]), _index(A, [1, [3]])),
        (_index(A, [1, [2]]), _index(A, [[1], 2])),
        (_index(A, [A[0]]), _index(A, [A[1]])),  # another part of the same memory
        (_index(A, [A[:, 0]]), _index(A, [A[0, :2]])),  # as many numbers, but other ones
        (_index(A, size=2), _index(A, size=3)),
        (_index(A, size=2), _index(A)),
        (_index(A, size=[A]), _index(A, size=[B])),
    ],
)
def test_what_differs_between_passes(first: list[Step], second: list[Step]) -> None:
    wanted = "aten.index.Tensor gets other arguments from pass to pass"
    assert differences(first, second) == wanted
    for steps in (first, second):
        assert differences(steps, steps) is None


def test_memory_that_a_pass_made_itself_may_lie_elsewhere() -> None:
    passes = []
    for _ in range(2):
        own = torch.ones(3)
        passes.append(
            [
                Step(aten.ones.default, ([3],), {}, (own,)),
                Step(aten.cat.default, ([A, own],), {}, ()),
            ]
        )
    assert differences(*passes) is None
    assert differences(passes[0], [passes[0][0], passes[1][1]]) is not None
