"""Importing transformers without hqq, which it imports with its caches wherever it is installed.

Running a pack needs no hqq, and it brings 45 MB of memory with it, mostly of torch's compiler.
"""

from __future__ import annotations

import importlib
import sys
from unittest import mock

_CACHES = "transformers.cache_utils"


def import_caches() -> None:
    """Import transformers' caches, unless somebody has imported them before."""
    if _CACHES in sys.modules:
        return
    import transformers.utils

    # Only while this module is imported: what it asks later, it asks in its own namespace.
    with mock.patch.object(transformers.utils, "is_hqq_available", return_value=False):
        importlib.import_module(_CACHES)
