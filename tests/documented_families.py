"""The table of ``docs/families.md``, which the tests hold to what families do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


class Row(NamedTuple):
    """What the page says of a family.

    Attributes:
        converts: ``yes``, or what ``moepack convert`` says.
        decoding: ``recorded``, why not, or ``-`` of one that is not converted.
    """

    converts: str
    decoding: str


def documented() -> dict[str, Row]:
    """The rows by model type."""
    cells = re.compile(r"^\| `([^`]+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
    return {family: Row(a, b) for family, a, b in cells.findall(PAGE.read_text("utf-8"))}
