"""Keeps the Hub client's native transfer library within a few hundred megabytes.

By itself it takes 1.2 GB to push five gigabytes and 1.1 GB to pull one file of 1.4 GB. These are
its own settings, read from the environment when its first session starts; what the user has set
stays.
"""

from __future__ import annotations

import os

_SETTINGS = {
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
    "HF_XET_DATA_INGESTION_BLOCK_SIZE": "1000000",
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "1",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "2",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "64000000",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "32000000",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "128000000",
}


def limit_xet_memory() -> None:
    """Set what is not set yet."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
