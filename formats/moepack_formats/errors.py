"""The errors a user can meet, each with its exit code.

An error is one line: what went wrong, where, what was wanted and what was got, and what to do
next. The command line prints ``str(error)`` and exits with ``error.exit_code``.
"""

from __future__ import annotations

_MAX_PART = 600

REMEDY_DRAFT = "if an earlier draft of the format wrote it, convert the source again"
"""For sizes that are not those of version 1 as it is now."""


class MoepackError(Exception):
    """Base of every error that is the input's or the machine's fault, not a defect of moepack.

    Args:
        what: What went wrong, without a full stop.
        where: File, layer and expert, or tensor.
        wanted: What the reader would have accepted.
        got: What it found.
        remedy: What to do next.
    """

    exit_code = 1
    prefix = ""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        wanted: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy
        facts = []
        if wanted is not None:
            facts.append(f"wanted {_shorten(wanted)}")
        if got is not None:
            facts.append(f"got {_shorten(got)}")
        line = f"{_shorten(self.where)}: {what}" if where is not None else what
        if facts:
            line += f" ({', '.join(facts)})"
        if remedy:
            line += f"; {remedy}"
        # A path or a JSON fragment may carry a newline or a terminal's escape codes.
        super().__init__(_printable(" ".join(f"{self.prefix}{line}".split())))


def _shorten(value: object) -> str:
    """Cut the middle out of a long text: a hostile file can hold a name of megabytes."""
    text = str(value)
    half = _MAX_PART // 2
    return text if len(text) <= _MAX_PART else f"{text[:half]}...{text[-half:]}"


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class UsageError(MoepackError):
    """The command or its input cannot be used as asked (exit 2)."""

    exit_code = 2


class FormatError(MoepackError):
    """A file is not what the format says (exit 3)."""

    exit_code = 3
    prefix = "not a valid pack: "


class IntegrityError(MoepackError):
    """Bytes or values are damaged (exit 4)."""

    exit_code = 4


class ResourceError(MoepackError):
    """Input/output failed, or memory, disk or descriptors ran out (exit 5)."""

    exit_code = 5


class NetworkError(MoepackError):
    """The Hub could not be reached or refused (exit 6)."""

    exit_code = 6
