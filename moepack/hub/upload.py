"""Uploading files: one after the other, and a commit every so many."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from moepack_formats import osio
from moepack_formats.errors import IntegrityError
from moepack_formats.manifest import FileEntry
from moepack_runtime.hub.progress import TransferProgress
from moepack_runtime.hub.retry import retrying

from .compress import compress_layer_file
from .send import Sender, Share, sender

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


def upload(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    items: Sequence[Item],
    message: str,
    progress: TransferProgress,
) -> None:
    """Upload file by file, and commit every so many.

    The Hub allows some hundred commits an hour, so a file does not get one of its own. But it is
    on the Hub as soon as it is sent, before the commit that shows it: a push that is broken off
    has at most one file to send again.

    Raises:
        IntegrityError: A layer file that is to be compressed is damaged, or a file was changed.
        NetworkError: The Hub cannot be reached or refuses.
        ResourceError: There is no room for a compressed file.
    """
    # There is one bar, and it is not one of the client's.
    with disable_progress_bars():
        way = sender(api, repo_id, revision)
        for number, batch in enumerate(_batches(items), 1):
            operations = [_send(way, item, progress) for item in batch]
            title = message if number == 1 else f"{message} (part {number})"
            retrying(
                lambda operations=operations, title=title: api.create_commit(  # type: ignore[misc]
                    repo_id, operations, commit_message=title, revision=revision
                ),
                repo_id,
                revision,
            )


def _send(way: Sender, item: Item, progress: TransferProgress) -> CommitOperationAdd:
    """Send one file, compressed if it is to be."""
    share = Share(progress, item.nbytes)
    if item.name == item.remote_name:
        operation = way.send(item.path, item.remote_name, share)
        if operation.upload_info.sha256.hex() != item.facts.sha256:
            raise IntegrityError(
                "the file was changed while it was sent",
                where=item.path,
                remedy="push again when nothing writes to the folder any more",
            )
    else:
        operation = _send_compressed(way, item, share)
    share.reach(1)
    return operation


def _send_compressed(way: Sender, item: Item, share: Share) -> CommitOperationAdd:
    with osio.io_errors("temporary file"), tempfile.TemporaryDirectory() as folder:
        compressed = Path(folder) / item.path.name
        compress_layer_file(item.path, compressed, item.facts)
        operation = way.send(compressed, item.remote_name, share)
        # A small file may be sent with the commit, when the temporary one is gone; a large file
        # is not needed again once it is sent.
        if compressed.stat().st_size <= SMALL_NBYTES:
            operation.path_or_fileobj = compressed.read_bytes()
        return operation


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
