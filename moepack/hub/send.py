"""Sending one file's bytes: through Xet, or as an LFS object where Xet is off.

Either way the file is on the Hub, whole, before the next one begins, and before a commit shows it.
So a push that is broken off has at most one file to send again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from moepack_runtime.hub.progress import TransferProgress
from moepack_runtime.hub.remote import LIBRARY
from moepack_runtime.hub.retry import retrying

XET_SUFFIXES = (".safetensors", ".zst")
"""What the Hub always keeps as large files, so that it need not be asked."""
_TOKEN_MARGIN = 60
"""Seconds before its end at which a token is no longer used."""


class Sender(Protocol):
    """A way to bring a file's bytes to the Hub."""

    def send(self, path: Path, remote_name: str, progress: Share) -> CommitOperationAdd:
        """Send a file.

        Args:
            path: Where it is.
            remote_name: Its path in the repository.
            progress: Is told of its bytes.

        Returns:
            What a commit needs to show it; a small file is in there itself.

        Raises:
            NetworkError: The Hub cannot be reached or refuses.
        """


class Share:
    """One file's share of a transfer: whatever happens to it, it counts once.

    Args:
        progress: The transfer.
        nbytes: What the file counts for.
    """

    def __init__(self, progress: TransferProgress, nbytes: int) -> None:
        self._progress, self._nbytes, self._done = progress, nbytes, 0

    def reach(self, fraction: float) -> None:
        """So much of the file is sent; it never goes backwards."""
        done = min(int(self._nbytes * fraction), self._nbytes)
        if done > self._done:
            self._progress.advance(done - self._done)
            self._done = done


def sender(api: HfApi, repo_id: str, revision: str | None) -> Sender:
    """The way that this installation of the Hub client uses."""
    has_xet = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
    plain = ClientSender(api, repo_id, revision)
    return XetSender(api, repo_id, revision, plain) if has_xet else plain


class ClientSender:
    """Through the Hub client: asks the Hub what kind of file it is, and sends a large one."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None) -> None:
        self._api, self._repo_id, self._revision = api, repo_id, revision

    def send(self, path: Path, remote_name: str, progress: Share) -> CommitOperationAdd:
        """See :class:`Sender`."""
        operation = _Watched(remote_name, path)
        operation.watch(progress)
        retrying(
            lambda: self._api.preupload_lfs_files(
                self._repo_id, [operation], revision=self._revision
            ),
            self._repo_id,
            self._revision,
        )
        return operation


class XetSender:
    """Straight through the client's Xet library, which says how far it is.

    Args:
        api: The client.
        repo_id: ``org/name``.
        revision: Branch.
        others: Sends what may be a small file.
    """

    def __init__(
        self, api: HfApi, repo_id: str, revision: str | None, others: ClientSender
    ) -> None:
        import hf_xet

        self._session: Any = hf_xet.XetSession()
        self._others, self._repo_id, self._revision = others, repo_id, revision
        branch = quote(revision or constants.DEFAULT_REVISION, safe="")
        self._token_url = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{branch}"
        self._headers = build_hf_headers(library_name=LIBRARY)
        self._token: _XetToken | None = None

    def send(self, path: Path, remote_name: str, progress: Share) -> CommitOperationAdd:
        """See :class:`Sender`."""
        if not remote_name.endswith(XET_SUFFIXES):
            return self._others.send(path, remote_name, progress)
        operation = CommitOperationAdd(remote_name, path)
        sent = retrying(lambda: self._upload(path, progress), self._repo_id, self._revision)
        operation.upload_info.sha256 = bytes.fromhex(sent)
        # Should the client call these otherwise one day, it looks at the file itself once more.
        operation._upload_mode = "lfs"
        operation._is_uploaded = True
        return operation

    def _upload(self, path: Path, progress: Share) -> str:
        """Returns the sha256 of what was sent."""
        size = max(path.stat().st_size, 1)
        # One token for many files: the Hub counts who asks for one.
        if self._token is None or self._token.expires < time.time() + _TOKEN_MARGIN:
            self._token = _xet_token(self._token_url, self._headers)

        def report(group: Any, _: object) -> None:
            progress.reach(group.total_bytes_completed / size)

        try:
            with self._session.new_upload_commit(
                endpoint=self._token.endpoint,
                token=self._token.token,
                token_expiry_unix_secs=self._token.expires,
                token_refresh_url=self._token_url,
                token_refresh_headers=self._headers,
                # Xet has tokens of its own: the Hub's must not go there.
                custom_headers={
                    name: value
                    for name, value in self._headers.items()
                    if name.lower() != "authorization"
                },
                progress_callback=report,
            ) as commit:
                handle = commit.start_upload_file(str(path))
            sha256: str = handle.result().xet_info.sha256
        except KeyboardInterrupt:
            self._session.sigint_abort()
            raise
        return sha256


@dataclass(frozen=True)
class _XetToken:
    """What opens the Xet storage for a while; never shown.

    Attributes:
        endpoint: Where the storage is.
        token: What it wants to see.
        expires: Seconds since 1970.
    """

    endpoint: str
    token: str = field(repr=False)
    expires: int


def _xet_token(url: str, headers: dict[str, str]) -> _XetToken:
    response = http_backoff("GET", url, headers=headers)
    hf_raise_for_status(response)
    try:
        return _XetToken(
            response.headers[constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT],
            response.headers[constants.HUGGINGFACE_HEADER_X_XET_ACCESS_TOKEN],
            int(response.headers[constants.HUGGINGFACE_HEADER_X_XET_EXPIRATION]),
        )
    except (KeyError, ValueError) as error:
        raise RuntimeError("the Hub's answer has no Xet token") from error


class _Watched(CommitOperationAdd):
    """Tells how much of the file the client has read to send it."""

    def watch(self, progress: Share) -> None:
        self._progress = progress

    @contextlib.contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """See the base class, which would show a bar of its own."""
        with super().as_file() as file:
            if with_tqdm:
                yield cast("BinaryIO", _Counting(file, self.upload_info.size, self._progress))
            else:
                yield file


class _Counting(io.BufferedIOBase):
    """A file that is read through it."""

    def __init__(self, file: BinaryIO, nbytes: int, progress: Share) -> None:
        self._file, self._nbytes, self._progress = file, max(nbytes, 1), progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._file.read(-1 if size is None else size)
        self._progress.reach(self._file.tell() / self._nbytes)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
