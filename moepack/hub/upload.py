"""The two ways up: the Hub client's own pipeline over Xet, and batches of our own without it."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from moepack_formats import osio
from moepack_formats.manifest import FileEntry
from moepack_runtime.hub.progress import TransferProgress
from moepack_runtime.hub.retry import retrying

from .compress import compress_layer_file

BATCH_FILES = 50
BATCH_NBYTES = 20_000_000_000
SMALL_NBYTES = 16 << 20
"""Beyond this the Hub takes nothing but large files."""


@dataclass(frozen=True)
class Item:
    """A file to upload.

    Attributes:
        path: Where it is.
        name: Its name in the pack.
        remote_name: Its path in the repository; another one when it is to be compressed.
        facts: What the manifest says of it.
    """

    path: Path
    name: str
    remote_name: str
    facts: FileEntry

    @property
    def nbytes(self) -> int:
        """Size in the pack."""
        return self.facts.size


def upload_with_pipeline(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    folder: Path,
    items: Sequence[Item],
    message: str,
    progress: TransferProgress,
) -> None:
    """Upload through Xet: chunked, deduplicated, committed in batches by the client.

    Raises:
        NetworkError: The Hub cannot be reached or refuses.
    """
    retrying(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[glob.escape(item.name) for item in items],
        ),
        repo_id,
        revision,
    )
    progress.advance(sum(item.nbytes for item in items))


def upload_in_batches(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    items: Sequence[Item],
    message: str,
    progress: TransferProgress,
) -> None:
    """Upload file by file, and commit every so many.

    A large file is on the Hub as soon as it is sent, before the commit that shows it, so that a
    push that is broken off has to send at most one again.

    Raises:
        IntegrityError: A layer file that is to be compressed is damaged.
        NetworkError: The Hub cannot be reached or refuses.
        ResourceError: There is no room for a compressed file.
    """
    for number, batch in enumerate(_batches(items), 1):
        operations = []
        for item in batch:
            operations.append(_preupload(api, repo_id, revision, item))
            progress.advance(item.nbytes)
        title = message if number == 1 else f"{message} (part {number})"
        retrying(
            lambda operations=operations, title=title: api.create_commit(  # type: ignore[misc]
                repo_id, operations, commit_message=title, revision=revision
            ),
            repo_id,
            revision,
        )


def _preupload(api: HfApi, repo_id: str, revision: str | None, item: Item) -> CommitOperationAdd:
    """Send one file's bytes, if it is a large one."""

    def send(operation: CommitOperationAdd) -> CommitOperationAdd:
        retrying(
            lambda: api.preupload_lfs_files(repo_id, [operation], revision=revision),
            repo_id,
            revision,
        )
        return operation

    if item.name == item.remote_name:
        return send(CommitOperationAdd(item.remote_name, item.path))
    with osio.io_errors("temporary file"), tempfile.TemporaryDirectory() as folder:
        compressed = Path(folder) / item.path.name
        compress_layer_file(item.path, compressed, item.facts)
        # A small file may be sent with the commit, when the temporary one is gone; a large file
        # is not needed again once it is sent.
        small = compressed.stat().st_size <= SMALL_NBYTES
        content = compressed.read_bytes() if small else compressed
        return send(CommitOperationAdd(item.remote_name, content))


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    nbytes = 0
    for item in items:
        batch.append(item)
        nbytes += item.nbytes
        if len(batch) >= BATCH_FILES or nbytes >= BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
