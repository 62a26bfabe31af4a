from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moepack.convert.sources.checkpoint import open_checkpoint
from moepack_formats.errors import IntegrityError, MoepackError, UsageError
from tests.moepack.convert.checkpoints import (
    SHA,
    TENSORS,
    error_of,
    hub_cache,
    write_config,
    write_folder,
    write_index,
    write_raw,
    write_shards,
)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "C:\\a",
        "C:a",
        "x/../../a",
        "\\\\host\\a",
        "a\0b",
        "",
    ],
)
def test_paths_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    write_config(tmp_path / "model")
    write_index(tmp_path / "model", {"x": name})
    assert "leaves the checkpoint" in error_of(UsageError, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "model")
    (tmp_path / "model" / name).rename(tmp_path / "outside")
    (tmp_path / "model" / name).symlink_to("../outside")
    assert name in error_of(UsageError, tmp_path / "model")


@pytest.mark.parametrize("shared", [False, True])
def test_links_into_a_hub_cache(tmp_path: Path, shared: bool) -> None:
    checkpoint = open_checkpoint(str(hub_cache(tmp_path, shared=shared)))
    assert torch.equal(checkpoint.read("stack"), TENSORS["stack"])
    source = checkpoint.source
    assert (source.id, source.revision, source.license) == ("org/name", SHA, "mit")


def test_a_hub_cache_does_not_open_the_rest_of_the_disk(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "model.safetensors").unlink()
    save_file({"x": torch.ones(2)}, tmp_path / "outside.safetensors")
    (snapshot / "model.safetensors").symlink_to("../../../outside.safetensors")
    assert "leaves the checkpoint" in error_of(UsageError, snapshot)


def test_fifo(tmp_path: Path) -> None:
    write_config(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in error_of(UsageError, tmp_path)


def test_loop_of_links(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    assert "model.safetensors" in error_of(MoepackError, tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(
        tmp_path, {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.ones(2)}}
    )
    (tmp_path / "b.safetensors").unlink()
    message = error_of(IntegrityError, tmp_path)
    assert "b.safetensors: missing file" in message
    assert "download" in message


def test_dangling_link(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("gone")
    assert "missing file" in error_of(IntegrityError, tmp_path)


def test_shard_without_a_listed_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"x": torch.ones(2)}})
    write_index(tmp_path, {"x": "a.safetensors", "layers.7.y": "a.safetensors"})
    message = error_of(IntegrityError, tmp_path)
    assert "a.safetensors" in message
    assert "layers.7.y" in message


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    both = {"x": torch.ones(2)}
    write_shards(tmp_path, {"a.safetensors": both, "b.safetensors": {**both, "y": torch.ones(2)}})
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    assert "tensor x is there twice" in error_of(IntegrityError, tmp_path)


ENTRY = b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
WHOLE = b"{" + ENTRY + b"}"


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        pytest.param(WHOLE, b"\0" * 4, None, id="truncated"),
        pytest.param(WHOLE, b"\0" * 12, None, id="trailing"),
        pytest.param(b"{" + ENTRY + b"," + ENTRY + b"}", b"\0" * 8, None, id="twice"),
        pytest.param(WHOLE, b"\0" * 8, 1 << 63, id="2^63"),
        pytest.param(WHOLE, b"\0" * 8, 5000, id="beyond"),
        pytest.param(WHOLE.replace(b"F32", b"F33"), b"\0" * 8, None, id="dtype"),
        pytest.param(WHOLE.replace(b"[2]", b"[-2]"), b"\0" * 8, None, id="negative"),
        pytest.param(WHOLE.replace(b"[0,8]", b"[8,0]"), b"\0" * 8, None, id="reversed"),
        pytest.param(
            WHOLE.replace(b"[2]", b"[%d,8]" % (2**63 - 1)), b"\0" * 8, None, id="overflow"
        ),
        pytest.param(b"\xff\xfe{}", b"", None, id="utf-8"),
        pytest.param(b"[" * 100_000, b"", None, id="nested"),
        pytest.param(b"", b"", None, id="empty"),
    ],
)
def test_damaged_shard(tmp_path: Path, header: bytes, data: bytes, length: int | None) -> None:
    write_raw(tmp_path, header, data, length)
    assert "model.safetensors" in error_of(IntegrityError, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_file_that_is_no_safetensors_at_all(tmp_path: Path, content: bytes) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in error_of(IntegrityError, tmp_path)


def test_dtype_without_a_torch_equivalent(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    assert "F4" in error_of(UsageError, write_raw(tmp_path, header, b"\0\0"))


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map":{}}',
        b'{"weight_map":[1]}',
        b'{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_damaged_index(tmp_path: Path, index: bytes) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    assert "model.safetensors.index.json" in error_of(IntegrityError, tmp_path)


@pytest.mark.parametrize("config", [b"", b"[]", b"\xff", b'{"a":' * 100_000])
def test_damaged_config(tmp_path: Path, config: bytes) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    assert "config.json" in error_of(IntegrityError, tmp_path)


def test_no_config(tmp_path: Path) -> None:
    assert "config.json" in error_of(UsageError, tmp_path)


def test_empty_folder_but_for_the_config(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert "no safetensors weights" in error_of(UsageError, tmp_path)


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert "not a folder" in error_of(UsageError, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "src",
    ["./missing", "/missing/folder", "missing", "a/b/c", "a/../b", "a/b/", "", "a b/c", "a/b.git"],
)
def test_neither_a_folder_nor_a_hub_id(
    src: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(UsageError, src if src else str(tmp_path / "x"))
    assert "folder" in message
    assert "org/name" in message


def test_a_revision_of_a_folder(tmp_path: Path) -> None:
    assert "revision" in error_of(UsageError, write_folder(tmp_path), revision="main")
