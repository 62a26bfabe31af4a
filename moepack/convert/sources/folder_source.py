"""A folder of safetensors files, read by byte range.

`safetensors.safe_open` validates each header. The data is read here instead: its ``pread`` backend
(0.8) reads the whole tensor for any slice of it, which for stacked experts is the whole layer for
each expert.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moepack.convert.sources.model_types import known_as
from moepack.convert.sources.source_files import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    find_weights,
    parse_json,
    read_config,
    read_source,
    read_weight_map,
    safe_path,
    some,
)
from moepack_formats.errors import IntegrityError, UsageError
from moepack_formats.osio import io_errors, read_at

READ_CAP = 1 << 30  # bytes a call; Linux itself stops short of 2 GiB

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@dataclass(frozen=True)
class ShardEntry:
    """Where one tensor lies: `offset` counts from the start of the file."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Stamp:
    """What a file was when its header was read; another value later means it was replaced."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> _Stamp:
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class FolderCheckpoint:
    """The safetensors files of one folder (a `Checkpoint`).

    A file is open only while it is read, so no descriptor is held between reads and one checkpoint
    may serve several threads.

    Args:
        folder: The folder; inside a Hub cache its links into the cache's blobs are followed.
        repo_id: The Hub id it came from, if it was just downloaded.

    Raises:
        UsageError: No ``config.json``, no safetensors weights, or a path that leaves the folder.
        IntegrityError: A shard or tensor that the index names is missing, or a file is damaged.
    """

    def __init__(self, folder: Path, repo_id: str | None = None) -> None:
        self.folder = folder.resolve()
        self.config = read_config(self.folder)
        self.notices: list[str] = []
        self._entries: dict[str, ShardEntry] = {}
        self._files: dict[str, tuple[Path, _Stamp]] = {}
        self._load()
        self._note_model_type()
        self._note_ignored()
        self.source = read_source(self.folder, repo_id)

    def keys(self) -> list[str]:
        """The tensors' names, in the order of the shards."""
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`."""
        return self.entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of tensor `key`."""
        return self.entry(key).dtype

    def nbytes(self, key: str) -> int:
        """Bytes of tensor `key`."""
        return self.entry(key).nbytes

    @property
    def staged_nbytes(self) -> int:
        """Nothing is staged: the files are here."""
        return 0

    def plan_reads(self, layers: Sequence[Sequence[str]]) -> None:
        """Nothing depends on the order."""

    def clear(self) -> None:
        """Nothing was staged."""

    def close(self) -> None:
        """Nothing is held open; here for the protocol."""

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read tensor `key`, or the part of it that `index` selects; see `Checkpoint.read`."""
        entry = self.entry(key)
        run = _covering_run(entry.shape, index or (), key)
        itemsize = entry.dtype.itemsize
        data = torch.empty(math.prod(run.shape) * itemsize, dtype=torch.uint8)
        if data.numel():
            self._read_into(key, data, entry.offset + run.start * itemsize)
        tensor = data.view(entry.dtype).reshape(run.shape)
        # A view of part of the run would keep the whole run alive: give it memory of its own.
        return (
            tensor[run.inner].clone(memory_format=torch.contiguous_format) if run.inner else tensor
        )

    def entry(self, key: str) -> ShardEntry:
        """Where tensor `key` lies."""
        try:
            return self._entries[key]
        except KeyError:
            raise IntegrityError("no such tensor", where=f"{self.folder}, {key}") from None

    def _load(self) -> None:
        name = self._weights_name()
        if not name.endswith(INDEX_SUFFIX):
            self._entries = self._read_header(name)
            return
        listed = read_weight_map(self.folder, name)
        wanted: dict[str, list[str]] = {}
        for key, shard in listed.items():
            wanted.setdefault(shard, []).append(key)
        unlisted = 0
        for shard in sorted(wanted):
            entries = self._read_header(shard)
            where = self.folder / shard
            if missing := [key for key in wanted[shard] if key not in entries]:
                raise IntegrityError(
                    f"the shard lacks {len(missing)} tensors that {name} places there",
                    where=where,
                    wanted=missing[0],
                    remedy="download the checkpoint again",
                )
            for key in entries:
                if listed.get(key, shard) != shard:
                    raise IntegrityError(
                        f"tensor {key} is there twice", where=where, wanted=f"in {listed[key]} only"
                    )
            unlisted += len(entries) - len(wanted[shard])
            self._entries.update((key, entries[key]) for key in wanted[shard])
        if unlisted:
            self.notices.append(f"ignored: {unlisted} tensors that {name} does not list")

    def _weights_name(self) -> str:
        """The file that holds all the tensors, or the index of several."""
        return find_weights(self.folder)

    def _header_path(self, shard: str) -> Path:
        """A file with the header of a shard, and of the shard's size."""
        return safe_path(self.folder, shard)

    def _file_names(self) -> list[str]:
        """The names in the checkpoint's folder."""
        return sorted(path.name for path in self.folder.iterdir())

    def _read_header(self, shard: str) -> dict[str, ShardEntry]:
        path = self._header_path(shard)
        where = self.folder / shard
        try:
            # Opening validates the header: offsets within the file, without holes or overlaps,
            # and of the size that dtype and shape ask for.
            with io_errors(where), safe_open(path, framework="pt", backend="pread"):
                pass
        except SafetensorError as error:
            raise IntegrityError(
                f"damaged safetensors file: {error}",
                where=where,
                remedy="download the checkpoint again",
            ) from error
        with io_errors(where), open(path, "rb") as file:
            stamp = _Stamp.of(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length), where, strict=True)
        self._files[shard] = (path, stamp)
        header.pop("__metadata__", None)
        entries = {}
        for key, item in header.items():
            if item["dtype"] not in _DTYPES:
                raise UsageError(
                    f"tensor {key} has a dtype that is not supported",
                    where=where,
                    wanted=" ".join(_DTYPES),
                    got=item["dtype"],
                )
            start, end = item["data_offsets"]
            dtype, shape = _DTYPES[item["dtype"]], tuple(item["shape"])
            entries[key] = ShardEntry(shard, dtype, shape, 8 + length + start, end - start)
        return entries

    def _read_into(self, key: str, data: torch.Tensor, offset: int) -> None:
        """Fill ``data`` from byte ``offset`` of the shard that holds tensor `key`."""
        shard = self.entry(key).shard
        path, stamp = self._files[shard]
        where = self.folder / shard
        view = data.numpy().data
        with io_errors(where), open(path, "rb", buffering=0) as file:
            if _Stamp.of(file.fileno()) != stamp:
                raise IntegrityError(
                    "the file changed while it was in use", where=where, remedy="run it again"
                )
            for start in range(0, len(view), READ_CAP):
                read_at(file.fileno(), view[start : start + READ_CAP], offset + start, where)

    def _note_model_type(self) -> None:
        model_type = self.config.get("model_type")
        if (known := known_as(model_type)) is not None:
            self.notices.append(f"model type {model_type} is read as {known}, the same model")

    def _note_ignored(self) -> None:
        names = self._file_names()
        code = [name for name in names if name.endswith(".py")]
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        if code:
            self.notices.append(f"ignored: {some(code)} (code in a checkpoint is never run)")
        if self.config.pop("auto_map", None) is not None:
            self.notices.append("ignored: auto_map in config.json (code is never loaded)")
        if pickles:
            self.notices.append(f"ignored: {some(pickles)} (pickles are never opened)")


@dataclass(frozen=True)
class _Run:
    """A contiguous run of a tensor's elements.

    Attributes:
        start: Its first element.
        shape: Its shape, with as many dimensions as the tensor.
        inner: The index that is left to apply to it, ``()`` for none.
    """

    start: int
    shape: tuple[int, ...]
    inner: tuple[slice, ...]


def _covering_run(shape: tuple[int, ...], index: tuple[slice, ...], key: str) -> _Run:
    """The smallest contiguous run that holds the part `index` selects."""
    if len(index) > len(shape) or any(part.step not in (None, 1) for part in index):
        raise ValueError(f"{key}: cannot read {index} of a tensor of shape {shape}")
    bounds = [(0, size) for size in shape]
    for axis, part in enumerate(index):
        low, high, _ = part.indices(shape[axis])
        bounds[axis] = (low, max(low, high))
    # Dimensions of which one place is asked do not break contiguity; the first with more does.
    several = (axis for axis, (low, high) in enumerate(bounds) if high - low != 1)
    last = next(several, len(shape) - 1)
    start = sum(bounds[axis][0] * math.prod(shape[axis + 1 :]) for axis in range(last + 1))
    run_shape = [high - low for low, high in bounds[: last + 1]] + list(shape[last + 1 :])
    rest = bounds[last + 1 :]
    if rest == [(0, size) for size in shape[last + 1 :]]:
        return _Run(start, tuple(run_shape), ())
    inner = (slice(None),) * (last + 1) + tuple(slice(*pair) for pair in rest)
    return _Run(start, tuple(run_shape), inner)
