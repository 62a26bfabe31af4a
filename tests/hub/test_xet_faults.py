"""The storage behind the Hub refuses, is busy, breaks off, or sends damaged bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.conftest import Client, files_of
from tests.hub.hub_server import Hub
from tests.hub.loopback import Fault

PUSHING = ("/xet-write-token/", "/xet/v1/xorbs/", "/xet/v2/shards")
PULLING = ("/xet-read-token/", "/xet/v2/reconstructions/", "/xet/fetch/")


@pytest.fixture
def xet(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home", "xet")


def test_it_is_tried_again(xet: Client, pack: Path, tmp_path: Path) -> None:
    xet.hub.faults = [Fault(path, status=status) for path in PUSHING for status in (429, 500)]
    xet.hub.faults.append(Fault("/xet/v1/xorbs/", drop_after=1000))
    xet.ok("push", pack, "me/pack")
    xet.hub.faults = [Fault(path, status=503) for path in PULLING]
    xet.hub.faults.append(Fault("/xet/fetch/", drop_after=1000, skip=1))
    xet.ok("pull", "me/pack", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(pack)


def test_a_bit_flipped_on_the_way(xet: Client, pack: Path, tmp_path: Path) -> None:
    xet.ok("push", pack, "me/pack")
    xet.hub.faults = [Fault("/xet/fetch/", flip=True)]
    done = xet.run("pull", "me/pack", tmp_path / "out")
    assert done.code == 0, done.err
    assert "damaged on the way" in done.err
    assert files_of(tmp_path / "out") == files_of(pack)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, ("HTTP 403", "hf auth login")),
        pytest.param(401, ("HTTP 401", "hf auth login"), marks=pytest.mark.slow),
        pytest.param(500, ("HTTP 500", "try again later"), marks=pytest.mark.slow),
    ],
)
def test_it_refuses(
    xet: Client, pack: Path, tmp_path: Path, status: int, words: tuple[str, ...]
) -> None:
    for path in PUSHING:
        xet.hub.faults = [Fault(path, status=status, times=-1)]
        line = xet.fails(6, "push", pack, "me/pack")
        assert all(word in line for word in words)
    xet.hub.forget()
    xet.ok("push", pack, "me/pack")
    for path in PULLING:
        xet.hub.faults = [Fault(path, status=status, times=-1)]
        line = xet.fails(6, "pull", "me/pack", tmp_path / "out")
        assert all(word in line for word in words)
    xet.hub.forget()
    xet.ok("pull", "me/pack", tmp_path / "out")
