"""What the tests of the weight mapping share: editing checkpoints, comparing with a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moepack.convert.meta_model import build_meta_model
from moepack.convert.sources.checkpoint import Checkpoint, open_checkpoint
from moepack.convert.sources.mapping import WeightMapping
from moepack_runtime.experts import find_experts
from tests import families

Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


def open_mapping(folder: Path) -> tuple[Checkpoint, WeightMapping]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, WeightMapping(build_meta_model(checkpoint.config), checkpoint)


def edit(folder: Path, change: Edit) -> None:
    """Rewrites a one-file checkpoint; ``change`` edits its tensors and its config in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def one_file(family: str, folder: Path, **options: Any) -> PreTrainedModel:
    model = families.random_model(family, **options)
    families.save_checkpoint(model, folder, max_shard_size="1GB")
    return model


def assert_same_as(model: PreTrainedModel, mapping: WeightMapping) -> None:
    """Experts and trunk together are exactly the state of the loaded model."""
    state = model.state_dict()
    for adapter in mapping.adapters:
        loaded = {a.name: a for a in find_experts(model)}[adapter.name]
        for expert in range(adapter.num_experts):
            one = {}
            for parameter in adapter.parameters:
                whole = state[f"{adapter.name}.{parameter}"]
                sliced = whole[loaded.expert_slice(parameter, whole.shape, expert)]
                one[parameter] = loaded.without_expert_axis(parameter, sliced)
            wanted = loaded.canonical(one)
            got = mapping.experts(adapter, expert)
            assert set(got) == set(wanted)
            for part, tensor in got.items():
                where = (adapter.name, expert, part)
                assert tensor.dtype == wanted[part].dtype, where
                assert tensor.is_contiguous(), where
                assert torch.equal(tensor, wanted[part]), where
    experts = {f"{a.name}.{p}" for a in mapping.adapters for p in a.parameters}
    targets = mapping.trunk_targets()
    got_names = set()
    for target, (name, tensor) in zip(targets, mapping.trunk(), strict=True):
        assert target.name == name
        assert (target.dtype, target.shape) == (tensor.dtype, tuple(tensor.shape)), name
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name
        got_names.add(name)
    assert set(state) - experts - got_names == set(mapping.missing) - experts


class CountingCheckpoint:
    """Notes how many bytes are read."""

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        self.bytes = 0
        self.keys_read: list[str] = []

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> Tensor:
        tensor = self._inner.read(key, index)
        self.bytes += tensor.nbytes
        self.keys_read.append(key)
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
