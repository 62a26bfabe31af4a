"""Many files, and many bytes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.hub.conftest import Client, files_of
from tests.hub.small_pack import make_random_pack

MEBIBYTE = 1 << 20
MOST_MEMORY = 500 * MEBIBYTE


def peak_memory(client: Client, *arguments: object) -> int:
    """Run a command; its largest resident set in bytes."""
    process = client.start(*arguments)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.stderr and process.stderr.read()
    return usage.ru_maxrss * 1024


@pytest.mark.slow
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
    assert sum(path.stat().st_size for path in large.rglob("*")) > 5e9
    pushing = peak_memory(either, "push", large, "me/pack")
    pulling = peak_memory(either, "pull", "me/pack", tmp_path / "out")
    print(f"{either.mode}: push {pushing >> 20} MiB, pull {pulling >> 20} MiB")
    assert max(pushing, pulling) < MOST_MEMORY
    compared = 0
    for path in large.rglob("*.safetensors"):
        with open(path, "rb") as left, open(
            tmp_path / "out" / path.relative_to(large), "rb"
        ) as right:
            while piece := left.read(MEBIBYTE):
                assert right.read(MEBIBYTE) == piece
                compared += len(piece)
    assert compared > 5e9


@pytest.mark.slow
def test_killed_in_the_middle_of_the_data(either: Client, pack: Path, tmp_path: Path) -> None:
    """Ten kills while bytes flow, each after a tenth more has arrived."""
    large = make_random_pack(pack, tmp_path / "large", layers=8, experts=10, width=2048)
    sizes = [path.stat().st_size for path in large.rglob("*.safetensors")]
    store = either.hub.store
    for tenth in range(10):
        process = either.start("push", large, "me/pack")
        while process.poll() is None and store.stored_nbytes() < sum(sizes) * tenth / 10:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    either.ok("push", large, "me/pack")
    resent = store.stored_nbytes() - sum(sizes)
    print(f"{either.mode}: {resent / max(sizes):.2f} files sent again in ten kills")
    assert resent <= 10 * max(sizes)
    out = tmp_path / "out"
    either.ok("pull", "me/pack", out)
    assert files_of(out) == files_of(large)
