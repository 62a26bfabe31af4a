from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.conftest import Client

GENERATE = ("--prompt", "And the king", "--greedy", "--max-new-tokens", "4")
FROM_PRETRAINED = """
import sys, torch
import moepack
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[5, 6, 7]])
print(model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist())
"""


def python(client: Client, code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=client.environment(**environment),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_from_a_hub_id_and_offline_after_that(
    either: Client, pack: Path, tmp_path: Path
) -> None:
    either.ok("push", pack, "me/pack")
    local = either.ok("generate", pack, *GENERATE)
    either.hub.forget()
    assert either.ok("generate", "me/pack", *GENERATE) == local
    either.hub.forget()
    assert either.ok("generate", "me/pack", *GENERATE, HF_HUB_OFFLINE="1") == local
    assert not either.hub.requests
    either.hub.close()  # and when nobody knows beforehand that there is no network
    assert either.ok("generate", "me/pack", *GENERATE) == local


def test_from_pretrained_fetches_the_experts(either: Client, pack: Path) -> None:
    either.ok("push", pack, "me/pack")
    local = python(either, FROM_PRETRAINED, str(pack))
    assert python(either, FROM_PRETRAINED, "me/pack") == local
    either.hub.forget()
    assert python(either, FROM_PRETRAINED, "me/pack", HF_HUB_OFFLINE="1") == local
    assert not either.hub.requests


@pytest.mark.parametrize("compress", [False, True])
def test_inspect_reads_headers_only(client: Client, pack: Path, compress: bool) -> None:
    client.ok("push", pack, "me/pack", *(["--compress"] if compress else []))
    local = json.loads(client.ok("inspect", pack, "--json"))
    client.hub.forget()
    assert json.loads(client.ok("inspect", "me/pack", "--json")) == local
    got = client.hub.downloads()
    assert all(request.range for request in got)
    whole = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    layers = [request for request in got if "experts/" in request.path]
    assert len(layers) == local["moe_layers"]
    assert sum(request.nbytes_out for request in got) < whole / 4
    assert not list(client.home.rglob("*.safetensors"))
    text = client.ok("inspect", "me/pack", "--layer", "1")
    assert text == client.ok("inspect", pack, "--layer", "1")
