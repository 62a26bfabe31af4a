"""Checkpoints as conversion sees them: named tensors that are read a slice at a time.

`open_checkpoint` turns a local folder or a Hub id into a `Checkpoint`. A checkpoint is data only:
no Python file, pickle or ``auto_map`` entry of it is ever executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import constants

from moepack.convert.sources.compressed import CompressedCheckpoint
from moepack.convert.sources.compressed_settings import CompressedSettings
from moepack.convert.sources.folder_source import FolderCheckpoint
from moepack.convert.sources.gptq import GPTQCheckpoint
from moepack.convert.sources.hub_source import download, download_small_files
from moepack.convert.sources.source_files import read_config
from moepack.convert.sources.source_quantization import Settings, source_settings
from moepack.convert.sources.streamed_source import StreamedCheckpoint
from moepack_formats.errors import MoepackError, UsageError
from moepack_formats.manifest import Source
from moepack_runtime.hub.remote import RemoteRepo
from moepack_runtime.hub.repo_id import looks_like_repo_id
from moepack_runtime.plugin.pack_config import MODEL_TYPE


class Checkpoint(Protocol):
    """A set of named tensors with a model configuration."""

    @property
    def folder(self) -> Path:
        """Where ``config.json`` and the tokenizer files lie."""

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` without ``auto_map``.

        ``quantization_config`` is there only when the tensors still are quantized (``fp8`` and
        ``mxfp4``, which transformers' weight conversion dequantizes).
        """

    @property
    def source(self) -> Source:
        """Id, revision and licence, as far as they are known."""

    @property
    def notices(self) -> list[str]:
        """One line for each thing of the source that is not used, for the user to see."""

    def keys(self) -> list[str]:
        """The tensors' names, in the order of the shards."""

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`, from the header: no data is read."""

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of tensor `key`, from the header: no data is read."""

    def nbytes(self, key: str) -> int:
        """Bytes that tensor `key` takes when it is read whole."""

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read tensor `key`, or the part of it that `index` selects.

        Args:
            key: A name that `keys` lists.
            index: One slice of step 1 for each of the leading dimensions; the remaining
                dimensions are read whole.

        Returns:
            A tensor on the CPU with memory of its own.

        Raises:
            IntegrityError: The file is damaged, or changed since it was opened.
            ResourceError: The operating system could not read it.
        """

    @property
    def staged_nbytes(self) -> int:
        """The most bytes of the source that lie on the disk at one time; 0 for a folder."""

    def plan_reads(self, layers: Sequence[Sequence[str]]) -> None:
        """Say in which order the experts will be read, before the trunk.

        Args:
            layers: For each MoE layer, the tensors that its experts come from.
        """

    def clear(self) -> None:
        """Remove what lies on the disk of a source that is fetched piece by piece."""

    def close(self) -> None:
        """Let go of what the checkpoint holds open."""


def open_checkpoint(
    src: str, *, revision: str | None = None, offline: bool = False, stage: Path | None = None
) -> Checkpoint:
    """Open a checkpoint folder, or one on the Hub.

    Args:
        src: A folder with ``config.json`` and safetensors files, or a Hub id ``org/name``.
        revision: Branch, tag or commit of a Hub id.
        offline: Use what the Hub cache holds and never the network.
        stage: A folder in which shards of a Hub id may lie while they are needed; without it the
            whole checkpoint is downloaded into the Hub cache.

    Returns:
        The checkpoint. GPTQ and compressed-tensors weights appear as plain ``X.weight`` tensors.

    Raises:
        UsageError: `src` is neither, or its weights are in a form that is not supported.
        IntegrityError: A file of it is missing or damaged.
        NetworkError: The Hub could not be reached or refused.
    """
    folder = Path(src).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UsageError("a revision belongs to a Hub id, not to a folder", where=src)
        return _open_folder(folder)
    if folder.exists():
        raise UsageError("not a folder", where=src, remedy="name the folder that holds config.json")
    if not looks_like_repo_id(src):
        raise UsageError(
            "no such folder, and not a Hub id either",
            where=src,
            wanted="an existing folder, or org/name",
        )
    if stage is not None and not (offline or constants.HF_HUB_OFFLINE):
        folder = download_small_files(src, revision=revision)
        settings = _settings(folder)
        if not _is_whole(src, folder):
            remote = RemoteRepo(src, folder.name)
            return _dequantized(StreamedCheckpoint(folder, remote, stage), settings)
    else:
        folder = download(src, revision=revision, offline=offline, check=_settings)
    return _open_folder(folder, repo_id=src)


def _is_whole(repo_id: str, folder: Path) -> bool:
    """Whether the Hub cache happens to hold all the shards of this commit."""
    try:
        download(repo_id, revision=folder.name, offline=True, check=_settings)
        return True
    except MoepackError:
        return False


def source_config(src: str, *, revision: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint; of a Hub id only the small files are downloaded.

    Raises:
        UsageError: `src` is neither a folder nor a Hub id.
        IntegrityError: The file is missing or damaged.
        NetworkError: The Hub could not be reached or refused.
    """
    folder = Path(src).expanduser()
    if not folder.is_dir():
        if not looks_like_repo_id(src):
            raise UsageError("no such folder, and not a Hub id either", where=src)
        folder = download_small_files(src, revision=revision)
    elif revision is not None:
        raise UsageError("a revision belongs to a Hub id, not to a folder", where=src)
    return read_config(folder)


def _open_folder(folder: Path, repo_id: str | None = None) -> Checkpoint:
    return _dequantized(FolderCheckpoint(folder, repo_id=repo_id), _settings(folder))


def _dequantized(plain: FolderCheckpoint, settings: Settings | None) -> Checkpoint:
    if settings is None:
        return plain
    if isinstance(settings, CompressedSettings):
        return CompressedCheckpoint(plain, settings)
    return GPTQCheckpoint(plain, settings)


def _settings(folder: Path) -> Settings | None:
    config = read_config(folder)
    if config.get("model_type") == MODEL_TYPE:
        raise UsageError(
            "this is already a pack", where=folder, remedy="convert the original checkpoint"
        )
    return source_settings(config, folder)
