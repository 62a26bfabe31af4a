"""Keeping sympy out of a process whose sizes are all numbers.

torch checks sizes through its module of symbolic shapes wherever a tensor is on the meta device, as
a model's are while transformers builds it. That module imports sympy: 38 MB and most of a second,
to learn that a bool is true. Stand-ins answer for numbers; whatever else is asked of them brings
the real modules in.

For the commands alone, which own their process.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_SHAPES = "torch.fx.experimental.symbolic_shapes"
_SYMPY = "sympy"


class _NoExpression:
    """The class of sympy's expressions; nothing is one of them."""


def _any(*conditions: Any) -> bool:
    return any(conditions)


def _all(*conditions: Any) -> bool:
    return all(conditions)


def _yes(_: Any) -> bool:
    return True


def _no(_: Any) -> bool:
    return False


def _equal(a: Any, b: Any) -> bool:
    """Numbers, or lists and tuples of them."""
    return bool(a == b) if isinstance(a, int) else tuple(a) == tuple(b)


def _itself(size: Any) -> Any:
    return size


_OF_SHAPES: dict[str, Callable[..., Any]] = {
    "expect_true": bool,
    "guard_or_false": bool,
    "guard_or_true": bool,
    "guard_size_oblivious": bool,
    "guarding_hint_or_throw": _itself,
    "has_guarding_hint": _yes,
    "is_nested_int": _no,
    "statically_known_true": bool,
    "sym_and": _all,
    "sym_eq": _equal,
    "sym_or": _any,
}


class _StandIn(ModuleType):
    """A module of a few names; any other is the real module's, which takes its place then."""

    def __init__(self, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(names)
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            self.__path__ = list(spec.submodule_search_locations)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def leave_out_symbols() -> None:
    """Put the stand-ins in place of what has not been imported yet."""
    importlib.import_module("torch.fx.experimental._config")  # which came with the real module
    for name, names in ((_SHAPES, _OF_SHAPES), (_SYMPY, {"Basic": _NoExpression})):
        if name not in sys.modules:
            sys.modules[name] = _StandIn(name, names)
