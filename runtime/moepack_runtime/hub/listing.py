"""What a pack's repository holds, checked before anything large is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from moepack_formats.errors import FormatError, IntegrityError
from moepack_formats.manifest import MANIFEST_NAME, Manifest, from_json
from moepack_formats.pack import MAX_MANIFEST_NBYTES

from .remote import RemoteFile, RemoteRepo

COMPRESSED_SUFFIX = ".zst"
LAYER_FOLDER = "experts/"
CODE_SUFFIXES = (".py", ".so", ".dll", ".sh")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_MARGIN_NBYTES = 16_000_000
"""Room beside the files of a pack, for small ones and their folders."""


@dataclass(frozen=True)
class PackListing:
    """A pack in a repository.

    Attributes:
        remote: The repository at one commit.
        manifest_data: The manifest's bytes.
        manifest: The checked manifest.
        remote_names: For each file of the manifest, its path in the repository.
        ignored: Code and pickles that lie in the repository and are left there.
    """

    remote: RemoteRepo
    manifest_data: bytes
    manifest: Manifest
    remote_names: dict[str, str]
    ignored: tuple[str, ...]

    def remote_nbytes(self, name: str) -> int:
        """Bytes that fetching file ``name`` takes."""
        return self.remote.files[self.remote_names[name]].size

    def room_for(self, names: Iterable[str]) -> int:
        """Bytes that fetching files takes on the disk at the worst moment.

        A compressed file lies beside its expansion.
        """
        chosen = list(names)
        packed = [self.remote_nbytes(name) for name in chosen if self.is_compressed(name)]
        sizes = sum(self.manifest.files[name].size for name in chosen)
        return sizes + max(packed, default=0) + (_MARGIN_NBYTES if chosen else 0)

    def is_compressed(self, name: str) -> bool:
        """Whether file ``name`` lies compressed in the repository."""
        return self.remote_names[name] != name


def list_pack(remote: RemoteRepo) -> PackListing:
    """Read a repository's manifest and compare it with what the repository holds.

    Raises:
        FormatError: There is no pack, or not a whole one.
        IntegrityError: A file is not the one that the manifest lists.
        NetworkError: The Hub cannot be reached or refuses.
    """
    files = remote.files
    where = f"{remote.repo_id} at {remote.commit[:8]}"
    if MANIFEST_NAME not in files:
        half = any(name.startswith(LAYER_FOLDER) for name in files)
        raise FormatError(
            "an unfinished push: it has no manifest" if half else f"it has no {MANIFEST_NAME}",
            where=where,
            remedy="push it again, or wait until that push ends" if half else None,
        )
    if files[MANIFEST_NAME].size > MAX_MANIFEST_NBYTES:
        raise FormatError("manifest is over the cap", where=where, got=files[MANIFEST_NAME].size)
    data = remote.read_range(MANIFEST_NAME, 0, MAX_MANIFEST_NBYTES)
    manifest = from_json(data, f"{where}, {MANIFEST_NAME}")
    names = {name: _remote_name(name, manifest, files, where) for name in manifest.files}
    ignored = sorted(name for name in files if is_code(name))
    return PackListing(remote, data, manifest, names, tuple(ignored))


def _remote_name(name: str, manifest: Manifest, files: Mapping[str, RemoteFile], where: str) -> str:
    facts, place = manifest.files[name], f"{where}, {name}"
    if is_code(name):
        raise FormatError("the manifest lists code or a pickle", where=place)
    compressed = f"{name}{COMPRESSED_SUFFIX}"
    if name not in files and compressed in files and name.startswith(LAYER_FOLDER):
        return compressed
    found = files.get(name)
    if found is None:
        raise FormatError("the repository lacks a file of the pack", where=place)
    if found.size != facts.size or found.sha256 not in (None, facts.sha256):
        raise IntegrityError(
            "the repository's file is not the one that its manifest lists",
            where=place,
            wanted=f"{facts.size} bytes, sha256 {facts.sha256}",
            got=f"{found.size} bytes, sha256 {found.sha256}",
            remedy="a push is under way or was broken off: wait for it, or push again",
        )
    return name


def is_code(name: str) -> bool:
    """Whether a file's name says that it is code or a pickle, which are never fetched."""
    return PurePosixPath(name).suffix.lower() in (*CODE_SUFFIXES, *PICKLE_SUFFIXES)


def layer_files(manifest: Manifest, layers: Iterable[int]) -> set[str]:
    """The files of some layers."""
    return {name for layer in layers for name in manifest.layers[layer].files}
