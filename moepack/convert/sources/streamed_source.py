"""A checkpoint on the Hub that is never stored as a whole.

Planning reads its config and the headers of its shards, by range requests. Converting fetches one
shard after the other, see :mod:`moepack.convert.sources.shard_stage`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from moepack_formats.errors import IntegrityError, UsageError
from moepack_formats.osio import io_errors
from moepack_runtime.hub.remote import RemoteRepo

from .folder_source import FolderCheckpoint
from .shard_stage import Schedule, ShardStage, Span
from .source_files import INDEX_SUFFIX, JSON_CAP, check_relative, find_index

_FIRST_NBYTES = 256 << 10
"""Enough for the header of a usual shard, so that one request does."""


class StreamedCheckpoint(FolderCheckpoint):
    """A checkpoint on the Hub (a `Checkpoint`).

    Args:
        folder: The Hub cache's snapshot with everything but the weights.
        remote: The repository, at the snapshot's commit.
        stage: Where shards lie while they are needed.

    Raises:
        UsageError: No safetensors weights.
        IntegrityError: A header is damaged.
        NetworkError: The Hub cannot be reached or refuses.
    """

    def __init__(self, folder: Path, remote: RemoteRepo, stage: Path) -> None:
        self._remote = remote
        self._stage = ShardStage(remote, stage)
        self._schedule: Schedule | None = None
        self._layer_of: dict[str, int] = {}
        with (
            io_errors("temporary file"),
            tempfile.TemporaryDirectory(prefix="moepack-") as headers,
        ):
            self._headers = Path(headers)
            super().__init__(folder, repo_id=remote.repo_id)

    def plan_reads(self, layers: Sequence[Sequence[str]]) -> None:
        """Say in which order the experts will be read, before the trunk.

        Args:
            layers: For each MoE layer, the tensors that its experts come from.
        """
        self._layer_of = {key: i for i, keys in enumerate(layers) for key in keys}
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        trunk: dict[str, list[Span]] = {}
        for key in self.keys():
            entry, layer = self.entry(key), self._layer_of.get(key)
            if layer is None:
                span = Span(entry.shard, entry.offset, entry.nbytes)
                trunk.setdefault(entry.shard, []).append(span)
            else:
                first[entry.shard] = min(first.get(entry.shard, layer), layer)
                last[entry.shard] = max(last.get(entry.shard, layer), layer)
        self._schedule = Schedule(first, last, trunk)
        self._stage.plan(self._schedule)

    @property
    def staged_nbytes(self) -> int:
        """The most bytes of shards that lie on the disk at one time."""
        shards = {self.entry(key).shard for key in self.keys()}
        sizes = {shard: self._remote.files[shard].size for shard in shards}
        if self._schedule is None:
            return sum(sizes.values())
        return self._schedule.staged_nbytes(sizes)

    def clear(self) -> None:
        """Remove the shards that are still there: the conversion is done."""
        self._stage.clear()

    def _read_into(self, key: str, data: torch.Tensor, offset: int) -> None:
        view, shard = data.numpy().data, self.entry(key).shard
        where = f"{self._remote.repo_id}, {shard}"
        self._stage.read_into(view, Span(shard, offset, len(view)), self._layer_of.get(key), where)

    def _weights_name(self) -> str:
        names = self._file_names()
        if "model.safetensors" in names:
            return "model.safetensors"
        if (index := find_index(self.folder)) is not None:
            return index
        singles = [n for n in names if n.startswith("gptq_model-") and n.endswith(".safetensors")]
        if len(singles) == 1:
            return singles[0]
        raise UsageError(
            "no safetensors weights",
            where=self._remote.repo_id,
            wanted=f"model.safetensors or model{INDEX_SUFFIX}",
            remedy="convert the weights to safetensors first",
        )

    def _file_names(self) -> list[str]:
        return sorted(name for name in self._remote.files if "/" not in name)

    def _header_path(self, shard: str) -> Path:
        """The header of a shard, in a file that is a hole otherwise."""
        check_relative(shard, self.folder)
        where = f"{self._remote.repo_id}, {shard}"
        listed = self._remote.files.get(shard)
        if listed is None:
            raise IntegrityError("missing file", where=where)
        start = self._remote.read_range(shard, 0, min(_FIRST_NBYTES, listed.size))
        length = int.from_bytes(start[:8], "little")
        if length > min(JSON_CAP, listed.size):
            raise IntegrityError("damaged safetensors file: impossible header", where=where)
        if 8 + length > len(start):
            start += self._remote.read_range(shard, len(start), 8 + length)
        path = self._headers / shard
        with io_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(start[: 8 + length])
                file.truncate(listed.size)
        return path
