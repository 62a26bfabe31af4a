"""Importing transformers for a command, without what running a pack never uses.

transformers imports torch's compiler, its distributed tensors, flex attention and hqq with its
model code, and the compiler comes in by other ways too: 90 MB that a budget would rather give to
experts, and seconds of waiting. transformers asks whether hqq, distributed and flex attention are
there, and the answer is no here. The compiler gets a stand-in, whose decorators leave functions as
they are: what it would compile runs as it is written.

For the commands alone, which own their process. What a program imports before this stays as it is.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .plain_sizes import leave_out_symbols

_log = logging.getLogger(__name__)

_COMPILER = "torch._dynamo"
_MODEL_CODE = (
    "transformers.cache_utils",
    "transformers.modeling_utils",
    "transformers.generation.utils",
)
_ABSENT = (
    "is_hqq_available",
    "is_torch_distributed_available",
    "is_torch_flex_attn_available",
)


def import_transformers() -> None:
    """Import transformers' model code, unless somebody has imported some of it before.

    Whatever goes wrong, it is imported as usual then.
    """
    if any(name in sys.modules for name in (_COMPILER, *_MODEL_CODE)):
        return
    try:
        with _absent(), _no_compiler():
            _import()
            leave_out_symbols()
    except Exception as error:  # a transformers that wants more of the compiler than decorators
        _log.info("transformers is imported with torch's compiler: %s", error)
        _import()


def _import() -> None:
    for name in _MODEL_CODE:
        importlib.import_module(name)


@contextmanager
def _absent() -> Iterator[None]:
    """Answer no to transformers' questions for parts, for good unless something is raised.

    Modules keep what they were told, so a part that was absent once must not appear later.
    """
    import transformers.utils
    from transformers.utils import import_utils

    before = [
        (module, name, getattr(module, name))
        for module in (transformers.utils, import_utils)
        for name in _ABSENT
        if hasattr(module, name)
    ]
    for module, name, _ in before:
        setattr(module, name, _no)
    try:
        yield
    except BaseException:
        for module, name, value in before:
            setattr(module, name, value)
        raise


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Put the stand-in in the compiler's place, for good unless something is raised."""
    import torch

    spec = find_spec(_COMPILER)
    stand_in = _StandIn(_COMPILER)
    stand_in.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    sys.modules[_COMPILER] = stand_in
    torch._dynamo = stand_in
    try:
        yield
    except BaseException:
        del sys.modules[_COMPILER]
        del torch._dynamo
        raise


class _StandIn(ModuleType):
    """A package of decorators that change nothing and of questions with no for an answer.

    Its submodules are the real ones.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _no if name.startswith("is_") else _unchanged


def _no(*_: Any, **__: Any) -> bool:
    return False


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """``@decorator`` and ``@decorator(...)`` alike."""
    return function if callable(function) else _unchanged
