"""What a Hub holds: repositories with commits, large objects by sha256, and a Xet store.

Small files live in memory, large ones on the disk. Content uploaded through Xet lies in the store
that hf_xet itself keeps when its endpoint is ``local://FOLDER``; the shards in it say which sha256
belongs to which Xet hash.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE_SUFFIXES = (".safetensors", ".bin", ".zst", ".gguf")
LARGE_NBYTES = 10 << 20

_SHARD_HEADER_NBYTES = 48
_ENTRY_NBYTES = 48
_HAS_METADATA, _HAS_VERIFICATION = 1 << 30, 1 << 31


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
        self.cas = root / "cas"
        self.objects.mkdir(parents=True)
        self.cas.mkdir(parents=True)

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

    def object_path(self, file: HubFile) -> Path:
        """Where a large file's bytes are; those of a Xet file are rebuilt on first use."""
        path = self.objects / str(file.sha256)
        if not path.exists() and file.xet is not None:
            with self.lock:
                if not path.exists():
                    self._rebuild(file, path)
        return path

    def read(self, file: HubFile) -> bytes:
        return file.data if file.data is not None else self.object_path(file).read_bytes()

    def xet_hash(self, sha256: str) -> tuple[str, int] | None:
        """The Xet hash and size of an object in the Xet store."""
        for shard in sorted(self.cas.rglob("*.mdb")):
            found = _files_of_shard(shard.read_bytes()).get(sha256)
            if found is not None:
                return found
        return None

    def stored_nbytes(self) -> int:
        """Bytes that arrived: LFS objects, and the Xet store's blocks."""
        xorbs = [p for p in self.cas.rglob("*") if p.is_file() and p.suffix != ".mdb"]
        return sum(p.stat().st_size for p in [*self.objects.iterdir(), *xorbs])

    def _rebuild(self, file: HubFile, path: Path) -> None:
        import hf_xet

        part = path.with_suffix(".part")
        session = hf_xet.XetSession()
        with session.new_file_download_group(endpoint=f"local://{self.cas}") as group:
            group.start_download_file(hf_xet.XetFileInfo(file.xet, file.size), str(part))
        part.replace(path)


def large_file(sha256: str, size: int, xet: str | None = None) -> HubFile:
    return HubFile(size, hashlib.sha1(sha256.encode()).hexdigest(), sha256=sha256, xet=xet)


def _files_of_shard(data: bytes) -> dict[str, tuple[str, int]]:
    """``{sha256: (Xet hash, size)}`` from the file section of one shard."""
    found: dict[str, tuple[str, int]] = {}
    at = _SHARD_HEADER_NBYTES
    while at + _ENTRY_NBYTES <= len(data):
        file_hash = data[at : at + 32]
        flags, count = struct.unpack_from("<II", data, at + 32)
        if file_hash == b"\xff" * 32:
            break
        at += _ENTRY_NBYTES
        sizes = (
            struct.unpack_from("<I", data, at + _ENTRY_NBYTES * i + 36)[0] for i in range(count)
        )
        size = sum(sizes)
        at += _ENTRY_NBYTES * count * (2 if flags & _HAS_VERIFICATION else 1)
        if flags & _HAS_METADATA:
            found[_hash_text(data[at : at + 32])] = (_hash_text(file_hash), size)
            at += _ENTRY_NBYTES
    return found


def _hash_text(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))
