from __future__ import annotations

import types
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors as hub
import pytest
import torch

from moepack.convert.sources import hub_source
from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.folder_source import FolderCheckpoint
from moepack_formats.errors import NetworkError, ResourceError, UsageError
from tests.moepack.convert.checkpoints import (
    SHA,
    TENSORS,
    error_of,
    hub_cache,
    write_config,
    write_folder,
    write_index,
    write_shards,
)


class FakeHub:
    """Stands in for `snapshot_download`: "downloads" from a folder into a Hub cache."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote = remote
        self.snapshot = cache / "models--org--name" / "snapshots" / SHA
        self.calls: list[dict[str, Any]] = []
        self.errors: list[Exception] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append(options)
        if self.errors:
            raise self.errors.pop(0)
        for path in self.remote.rglob("*"):
            name = path.relative_to(self.remote).as_posix()
            allowed = any(fnmatch(name, pattern) for pattern in options["allow_patterns"])
            if allowed and not any(fnmatch(name, p) for p in options["ignore_patterns"]):
                target = self.snapshot / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return str(self.snapshot)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr(hub_source, "snapshot_download", fake)
    monkeypatch.setattr("moepack_runtime.hub.retry.DELAYS", (0.0, 0.0))
    monkeypatch.chdir(tmp_path)
    return fake


def http_error(kind: type[hub.HfHubHTTPError], status: int) -> hub.HfHubHTTPError:
    response: Any = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("two\nlines with hf_secret", response=response)


def test_download(fake_hub: FakeHub) -> None:
    shards = {"m-1.safetensors": {"x": torch.ones(2)}, "m-2.safetensors": {"y": torch.ones(3)}}
    write_shards(fake_hub.remote, shards)
    for name in (
        "evil.py",
        "LICENSE.py",
        "pytorch_model.bin",
        "other.safetensors",
        "tokenizer.json",
    ):
        (fake_hub.remote / name).write_text("{}")
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert checkpoint.keys() == ["x", "y"]
    assert (checkpoint.source.id, checkpoint.source.revision) == ("org/name", SHA)
    there = {path.name for path in fake_hub.snapshot.iterdir()}
    assert there == {*shards, "config.json", "model.safetensors.index.json", "tokenizer.json"}
    # The weights come from the commit that the small files came from.
    assert [call["revision"] for call in fake_hub.calls] == ["v1", SHA]


def test_download_of_a_single_file(fake_hub: FakeHub) -> None:
    write_folder(fake_hub.remote)
    checkpoint = open_checkpoint("org/name", offline=True)
    assert sorted(checkpoint.keys()) == sorted(TENSORS)
    assert all(call["local_files_only"] for call in fake_hub.calls)


def test_unsupported_weights_are_not_downloaded(fake_hub: FakeHub) -> None:
    write_folder(fake_hub.remote)
    write_config(fake_hub.remote, quantization_config={"quant_method": "awq"})
    assert "awq" in error_of(UsageError, "org/name")
    assert len(fake_hub.calls) == 1


def test_hostile_index_on_the_hub(fake_hub: FakeHub) -> None:
    write_config(fake_hub.remote)
    write_index(fake_hub.remote, {"x": "../../evil"})
    assert "leaves the checkpoint" in error_of(UsageError, "org/name")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            http_error(hub.GatedRepoError, 403),
            ["gated", "hf auth login", "huggingface.co/org/name"],
        ),
        (http_error(hub.RepositoryNotFoundError, 404), ["no such repository", "no such folder"]),
        (http_error(hub.RevisionNotFoundError, 404), ["no such revision", "v9"]),
        (http_error(hub.HfHubHTTPError, 401), ["401", "hf auth login"]),
        (http_error(hub.HfHubHTTPError, 403), ["403", "hf auth login"]),
        (http_error(hub.HfHubHTTPError, 418), ["418"]),
        (hub.LocalEntryNotFoundError("not there"), ["cache", "offline", "no such folder"]),
        (hub.OfflineModeIsEnabled("offline"), ["cache", "offline"]),
        (ConnectionResetError("hf_secret"), ["connection", "ConnectionResetError"]),
        (TimeoutError(), ["connection"]),
        (RuntimeError("hf_secret"), ["RuntimeError"]),
    ],
)
def test_hub_errors(fake_hub: FakeHub, error: Exception, words: list[str]) -> None:
    fake_hub.errors = [error] * 3
    message = error_of(NetworkError, "org/name", revision="v9")
    assert "hf_secret" not in message
    assert "org/name" in message
    for word in words:
        assert word in message
    broken = type(error) in (ConnectionResetError, TimeoutError, RuntimeError)
    assert len(fake_hub.calls) == (3 if broken else 1)


def test_malformed_id_according_to_the_hub(fake_hub: FakeHub) -> None:
    fake_hub.errors = [hub.HFValidationError("bad")]
    error_of(UsageError, "org/name")


def test_full_disk(fake_hub: FakeHub) -> None:
    fake_hub.errors = [OSError(28, "No space left on device")]
    assert "no space left" in error_of(ResourceError, "org/name")


def test_the_reason_that_the_client_fell_back_to_its_cache(fake_hub: FakeHub) -> None:
    try:
        raise hub.LocalEntryNotFoundError("a page of text") from http_error(hub.HfHubHTTPError, 403)
    except hub.LocalEntryNotFoundError as error:
        fake_hub.errors = [error]
    assert "403" in error_of(NetworkError, "org/name")


def test_a_busy_hub_is_tried_again(fake_hub: FakeHub) -> None:
    write_folder(fake_hub.remote)
    fake_hub.errors = [http_error(hub.HfHubHTTPError, 429), http_error(hub.HfHubHTTPError, 503)]
    assert isinstance(open_checkpoint("org/name"), FolderCheckpoint)
    fake_hub.errors = [http_error(hub.HfHubHTTPError, 503) for _ in range(3)]
    assert "try again later" in error_of(NetworkError, "org/name")
    assert fake_hub.errors == []


def test_offline_with_a_warm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for revision in (None, "main", SHA):
        checkpoint = open_checkpoint("org/name", revision=revision, offline=True)
        assert torch.equal(checkpoint.read("stack"), TENSORS["stack"])
        assert checkpoint.source.revision == SHA
    assert "cache" in error_of(NetworkError, "org/other", offline=True)
    assert "cache" in error_of(NetworkError, "org/name", revision="v2", offline=True)
