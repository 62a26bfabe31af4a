"""Shards of a checkpoint on the Hub, on the disk for only as long as they are needed.

A shard is fetched when the first of its tensors is read, and its sha256 is compared before that.
Once the last MoE layer with experts in it is done, only the rest of it stays: a file with holes, in
which the tensors of the trunk keep their places. So every shard is fetched once, or once for each
time that all experts are read: calibration, and the choice of schemes, come before the conversion.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moepack_formats import osio
from moepack_formats.manifest import FileEntry
from moepack_runtime.hub.fetch import Place, check_sha256, fetch_checked, remove_unfinished
from moepack_runtime.hub.progress import Quiet
from moepack_runtime.hub.remote import RemoteRepo

_COPY_NBYTES = 16 << 20


@dataclass(frozen=True)
class Span:
    """Bytes of one tensor in its shard."""

    shard: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Schedule:
    """When each shard is needed.

    Attributes:
        last_layer: For each shard with experts, the last MoE layer that reads it.
        first_layer: And the first.
        trunk: For each shard, what of it is needed after the experts.
    """

    first_layer: Mapping[str, int]
    last_layer: Mapping[str, int]
    trunk: Mapping[str, Sequence[Span]]

    def staged_nbytes(self, sizes: Mapping[str, int]) -> int:
        """The most bytes that lie on the disk at one time.

        Args:
            sizes: Bytes of each shard.
        """
        layers = max(self.last_layer.values(), default=-1) + 1
        whole = [
            sum(
                sizes[shard]
                for shard, first in self.first_layer.items()
                if first <= layer <= self.last_layer[shard]
            )
            for layer in range(layers)
        ]
        rest = sum(span.nbytes for spans in self.trunk.values() for span in spans)
        pure = [size for shard, size in sizes.items() if shard not in self.last_layer]
        return max(whole, default=0) + rest + max(pure, default=0)


class ShardStage:
    """Fetches shards and gives their bytes.

    Args:
        remote: The repository at one commit.
        folder: Where shards lie meanwhile.
    """

    def __init__(self, remote: RemoteRepo, folder: Path) -> None:
        self._remote, self._folder = remote, folder
        self._schedule: Schedule | None = None
        self._lock = threading.Lock()
        self._whole: set[str] = set()
        self._layer = -1

    def plan(self, schedule: Schedule) -> None:
        """Say when shards are needed; without it each stays once it is fetched."""
        self._schedule = schedule

    def read_into(self, data: memoryview, span: Span, layer: int | None, where: object) -> None:
        """Read bytes of a shard, fetching it if need be.

        Args:
            data: Where they go, ``span.nbytes`` long.
            span: Which bytes.
            layer: The MoE layer they are for; None for the trunk.
            where: For messages.

        Raises:
            NetworkError: The shard cannot be fetched.
            IntegrityError: It stays damaged.
            ResourceError: The disk is full or cannot be read.
        """
        with self._lock:
            shard = span.shard
            path = self._for_trunk(shard) if layer is None else self._for_experts(shard, layer)
            with osio.io_errors(where):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                osio.read_at(descriptor, data, span.start, where)
            finally:
                os.close(descriptor)

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _for_experts(self, shard: str, layer: int) -> Path:
        """Where to read an expert's tensor, without the shards of other layers."""
        self._layer = layer
        self._thin_all_but(layer)
        return self._fetch(shard)

    def _for_trunk(self, shard: str) -> Path:
        """Where to read a tensor of the trunk: what is left of the shard, or all of it.

        Calibration reads the trunk of a layer just before its experts, so a shard that is there is
        left as it is. Where another one has to come, the experts before it have been read.
        """
        path, rest = self._path(shard), self._rest(shard)
        if path.exists():
            return self._fetch(shard)
        if rest.exists():
            return rest
        self._thin_all_but(self._layer + 1)
        self._fetch(shard)
        if self._has_experts(shard, self._layer + 1):
            return path
        self._thin(shard)
        return rest if rest.exists() else path

    def _thin_all_but(self, layer: int) -> None:
        """Thin the shards that hold no experts of a layer."""
        if self._schedule is None:
            return
        for shard in self._schedule.last_layer:
            if not self._has_experts(shard, layer) and self._path(shard).exists():
                self._thin(shard)

    def _has_experts(self, shard: str, layer: int) -> bool:
        schedule = self._schedule
        if schedule is None or shard not in schedule.last_layer:
            return False
        return schedule.first_layer[shard] <= layer <= schedule.last_layer[shard]

    def _fetch(self, shard: str) -> Path:
        path, facts = self._path(shard), self._remote.files[shard]
        if shard in self._whole:
            return path
        if path.exists() and path.stat().st_size == facts.size:
            # From an earlier run, which may have been killed while it was written.
            with contextlib.suppress(Exception):
                if facts.sha256 is not None:
                    check_sha256(path, FileEntry(facts.size, facts.sha256), shard)
                self._whole.add(shard)
                return path
        path.unlink(missing_ok=True)
        place = Place(self._folder / "incoming")
        remove_unfinished(self._folder / "incoming")
        if facts.sha256 is None:
            arrived = self._remote.download(shard, folder=place.folder)
        else:
            entry = FileEntry(facts.size, facts.sha256)
            arrived = fetch_checked(self._remote, shard, entry, Quiet(), place)
        with osio.io_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived, path)
        self._whole.add(shard)
        return path

    def _thin(self, shard: str) -> None:
        """Keep of a shard what the trunk needs, in a file with holes elsewhere."""
        path, rest = self._path(shard), self._rest(shard)
        if self._schedule is None:
            return
        with osio.io_errors(rest):
            if shard not in self._schedule.last_layer:
                rest.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, rest)  # nothing of it can be left out
            elif not rest.exists():
                _copy_spans(path, rest, self._schedule.trunk.get(shard, ()))
        path.unlink(missing_ok=True)
        self._whole.discard(shard)

    def _path(self, shard: str) -> Path:
        return self._folder / "whole" / shard

    def _rest(self, shard: str) -> Path:
        return self._folder / "trunk" / shard


def _copy_spans(source: Path, target: Path, spans: Sequence[Span]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with open(source, "rb") as read, open(part, "wb") as write:
        write.truncate(source.stat().st_size)
        for span in spans:
            read.seek(span.start)
            write.seek(span.start)
            left = span.nbytes
            while left:
                piece = read.read(min(left, _COPY_NBYTES))
                write.write(piece)
                left -= len(piece)
        write.flush()
        osio.sync(write.fileno())
    osio.replace(part, target)
