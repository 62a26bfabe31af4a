"""A repository at one commit: its listing, ranges of its files, and whole files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from moepack_formats.errors import IntegrityError, NetworkError

from .errors import HTTPError
from .progress import Quiet, TransferProgress, client_bar
from .retry import retrying
from .xet_limits import limit_xet_memory

LIBRARY = "moepack"

WHOLE_NBYTES = 4 << 20
"""A server that does not know ranges may send a file up to this size whole. Reading larger ones for
a part of each would take the memory and the time that ranges are there to save."""

limit_xet_memory()


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it.

    Attributes:
        size: Bytes.
        sha256: Digest of a large file, None for one that git itself keeps.
        blob_id: Git's id of a small file, or of a large one's pointer.
    """

    size: int
    sha256: str | None
    blob_id: str


class RemoteRepo:
    """A model repository at one commit; every request names that commit.

    Args:
        repo_id: ``org/name``.
        commit: The full hash.
    """

    def __init__(self, repo_id: str, commit: str) -> None:
        self.repo_id = repo_id
        self.commit = commit

    @classmethod
    def at(cls, repo_id: str, revision: str | None = None) -> RemoteRepo:
        """The repository at what a branch, tag or hash means now.

        Raises:
            NetworkError: The Hub cannot be reached, or there is no such repository or revision.
        """
        api = HfApi(library_name=LIBRARY)
        info = retrying(lambda: api.model_info(repo_id, revision=revision), repo_id, revision)
        if info.sha is None:
            raise IntegrityError("the Hub named no commit", where=repo_id)
        return cls(repo_id, info.sha)

    @functools.cached_property
    def files(self) -> Mapping[str, RemoteFile]:
        """Every file of the commit by its path.

        Raises:
            NetworkError: The Hub cannot be reached or refuses.
        """
        api = HfApi(library_name=LIBRARY)

        def entries() -> dict[str, RemoteFile]:
            tree = api.list_repo_tree(self.repo_id, recursive=True, revision=self.commit)
            return {
                item.path: RemoteFile(
                    item.size, item.lfs.sha256 if item.lfs else None, item.blob_id
                )
                for item in tree
                if isinstance(item, RepoFile)
            }

        return retrying(entries, self.repo_id, self.commit)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a file, fewer where it ends early.

        Raises:
            NetworkError: The Hub cannot be reached, refuses, or sends large files whole.
            IntegrityError: The Hub sent other bytes than were asked for.
        """
        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        where = f"{self.repo_id}, {name}"

        def get() -> bytes:
            headers = build_hf_headers(library_name=LIBRARY)
            headers["Range"] = f"bytes={start}-{stop - 1}"
            # Compressed on the way, a range would be one of other bytes.
            headers["Accept-Encoding"] = "identity"
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            broken: Exception
            with http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                try:
                    return _body(response, start, stop, where)
                except HTTPError as error:  # the client's generator would answer a second time
                    broken = error
            raise broken

        data = retrying(get, self.repo_id, self.commit)
        size = self.files[name].size if name in self.files else stop
        wanted = max(min(stop, size) - start, 0)
        if len(data) != wanted:
            raise IntegrityError(
                "the Hub sent another number of bytes than was asked for",
                where=where,
                wanted=wanted,
                got=len(data),
                remedy="run it again",
            )
        return data

    def download(
        self,
        name: str,
        *,
        folder: Path | None = None,
        cache: Path | None = None,
        force: bool = False,
        progress: TransferProgress | None = None,
    ) -> Path:
        """Fetch one whole file, into a folder or the Hub cache.

        Args:
            name: Its path in the repository.
            folder: Where its path starts; None for the Hub cache.
            cache: Another Hub cache than the user's own.
            force: Fetch it although it is there.
            progress: Told of bytes as they arrive.

        Raises:
            NetworkError: The Hub cannot be reached or refuses.
            ResourceError: The file cannot be written.
        """
        bar = client_bar(progress or Quiet())
        return retrying(
            lambda: Path(
                hf_hub_download(
                    self.repo_id,
                    name,
                    revision=self.commit,
                    local_dir=folder,
                    cache_dir=cache,
                    force_download=force,
                    library_name=LIBRARY,
                    tqdm_class=bar,
                )
            ),
            self.repo_id,
            self.commit,
        )


def _body(response: Any, start: int, stop: int, where: str) -> bytes:
    """What the answer to a request for bytes ``start`` to ``stop`` holds of them.

    Raises:
        NetworkError: It is a whole file, and a large one.
    """
    is_whole = response.status_code == 200  # the server does not know ranges
    most = max(stop - start, WHOLE_NBYTES if is_whole else 0)
    data = bytearray()
    for piece in response.iter_bytes():
        data += piece
        if len(data) > most:
            break
    if is_whole and len(data) > most:
        raise NetworkError(
            "the server sends the whole file where a part was asked for",
            where=where,
            remedy="check HF_ENDPOINT and the proxy, or download the repository first",
        )
    return bytes(data[start:stop] if is_whole else data)
