"""Checkpoint folders for the tests of sources."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moepack.convert.sources.checkpoint import open_checkpoint
from moepack_formats.errors import MoepackError

SHA = "0123456789abcdef0123456789abcdef01234567"
TENSORS = {
    "stack": torch.arange(4 * 5 * 6, dtype=torch.float32).view(4, 5, 6),
    "matrix": torch.arange(12).view(3, 4).to(torch.bfloat16),
    "codes": torch.arange(16, dtype=torch.uint8).view(4, 4),
    "eights": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def write_config(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", **config}))


def write_folder(folder: Path, tensors: Mapping[str, torch.Tensor] = TENSORS) -> Path:
    write_config(folder)
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    write_config(folder)
    weight_map = {}
    for name, tensors in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    document = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def write_raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    write_config(folder)
    size = struct.pack("<Q", len(header) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + header + data)
    return folder


def error_of(kind: type[MoepackError], folder: Path | str, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(str(folder), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def hub_cache(root: Path, *, shared: bool = False) -> Path:
    """A Hub cache with one model, laid out as the client does; returns the snapshot."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / SHA
    write_folder(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = repo / "blobs" / f"blob{number}"
        path.rename(blob)
        if shared:
            store = root / "blobs" / "ab" / f"ab{number}"
            store.parent.mkdir(parents=True, exist_ok=True)
            blob.rename(store)
            blob.symlink_to(f"../../blobs/ab/ab{number}")
        path.symlink_to(f"../../blobs/blob{number}")
    return snapshot
