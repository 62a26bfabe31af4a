"""Packs in the Hub cache: brought there whole, at one commit, and found there offline."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from moepack_formats.errors import FormatError, IntegrityError, MoepackError, NetworkError
from moepack_formats.manifest import MANIFEST_NAME, Manifest
from moepack_formats.pack import read_manifest

from ..disk.room import check_space
from .errors import UnreachableError, status_behind
from .fetch import fetch_file, is_right
from .listing import list_pack
from .progress import Bar, TransferProgress
from .remote import LIBRARY, RemoteRepo
from .retry import retrying

_log = logging.getLogger(__name__)

_PREFIX = "models--"


def fetch_pack(
    repo_id: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: TransferProgress | None = None,
) -> Path:
    """Bring a pack into the Hub cache, or find it there.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit.
        offline: Use the cache alone.
        progress: Is told about it; a bar on the terminal if None.

    Returns:
        The pack's folder: the cache's snapshot of the commit.

    Raises:
        NetworkError: The Hub cannot be reached or refuses, and the cache has no whole pack.
        FormatError: The repository holds no pack.
        IntegrityError: A file stays damaged.
    """
    if offline or constants.HF_HUB_OFFLINE:
        folder = _snapshot(repo_id, revision, local_only=True)
        if folder is None or not is_whole(folder):
            raise _not_cached(repo_id)
        return folder
    folder = _snapshot(repo_id, revision, local_only=False)
    if folder is None:
        list_pack(RemoteRepo.at(repo_id, revision))  # says why there is no manifest
        raise FormatError(f"it has no {MANIFEST_NAME}", where=repo_id)
    _complete(repo_id, folder, progress)
    return folder


def cached_pack(repo_id: str, revision: str | None, error: NetworkError) -> Path:
    """The pack in the Hub cache, where the Hub could not be asked.

    Raises:
        NetworkError: ``error`` itself: the Hub has refused, or the cache has no whole pack.
    """
    if status_behind(error) is not None:
        raise error
    with contextlib.suppress(NetworkError):
        folder = fetch_pack(repo_id, revision=revision, offline=True)
        _say_unreachable(repo_id)
        return folder
    raise error


def complete_snapshot(folder: Path, progress: TransferProgress | None = None) -> None:
    """Fetch what a snapshot in a Hub cache lacks of its pack, at the snapshot's own commit.

    transformers fetches a repository's config and trunk by itself and knows nothing of the rest.
    A folder that is not such a snapshot is left alone.

    Raises:
        NetworkError: Something is missing and the Hub cannot be reached or refuses.
        IntegrityError: A file stays damaged.
    """
    repo_id = repo_of_snapshot(folder)
    if repo_id is None or is_whole(folder):
        return
    if constants.HF_HUB_OFFLINE:
        raise _not_cached(repo_id)
    _complete(repo_id, folder, progress)


def repo_of_snapshot(folder: Path) -> str | None:
    """The repository whose snapshot in a Hub cache ``folder`` is, if it is one."""
    repository = folder.parent.parent
    if folder.parent.name != "snapshots" or not repository.name.startswith(_PREFIX):
        return None
    return repository.name.removeprefix(_PREFIX).replace("--", "/")


def is_whole(folder: Path) -> bool:
    """Whether every file of the pack is there with its size."""
    try:
        manifest = read_manifest(folder)
    except MoepackError:
        return False
    return all(_has_size(folder, manifest, name) for name in manifest.files)


def _has_size(folder: Path, manifest: Manifest, name: str) -> bool:
    try:
        return (folder / name).stat().st_size == manifest.files[name].size
    except OSError:
        return False


def _snapshot(repo_id: str, revision: str | None, *, local_only: bool) -> Path | None:
    """The snapshot that holds the manifest of this revision, fetched if need be."""

    def get(*, local_only: bool) -> Path:
        if not local_only:  # downloading falls back on the cache without a word
            get_hf_file_metadata(hf_hub_url(repo_id, MANIFEST_NAME, revision=revision))
        return Path(
            hf_hub_download(
                repo_id,
                MANIFEST_NAME,
                revision=revision,
                library_name=LIBRARY,
                local_files_only=local_only,
            )
        ).parent

    try:
        return retrying(lambda: get(local_only=local_only), repo_id, revision)
    except NetworkError as error:
        status = status_behind(error)
        if status == 404 and "lacks a file" in error.what:
            return None
        if status is None and not local_only:
            # Without a connection, what the cache holds of the revision will do, if it is whole.
            with contextlib.suppress(OSError, ValueError):
                folder = get(local_only=True)
                if is_whole(folder):
                    _say_unreachable(repo_id)
                    return folder
        raise


def _say_unreachable(repo_id: str) -> None:
    if not constants.HF_HUB_OFFLINE:  # what was asked for needs no telling
        _log.warning("the Hub cannot be reached; using %s as the Hub cache holds it", repo_id)


def _complete(repo_id: str, folder: Path, progress: TransferProgress | None) -> None:
    if is_whole(folder):
        return
    bar = Bar(f"fetching {repo_id}") if progress is None else None
    watcher: TransferProgress = progress or bar or Bar("")
    cache = folder.parent.parent.parent
    listing = list_pack(RemoteRepo(repo_id, folder.name))
    if listing.ignored:
        names = ", ".join(listing.ignored[:3])
        watcher.notice(f"ignored {len(listing.ignored)} files with code or pickles: {names}")
    try:
        absent = [name for name in listing.manifest.files if not (folder / name).exists()]
        check_space(cache, listing.room_for(absent))
        watcher.start(sum(listing.remote_nbytes(name) for name in listing.manifest.files))
        for name, facts in listing.manifest.files.items():
            # Files that others fetched were not compared with anything but their size.
            there = folder / name
            if is_right(there, facts):
                watcher.advance(listing.remote_nbytes(name))
                continue
            damaged = there.exists()
            fetch_file(listing, name, watcher, cache=cache, force=damaged)
            if damaged and name == "config.json":
                raise IntegrityError(
                    "the file was damaged on the way and has been fetched again",
                    where=f"{repo_id}, {name}",
                    remedy="run it again",
                )
        listing.remote.download(MANIFEST_NAME, cache=cache, progress=None)
    finally:
        if bar is not None:
            bar.close()


def _not_cached(repo_id: str) -> UnreachableError:
    return UnreachableError(
        "not whole in the Hub cache while offline",
        where=repo_id,
        remedy="check the name, or run it once online",
    )
