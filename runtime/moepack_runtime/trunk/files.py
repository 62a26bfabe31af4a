"""The trunk's files: their checksums, and the memory they take."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moepack_formats import checksum, osio
from moepack_formats.errors import FormatError, ResourceError
from moepack_formats.pack import Pack
from moepack_formats.paths import resolve_inside
from moepack_formats.trunk import check_complete, read_trunk_file

from ..cache.arena import huge_pages
from ..options import format_size

_ALIGNMENT = 64
"""Of a tensor's copy, bytes: a line of the cache."""

if TYPE_CHECKING:  # this module is imported while transformers is still importing its own
    from transformers import PreTrainedModel


def check_trunk(pack: Pack) -> dict[str, tuple[int, ...]]:
    """Compare every trunk tensor with its checksum.

    Returns:
        The shapes of the stored tensors by name.

    Raises:
        FormatError: A trunk file is malformed, or its tensors are not those of the manifest.
        IntegrityError: A header or a tensor's bytes are damaged; names it.
    """
    seen: dict[str, tuple[int, ...]] = {}
    for name in pack.manifest.trunk_files:
        descriptor = osio.open_regular(resolve_inside(pack.folder, name))
        with open(descriptor, "rb", buffering=0):
            _, tensors = read_trunk_file(pack.manifest, descriptor, name, seen)
            for tensor in tensors:
                at = tensor.entry
                tensor.check(checksum.xxh3_of_range(descriptor, at.start, at.nbytes, name))
                seen[at.name] = at.shape
    check_complete(pack.manifest, seen)
    return seen


def check_fits(model: PreTrainedModel, stored: dict[str, tuple[int, ...]]) -> None:
    """The trunk must hold exactly what the config's model needs.

    transformers would fill a gap with random numbers and only warn.

    Args:
        model: On the meta device, without its experts and with packed modules in place.
        stored: Shapes by name, from :func:`check_trunk`.

    Raises:
        FormatError: A tensor is missing, has another shape, or has no place in the model.
    """
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in needed.items():
        if name in stored and stored[name] != shape:
            raise FormatError(
                "a trunk tensor has another shape than the config's",
                where=name,
                wanted=list(shape),
                got=list(stored[name]),
            )
    tied = [set(pair) for pair in model.all_tied_weights_keys.items()]
    ignored = model._keys_to_ignore_on_load_missing or ()
    may_be_absent = re.compile("|".join(f"({pattern})" for pattern in ignored) or r"(?!)")
    for name in needed.keys() - stored:
        has_twin = any(name in pair and pair & stored.keys() for pair in tied)
        if not has_twin and not may_be_absent.search(name):
            raise FormatError("the trunk lacks a tensor that the config's model has", where=name)
    extra = sorted(stored.keys() - needed)
    if extra:
        raise FormatError("the trunk has a tensor that the config's model lacks", where=extra[0])


def trunk_nbytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Memory that the parameters and buffers of a model (without experts) will take, in bytes."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(
        t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize)
        for t in tensors.values()
    )


def copy_out_of_files(model: nn.Module) -> None:
    """Bring every tensor into memory of the process, one at a time.

    transformers leaves tensors that need no conversion in the mapped file. Its pages come and go
    with the page cache, so that under a limit they would be read again and again, and touching one
    after the file was truncated ends the process.

    Raises:
        ResourceError: There is not enough memory.
    """
    tensors = [
        tensor
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.is_cpu and not tensor.is_meta and tensor.numel() > 0
    ]
    same: dict[tuple[int, torch.Size, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        same.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), []).append(tensor)
    sizes = [-(-group[0].nbytes // _ALIGNMENT) * _ALIGNMENT for group in same.values()]
    places = [0, *itertools.accumulate(sizes)]
    try:
        memory = huge_pages(places[-1])
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"cannot take {format_size(places[-1])} for the trunk: {error}",
        ) from error
    for group, at in zip(same.values(), places, strict=False):
        first = group[0]
        # A storage of its own, or torch.save() would not know what to write.
        copy = torch.frombuffer(memory, dtype=first.dtype, count=first.numel(), offset=at)
        copy = copy.view(first.shape)
        copy.copy_(first.data)
        for tensor in group:  # tied tensors stay tied; the original goes before the next is copied
            tensor.data = copy
