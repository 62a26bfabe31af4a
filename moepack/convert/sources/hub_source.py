"""Checkpoints on the Hub: downloaded into the Hub cache, or found there."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from moepack.convert.sources.source_files import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    find_index,
    read_weight_map,
)
from moepack_runtime.hub.errors import UnreachableError
from moepack_runtime.hub.remote import LIBRARY
from moepack_runtime.hub.retry import retrying

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


def download(
    repo_id: str, *, revision: str | None, offline: bool, check: Callable[[Path], object]
) -> Path:
    """Bring a checkpoint into the Hub cache.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit.
        offline: Use the cache alone.
        check: Called with the folder once the small files are there and before the weights are
            downloaded; what it raises ends the download.

    Returns:
        The snapshot's folder, named after the commit.

    Raises:
        NetworkError: The Hub could not be reached or refused, or the cache lacks a file.
        UsageError: The id or revision is malformed.
        ResourceError: A file could not be written.
    """
    folder = download_small_files(repo_id, revision=revision, offline=offline)
    check(folder)
    # From the commit that the small files came from, whatever the branch has become since.
    index = find_index(folder)
    if index is None:
        return _fetch(repo_id, folder.name, WHOLE_WEIGHTS, offline=offline)
    shards = sorted(set(read_weight_map(folder, index).values()))
    patterns = [glob.escape(shard) for shard in shards]
    return _fetch(repo_id, folder.name, patterns, offline=offline)


def download_small_files(repo_id: str, *, revision: str | None, offline: bool = False) -> Path:
    """Bring everything of a checkpoint but its weights into the Hub cache.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit.
        offline: Use the cache alone.

    Returns:
        The snapshot's folder, named after the commit.

    Raises:
        NetworkError: The Hub could not be reached or refused, or the cache lacks a file.
        UsageError: The id or revision is malformed.
        ResourceError: A file could not be written.
    """
    return _fetch(repo_id, revision, SMALL_FILES, offline=offline)


def _fetch(repo_id: str, revision: str | None, patterns: list[str], *, offline: bool) -> Path:
    try:
        folder = retrying(
            lambda: snapshot_download(
                repo_id,
                revision=revision,
                local_files_only=offline,
                allow_patterns=patterns,
                ignore_patterns=["*.py", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)],
                library_name=LIBRARY,
            ),
            repo_id,
            revision,
        )
    except UnreachableError as error:
        raise error.or_folder() from error
    return Path(folder)
