"""What a Hub holds: repositories with commits, large objects by sha256, and a Xet store.

Small files live in memory, large ones on the disk.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.hub.xet_store import XetStore

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE_SUFFIXES = (".safetensors", ".bin", ".zst", ".gguf")
LARGE_NBYTES = 10 << 20


@dataclass(frozen=True)
class HubFile:
    """One file of a commit: small (``data``) or large (``sha256``, perhaps ``xet``)."""

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None
    xet: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, HubFile]


@dataclass
class Repo:
    commits: list[Commit]
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def branch(self, name: str) -> list[Commit]:
        """The commits of a branch, oldest first.

        Raises:
            KeyError: There is no such branch.
        """
        return self.commits if name == "main" else self.branches[name]

    def commit(self, revision: str) -> Commit:
        """The commit that a branch or a hash names.

        Raises:
            KeyError: There is none.
        """
        name = revision.removeprefix("refs/heads/")
        if name == "main" or name in self.branches:
            return self.branch(name)[-1]
        for commits in (self.commits, *self.branches.values()):
            for commit in commits:
                if len(revision) >= 7 and commit.oid.startswith(revision):
                    return commit
        raise KeyError(revision)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def small_file(data: bytes) -> HubFile:
    return HubFile(len(data), git_oid(data), data=data)


def is_large(name: str, size: int) -> bool:
    return size > LARGE_NBYTES or name.endswith(LARGE_SUFFIXES)


class HubStore:
    """All repositories and objects.

    Args:
        root: A folder for the objects.
    """

    def __init__(self, root: Path) -> None:
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects = root / "objects"
        self.rebuilt = root / "rebuilt"
        self.objects.mkdir(parents=True)
        self.rebuilt.mkdir()
        self.xet = XetStore(root / "xet")

    def copy_from(self, other: HubStore) -> None:
        """Begin with the repositories and LFS objects of another store."""
        self.repos = copy.deepcopy(other.repos)
        shutil.copytree(other.objects, self.objects, dirs_exist_ok=True)

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        first = Commit(
            hashlib.sha1(repo_id.encode()).hexdigest(),
            "initial commit",
            {".gitattributes": small_file(GIT_ATTRIBUTES)},
        )
        self.repos[repo_id] = Repo([first], private, gated)
        return self.repos[repo_id]

    def put(self, repo_id: str, files: dict[str, bytes], title: str = "put") -> str:
        """Commit files to ``main`` behind the protocol's back; returns the commit."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.create(repo_id)
            new = dict(repo.commits[-1].files)
            for name, data in files.items():
                if is_large(name, len(data)):
                    sha256 = hashlib.sha256(data).hexdigest()
                    (self.objects / sha256).write_bytes(data)
                    new[name] = large_file(sha256, len(data))
                else:
                    new[name] = small_file(data)
            return self.add_commit(repo, "main", title, new).oid

    def add_commit(self, repo: Repo, branch: str, title: str, files: dict[str, HubFile]) -> Commit:
        commits = repo.branch(branch)
        facts = repr((commits[-1].oid, sorted((n, f.oid) for n, f in files.items())))
        commit = Commit(hashlib.sha1(facts.encode()).hexdigest(), title, files)
        commits.append(commit)
        return commit

    def stored_nbytes(self) -> int:
        """Bytes that arrived: LFS objects, and the Xet store's blocks."""
        lfs = sum(path.stat().st_size for path in self.objects.iterdir())
        return lfs + self.xet.stored_nbytes()


def large_file(sha256: str, size: int, xet: str | None = None) -> HubFile:
    return HubFile(size, hashlib.sha1(sha256.encode()).hexdigest(), sha256=sha256, xet=xet)
