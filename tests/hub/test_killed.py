"""Pushes and pulls that are killed, or interrupted, at many points, and started again."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.hub.conftest import MODES, Client, files_of
from tests.hub.hub_server import Hub
from tests.hub.loopback import Fault

SOME = (6,)
TEN = tuple(range(1, 11))
PATIENT = (pytest.mark.slow, pytest.mark.timeout(1500))
POINTS = [pytest.param(SOME, id="one"), pytest.param(TEN, id="ten", marks=PATIENT)]
OVERHEAD = 1.01
"""What Xet's blocks are larger than their content at most."""


@contextmanager
def fresh(folder: Path, mode: str) -> Iterator[Client]:
    """A client that has never seen this Hub, which has nothing."""
    folder.mkdir()
    hub = Hub(folder / "hub")
    try:
        yield Client(hub, folder / "home", mode)
    finally:
        hub.close()


def killed_at(client: Client, skip: int, *arguments: object) -> None:
    """Run a command, and kill it when it makes a certain request."""
    process = client.start(*arguments)
    client.hub.faults = [Fault("", skip=skip, act=process.kill, drop_after=0)]
    process.communicate()
    client.hub.drain()  # requests that were on their way are still answered
    client.hub.faults.clear()


def spread(points: tuple[int, ...], requests: int) -> list[int]:
    """Where to kill: tenths of the way."""
    return [requests * tenth // 10 - (tenth == 10) for tenth in points]


def large_sizes(pack: Path) -> list[int]:
    return [path.stat().st_size for path in pack.rglob("*.safetensors")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("points", POINTS)
def test_killed_push(pack: Path, tmp_path: Path, mode: str, points: tuple[int, ...]) -> None:
    sizes = large_sizes(pack)
    with fresh(tmp_path / "whole", mode) as client:
        client.ok("push", pack, "me/pack")
        count = len(client.hub.requests)
    for point in spread(points, count):
        with fresh(tmp_path / str(point), mode) as client:
            killed_at(client, point, "push", pack, "me/pack")
            repo = client.hub.store.repos.get("me/pack")
            assert repo is None or "moepack.json" not in repo.commits[-1].files
            client.ok("push", pack, "me/pack")
            sent = Counter(request.path for request in client.hub.uploaded())
            assert sum(times - 1 for times in sent.values()) <= 1
            total = sum(request.nbytes_in for request in client.hub.uploaded())
            assert total <= (sum(sizes) + max(sizes)) * OVERHEAD
            files = client.hub.store.repos["me/pack"].commits[-1].files
            there = {name: client.hub.read(files[name]) for name in files_of(pack)}
            assert there == files_of(pack)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("points", POINTS)
def test_killed_pull(pack: Path, tmp_path: Path, mode: str, points: tuple[int, ...]) -> None:
    sizes = large_sizes(pack)
    with fresh(tmp_path / "hub", mode) as client:
        client.ok("push", pack, "me/pack")
        client.hub.forget()
        client.ok("pull", "me/pack", tmp_path / "whole")
        count = len(client.hub.requests)
        for point in spread(points, count):
            client.hub.forget()
            out = tmp_path / f"out-{point}"
            killed_at(client, point, "pull", "me/pack", out)
            assert not (out / "moepack.json").exists()
            client.ok("pull", "me/pack", out)
            assert files_of(out) == files_of(pack)
            check_at_most_one_twice(client, sizes)


def check_at_most_one_twice(client: Client, sizes: list[int]) -> None:
    """What was fetched with and after a kill: every file once, and perhaps one of them again."""
    parts = ("/resolve/", "/xet/fetch/")
    got = [r for r in client.hub.requests if any(part in r.path for part in parts)]
    contents = [r for r in got if r.nbytes_out and "moepack.json" not in r.path]
    twice = Counter(r.path for r in contents)
    assert sum(times - 1 for times in twice.values()) <= 1
    large = [r for r in contents if "/xet/" in r.path or r.path.endswith(".safetensors")]
    assert sum(r.nbytes_out for r in large) <= sum(sizes) + max(sizes)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", MODES)
def test_killed_on_the_way_to_the_cache(pack: Path, tmp_path: Path, mode: str) -> None:
    sizes = large_sizes(pack)
    with fresh(tmp_path / "hub", mode) as client:
        client.ok("push", pack, "me/pack")
        client.hub.forget()
        client.ok("verify", "me/pack")
        count = len(client.hub.requests)
        for point in spread(TEN, count):
            client.hub.forget()
            client.home = tmp_path / f"home-{point}"
            killed_at(client, point, "verify", "me/pack")
            client.ok("verify", "me/pack")
            check_at_most_one_twice(client, sizes)
            client.ok("verify", "me/pack", HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["push", "pull"])
def test_interrupted(pack: Path, tmp_path: Path, mode: str, what: str) -> None:
    with fresh(tmp_path / "hub", mode) as client:
        if what == "pull":
            client.ok("push", pack, "me/pack")
        words: tuple[object, ...] = (pack, "me/pack")
        method, path = "", "/lfs-put/|/xet/v1/xorbs/"
        if what == "pull":
            words = ("me/pack", tmp_path / "out")
            method, path = "GET", "/resolve/.*/experts/|/xet/fetch/"
        process = client.start(what, *words)

        def interrupt() -> None:
            process.send_signal(signal.SIGINT)
            # The transfer is still under way when it arrives, however late.
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)

        client.hub.faults = [Fault(path, method, skip=2, act=interrupt)]
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert err.splitlines()[-1:] == ["moepack: interrupted"]
        assert "Traceback" not in out + err
        client.hub.forget()
        client.ok(what, *words)
        if what == "push":
            assert len(client.hub.uploaded()) < len(large_sizes(pack))
            client.ok("pull", "me/pack", tmp_path / "out")
        assert files_of(tmp_path / "out") == files_of(pack)
