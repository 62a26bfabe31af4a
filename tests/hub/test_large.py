"""Many files, and many bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moepack_formats.pack import read_manifest
from tests.hub.conftest import MODES, Client, files_of
from tests.hub.small_pack import make_random_pack
from tests.hub.test_killed import OVERHEAD, fresh

MEBIBYTE = 1 << 20
MOST_MEMORY = 500 * MEBIBYTE


def peak_memory(client: Client, *arguments: object) -> int:
    """Run a command; its largest resident set in bytes."""
    path = client.home.with_name("peak")
    client.ok(*arguments, PEAK_MEMORY_FILE=str(path))
    return int(path.read_text().split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_files(either: Client, pack: Path, tmp_path: Path) -> None:
    large = make_random_pack(pack, tmp_path / "large", layers=1000, experts=1, width=64)
    pushed = json.loads(either.ok("push", large, "me/pack", "--json"))
    assert pushed["uploaded"] >= 1000
    assert len(either.hub.store.repos["me/pack"].commits) < 40
    out = tmp_path / "out"
    either.ok("pull", "me/pack", out)
    assert files_of(out) == files_of(large)
    assert json.loads(either.ok("push", large, "me/pack", "--json"))["uploaded"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_memory_for_five_gigabytes(either: Client, pack: Path, tmp_path: Path) -> None:
    large = make_random_pack(pack, tmp_path / "large", layers=92, experts=8, width=2048)
    wanted = read_manifest(large).files
    assert sum(facts.size for facts in wanted.values()) > 5e9
    pushing = peak_memory(either, "push", large, "me/pack")
    shutil.rmtree(large)  # two copies on the disk are enough
    pulling = peak_memory(either, "pull", "me/pack", tmp_path / "out")
    print(f"{either.mode}: push {pushing >> 20} MiB, pull {pulling >> 20} MiB")
    assert max(pushing, pulling) < MOST_MEMORY
    for name, facts in wanted.items():
        with open(tmp_path / "out" / name, "rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == facts.sha256


@pytest.fixture(params=[2, 10], ids=["14MB", "70MB"])
def six_files(request: pytest.FixtureRequest, pack: Path, tmp_path: Path) -> Path:
    """A pack of six layer files, smaller or larger than the blocks of 64 MB that Xet sends."""
    return make_random_pack(pack, tmp_path / "large", layers=6, experts=request.param, width=2048)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", MODES)
def test_killed_in_the_middle_of_the_data(mode: str, six_files: Path, tmp_path: Path) -> None:
    """Ten pushes, killed after a tenth of the data, two tenths, and so on, and started again."""
    sizes = [path.stat().st_size for path in six_files.rglob("*.safetensors")]
    resent = []
    for tenth in range(10):
        with fresh(tmp_path / str(tenth), mode) as client:
            limit = sum(sizes) * tenth / 10
            killed_after(client, received, limit, "push", six_files, "me/pack")
            client.ok("push", six_files, "me/pack")
            resent.append((received(client) - sum(sizes)) / max(sizes))
        shutil.rmtree(tmp_path / str(tenth))
    print(f"{mode}: files sent again {[round(files, 2) for files in resent]}")
    assert max(resent) <= OVERHEAD


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", MODES)
def test_pulls_killed_in_the_middle_of_the_data(mode: str, six_files: Path, tmp_path: Path) -> None:
    """The same for pulls."""
    sizes = [path.stat().st_size for path in six_files.rglob("*.safetensors")]
    again = []
    with fresh(tmp_path / "hub", mode) as client:
        client.ok("push", six_files, "me/pack")
        for tenth in range(10):
            client.hub.forget()
            out = tmp_path / str(tenth)
            killed_after(client, fetched, sum(sizes) * tenth / 10, "pull", "me/pack", out)
            client.ok("pull", "me/pack", out)
            again.append((fetched(client) - sum(sizes)) / max(sizes))
            assert files_of(out) == files_of(six_files)
            shutil.rmtree(out)
    print(f"{mode}: files fetched again {[round(files, 2) for files in again]}")
    assert max(again) <= OVERHEAD


def killed_after(
    client: Client, moved: Callable[[Client], int], limit: float, *arguments: object
) -> None:
    """Run a command, and kill it when more than ``limit`` bytes have moved."""
    process = client.start(*arguments)
    while process.poll() is None and moved(client) <= limit:
        time.sleep(0.002)
    process.kill()
    process.communicate()


def fetched(client: Client) -> int:
    """Bytes of large objects that have left the Hub."""
    parts = (".safetensors", "/xet/fetch/")
    asked = [r for r in list(client.hub.requests) if any(part in r.path for part in parts)]
    return sum(request.nbytes_out for request in asked)


def received(client: Client) -> int:
    """Bytes of large objects that have come to the Hub."""
    return sum(request.nbytes_in for request in list(client.hub.uploaded()))
