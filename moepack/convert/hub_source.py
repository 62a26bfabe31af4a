"""Checkpoints on the Hub: downloaded into the Hub cache, or found there."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from moepack.convert.source_files import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    find_index,
    read_weight_map,
)
from moepack_formats.errors import MoepackError, NetworkError, UsageError
from moepack_formats.osio import resource_error

# The base of every error of the client's HTTP library, which changes its name between versions.
HTTPError: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]

# RuntimeError is what the client's native transfer library raises.
CLIENT_ERRORS = (HTTPError, XetDownloadError, OSError, RuntimeError, ValueError)

# What a conversion may use, beside the weights; code and pickles are left out whatever their name.
SMALL_FILES = [
    "README.md",
    "LICENSE*",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "quantize_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*.json",
    "*.tiktoken",
    "*.model",
    "vocab.json",
    "vocab.txt",
    f"model{INDEX_SUFFIX}",
    f"gptq_model-*{INDEX_SUFFIX}",
]
WHOLE_WEIGHTS = ["model.safetensors", "gptq_model-*.safetensors"]
RETRY_STATUSES = (429, 500, 502, 503, 504)
RETRY_SECONDS = (1.0, 4.0, 10.0)


def download(
    repo_id: str,
    *,
    revision: str | None,
    offline: bool,
    check: Callable[[Path], object],
    weights: bool = True,
) -> Path:
    """Bring a checkpoint into the Hub cache.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit.
        offline: Use the cache alone.
        check: Called with the folder once the small files are there and before the weights are
            downloaded; what it raises ends the download.
        weights: Whether to download them at all.

    Returns:
        The snapshot's folder, named after the commit.

    Raises:
        NetworkError: The Hub could not be reached or refused, or the cache lacks a file.
        UsageError: The id or revision is malformed.
        ResourceError: A file could not be written.
    """

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        for delay in (*RETRY_SECONDS, None):
            try:
                folder = snapshot_download(
                    repo_id,
                    revision=revision,
                    local_files_only=offline,
                    allow_patterns=patterns,
                    ignore_patterns=["*.py", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)],
                    library_name="moepack",
                )
                return Path(folder)
            except CLIENT_ERRORS as error:
                if delay is None or _status(_root(error)) not in RETRY_STATUSES:
                    raise explain(error, repo_id, revision) from error
            time.sleep(delay)
        raise AssertionError("the last try returns or raises")

    folder = fetch(revision, SMALL_FILES)
    check(folder)
    if not weights:
        return folder
    # From the commit that the small files came from, whatever the branch has become since.
    index = find_index(folder)
    if index is None:
        return fetch(folder.name, WHOLE_WEIGHTS)
    shards = sorted(set(read_weight_map(folder, index).values()))
    return fetch(folder.name, [glob.escape(shard) for shard in shards])


def explain(error: Exception, repo_id: str, revision: str | None = None) -> MoepackError:
    """Say in one line what an exception of the Hub client means and what to do about it.

    The client's own text is left out: it spans lines and may quote a proxy's credentials.

    Args:
        error: What the client raised.
        repo_id: The repository it was about.
        revision: The revision it was about.
    """
    cause = _root(error)
    status = _status(cause)
    if isinstance(cause, HFValidationError):
        return UsageError("not a Hub id", where=repo_id, wanted="an existing folder, or org/name")
    if isinstance(cause, GatedRepoError):
        return NetworkError(
            "the repository is gated",
            where=repo_id,
            remedy=f"log in with `hf auth login` and accept the licence at "
            f"https://huggingface.co/{repo_id}",
        )
    if isinstance(cause, RevisionNotFoundError):
        return NetworkError("no such revision on the Hub", where=repo_id, got=revision or "main")
    if isinstance(cause, RepositoryNotFoundError):
        return NetworkError(
            "no such folder, and no such repository on the Hub",
            where=repo_id,
            remedy="check the name, or log in with `hf auth login` if it is private",
        )
    if status in (401, 403):
        return NetworkError(
            f"the Hub refused access (HTTP {status})",
            where=repo_id,
            remedy="log in with `hf auth login`",
        )
    if status is not None:
        busy = status in RETRY_STATUSES
        return NetworkError(
            f"the Hub answered HTTP {status}",
            where=repo_id,
            remedy="try again later: what has arrived is kept" if busy else None,
        )
    if isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return NetworkError(
            "no such folder, and not whole in the Hub cache while offline",
            where=repo_id,
            remedy="check the name, or run it once online",
        )
    if isinstance(cause, (HTTPError, ConnectionError, TimeoutError)):
        return NetworkError(
            f"no such folder, and the connection to the Hub failed ({type(cause).__name__})",
            where=repo_id,
            remedy="check the network and run it again: what has arrived is kept",
        )
    if isinstance(cause, OSError):
        return resource_error(cause, repo_id)
    return NetworkError(f"the Hub client failed ({type(cause).__name__})", where=repo_id)


def _root(error: BaseException) -> BaseException:
    """What made the client look into its cache in vain, where it says that."""
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, (HTTPError, OSError)):
            return cause
    return error


def _status(error: BaseException) -> int | None:
    if not isinstance(error, HfHubHTTPError):
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
