"""Fetching a pack's file and making sure that it is the right one.

The Hub client compares sizes only; here every file's sha256 is compared with the manifest's, and
one that was damaged on the way is fetched again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from moepack_formats import checksum, osio
from moepack_formats.errors import IntegrityError, MoepackError
from moepack_formats.manifest import FileEntry

from .expand import expand_layer_file
from .listing import COMPRESSED_SUFFIX, PackListing
from .progress import TransferProgress

TRIES = 3


def fetch_file(
    listing: PackListing,
    name: str,
    progress: TransferProgress,
    *,
    folder: Path | None = None,
    cache: Path | None = None,
    force: bool = False,
) -> Path:
    """Fetch a file of a pack, expand it if need be, and compare its sha256.

    Args:
        listing: The pack in its repository.
        name: A file of the manifest.
        progress: Told of the bytes that arrive.
        folder: Where its path starts; None for the Hub cache.
        cache: Another Hub cache than the user's own.
        force: Fetch it although the client has it already.

    Returns:
        Where the file is.

    Raises:
        IntegrityError: It was damaged each time; nothing is left of it.
        NetworkError: The Hub cannot be reached or refuses.
        ResourceError: The disk is full or cannot be written.
    """
    facts, where = listing.manifest.files[name], f"{listing.remote.repo_id}, {name}"
    for attempt in range(1, TRIES + 1):
        arrived = listing.remote.download(
            listing.remote_names[name],
            folder=folder,
            cache=cache,
            force=force or attempt > 1,
            progress=progress,
        )
        whole = arrived
        try:
            if listing.is_compressed(name):
                whole = arrived.with_name(arrived.name.removesuffix(COMPRESSED_SUFFIX))
                expand_layer_file(arrived, whole, facts, where)
                _remove(arrived)
            check_sha256(whole, facts, where)
            return whole
        except IntegrityError:
            _remove(arrived)
            whole.unlink(missing_ok=True)
            if attempt == TRIES:
                raise
            progress.notice(f"{where} was damaged on the way; fetching it again")
            progress.advance(-listing.remote_nbytes(name))
    raise AssertionError("the last try returns or raises")


def check_sha256(path: Path, facts: FileEntry, where: object) -> None:
    """Compare a file with what the manifest says of it, and force it to the disk.

    Raises:
        IntegrityError: It is another one.
    """
    with osio.io_errors(where):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        got = checksum.sha256_of_file(descriptor, where) if size == facts.size else None
        if got != facts.sha256:
            raise IntegrityError(
                "the file is not the one that the manifest lists",
                where=where,
                wanted=f"{facts.size} bytes, sha256 {facts.sha256}",
                got=f"{size} bytes" if got is None else f"sha256 {got}",
                remedy="pull it again; if that does not help, it has to be pushed again",
            )
        with contextlib.suppress(OSError):
            osio.sync(descriptor)
    finally:
        os.close(descriptor)


def is_right(path: Path, facts: FileEntry) -> bool:
    """Whether the file is there and is the one that the manifest lists."""
    if not path.is_file():
        return False
    try:
        check_sha256(path, facts, path.name)
    except MoepackError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a file, and in a Hub cache the blob that its link leads to."""
    with contextlib.suppress(OSError):
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
