from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moepack_runtime.hub.remote import WHOLE_NBYTES
from tests.hub.conftest import Client, files_of
from tests.hub.loopback import Fault
from tests.hub.small_pack import TINY_MOE
from tests.moepack.convert.compressed_packer import FORMS, KIMI
from tests.moepack.convert.compressed_packer import quantize_linears as compress_linears
from tests.moepack.convert.mapping_checks import edit, one_file
from tests.moepack.convert.test_gptq import CONFIG, quantize_linears
from tests.packs import make_pack

TEXT = Path(__file__).parents[1] / "assets" / "text" / "alice29.txt"
SLACK = 64 << 10
"""Blocks that are not full."""
CALIBRATE = ("--calibrate", TEXT, "--calibrate-tokens", "2048")
OPTIONS = ("--quantizer", "rtn", "--expert-bits", "2")


def in_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """Write tensors as shards with an index."""
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for i in range(count):
        part = names[len(names) * i // count : len(names) * (i + 1) // count]
        shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def share(client: Client, folder: Path) -> None:
    """Put a folder at ``org/model``, with code beside it."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = {"evil.py": b"boom", "pytorch_model.bin": b"boom"}
    client.hub.store.put("org/model", {**files, **code})
    client.hub.forget()


@pytest.fixture
def source(client: Client, tmp_path: Path) -> Path:
    """The small model in five shards, in a folder and on the Hub."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY_MOE.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    in_shards(folder, load_file(TINY_MOE / "model.safetensors"), 5)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    share(client, folder)
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


def test_a_server_without_ranges(client: Client, pack: Path, source: Path, tmp_path: Path) -> None:
    """Small files may come whole; a large one is not read for the sake of its header."""
    client.ok("push", pack, "me/pack")
    inspected = client.ok("inspect", "me/pack")
    client.hub.ranges = False
    assert client.ok("inspect", "me/pack") == inspected
    client.hub.store.put("org/model", {"model.safetensors": bytes(WHOLE_NBYTES + (64 << 20))})
    client.hub.forget()
    line = client.fails(6, "convert", "org/model", tmp_path / "out", *OPTIONS)
    assert "org/model, model.safetensors: the server sends the whole file" in line
    client.hub.drain()
    asked = [r for r in client.hub.downloads() if r.path.endswith("/model.safetensors")]
    assert len(asked) == 1
    assert asked[0].nbytes_out < WHOLE_NBYTES + (32 << 20)  # some was on its way


def test_convert_without_storing_the_source(client: Client, source: Path, tmp_path: Path) -> None:
    done = client.run("convert", "org/model", tmp_path / "streamed", *OPTIONS)
    assert done.code == 0, done.err
    assert "evil.py" in done.err
    assert re.search(r"disk: .* needed \(.* for shards of the source, .*\), .* free", done.err)
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
@pytest.mark.parametrize(
    ("more", "fetches"),
    [
        ((), 5),
        # The losses of every expert are measured before, and calibration comes before that.
        (("--expert-bits", "2.7"), 10),
        (
            ("--expert-bits", "2.7", "--quantizer", "gptq", *CALIBRATE),
            16,  # and the last shard for norm and head, with which calibration begins
        ),
    ],
    ids=["plain", "mixed", "calibrated"],
)
def test_one_layers_shards_at_a_time(
    client: Client, source: Path, tmp_path: Path, more: tuple[object, ...], fetches: int
) -> None:
    out, options = tmp_path / "out", (*OPTIONS, *more)
    plan = json.loads(client.ok("convert", "org/model", out, *options, "--dry-run", "--json"))
    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    staged = []

    def look() -> None:
        """What lies there, and what is about to come."""
        there = sum(path.stat().st_blocks * 512 for path in shards_in(out) if path.is_file())
        staged.append(there + sizes[client.hub.requests[-1].path.rsplit("/", 1)[1]])

    client.hub.forget()
    client.hub.faults = [Fault(r"/resolve/.*\.safetensors$", "GET", act=look, times=-1)]
    client.ok("convert", "org/model", out, *options)
    counts = Counter(shard_requests(client))
    assert set(counts) == set(sizes)
    assert counts.total() <= fetches
    assert max(staged) <= plan["disk_staged"] + SLACK < sum(sizes.values())


def shards_in(out: Path) -> list[Path]:
    return list((out / ".moepack-source").rglob("*.safetensors"))


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


@pytest.mark.parametrize("shards", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_gptq_source(client: Client, tmp_path: Path, shards: int) -> None:
    """Each shard comes once, although a weight is made of four tensors in any of them."""
    folder = tmp_path / "model"
    one_file("mixtral", folder, intermediate_size=64, dtype=torch.float16)
    edit(folder, quantize_linears)
    if shards > 1:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        in_shards(folder, tensors, shards)
    else:
        # As AutoGPTQ names its one file, and keeps its settings.
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "quantize_config.json").write_text(json.dumps(CONFIG))
    share(client, folder)
    client.ok("convert", "org/model", tmp_path / "streamed", *OPTIONS)
    assert sorted(shard_requests(client)) == sorted(p.name for p in folder.glob("*.safetensors"))
    assert not list(client.home.rglob("*.safetensors"))
    make_pack(folder, tmp_path / "local", quantizer="rtn", expert_bits=2)
    streamed, local = files_of(tmp_path / "streamed"), files_of(tmp_path / "local")
    assert json.loads(streamed.pop("moepack.json"))["source"]["id"] == "org/model"
    local.pop("moepack.json")
    assert streamed == local


def test_a_compressed_tensors_source(client: Client, tmp_path: Path) -> None:
    """Planning reads headers alone; then each shard comes once."""
    folder = tmp_path / "model"
    one_file("deepseek_v3", folder, moe_intermediate_size=64, dtype=torch.bfloat16)
    edit(folder, lambda *both: compress_linears(*both, KIMI, FORMS["fp8-channel"]))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    in_shards(folder, tensors, 4)
    share(client, folder)
    client.ok("convert", "org/model", tmp_path / "streamed", *OPTIONS, "--dry-run")
    assert not shard_requests(client)
    client.ok("convert", "org/model", tmp_path / "streamed", *OPTIONS)
    assert sorted(shard_requests(client)) == sorted(p.name for p in folder.glob("*.safetensors"))
    assert not list(client.home.rglob("*.safetensors"))
    make_pack(folder, tmp_path / "local", quantizer="rtn", expert_bits=2)
    streamed, local = files_of(tmp_path / "streamed"), files_of(tmp_path / "local")
    del streamed["moepack.json"], local["moepack.json"]
    assert streamed == local
