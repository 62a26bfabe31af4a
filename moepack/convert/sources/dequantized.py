"""What readers of quantized checkpoints share: a Linear's parts appear as one plain weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from moepack_formats.errors import IntegrityError

from .folder_source import FolderCheckpoint
from .source_quantization import without_quantization


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized Linear ``X``.

    Attributes:
        name: ``X``; its weight appears as ``X.weight``.
        shape: ``[out, in]`` of the weight.
        dtype: The dtype of the weight once it is decoded.
        parts: The folder's own tensors that it is made of.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: tuple[str, ...]


L = TypeVar("L", bound=QuantizedLinear)


class DequantizedCheckpoint(Generic[L]):
    """A folder with every quantized Linear as one ``X.weight`` (a `Checkpoint`).

    Args:
        plain: The folder's own tensors.
        linears: The quantized Linears, by the tensor in whose place the weight appears.
        dropped: Tensors that say nothing about weights.

    Raises:
        IntegrityError: A weight is there both quantized and not.
    """

    def __init__(
        self, plain: FolderCheckpoint, linears: Mapping[str, L], dropped: Collection[str] = ()
    ) -> None:
        self._plain = plain
        self.folder = plain.folder
        self.source = plain.source
        self.notices = plain.notices
        self.config = without_quantization(plain.config)
        self._linears = {f"{linear.name}.weight": linear for linear in linears.values()}
        hidden = {part for linear in linears.values() for part in linear.parts}.union(dropped)
        every = plain.keys()
        if twice := self._linears.keys() & set(every) - linears.keys():
            raise IntegrityError(
                "a weight is there both quantized and not", where=f"{self.folder}, {min(twice)}"
            )
        self._keys = [
            f"{linears[key].name}.weight" if key in linears else key
            for key in every
            if key in linears or key not in hidden
        ]

    def keys(self) -> list[str]:
        """The tensors' names, in the order of the shards."""
        return list(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`; ``[out, in]`` for a quantized Linear."""
        linear = self._linears.get(key)
        return self._plain.shape(key) if linear is None else linear.shape

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of tensor `key`; that of its scales for a quantized Linear."""
        linear = self._linears.get(key)
        return self._plain.dtype(key) if linear is None else linear.dtype

    def nbytes(self, key: str) -> int:
        """Bytes of tensor `key` once it is dequantized."""
        linear = self._linears.get(key)
        if linear is None:
            return self._plain.nbytes(key)
        return math.prod(linear.shape) * linear.dtype.itemsize

    @property
    def staged_nbytes(self) -> int:
        """The most bytes of shards that lie on the disk at one time."""
        return self._plain.staged_nbytes

    def plan_reads(self, layers: Sequence[Sequence[str]]) -> None:
        """Say in which order the experts will be read, before the trunk."""
        self._plain.plan_reads(
            [[part for key in keys for part in self._parts_of(key)] for keys in layers]
        )

    def clear(self) -> None:
        """Remove what was staged."""
        self._plain.clear()

    def close(self) -> None:
        """Let go of what the folder holds open."""
        self._plain.close()

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read tensor `key`, or the part of it that `index` selects; see `Checkpoint.read`.

        A quantized Linear is read and decoded whole, then sliced.
        """
        linear = self._linears.get(key)
        if linear is None:
            return self._plain.read(key, index)
        weight = self._dequantize(linear)
        return weight[index].clone() if index else weight

    def _parts_of(self, key: str) -> Sequence[str]:
        linear = self._linears.get(key)
        return [key] if linear is None else linear.parts

    def _check_groups(self, linear: L, group: torch.Tensor, groups: int) -> torch.Tensor:
        """The group of each input, ``[in]`` int64, all of them there.

        Raises:
            IntegrityError: One is not.
        """
        low, high = int(group.min()), int(group.max())
        if low < 0 or high >= groups:
            raise IntegrityError(
                "an input belongs to a group that is not there",
                where=f"{self.folder}, {linear.name}",
                wanted=f"0 to {groups - 1}",
                got=low if low < 0 else high,
            )
        return group

    def _dequantize(self, linear: L) -> torch.Tensor:
        """The weight of a Linear, ``[out, in]`` in its dtype."""
        raise NotImplementedError
