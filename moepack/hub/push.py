"""Pushing a pack: what the repository lacks, and the manifest after everything else."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from moepack_formats.errors import NetworkError, UsageError
from moepack_formats.manifest import MANIFEST_NAME, Manifest
from moepack_formats.pack import read_manifest
from moepack_formats.paths import resolve_inside
from moepack_runtime.hub.fetch import check_sha256
from moepack_runtime.hub.listing import COMPRESSED_SUFFIX, LAYER_FOLDER
from moepack_runtime.hub.progress import TransferProgress
from moepack_runtime.hub.remote import LIBRARY, RemoteRepo
from moepack_runtime.hub.retry import retrying
from moepack_runtime.options import format_size

from .card import CARD_NAME, MAX_CARD_NBYTES, Quality, is_ours, model_card
from .upload import Item, upload

_log = logging.getLogger(__name__)

MESSAGE = "Upload a pack with moepack"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class PushReport:
    """What a push did.

    Attributes:
        url: The repository's page.
        commit: The commit that the repository is at now.
        uploaded: Files that were sent.
        kept: Files that were there already.
        nbytes: Bytes of the files that were sent, before deduplication.
    """

    url: str
    commit: str
    uploaded: int
    kept: int
    nbytes: int


def push(
    folder: Path,
    repo_id: str,
    progress: TransferProgress,
    *,
    private: bool = False,
    revision: str | None = None,
    compress: bool = False,
    quality: Quality | None = None,
) -> PushReport:
    """Upload a pack, creating the repository when there is none.

    While a push is under way the repository has no manifest, so that it is recognisably
    unfinished; a push that was broken off goes on where it stopped when it is started again.

    Args:
        folder: The pack's folder.
        repo_id: ``org/name``.
        progress: Is told about it.
        private: Create the repository as a private one.
        revision: Branch, made when there is none.
        compress: Upload layer files compressed.
        quality: What to say in the model card.

    Raises:
        FormatError: The folder is not a complete pack.
        IntegrityError: A file of it is damaged; nothing was sent.
        UsageError: The repository holds something else, or is public.
        NetworkError: The Hub cannot be reached or refuses.
    """
    manifest = read_manifest(folder)
    api = HfApi(library_name=LIBRARY)
    url = _ready_repo(api, repo_id, private=private, revision=revision)
    remote = RemoteRepo.at(repo_id, revision)
    names = {name: _remote_name(name, compress=compress) for name in manifest.files}
    _check_is_ours(remote, names)
    missing = _missing(remote, folder, manifest, names, progress)
    card = _card(remote, folder, manifest, repo_id, quality)
    stale = _stale(remote, names)
    if not missing and card is None and not stale and _has_manifest(remote, folder):
        return PushReport(url, remote.commit, 0, len(manifest.files), 0)

    items = [_item(folder, manifest, name, names[name]) for name in missing]
    progress.start(sum(item.nbytes for item in items))
    if (missing or stale) and MANIFEST_NAME in remote.files:
        _commit(api, remote, [CommitOperationDelete(MANIFEST_NAME)], revision, remote.commit)
    upload(api, repo_id, revision, items, MESSAGE, progress)
    last: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(name) for name in stale
    ]
    if card is not None:
        last.append(CommitOperationAdd(CARD_NAME, card))
    last.append(CommitOperationAdd(MANIFEST_NAME, (folder / MANIFEST_NAME).read_bytes()))
    # On top of what was there a moment ago: somebody else's push in between is found out.
    now = RemoteRepo.at(repo_id, revision)
    _check_arrived(now, manifest, names)
    commit = _commit(api, remote, last, revision, now.commit)
    nbytes = sum(item.nbytes for item in items)
    return PushReport(url, commit, len(items), len(manifest.files) - len(items), nbytes)


def _ready_repo(api: HfApi, repo_id: str, *, private: bool, revision: str | None) -> str:
    """Create what is not there; returns the repository's page."""
    url = retrying(
        lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id
    )
    if private and not retrying(lambda: api.model_info(repo_id), repo_id).private:
        raise UsageError(
            "the repository exists and is public",
            where=repo_id,
            remedy="make it private on the Hub first, or choose another name",
        )
    if revision is not None:
        retrying(
            lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id, revision
        )
    return str(url)


def _remote_name(name: str, *, compress: bool) -> str:
    return f"{name}{COMPRESSED_SUFFIX}" if compress and name.startswith(LAYER_FOLDER) else name


def _check_is_ours(remote: RemoteRepo, names: dict[str, str]) -> None:
    """Refuse to write over a repository with other weights, the source's for instance."""
    if MANIFEST_NAME in remote.files or any(n.startswith(LAYER_FOLDER) for n in remote.files):
        return
    others = sorted(name for name in remote.files.keys() - names.keys() if name.endswith(_WEIGHTS))
    if others:
        raise UsageError(
            "the repository holds other weights and no pack",
            where=remote.repo_id,
            got=others[0],
            remedy="choose another name",
        )


def _missing(
    remote: RemoteRepo,
    folder: Path,
    manifest: Manifest,
    names: dict[str, str],
    progress: TransferProgress,
) -> list[str]:
    """Files that the repository lacks or has otherwise; each is compared with the manifest."""
    # Behind a manifest like ours the files are ours, compressed ones too.
    finished = _has_manifest(remote, folder)
    other = []
    for name, facts in manifest.files.items():
        there = remote.files.get(names[name])
        same = there is not None and there.sha256 == facts.sha256
        if not same and not (there is not None and names[name] != name and finished):
            other.append(name)
    progress.start(sum(manifest.files[name].size for name in other), f"checking {folder.name}")
    missing = []
    for name in other:
        path = resolve_inside(folder, name)
        check_sha256(path, manifest.files[name], path, remedy="run verify, then convert again")
        progress.advance(manifest.files[name].size)
        there = remote.files.get(names[name])
        small = there is not None and there.sha256 is None
        if not (small and there is not None and there.blob_id == _git_id(path.read_bytes())):
            missing.append(name)
    return missing


def _check_arrived(remote: RemoteRepo, manifest: Manifest, names: dict[str, str]) -> None:
    """The manifest may be shown only with the files that it lists."""
    for name, facts in manifest.files.items():
        there = remote.files.get(names[name])
        as_it_is = names[name] == name
        if there is None or (as_it_is and there.sha256 not in (None, facts.sha256)):
            raise NetworkError(
                "the repository lacks what was sent: somebody else changes it, or its .gitignore "
                "leaves the file out",
                where=remote.repo_id,
                got=names[name],
                remedy="run it again: what has arrived is kept",
            )


def _has_manifest(remote: RemoteRepo, folder: Path) -> bool:
    there = remote.files.get(MANIFEST_NAME)
    return there is not None and there.blob_id == _git_id((folder / MANIFEST_NAME).read_bytes())


def _git_id(data: bytes) -> str:
    """Git's id of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _stale(remote: RemoteRepo, names: dict[str, str]) -> list[str]:
    """Weights of an earlier pack that this one does not have."""
    wanted = set(names.values())
    return sorted(
        name
        for name in remote.files
        if name not in wanted
        and (
            (name.startswith(LAYER_FOLDER) and ".safetensors" in name)
            or (name.startswith("model") and ".safetensors" in name and "/" not in name)
        )
    )


def _card(
    remote: RemoteRepo, folder: Path, manifest: Manifest, repo_id: str, quality: Quality | None
) -> bytes | None:
    """The card to upload: the user's own, or one from the manifest; None to leave it as it is."""
    local = folder / CARD_NAME
    own = local.read_bytes() if local.is_file() else b""
    data = model_card(manifest, repo_id=repo_id, quality=quality)
    if is_users := bool(own) and not is_ours(own):
        data = own
    there = remote.files.get(CARD_NAME)
    if there is None:
        return data
    if there.blob_id == _git_id(data):
        return None
    too_large = there.size > MAX_CARD_NBYTES  # none of ours: it is not read
    if too_large or not is_ours(remote.read_range(CARD_NAME, 0, max(there.size, 1))):
        if too_large or is_users or quality is not None:
            why = f"it has {format_size(there.size)}" if too_large else "it was edited on the Hub"
            _log.warning("%s of %s stays as it is: %s", CARD_NAME, repo_id, why)
        return None
    # One whose figures this push does not know stays, too.
    same_pack = quality is None and not is_users and _has_manifest(remote, folder)
    return None if same_pack else data


def _item(folder: Path, manifest: Manifest, name: str, remote_name: str) -> Item:
    return Item(resolve_inside(folder, name), name, remote_name, manifest.files[name])


def _commit(
    api: HfApi,
    remote: RemoteRepo,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    revision: str | None,
    parent: str,
) -> str:
    info = retrying(
        lambda: api.create_commit(
            remote.repo_id,
            operations,
            commit_message=MESSAGE,
            revision=revision,
            parent_commit=parent,
        ),
        remote.repo_id,
        revision,
    )
    return info.oid
