"""What a Hub id looks like."""

from __future__ import annotations

import re

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)
_MAX_CHARS = 96


def looks_like_repo_id(name: str) -> bool:
    """Whether ``name`` can be ``org/name`` on the Hub."""
    odd = ".." in name or "--" in name or name.endswith(".git")
    return not odd and len(name) <= _MAX_CHARS and _REPO_ID.fullmatch(name) is not None
