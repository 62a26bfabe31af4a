"""Running a program under a limit of memory: a control group of its own, version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Group:
    """A control group with a limit.

    Attributes:
        folder: Where its files are.
        version: 1 or 2.
    """

    folder: Path
    version: int

    @property
    def peak_nbytes(self) -> int:
        """The most that was charged at a time, page cache included; 0 if the kernel is silent."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        path = self.folder / name
        return int(path.read_text()) if path.exists() else 0

    @property
    def kills(self) -> int:
        """How often the kernel has killed a process of the group for its memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        found = re.search(r"^oom_kill (\d+)$", (self.folder / name).read_text(), re.M)
        return int(found.group(1)) if found else 0

    def run(self, words: Sequence[object], **options: object) -> subprocess.CompletedProcess[str]:
        """Run a program in the group from its first instruction on; output is captured."""
        join = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", join, "sh", *(str(word) for word in words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def why_not() -> str | None:
    """Why no limit can be set here; None when it can."""
    try:
        with limited(1 << 30):
            return None
    except OSError as error:
        return f"no control group can be made here: {error}"


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Group]:
    """A group of at most ``nbytes``, taken away at the end.

    Raises:
        OSError: The system or the user's rights do not allow it.
    """
    parent, version = _hierarchy()
    folder = Path(tempfile.mkdtemp(prefix="moepack-", dir=parent))
    try:
        limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
        (folder / limit).write_text(str(nbytes))
        if version == 2:
            (folder / "memory.swap.max").write_text("0")
        yield Group(folder, version)
    finally:
        for _ in range(100):  # the last process may still be on its way out
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)


def _hierarchy() -> tuple[Path, int]:
    """Where groups with a memory limit can be made, and the version."""
    root = Path("/sys/fs/cgroup")
    if (root / "memory" / "memory.limit_in_bytes").exists() or (root / "memory").is_dir():
        return root / "memory", 1
    own = next(
        (
            line[3:]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line[:3] == "0::"
        ),
        "/",
    )
    folder = root / own.lstrip("/")
    controllers = folder / "cgroup.subtree_control"
    # Processes and limited children may not share a folder, except at the root.
    while "memory" not in controllers.read_text().split() and folder != root:
        folder = folder.parent
        controllers = folder / "cgroup.subtree_control"
    if "memory" not in controllers.read_text().split():
        controllers.write_text("+memory")
    return folder, 2


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Make the next reads of these files come from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on the disk yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
