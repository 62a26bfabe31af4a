"""The output folder: one writer at a time, nothing overwritten by accident."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moepack_formats import osio, strict_json
from moepack_formats.errors import FormatError, ResourceError, UsageError
from moepack_formats.journal import JOURNAL_NAME, read_fingerprint
from moepack_formats.manifest import MANIFEST_NAME
from moepack_formats.pack import read_manifest
from moepack_formats.paths import resolve_inside

LOCK_NAME = ".moepack-lock"
STAGE_NAME = ".moepack-source"
"""The folder inside the output's where shards of a Hub source lie while they are needed."""
_OURS = {JOURNAL_NAME, LOCK_NAME}
_PARTS = ("model*.safetensors*.part", "experts/layer-*.safetensors.part", f"{MANIFEST_NAME}.part")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if need be and hold it against other commands.

    Raises:
        ResourceError: Another process writes into it, or it cannot be written.
    """
    lock = folder / LOCK_NAME
    descriptor = _lock(folder, lock)
    try:
        with osio.io_errors(lock):
            os.ftruncate(descriptor, 0)
            osio.write_at(descriptor, memoryview(f"{os.getpid()}\n".encode()), 0)
        try:
            yield
        finally:
            # While still holding it: whoever opens the name next makes a new file.
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # only succeeds when nothing at all was written
    finally:
        os.close(descriptor)


def _lock(folder: Path, lock: Path) -> int:
    """The descriptor of the lock file, locked; the folder is made when it is not there."""
    while True:
        with osio.io_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lock):
                return descriptor
            # Its last owner took it away between the two calls above: it locks nothing any more.
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ResourceError(
                f"in use by PID {owner}", where=folder, remedy="wait until that command ends"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise osio.resource_error(error, lock) from error
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def check_usable(folder: Path, *, force: bool) -> None:
    """Refuse a folder with other content, unless forced, before any work is done.

    A folder with a lock is left to :func:`check_locked`: it is in use, or was when its owner was
    killed.

    Raises:
        ResourceError: The folder is not empty, or not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ResourceError("not a folder", where=folder)
    if folder.exists() and not force and not (folder / LOCK_NAME).exists():
        _check_ours(folder)


def check_locked(folder: Path, fingerprint: str, *, force: bool) -> bool:
    """Refuse a folder with other content, unless forced, now that nobody else writes into it.

    Args:
        folder: The output folder.
        fingerprint: Names the conversion that is to be done, as its journal does.
        force: Overwrite what is there.

    Returns:
        Whether the conversion is there already: a run of it was ended after the manifest was in
        place and before its last traces were gone.

    Raises:
        ResourceError: The folder is not empty, or holds the pack of another conversion.
    """
    if force:
        return False
    _check_ours(folder)
    if not (folder / MANIFEST_NAME).exists():
        return False
    if read_fingerprint(folder) != fingerprint:
        raise _occupied(folder, MANIFEST_NAME)
    return True


def _check_ours(folder: Path) -> None:
    """Raise unless the folder is empty or has the journal of a conversion."""
    if (folder / JOURNAL_NAME).exists():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OURS)
    if others:
        raise _occupied(folder, MANIFEST_NAME if MANIFEST_NAME in others else others[0])


def _occupied(folder: Path, name: str) -> ResourceError:
    what = "already holds a pack" if name == MANIFEST_NAME else "the folder is not empty"
    return ResourceError(
        what, where=folder, got=name, remedy="give --force to overwrite, or another folder"
    )


def check_apart(source: Path, out: Path) -> None:
    """Refuse to write a pack over its own source, forced or not.

    Raises:
        UsageError: They are one folder.
    """
    if out.exists() and out.samefile(source):
        raise UsageError(
            "the output folder is the source itself", where=out, remedy="name another folder"
        )


def old_files(folder: Path) -> list[Path]:
    """The files of an earlier pack or conversion, the manifest first; other files are not ours."""
    names: list[str] = []
    # A manifest that cannot be read says nothing of what is ours.
    with contextlib.suppress(FormatError, UsageError):
        names = list(read_manifest(folder).files)
    found = [folder / MANIFEST_NAME]
    for name in dict.fromkeys([*names, *_noted_files(folder)]):
        with contextlib.suppress(FormatError):
            found.append(resolve_inside(folder, name))
    found += [part for pattern in _PARTS for part in sorted(folder.glob(pattern))]
    found.append(folder / JOURNAL_NAME)
    return [path for path in found if path.is_file() or path.is_symlink()]


def _noted_files(folder: Path) -> list[str]:
    """Files that an unfinished conversion has completed, as its journal says."""
    names = []
    with contextlib.suppress(OSError, FormatError):
        for line in (folder / JOURNAL_NAME).read_bytes().splitlines():
            note = strict_json.loads(line, JOURNAL_NAME)
            if "finished" in note and isinstance(note.get("file"), str):
                names.append(note["file"])
    return names


def clear_old_pack(folder: Path) -> None:
    """Take away the files of an earlier pack or conversion; other files are left alone.

    The manifest goes first: from then on the folder counts as unfinished. Programs that have the
    old files open keep reading the old bytes.
    """
    with osio.io_errors(folder):
        for path in old_files(folder):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / STAGE_NAME, ignore_errors=True)
