"""What the tests of conversions that fail share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepack_formats import osio
from moepack_formats.journal import JOURNAL_NAME
from tests.commands import Command, Result, wait_for

WORDS = ("--quantizer", "rtn")


def convert(command: Command, source: Path, out: Path, *arguments: object) -> Result:
    """Run ``moepack convert`` with the quick quantizer."""
    return command("convert", source, out, *WORDS, *arguments)


class Failing:
    """Stands in for a function of ``os`` or ``osio`` and fails at one call.

    Args:
        real: The function.
        at: Which call fails, from 1; 0 never does.
        number: The error.
    """

    def __init__(self, real: Callable[..., Any], at: int, number: int) -> None:
        self.real, self.at, self.number, self.calls = real, at, number, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments, **keywords)


def progress(out: Path) -> int:
    """Bytes that the journal of a conversion has by now."""
    journal = out / JOURNAL_NAME
    try:
        return journal.stat().st_size
    except FileNotFoundError:
        return 0


def stop_after(noted: int, out: Path, until: Path) -> None:
    """Make a conversion wait until a file is there, once its journal has more bytes than this."""
    real = osio.write_at

    def write_at(*arguments: Any) -> None:
        if progress(out) > noted:
            wait_for(until.exists)
        real(*arguments)

    osio.write_at = write_at
