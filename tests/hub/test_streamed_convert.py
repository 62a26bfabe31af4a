from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.hub.conftest import Client, files_of
from tests.hub.loopback import Fault
from tests.hub.small_pack import TINY_MOE
from tests.packs import make_pack

OPTIONS = ("--quantizer", "rtn", "--expert-bits", "2")


@pytest.fixture
def source(client: Client, tmp_path: Path) -> Path:
    """The small model in five shards, in a folder and at ``org/model``, with code beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY_MOE.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(TINY_MOE / "model.safetensors")
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for i in range(5):
        part = names[len(names) * i // 5 : len(names) * (i + 1) // 5]
        shard = f"model-{i + 1:05d}-of-00005.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = {"evil.py": b"boom", "pytorch_model.bin": b"boom"}
    client.hub.store.put("org/model", {**files, **code})
    client.hub.forget()
    return folder


def shard_requests(client: Client) -> list[str]:
    got = client.hub.downloads(".safetensors")
    return [r.path.rsplit("/", 1)[1] for r in got if r.range is None and "index" not in r.path]


def test_dry_run_reads_headers_only(client: Client, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = json.loads(client.ok("convert", "org/model", out, *OPTIONS, "--dry-run", "--json"))
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert 0 < plan["disk_staged"] < sum(shards) * 1.3
    assert plan["disk_needed"] > plan["disk_staged"]
    assert not shard_requests(client)
    assert all(r.range for r in client.hub.downloads(".safetensors") if "index" not in r.path)
    assert not out.exists()


def test_convert_without_storing_the_source(client: Client, source: Path, tmp_path: Path) -> None:
    done = client.run("convert", "org/model", tmp_path / "streamed", *OPTIONS)
    assert done.code == 0, done.err
    assert "evil.py" in done.err
    assert "pytorch_model.bin" in done.err
    # Every shard came once, and nothing of it stays.
    assert sorted(shard_requests(client)) == sorted(p.name for p in source.glob("*.safetensors"))
    assert not list(client.home.rglob("*.safetensors"))
    assert not (tmp_path / "streamed" / ".moepack-source").exists()
    make_pack(source, tmp_path / "local", quantizer="rtn", expert_bits=2)
    streamed, local = files_of(tmp_path / "streamed"), files_of(tmp_path / "local")
    manifest = json.loads(streamed.pop("moepack.json"))
    assert manifest["source"]["id"] == "org/model"
    assert manifest["source"]["license"] == "mit"
    assert manifest["source"]["revision"] == client.hub.store.repos["org/model"].commits[-1].oid
    local.pop("moepack.json")
    assert streamed == local


@pytest.mark.slow
def test_a_streamed_conversion_goes_on(client: Client, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    client.hub.faults = [Fault("00004-of-00005", "GET", status=403, times=-1, skip=1)]
    line = client.fails(6, "convert", "org/model", out, *OPTIONS)
    assert "HTTP 403" in line
    before = shard_requests(client)
    client.hub.forget()
    client.ok("convert", "org/model", out, *OPTIONS)
    again = shard_requests(client)
    assert len(set(before) & set(again)) <= 2
    client.ok("verify", out)


@pytest.mark.slow
def test_a_flipped_bit_in_a_shard(client: Client, source: Path, tmp_path: Path) -> None:
    client.hub.faults = [Fault("00002-of-00005", "GET", flip=True, skip=1)]
    client.ok("convert", "org/model", tmp_path / "out", *OPTIONS)
    client.ok("convert", source, tmp_path / "local", *OPTIONS)
    streamed, local = files_of(tmp_path / "out"), files_of(tmp_path / "local")
    assert streamed["model.safetensors"] == local["model.safetensors"]
    name = "experts/layer-00001.safetensors"
    assert streamed[name] == local[name]
