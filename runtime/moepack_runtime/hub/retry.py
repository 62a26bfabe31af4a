"""Trying again, with growing pauses, what the Hub refused for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

from .errors import CLIENT_ERRORS, explain, is_transient, root_cause

T = TypeVar("T")

DELAYS = (1.0, 4.0, 10.0)
"""Seconds before the second, third and fourth try."""
_LONGEST_WAIT = 310.0
"""The Hub counts requests in windows of five minutes, and says when the next one begins."""
_LONG_WAIT = 15.0
"""Whoever waits longer than this is told why."""

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
            level = logging.WARNING if pause > _LONG_WAIT else logging.INFO
            logger.log(level, "%s; trying again in %.0f s", why, pause)
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _asked_pause(error: BaseException) -> float:
    """Seconds that the Hub asked to wait, 0 if it did not say."""
    headers = getattr(getattr(root_cause(error), "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdigit() else 0.0
