"""The trunk's files: their checksums, and the memory they take."""

from __future__ import annotations

import torch
from torch import nn

from moepack_formats import checksum, osio
from moepack_formats.errors import FormatError, IntegrityError
from moepack_formats.pack import Pack
from moepack_formats.paths import resolve_inside
from moepack_formats.tensor_file import read_header


def check_trunk(pack: Pack) -> None:
    """Compare every trunk tensor with its checksum.

    Raises:
        FormatError: A trunk file is malformed, or its tensors are not those of the manifest.
        IntegrityError: A tensor's bytes are damaged; names it.
    """
    seen: set[str] = set()
    for name in pack.manifest.trunk_files:
        descriptor = osio.open_regular(resolve_inside(pack.folder, name))
        with open(descriptor, "rb", buffering=0):
            header = read_header(descriptor, name)
            for tensor in header.tensors.values():
                digest = pack.manifest.trunk.get(tensor.name)
                if digest is None:
                    raise FormatError("unknown tensor", where=f"{name}: {tensor.name}")
                data = osio.read_bytes(descriptor, tensor.start, tensor.nbytes, name)
                if checksum.xxh3(data) != digest:
                    raise IntegrityError(
                        "a trunk tensor's bytes are damaged",
                        where=f"{name}: {tensor.name}",
                        remedy="restore the file or convert again",
                    )
                seen.add(tensor.name)
    missing = sorted(set(pack.manifest.trunk) - seen)
    if missing:
        raise FormatError("a trunk tensor is missing", where=missing[0], remedy="convert again")


def trunk_nbytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Memory that the parameters and buffers of a model (without experts) will take, in bytes."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(
        t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize)
        for t in tensors.values()
    )
