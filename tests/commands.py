"""Running the command line in tests: in this process, or in a child that may be killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack import cli
from tests import families
from tests.packs import make_pack

ASSETS = Path(__file__).parent / "assets"
TINY = ASSETS / "tiny-moe"
LEFTOVERS = (".moepack-journal", ".moepack-lock")

# A server that has imported everything forks the children: each starts at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "moepack.commands.convert_command",
        "moepack.convert.run",
        "moepack_runtime.loading",
        "transformers.models.mixtral.modeling_mixtral",
    ]
)


@dataclass(frozen=True)
class Result:
    """What a command left: exit code (negative: the signal that ended it), stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be exactly one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value

    def error(self, code: int) -> str:
        """The one line on stderr of a command that failed with ``code``."""
        lines = [line for line in self.err.splitlines() if line]
        assert self.code == code, self
        assert len(lines) == 1, self
        assert lines[0].startswith("moepack: "), self
        assert "Traceback" not in self.err
        return lines[0]


Command = Callable[..., Result]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs the command line in this process."""
    threads = torch.get_num_threads()

    def call(*arguments: object, stdin: str | None = None) -> Result:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", _text_input(stdin))
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    yield call
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def _text_input(text: str) -> Any:
    import io

    return io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")), "utf-8")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of three layers with eight experts each, and a real tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "micro")


@pytest.fixture(scope="session")
def pack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a pack; who damages it takes a copy."""
    folder = tmp_path_factory.mktemp("pack") / "micro"
    make_pack(checkpoint, folder, quantizer="rtn")
    return folder


@pytest.fixture
def damaged(pack: Path, tmp_path: Path) -> Path:
    """A copy of the pack."""
    return Path(shutil.copytree(pack, tmp_path / "damaged"))


def make_checkpoint(folder: Path, **changes: Any) -> Path:
    """A small random Mixtral with the tokenizer of the tiny model."""
    model = families.random_model("mixtral", **{"vocab_size": 4096, **changes})
    families.save_checkpoint(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; None takes a key away."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[str]:
    """Names of temporary files in an output folder."""
    return [n for n in hashes(folder) if n in LEFTOVERS or n.endswith(".part")]


class Child:
    """The command line in a process of its own.

    Args:
        folder: Where its output goes.
        arguments: Of the command line.
        before: Is called in the child first; it must be a module's function.
    """

    def __init__(
        self, folder: Path, *arguments: object, before: Callable[[], object] | None = None
    ) -> None:
        self._files = folder / "child-stdout", folder / "child-stderr"
        words = [str(argument) for argument in arguments]
        # The type of a context's processes is not known to mypy.
        self._process: Any = _context.Process(target=_run, args=(words, self._files, before))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> Result:
        """Wait for its end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            pytest.fail(f"the child did not end: {self._files[1].read_text()}")
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        return Result(self._process.exitcode, out, err)


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    """Wait until ``condition`` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def _run(
    arguments: list[str], files: tuple[Path, Path], before: Callable[[], object] | None
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate(files, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if before is not None:
        before()
    code = cli.run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
