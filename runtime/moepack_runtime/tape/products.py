"""Products that are summed up at once, in one step that keeps none of them.

Linear attention multiplies a state of a megabyte with a vector and sums the result: what is
written in between is the larger part of the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .record import Opaque, Step, storage, tensors_read
from .steps import is_floats

aten = torch.ops.aten


def summed_at_once(
    steps: Sequence[Step], mutated: set[int], keep: Iterable[Tensor] = ()
) -> list[Step]:
    """A recording in which a product whose only reader sums it is a step ``contract``.

    Args:
        steps: A recording.
        mutated: Storages that some step writes into after they were made.
        keep: Tensors that somebody else reads.
    """
    readers = Counter(storage(t) for step in steps for t in tensors_read(step))
    readers.update(storage(t) for t in keep)
    products: dict[int, Step] = {}
    dropped: set[int] = set()
    order: list[Step] = []
    for step in steps:
        if _is_product(step, mutated) and readers[storage(step.results[0])] == 1:
            products[storage(step.results[0])] = step
        product = products.pop(storage(step.arguments[0]), None) if _is_sum(step) else None
        if product is None or product.results[0] is not step.arguments[0]:
            order.append(step)
            continue
        dropped.add(id(product))
        axis = step.arguments[1][0]
        out = step.results[0]
        if len(step.arguments) > 2 and step.arguments[2]:
            out = out.squeeze(axis)
        what = Opaque("contract", None, (axis,))
        order.append(Step(what, product.arguments, {}, (out,)))
    return [step for step in order if id(step) not in dropped]


def _is_product(step: Step, mutated: set[int]) -> bool:
    if step.operation is not aten.mul.Tensor or step.keywords or len(step.arguments) != 2:
        return False
    tensors = [*step.arguments, *step.results]
    if not all(isinstance(t, Tensor) for t in tensors):
        return False
    return is_floats(*tensors) and mutated.isdisjoint(storage(t) for t in tensors)


def _is_sum(step: Step) -> bool:
    return (
        step.operation is aten.sum.dim_IntList
        and not step.keywords
        and len(step.arguments[1]) == 1
        and is_floats(step.arguments[0])
    )
