"""Making packs in tests: a quiet conversion, and the stock model that equals a pack."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moepack.convert.options import ConvertOptions
from moepack.convert.plan import make_plan
from moepack.convert.run import convert
from moepack.convert.sources.checkpoint import open_checkpoint
from moepack_formats.manifest import Manifest
from moepack_runtime.kernels.reference import decode_projection
from moepack_runtime.trunk.packed_modules import PackedEmbedding, PackedLinear
from tests import families


class Silent:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.notices: list[str] = []

    def start(self, parameters: int) -> None:
        self.total = parameters

    def advance(self, parameters: int, what: str) -> None:
        self.done += parameters

    def notice(self, line: str) -> None:
        self.notices.append(line)


def make_pack(source: Path, out: Path, *, force: bool = False, **options: Any) -> Manifest:
    """Convert a checkpoint folder; with 16-bit attention, all of the trunk stays 16-bit."""
    if options.get("attn_bits") == 16:
        options.setdefault("head_bits", 16)
    checkpoint = open_checkpoint(str(source))
    try:
        plan = make_plan(checkpoint, ConvertOptions(**options))
        progress = Silent()
        manifest = convert(plan, out, progress, force=force)
        assert progress.done == progress.total
        return manifest
    finally:
        checkpoint.close()


def make_family_pack(family: str, folder: Path, **options: Any) -> Path:
    """A pack of a random model of a family, ``folder / "pack"``, without regard to quality."""
    families.save_checkpoint(families.random_model(family), folder / "source")
    options = {"attn_bits": 4, "expert_bits": 3, "quantizer": "rtn", **options}
    make_pack(folder / "source", folder / "pack", **options)
    return folder / "pack"


class FamilyPacks:
    """Packs of random models of families, converted once for all tests that only read them.

    Args:
        folder: Where they are; the processes of a test run share it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def source(self, family: str, **changes: Any) -> Path:
        """The checkpoint of :func:`tests.families.random_model`."""

        def save(folder: Path) -> None:
            families.save_checkpoint(families.random_model(family, **changes), folder)

        return self._made(f"{family}-source-{_digest(changes)}", save)

    def __call__(self, family: str, changes: dict[str, Any] | None = None, **options: Any) -> Path:
        """A pack, without regard to quality unless told otherwise.

        Args:
            family: The family.
            changes: Keys of its config.
            options: Those of the conversion.
        """
        options = {"attn_bits": 4, "expert_bits": 3, "quantizer": "rtn", **options}

        def make(folder: Path) -> None:
            make_pack(self.source(family, **(changes or {})), folder, **options)

        return self._made(f"{family}-pack-{_digest([changes or {}, options])}", make)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        folder = self._folder / name
        if folder.exists():
            return folder
        self._folder.mkdir(exist_ok=True)
        with open(self._folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing gives it back
            if not folder.exists():
                # Renamed once it is whole: who finds a folder does not ask for the lock.
                unfinished = self._folder / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(folder)
        return folder


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def with_weights_of_pack(stock: PreTrainedModel, packed: PreTrainedModel) -> PreTrainedModel:
    """Give a stock model the weights that a loaded pack's codes stand for.

    Args:
        stock: The family's own model, experts and all.
        packed: The loaded pack.
    """
    from moepack_runtime.experts import find_experts

    runtime = packed.moepack
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, PackedLinear):
                stock.get_submodule(name).weight.copy_(module.dequantized(torch.float32))
            elif isinstance(module, PackedEmbedding):
                rows = module(torch.arange(module.num_embeddings))
                stock.get_submodule(name).weight.copy_(rows)
        for layer, adapter in enumerate(find_experts(stock)):
            for expert, record in runtime.residency.fetch(layer, range(adapter.num_experts)):
                spec = runtime.pack.layers[layer][expert].spec
                parts = {
                    tensor.name: decode_projection(record, tensor, torch.float32)
                    for tensor in spec.tensors
                }
                _write_expert(adapter, expert, parts)
    return stock


def _write_expert(adapter: Any, expert: int, parts: dict[str, torch.Tensor]) -> None:
    """Undo ``ExpertsAdapter.canonical`` by asking it which elements it picks.

    Every element of the module's parameter is numbered, the numbers are brought into canonical
    form, and the values are written where the numbers say.
    """
    numbered, flats = {}, {}
    offset = 0
    for name in adapter.parameters:
        parameter: nn.Parameter = adapter.module.get_parameter(name)
        index = adapter.expert_slice(name, parameter.shape, expert)
        view = parameter.data[index]
        numbers = torch.arange(offset, offset + view.numel()).view(view.shape)
        numbered[name] = adapter.without_expert_axis(name, numbers)
        flats[name] = (parameter, index, offset, view.shape, view.numel())
        offset += view.numel()
    canonical = adapter.canonical(numbered)
    values = torch.empty(offset)
    for part, numbers in canonical.items():
        values[numbers.reshape(-1)] = _part(parts, part).reshape(-1)
    for parameter, index, start, shape, count in flats.values():
        parameter.data[index] = values[start : start + count].view(shape)


def _part(parts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    stem = name.removesuffix("_bias")
    suffix = name[len(stem) :]
    joined = parts.get(f"gate_up{suffix}")
    if joined is not None and stem in ("gate", "up"):
        return joined.chunk(2)[0 if stem == "gate" else 1]
    return parts[name]
