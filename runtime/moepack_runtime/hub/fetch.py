"""Fetching a pack's file and making sure that it is the right one.

The Hub client compares sizes only; here every file's sha256 is compared with the manifest's, and
one that was damaged on the way is fetched again.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from moepack_formats import checksum, osio
from moepack_formats.errors import FormatError, IntegrityError, MoepackError
from moepack_formats.manifest import FileEntry

from .expand import expand_layer_file
from .listing import COMPRESSED_SUFFIX, PackListing
from .progress import TransferProgress
from .remote import RemoteRepo

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
    place = Place(folder, cache)
    remote_name, facts = listing.remote_names[name], listing.manifest.files[name]
    return fetch_checked(listing.remote, remote_name, facts, progress, place, force=force)


@dataclass(frozen=True)
class Place:
    """Where files are fetched to.

    Attributes:
        folder: Where their paths start; None for the Hub cache.
        cache: Another Hub cache than the user's own.
    """

    folder: Path | None = None
    cache: Path | None = None


def fetch_checked(
    remote: RemoteRepo,
    remote_name: str,
    facts: FileEntry,
    progress: TransferProgress,
    place: Place,
    *,
    force: bool = False,
) -> Path:
    """Fetch a file whose sha256 is known; see :func:`fetch_file`.

    Args:
        remote: The repository.
        remote_name: Its path there; a compressed one is expanded.
        facts: Size and sha256 of the file, expanded.
        progress: Told of the bytes that arrive.
        place: Where to put it.
        force: Fetch it although the client has it already.
    """
    where = f"{remote.repo_id}, {remote_name.removesuffix(COMPRESSED_SUFFIX)}"
    for attempt in range(1, TRIES + 1):
        arrived = remote.download(
            remote_name,
            folder=place.folder,
            cache=place.cache,
            force=force or attempt > 1,
            progress=progress,
        )
        whole = arrived
        try:
            if remote_name.endswith(COMPRESSED_SUFFIX):
                whole = arrived.with_name(arrived.name.removesuffix(COMPRESSED_SUFFIX))
                expand_layer_file(arrived, whole, facts, where)
                _remove(arrived)
            check_sha256(whole, facts, where)
            return whole
        except MoepackError as error:
            _remove(arrived)
            whole.unlink(missing_ok=True)
            if attempt == TRIES or not isinstance(error, (IntegrityError, FormatError)):
                raise
            progress.notice(f"{where} was damaged on the way; fetching it again")
            progress.advance(-remote.files[remote_name].size)
    raise AssertionError("the last try returns or raises")


_PULL_AGAIN = "pull it again; if that does not help, it has to be pushed again"


def check_sha256(path: Path, facts: FileEntry, where: object, remedy: str = _PULL_AGAIN) -> None:
    """Compare a file with what the manifest says of it, and force it to the disk.

    Args:
        path: The file.
        facts: What the manifest says of it.
        where: What to call it in messages.
        remedy: What to do about another one.

    Raises:
        IntegrityError: It is another one.
        FormatError: It is missing, or not a regular file.
    """
    descriptor = osio.open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        got = checksum.sha256_of_file(descriptor, where) if size == facts.size else None
        if got != facts.sha256:
            raise IntegrityError(
                "the file is not the one that the manifest lists",
                where=where,
                wanted=f"{facts.size} bytes, sha256 {facts.sha256}",
                got=f"{size} bytes" if got is None else f"sha256 {got}",
                remedy=remedy,
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


def remove_unfinished(folder: Path) -> None:
    """Remove what a download that was killed has left in a folder: nothing goes on with it.

    Args:
        folder: Where nobody else downloads to at this time.
    """
    for path in (folder / ".cache").rglob("*.incomplete"):
        path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a file, and in a Hub cache the blob that its link leads to."""
    with contextlib.suppress(OSError):
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
