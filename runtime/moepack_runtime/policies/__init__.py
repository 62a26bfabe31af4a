"""Which resident expert gives way to a new one: one policy a file, found by its name.

A policy file has a class ``POLICY`` that follows :class:`Policy`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol, cast

from moepack_formats.errors import UsageError

Key = tuple[int, int]
"""(layer, expert)"""


class Policy(Protocol):
    """Orders the resident experts of one size class."""

    def insert(self, key: Key) -> None:
        """The expert has become resident."""

    def touch(self, key: Key) -> None:
        """A resident expert was demanded."""

    def remove(self, key: Key) -> None:
        """The expert is no longer resident."""

    def victim(self, usable: Callable[[Key], bool]) -> Key | None:
        """The resident expert to give up, among those that ``usable`` accepts."""


def policy_names() -> list[str]:
    """Names of the policies there are."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def get_policy(name: str) -> Callable[[], Policy]:
    """The class of a policy.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in policy_names():
        raise UsageError("unknown policy", wanted=f"one of {', '.join(policy_names())}", got=name)
    module = importlib.import_module(f"{__name__}.{name}")
    return cast("Callable[[], Policy]", module.POLICY)
