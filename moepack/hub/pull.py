"""Pulling a pack into a folder: resumable, every sha256 checked, the manifest last."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from moepack.convert.output_folder import LOCK_NAME, locked
from moepack_formats import osio
from moepack_formats.errors import (
    IntegrityError,
    MoepackError,
    NetworkError,
    ResourceError,
    UsageError,
)
from moepack_formats.manifest import MANIFEST_NAME, FileEntry
from moepack_formats.pack import PULL_NAME, read_manifest
from moepack_formats.paths import resolve_inside
from moepack_runtime.disk.room import check_space
from moepack_runtime.hub.fetch import fetch_file, is_right, remove_unfinished
from moepack_runtime.hub.listing import PackListing, layer_files, list_pack
from moepack_runtime.hub.progress import TransferProgress
from moepack_runtime.hub.remote import RemoteRepo
from moepack_runtime.options import format_size

from .card import CARD_NAME, MAX_CARD_NBYTES

_log = logging.getLogger(__name__)

_STATE_NAME = "pull.json"


@dataclass(frozen=True)
class PullReport:
    """What a pull did.

    Attributes:
        commit: The commit it is from.
        fetched: Files that were fetched.
        kept: Files that were there and right.
        nbytes: Bytes fetched.
        complete: Whether the folder is a whole pack now; not with some layers only.
    """

    commit: str
    fetched: int
    kept: int
    nbytes: int
    complete: bool


@dataclass(frozen=True)
class _State:
    """Which pull the folder is in the middle of."""

    repo_id: str
    revision: str | None
    commit: str


def pull(
    repo_id: str,
    out: Path,
    progress: TransferProgress,
    *,
    revision: str | None = None,
    layers: Iterable[int] | None = None,
    repair: bool = False,
) -> PullReport:
    """Bring a pack into a folder.

    The first request decides which commit is meant, and all others ask for that one. A pull that
    was broken off goes on where it stopped, at the same commit. Files appear in the folder only
    after their sha256 was compared, and the manifest after all of them.

    Args:
        repo_id: ``org/name``.
        out: The folder; absent, empty, an unfinished pull, or a pack that is to be checked.
        progress: Is told about it.
        revision: Branch, tag or commit.
        layers: Fetch only the experts of these layers; the folder stays unfinished.
        repair: Replace what differs from the repository in a folder that holds a pack.

    Raises:
        IntegrityError: A file stays damaged, or the pack in the folder is and ``repair`` is off.
        NetworkError: The Hub cannot be reached or refuses.
        ResourceError: The folder holds something else, or the disk is full.
    """
    had_pack = _check_usable(out)
    with locked(out):
        staging = out / PULL_NAME
        remove_unfinished(staging)
        remote = _pinned(repo_id, revision, staging, progress, repair=repair)
        listing = list_pack(remote)
        if listing.ignored:
            names = ", ".join(listing.ignored[:3])
            progress.notice(f"ignored {len(listing.ignored)} files with code or pickles: {names}")
        wanted = _wanted(listing, layers)
        if had_pack and not repair:
            return _check_existing(out, listing, wanted, progress)
        if had_pack and (out / MANIFEST_NAME).read_bytes() != listing.manifest_data:
            _clear(out, listing)
        _write_state(staging, _State(repo_id, revision, remote.commit))
        return _Pull(out, staging, listing, progress).run(wanted)


class _Pull:
    def __init__(
        self, out: Path, staging: Path, listing: PackListing, progress: TransferProgress
    ) -> None:
        self._out, self._staging = out, staging
        self._listing, self._progress = listing, progress

    def run(self, wanted: list[str]) -> PullReport:
        files = self._listing.manifest.files
        self._progress.start(sum(self._listing.remote_nbytes(name) for name in wanted))
        missing = []
        for name in wanted:
            if is_right(resolve_inside(self._out, name), files[name]):
                self._progress.advance(self._listing.remote_nbytes(name))
            else:
                missing.append(name)
        check_space(self._out, self._listing.room_for(missing))
        for name in missing:
            self._fetch(name)
        complete = len(wanted) == len(files)
        if complete:
            self._finish()
        nbytes = sum(self._listing.remote_nbytes(name) for name in missing)
        kept = len(wanted) - len(missing)
        return PullReport(self._listing.remote.commit, len(missing), kept, nbytes, complete)

    def _fetch(self, name: str) -> None:
        path = fetch_file(self._listing, name, self._progress, folder=self._staging)
        target = self._out / name
        with osio.io_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)

    def _finish(self) -> None:
        remote = self._listing.remote
        size = remote.files[CARD_NAME].size if CARD_NAME in remote.files else 0
        if size > MAX_CARD_NBYTES:
            _log.warning("%s has %s and is left out", CARD_NAME, format_size(size))
        elif size:
            card = remote.read_range(CARD_NAME, 0, size)
            osio.write_file(self._out / CARD_NAME, card)
        osio.write_file(self._out / MANIFEST_NAME, self._listing.manifest_data)
        shutil.rmtree(self._staging, ignore_errors=True)


def _check_usable(out: Path) -> bool:
    """Whether the folder holds a pack.

    Raises:
        ResourceError: It holds something that is neither a pack nor an unfinished pull.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise ResourceError("not a folder", where=out)
    if (out / MANIFEST_NAME).exists():
        return True
    others = [path.name for path in out.iterdir() if path.name != LOCK_NAME]
    if others and not (out / PULL_NAME).is_dir():
        raise ResourceError(
            "the folder is not empty and no unfinished pull",
            where=out,
            got=sorted(others)[0],
            remedy="choose another folder",
        )
    return False


def _pinned(
    repo_id: str,
    revision: str | None,
    staging: Path,
    progress: TransferProgress,
    *,
    repair: bool,
) -> RemoteRepo:
    """The repository at the commit that this pull, or the one it goes on with, began at."""
    newest = RemoteRepo.at(repo_id, revision)
    state = _read_state(staging)
    if state is None or repair:
        return newest
    if (state.repo_id, state.revision) != (repo_id, revision):
        raise UsageError(
            "an unfinished pull of another repository or revision is here",
            where=staging.parent,
            got=f"{state.repo_id} at {state.revision or 'main'}",
            remedy="choose another folder, or give --repair to replace what differs",
        )
    if state.commit == newest.commit:
        return newest
    pinned = RemoteRepo(repo_id, state.commit)
    try:
        pinned.files  # noqa: B018 - asks the Hub whether the commit is still there
    except NetworkError as error:
        if "no such revision" not in error.what:
            raise
        raise IntegrityError(
            "the revision changed in the middle of the pull, and the old one is gone",
            where=repo_id,
            wanted=state.commit,
            got=newest.commit,
            remedy="give --repair to go on with the new one",
        ) from error
    progress.notice(
        f"{repo_id} has moved on to {newest.commit[:8]}; this pull goes on with "
        f"{state.commit[:8]}, where it began"
    )
    return pinned


def _read_state(staging: Path) -> _State | None:
    try:
        return _State(**json.loads((staging / _STATE_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write_state(staging: Path, state: _State) -> None:
    with osio.io_errors(staging):
        staging.mkdir(parents=True, exist_ok=True)
    osio.write_file(staging / _STATE_NAME, json.dumps(asdict(state)).encode())


def _wanted(listing: PackListing, layers: Iterable[int] | None) -> list[str]:
    manifest = listing.manifest
    if layers is None:
        return list(manifest.files)
    count = len(manifest.layers)
    chosen = sorted(set(layers))
    if chosen and chosen[-1] >= count:
        raise UsageError("no such MoE layer", wanted=f"0 to {count - 1}", got=chosen[-1])
    others = layer_files(manifest, set(range(count)) - set(chosen))
    return [name for name in manifest.files if name not in others]


def _check_existing(
    out: Path, listing: PackListing, wanted: list[str], progress: TransferProgress
) -> PullReport:
    """The folder holds a pack already: it must be this one, and whole."""
    if (out / MANIFEST_NAME).read_bytes() != listing.manifest_data:
        raise ResourceError(
            "the folder holds another pack",
            where=out,
            remedy="choose another folder, or give --repair to replace what differs",
        )
    files = listing.manifest.files
    progress.start(sum(files[name].size for name in wanted), f"checking {out.name}")
    for name in wanted:
        if not is_right(resolve_inside(out, name), files[name]):
            raise IntegrityError(
                "a file is damaged or missing",
                where=out / name,
                remedy="give --repair to fetch what is wrong again",
            )
        progress.advance(files[name].size)
    return PullReport(listing.remote.commit, 0, len(wanted), 0, complete=True)


def _clear(out: Path, listing: PackListing) -> None:
    """Make an old pack an unfinished one, without the files that the new one does not have."""
    old: dict[str, FileEntry] = {}
    # A manifest that cannot be read says nothing of what is ours.
    with contextlib.suppress(MoepackError):
        old = read_manifest(out).files
    with osio.io_errors(out):
        (out / MANIFEST_NAME).unlink()
        for name in old.keys() - listing.manifest.files.keys():
            resolve_inside(out, name).unlink(missing_ok=True)
