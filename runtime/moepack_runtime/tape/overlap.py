"""Reordering a recording so that records are read while something else is computed.

Where nothing is read any more, what is computed for reading's sake is left out.

A layer's reads can begin when its router has chosen, and are needed when the routed experts
compute. Whatever a model does in between or beside, shared experts above all, is put between the
two. Only the order changes, so results are the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from .record import Opaque, Step, storage, tensors_read

_HEAVY = "packed"
"""What is worth a step of its own to demand early: at least one packed matrix."""


def reads_early(steps: Sequence[Step]) -> list[Step]:
    """A recording in which demands come early and routed experts late.

    Args:
        steps: A recording.

    Returns:
        The same steps with a step ``demand`` for each layer that gains by it.
    """
    order: list[Step] = []
    rest = list(steps)
    while (at := _next_experts(rest, 0)) < len(rest):
        end = _next_experts(rest, at + 1)
        moved = _reordered(rest[:at], rest[at], rest[at + 1 : end])
        if moved is None:
            order += rest[: at + 1]
            rest = rest[at + 1 :]
        else:
            until_experts, after = moved
            order += until_experts
            rest = after + rest[end:]
    return order + rest


def without_asking(steps: Sequence[Step], wanted: Iterable[Tensor]) -> list[Step]:
    """A recording without what is needed for nothing but asking later layers' routers.

    Args:
        steps: The recording.
        wanted: The logits, and states that the next token needs.
    """
    # The next token reads what is appended, if this one does not.
    caches = [_cache(step) for step in steps if _kind(step) == "append"]
    needed = _needed_for(wanted, steps, caches)
    return [step for step in steps if id(step) in needed]


def _next_experts(steps: Sequence[Step], begin: int) -> int:
    """The place of the first routed experts from ``begin`` on, or the end."""
    places = range(begin, len(steps))
    return next((i for i in places if _kind(steps[i]) == "experts"), len(steps))


def _reordered(
    before: Sequence[Step], experts: Step, behind: Sequence[Step]
) -> tuple[list[Step], list[Step]] | None:
    """One layer's steps in the new order, up to its experts and behind them.

    None where nothing is gained, or where memory is written over and order matters.

    Args:
        before: What comes after the layer before and ahead of the experts.
        experts: The routed experts.
        behind: What follows, up to the next layer's experts.
    """
    # The weights too: they are made of the router's scores, often in place.
    _, index, weights = experts.arguments
    routing = _needed_for((index, weights), before)
    beside = [step for step in before if id(step) not in routing]
    waiting = _depending_on(experts.results, behind)
    independent = [step for step in behind if id(step) not in waiting]
    meanwhile = beside + independent
    first = [step for step in before if id(step) in routing]
    last = [step for step in behind if id(step) in waiting]
    if not any(_kind(step) == _HEAVY for step in meanwhile):
        return None
    # The pairs whose order changes.
    if not (_apart(first, beside) and _apart(independent, [experts, *last])):
        return None
    assert isinstance(experts.operation, Opaque)
    demand = Step(Opaque("demand", experts.operation.subject), (index,), {}, ())
    return [*first, demand, *meanwhile, experts], last


def _needed_for(
    values: Iterable[Tensor], steps: Sequence[Step], caches: Iterable[int] = ()
) -> set[int]:
    """The steps that values, and what is appended to caches, are computed by, by identity."""
    wanted = {storage(t) for t in values} | {*caches}
    needed: set[int] = set()
    for step in reversed(steps):
        made = {storage(t) for t in step.results}
        # A cache is no tensor of its steps: what attends needs what was appended.
        cache = _cache(step) if _kind(step) == "append" else None
        if wanted.isdisjoint(made) and (cache is None or cache not in wanted):
            continue
        needed.add(id(step))
        wanted.update(storage(t) for t in tensors_read(step))
        if _kind(step) == "attend":
            wanted.add(_cache(step))
    return needed


def _depending_on(values: Iterable[Tensor], steps: Sequence[Step]) -> set[int]:
    """The steps that read a value or what was made of it, by identity."""
    made = {storage(t) for t in values}
    found: set[int] = set()
    for step in steps:
        reads = {storage(t) for t in tensors_read(step)}
        if _kind(step) == "attend":
            reads.add(_cache(step))
        if made.isdisjoint(reads):
            continue
        found.add(id(step))
        made.update(storage(t) for t in step.results)
        if _kind(step) == "append":
            made.add(_cache(step))
    return found


def _apart(one: Sequence[Step], other: Sequence[Step]) -> bool:
    """Whether no memory that a step writes over is touched by steps of both."""
    touched = [
        {storage(t) for step in steps for t in (*tensors_read(step), *step.results)}
        for steps in (one, other)
    ]
    changed = {storage(t) for step in (*one, *other) if _mutates(step) for t in step.results}
    return changed.isdisjoint(touched[0] & touched[1])


def _kind(step: Step) -> str | None:
    return step.operation.kind if isinstance(step.operation, Opaque) else None


def _cache(step: Step) -> int:
    """A cache layer in place of a storage; addresses of storages are never negative."""
    assert isinstance(step.operation, Opaque)
    return -id(step.operation.subject)


def _mutates(step: Step) -> bool:
    return not isinstance(step.operation, Opaque) and step.operation._schema.is_mutable
