"""Pushes and pulls that are killed, at many points, and started again."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from tests.hub.conftest import Client, files_of
from tests.hub.loopback import Fault

SOME = (6,)
TEN = tuple(range(1, 11))
POINTS = [pytest.param(SOME, id="one"), pytest.param(TEN, id="ten", marks=pytest.mark.slow)]


def killed_at(client: Client, skip: int, path: str, *arguments: object) -> None:
    """Run a command, and kill it when it makes a certain request."""
    process = client.start(*arguments)
    client.hub.faults = [Fault(path, skip=skip, act=process.kill, drop_after=0)]
    process.communicate()
    # Requests that were on their way may still be answered.
    time.sleep(0.05)
    client.hub.faults.clear()


def spread(points: tuple[int, ...], requests: int) -> list[int]:
    """Where to kill: tenths of the way."""
    return [requests * tenth // 10 - (tenth == 10) for tenth in points]


@pytest.mark.parametrize("points", POINTS)
def test_killed_push(client: Client, pack: Path, points: tuple[int, ...]) -> None:
    client.ok("push", pack, "me/whole")
    count = len(client.hub.requests)
    sizes = sorted(path.stat().st_size for path in pack.rglob("*.safetensors"))
    for point in spread(points, count):
        client.hub.forget()
        for path in client.hub.store.objects.iterdir():
            path.unlink()
        client.hub.store.repos.clear()
        killed_at(client, point, "", "push", pack, "me/pack")
        repo = client.hub.store.repos.get("me/pack")
        assert repo is None or "moepack.json" not in repo.commits[-1].files
        client.ok("push", pack, "me/pack")
        sent = Counter(request.path for request in client.hub.uploaded())
        assert sum(times - 1 for times in sent.values()) <= 1
        total = sum(request.nbytes_in for request in client.hub.uploaded())
        assert total <= sum(sizes) + sizes[-1]
        files = client.hub.store.repos["me/pack"].commits[-1].files
        assert {name: client.hub.read(files[name]) for name in files_of(pack)} == files_of(pack)


@pytest.mark.parametrize("points", POINTS)
def test_killed_pull(client: Client, pack: Path, tmp_path: Path, points: tuple[int, ...]) -> None:
    client.ok("push", pack, "me/pack")
    client.hub.forget()
    client.ok("pull", "me/pack", tmp_path / "whole")
    count = len(client.hub.requests)
    for point in spread(points, count):
        client.hub.forget()
        out = tmp_path / f"out-{point}"
        killed_at(client, point, "", "pull", "me/pack", out)
        assert not (out / "moepack.json").exists()
        client.ok("pull", "me/pack", out)
        assert files_of(out) == files_of(pack)
        got = Counter(r.path for r in client.hub.downloads() if r.nbytes_out)
        got.pop("/me/pack/resolve/" + "main" + "/moepack.json", None)
        twice = [path for path, times in got.items() if times > 1 and "moepack.json" not in path]
        assert len(twice) <= 1


@pytest.mark.parametrize("points", POINTS)
def test_killed_through_xet(pack: Path, tmp_path: Path, points: tuple[int, ...]) -> None:
    """The bytes in the Xet store say how much was sent: blocks are kept as they arrive."""
    from tests.hub.hub_server import Hub

    size = sum(path.stat().st_size for path in pack.rglob("*.safetensors"))
    largest = max(path.stat().st_size for path in pack.rglob("*.safetensors"))
    for point in points:
        hub = Hub(tmp_path / f"hub-{point}")
        client = Client(hub, tmp_path / f"home-{point}", "xet")
        try:
            killed_at(client, point, "", "push", pack, "me/pack")
            client.ok("push", pack, "me/pack")
            assert hub.store.stored_nbytes() <= size + largest
            out = tmp_path / f"out-{point}"
            hub.requests.clear()
            killed_at(client, 2 * point, "", "pull", "me/pack", out)
            client.ok("pull", "me/pack", out)
            assert files_of(out) == files_of(pack)
        finally:
            hub.close()
