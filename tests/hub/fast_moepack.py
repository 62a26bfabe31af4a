"""The command line with short pauses between tries; says its peak memory if it is asked to."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.02))


def _note_peak(path: str) -> None:
    # Not getrusage: its peak goes back to before exec, to the process that started this one.
    with open("/proc/self/status", encoding="ascii") as status, open(path, "w") as file:
        file.writelines(line for line in status if line.startswith("VmHWM"))


if "PEAK_MEMORY_FILE" in os.environ:
    atexit.register(_note_peak, os.environ["PEAK_MEMORY_FILE"])

# A shell that starts tests in the background makes all they start ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

from moepack.cli import main  # noqa: E402

sys.exit(main())
