"""A Hub on loopback, a pack to move, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub.hub_server import TOKEN, Hub
from tests.hub.hub_store import HubStore
from tests.hub.xet_server import XET_TOKEN

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("fast_moepack.py")
MODES = ("lfs", "xet")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Client:
    """Runs commands against a Hub.

    Attributes:
        hub: The server.
        home: The Hub client's folder.
        mode: ``lfs`` or ``xet``.
    """

    hub: Hub
    home: Path
    mode: str = "lfs"

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        packages = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "formats")]
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join([*packages, kept.get("PYTHONPATH", "")]),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # Requests that a test holds back, or a busy machine, are not given up.
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
            "HF_HUB_ETAG_TIMEOUT": "120",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
            "OMP_NUM_THREADS": "1",
            **more,
        }
        if self.mode == "lfs":
            environment["HF_HUB_DISABLE_XET"] = "1"
        return environment

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start a command; empty values of the environment are taken out."""
        values = {k: v for k, v in self.environment(**environment).items() if v}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", str(DRIVER), *map(str, arguments)],
            env=values,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **environment: str) -> Done:
        """Run a command to its end. The token is never in what it prints."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=1200)
        assert TOKEN not in out + err
        assert XET_TOKEN not in out + err
        return Done(process.returncode, out, err)

    def ok(self, *arguments: object, **environment: str) -> str:
        """Run a command that has to succeed; gives its stdout."""
        done = self.run(*arguments, **environment)
        assert done.code == 0, done.err
        return done.out

    def fails(self, code: int, *arguments: object, **environment: str) -> str:
        """Run a command that has to end with an error of one line; gives the line."""
        done = self.run(*arguments, **environment)
        assert done.code == code, done.err
        lines = [line for line in done.err.splitlines() if line]
        assert lines[-1].startswith("moepack: "), done.err
        assert "Traceback" not in done.err
        return lines[-1]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    yield server
    server.close()


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


@pytest.fixture(params=MODES)
def either(hub: Hub, tmp_path: Path, request: pytest.FixtureRequest) -> Client:
    """A client that uses LFS, and one that uses Xet."""
    return Client(hub, tmp_path / "home", request.param)


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of four layers; tests may not change it."""
    from tests.hub.small_pack import make_small_pack

    return make_small_pack(tmp_path_factory.mktemp("pack") / "pack")


@pytest.fixture(scope="session")
def stock(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> HubStore:
    """What a Hub holds to which the pack was pushed as ``me/pack``; tests copy it."""
    folder = tmp_path_factory.mktemp("stock")
    hub = Hub(folder / "hub")
    Client(hub, folder / "home").ok("push", pack, "me/pack")
    hub.close()
    return hub.store


@pytest.fixture
def shared(client: Client, stock: HubStore) -> Client:
    """A client whose Hub has the pack at ``me/pack``, as LFS objects."""
    client.hub.store.copy_from(stock)
    return client


@pytest.fixture
def own_pack(pack: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    import shutil

    return Path(shutil.copytree(pack, tmp_path / "own-pack"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but what stays behind by design."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }
