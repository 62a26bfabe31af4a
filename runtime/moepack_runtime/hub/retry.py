"""Trying again, with growing pauses, what the Hub refused for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import CLIENT_ERRORS, explain, is_transient, root_cause

T = TypeVar("T")

DELAYS = (1.0, 4.0, 10.0)
"""Seconds before the second, third and fourth try."""
_LONGEST_WAIT = 60.0

logger = logging.getLogger(__name__)


def retrying(call: Callable[[], T], repo_id: str, revision: str | None = None) -> T:
    """Call the Hub client, again when the Hub is busy or the connection broke.

    Args:
        call: May be called several times; each starts over or goes on where the last one stopped.
        repo_id: For messages.
        revision: For messages.

    Raises:
        MoepackError: What the last try met, in one line.
    """
    for delay in (*DELAYS, None):
        try:
            return call()
        except CLIENT_ERRORS as error:
            if delay is None or not is_transient(error):
                raise explain(error, repo_id, revision) from error
            pause = max(delay, min(_asked_pause(error), _LONGEST_WAIT))
            why = explain(error, repo_id, revision).what
            logger.info("%s; trying again in %.0f s", why, pause)
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _asked_pause(error: BaseException) -> float:
    """Seconds that the Hub asked to wait, 0 if it did not say."""
    response = getattr(root_cause(error), "response", None)
    text = getattr(response, "headers", {}).get("Retry-After", "")
    return float(text) if str(text).isdigit() else 0.0
