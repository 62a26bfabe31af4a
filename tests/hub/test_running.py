from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.hub.conftest import DRIVER, MODES, Client, files_of
from tests.hub.hub_server import Hub
from tests.hub.loopback import Fault

TEXT = Path(__file__).parents[1] / "assets" / "text" / "alice29.txt"
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


def test_generate_from_a_hub_id_and_offline_after_that(shared: Client, pack: Path) -> None:
    online = shared.ok("generate", "me/pack", *GENERATE)
    assert len(online) > len("And the king")
    shared.hub.forget()
    assert shared.ok("generate", "me/pack", *GENERATE, HF_HUB_OFFLINE="1") == online
    done = shared.run("inspect", "me/pack", HF_HUB_OFFLINE="1")
    looked = done.out
    assert (done.code, done.err) == (0, "")
    assert not shared.hub.requests
    assert looked == shared.ok("inspect", pack)
    shared.hub.close()  # nobody knows beforehand that there is no network
    for command, wanted in (
        (["inspect", "me/pack"], looked),
        (["generate", "me/pack", *GENERATE], online),
    ):
        done = shared.run(*command)
        assert (done.code, done.out) == (0, wanted)
        assert "the Hub cannot be reached; using me/pack as the Hub cache holds it" in done.err
    assert "no such folder" not in shared.fails(6, "inspect", "me/other")


@pytest.mark.slow
def test_the_same_text_from_everywhere(either: Client, pack: Path) -> None:
    either.ok("push", pack, "me/pack")
    local = either.ok("generate", pack, *GENERATE)
    assert either.ok("generate", "me/pack", *GENERATE) == local
    either.ok("verify", "me/pack")
    text = str(TEXT)
    assert json.loads(either.ok("eval", "me/pack", "--text", text, "--max-tokens", "64", "--json"))
    assert either.ok("bench", "me/pack", "--max-new-tokens", "2", "--rounds", "1")
    either.hub.close()  # nobody knows beforehand that there is no network
    assert either.ok("generate", "me/pack", *GENERATE) == local


def test_from_pretrained_fetches_the_experts(shared: Client, pack: Path) -> None:
    assert python(shared, FROM_PRETRAINED, "me/pack")
    snapshot = next(shared.home.rglob("moepack.json")).parent
    assert {name: (snapshot / name).read_bytes() for name in files_of(pack)} == files_of(pack)


@pytest.mark.slow
def test_from_pretrained_offline_after_that(either: Client, pack: Path) -> None:
    either.ok("push", pack, "me/pack")
    local = python(either, FROM_PRETRAINED, str(pack))
    assert python(either, FROM_PRETRAINED, "me/pack") == local
    either.hub.forget()
    assert python(either, FROM_PRETRAINED, "me/pack", HF_HUB_OFFLINE="1") == local
    assert not either.hub.requests


def test_a_flipped_bit_on_the_way_to_the_cache(shared: Client, pack: Path) -> None:
    shared.hub.faults = [
        Fault("layer-00002", "GET", flip=True),
        Fault("model.safetensors", "GET", flip=True),
    ]
    shared.ok("verify", "me/pack")


@pytest.mark.parametrize("mode", MODES)
def test_one_bar_for_everything(hub: Hub, pack: Path, tmp_path: Path, mode: str) -> None:
    client = Client(hub, tmp_path / "home", mode)
    # Files are compared with the manifest before anything is sent.
    shown = on_a_terminal(client, "push", pack, "me/pack")
    assert bars_in(shown) == [f"checking {pack.name}", "pushing me/pack"]
    assert shown.count("100%") >= 2
    shown = on_a_terminal(client, "pull", "me/pack", tmp_path / "out")
    assert bars_in(shown) == ["pulling me/pack"]
    assert "100%" in shown
    # As do generate, eval and bench.
    shown = on_a_terminal(client, "verify", "me/pack")
    assert bars_in(shown)[0] == "fetching me/pack"
    assert not any("me/pack" in name for name in bars_in(shown)[1:])


def bars_in(shown: str) -> list[str]:
    """The names of the bars that were shown, in their order."""
    lines = re.split(r"[\r\n]", shown)
    return list(dict.fromkeys(line.split(":")[0].strip() for line in lines if "%|" in line))


def on_a_terminal(client: Client, *arguments: object) -> str:
    """Run a command with a terminal for stderr; what it shows there."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(DRIVER), *map(str, arguments)],
        env=client.environment(TERM="xterm", COLUMNS="100"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0, shown
    return shown.decode(errors="replace")


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
