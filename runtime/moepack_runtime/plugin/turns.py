"""Passes of one model take turns, and are refused in a process that was forked off.

The expert cache, guesses and a recorded token are one for all threads that call a model.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from moepack_formats.errors import UsageError


class Turns:
    """Lets one thread at a time compute with a pack.

    A thread that computes may begin another pass inside, as a hook does that calls ``generate()``.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def in_this_process(self) -> bool:
        """Whether the pack was loaded in this process, and not in the one it was forked off."""
        return os.getpid() == self._process

    def __enter__(self) -> None:
        # Before the lock, which another thread may have held at the fork.
        if not self.in_this_process:
            raise UsageError(
                "a pack does not compute in a process that was forked off after loading it",
                remedy="load it in the new process, or start that with the method 'spawn'",
            )
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def take_turns(model: nn.Module, name: str, turns: Turns) -> None:
    """Let a method of a model, ``forward`` or ``generate``, wait for its turn."""
    own: Callable[..., Any] | None = vars(model).get(name)
    signature = inspect.signature(getattr(model, name))
    of_class = getattr(cast(Any, type(model)), name)
    weak = weakref.ref(model)  # the model must end with its last other owner

    @functools.wraps(of_class)
    def in_turn(*args: Any, **kwargs: Any) -> Any:
        with turns:
            return own(*args, **kwargs) if own is not None else of_class(weak(), *args, **kwargs)

    # generate() looks at the parameters' names, and must not find `self`.
    cast(Any, in_turn).__signature__ = signature
    setattr(model, name, in_turn)
