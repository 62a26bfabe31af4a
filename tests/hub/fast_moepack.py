"""The command line with short pauses between tries."""

from __future__ import annotations

import sys
import time

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(min(seconds, 0.02))

from moepack.cli import main  # noqa: E402

sys.exit(main())
