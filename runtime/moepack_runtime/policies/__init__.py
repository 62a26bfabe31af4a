"""Which resident expert gives way to a new one: one policy a file, found by its name.

A policy file has a class ``POLICY`` that follows :class:`Policy`; a ``-`` in the name is a ``_`` in
the file. The same classes serve the cache and the simulator (:mod:`moepack_runtime.simulate`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

from moepack_formats.errors import UsageError

Key = tuple[int, int]
"""(layer, expert)"""


class Policy(Protocol):
    """Orders the resident experts of one size class.

    Every demand of an expert is one ``touch`` when it is resident and one ``insert`` when it has to
    be read. A policy may remember experts that are not resident.
    """

    def insert(self, key: Key) -> None:
        """The expert was demanded and has become resident."""

    def touch(self, key: Key) -> None:
        """A resident expert was demanded."""

    def remove(self, key: Key) -> None:
        """The expert is no longer resident."""

    def victim(self, usable: Callable[[Key], bool], incoming: Key | None) -> Key | None:
        """The resident expert to give up for ``incoming``, among those that ``usable`` accepts.

        It stays resident until it is removed. ``incoming`` is None when memory is given back
        instead. None when ``usable`` accepts none.
        """


@runtime_checkable
class Observing(Protocol):
    """What a policy has besides when it wants to know the router's weights."""

    def observe(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """A layer's router has chosen; comes before the demands of that choice.

        Args:
            layer: Ordinal of the MoE layer.
            experts: The experts chosen, each once.
            weights: The router's weight of each, the mean over the tokens of the pass.
        """


@runtime_checkable
class Offline(Protocol):
    """What a policy has besides when it must know the future; only the simulator can tell it."""

    def foresee(self, demands: Sequence[Sequence[Key]]) -> None:
        """All demands to come: for each pass over a layer, its experts."""


def policy_names() -> list[str]:
    """Names of the policies there are."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__))


def runnable_names() -> list[str]:
    """Names of the policies that a cache can run: those that need not know the future."""
    return [name for name in policy_names() if not isinstance(get_policy(name)(), Offline)]


def get_policy(name: str) -> Callable[[], Policy]:
    """The class of a policy.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in policy_names():
        raise UsageError("unknown policy", wanted=f"one of {', '.join(policy_names())}", got=name)
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return cast("Callable[[], Policy]", module.POLICY)


def check_runnable(name: str) -> None:
    """Refuse a policy that a cache cannot run.

    Raises:
        UsageError: There is none of that name, or it has to know the future.
    """
    if isinstance(get_policy(name)(), Offline):
        raise UsageError(
            f"the policy {name} has to know the demands to come and runs only in the simulator",
            remedy="use another one, or `moepack simulate`",
        )
