from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepack.convert.sources.checkpoint import Checkpoint, open_checkpoint
from moepack_formats.errors import IntegrityError, ResourceError, UsageError
from tests.moepack.convert.checkpoints import (
    TENSORS,
    error_of,
    write_config,
    write_folder,
    write_index,
    write_raw,
    write_shards,
)


def test_whole_tensors_and_headers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "model")))
    assert sorted(checkpoint.keys()) == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert checkpoint.dtype(key) is tensor.dtype
        assert checkpoint.nbytes(key) == tensor.nbytes
        assert torch.equal(checkpoint.read(key).float(), tensor.float())
    assert checkpoint.config == {"model_type": "mixtral"}
    assert checkpoint.folder == tmp_path / "model"
    assert checkpoint.source.id == "model"
    assert checkpoint.notices == []
    checkpoint.close()


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_folder(tmp_path_factory.mktemp("stacked"))))


@given(st.lists(st.tuples(st.integers(-7, 7), st.integers(-7, 7)), max_size=3))
def test_any_slice(stacked: Checkpoint, bounds: list[tuple[int, int]]) -> None:
    index = tuple(slice(low, high) for low, high in bounds)
    part = stacked.read("stack", index)
    assert torch.equal(part, TENSORS["stack"][index])
    assert part.is_contiguous()
    assert part.untyped_storage().nbytes() == part.nbytes


def test_a_step_is_refused(stacked: Checkpoint) -> None:
    with pytest.raises(ValueError, match="stack"):
        stacked.read("stack", (slice(0, 4, 2),))
    with pytest.raises(ValueError, match="scalar"):
        stacked.read("scalar", (slice(0, 1),))


def test_unknown_tensor(stacked: Checkpoint) -> None:
    with pytest.raises(IntegrityError, match="nothing"):
        stacked.read("nothing")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's read counters")
def test_only_the_bytes_asked_for_are_read(tmp_path: Path) -> None:
    rows, cols = 1 << 20, 1024  # 1 GiB that takes no disk: the file is one hole
    entry = {"dtype": "U8", "shape": [rows, cols], "data_offsets": [0, rows * cols]}
    write_raw(tmp_path, json.dumps({"big": entry}).encode())
    os.truncate(
        tmp_path / "model.safetensors",
        (tmp_path / "model.safetensors").stat().st_size + rows * cols,
    )

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_so_far()
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.read("big", (slice(5000, 5008),)).shape == (8, cols)
    assert checkpoint.read("big", (slice(7, 8), slice(1, 3))).shape == (1, 2)
    assert read_so_far() - before < 1 << 20


def test_no_file_stays_open(tmp_path: Path) -> None:
    shards = {f"model-{i:03}.safetensors": {f"t{i}": torch.ones(2) * i} for i in range(40)}
    before = len(os.listdir("/dev/fd"))
    checkpoint = open_checkpoint(str(write_shards(tmp_path, shards)))
    for i in range(40):
        assert checkpoint.read(f"t{i}")[0] == i
    assert len(os.listdir("/dev/fd")) == before


def test_shards_and_subfolders(tmp_path: Path) -> None:
    a, b = {"x": torch.ones(2)}, {"y": torch.zeros(3)}
    write_shards(tmp_path, {"a.safetensors": a, "weights/b.safetensors": b})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.keys() == ["x", "y"]
    assert torch.equal(checkpoint.read("y"), b["y"])


def test_a_file_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_folder(tmp_path)))
    os.truncate(tmp_path / "model.safetensors", 400)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: .*changed"):
        checkpoint.read("stack")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ResourceError, match=r"model\.safetensors"):
        checkpoint.read("stack")


def test_code_and_pickles_are_ignored_with_a_notice(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_config(tmp_path, auto_map={"AutoConfig": "configuration_evil.Evil"})
    (tmp_path / "configuration_evil.py").write_text("raise SystemExit('executed')")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    checkpoint = open_checkpoint(str(tmp_path))
    assert "auto_map" not in checkpoint.config
    assert len(checkpoint.notices) == 3
    for word in ("configuration_evil.py", "auto_map", "pytorch_model.bin"):
        assert any(word in notice for notice in checkpoint.notices)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "model.ckpt"])
def test_only_pickles(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = error_of(UsageError, tmp_path)
    assert name in message
    assert "safetensors" in message


def test_tensors_that_the_index_leaves_out(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"x": torch.ones(2), "extra": torch.ones(1)}})
    write_index(tmp_path, {"x": "a.safetensors"})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.keys() == ["x"]
    assert checkpoint.notices == [
        "ignored: 1 tensors that model.safetensors.index.json does not list"
    ]


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: apache-2.0\ntags: [moe]\n---\n# Model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: own-1.0\n---\n", "own-1.0"),
        ("# No metadata\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: : :\n\t- x\n---\n", None),
    ],
)
def test_licence(tmp_path: Path, card: str, license_: str | None) -> None:
    write_folder(tmp_path)
    (tmp_path / "README.md").write_text(card)
    assert open_checkpoint(str(tmp_path)).source.license == license_
