"""The project's reads and writes of files, in one place, with errors a user can act on.

Every write goes through :func:`write_at`, :func:`sync` and :func:`replace`, so that a test can
make any of them fail.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import FormatError, MoepackError, ResourceError

_REMEDIES = {
    errno.ENOSPC: ("no space left on the disk", "free some space and run it again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run it again"),
    errno.EFBIG: ("the file system refuses a file this large", "use another file system"),
    errno.EROFS: ("the folder is read-only", "choose a folder that you can write to"),
    errno.EACCES: ("permission denied", "choose a folder that you may use"),
    errno.EPERM: ("permission denied", "choose a folder that you may use"),
    errno.EIO: ("the disk reported an input/output error", "check the disk"),
    errno.EMFILE: ("too many open files", "raise the limit, for example `ulimit -n 4096`"),
    errno.ENFILE: ("too many open files on this machine", "close other programs"),
    errno.ENOMEM: ("out of memory", "close other programs or lower --ram"),
}


def resource_error(error: OSError, where: object) -> MoepackError:
    """The one-line error for an ``OSError`` met at ``where``."""
    what, remedy = _REMEDIES.get(error.errno or 0, (error.strerror or str(error), None))
    return ResourceError(what, where=where, remedy=remedy)


@contextlib.contextmanager
def io_errors(where: object) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into a :class:`ResourceError` naming ``where``."""
    try:
        yield
    except OSError as error:
        raise resource_error(error, where) from error


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        FormatError: It is missing, a FIFO, a device or a folder.
        ResourceError: The system refused.
    """
    try:
        # A FIFO without a writer would block in open(); non-blocking means nothing to a file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FormatError("file is missing", where=path.name) from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise FormatError("not a regular file", where=path.name) from None
        raise resource_error(error, path.name) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError("not a regular file", where=path.name)
    return descriptor


def read_at(
    descriptor: int, buffer: memoryview, offset: int, where: object, *, align: int = 1
) -> None:
    """Fill ``buffer`` from ``offset`` of a file.

    Args:
        descriptor: Of the file.
        buffer: What to fill.
        offset: First byte in the file.
        where: Named in errors.
        align: After a short read, reading goes on at a multiple of this many bytes, as direct
            reads need; ``buffer`` and ``offset`` are aligned to it.

    Raises:
        ResourceError: The file ends early (it was truncated while open) or the read failed.
    """
    done = 0
    while done < len(buffer):
        with io_errors(where):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        after = done + count
        if after < len(buffer):
            after -= after % align
        if after == done:
            raise ResourceError(
                "the file ended early: it was truncated while in use",
                where=where,
                wanted=f"{len(buffer)} bytes at {offset}",
                got=done + count,
                remedy="restore the file and run it again",
            )
        done = after


def read_bytes(descriptor: int, offset: int, nbytes: int, where: object) -> bytes:
    """Read exactly ``nbytes``; see :func:`read_at`."""
    buffer = bytearray(nbytes)
    read_at(descriptor, memoryview(buffer), offset, where)
    return bytes(buffer)


def set_direct(descriptor: int, direct: bool) -> bool:
    """Read past the page cache from now on, or through it.

    Without direct reads the kernel is told that access is random: reading ahead would fetch
    neighbours that nobody asked for.

    Returns:
        Whether reads are direct now: not every system and file system can.
    """
    flag: int = getattr(os, "O_DIRECT", 0)
    if direct and flag:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | flag)
            return True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    if flag:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~flag)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return False


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; a short write is continued.

    Raises:
        OSError: As the system reports it.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def sync(descriptor: int) -> None:
    """Force a file's bytes to the disk."""
    os.fsync(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename over ``target`` and force the folder's entry to the disk."""
    os.replace(source, target)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; the file itself is on the disk.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is either the old one or the whole new one.

    Raises:
        ResourceError: The write failed; the temporary file is gone.
    """
    temporary = path.with_name(f"{path.name}.part")
    with io_errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                write_at(descriptor, memoryview(data), 0)
                sync(descriptor)
            finally:
                os.close(descriptor)
            replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
