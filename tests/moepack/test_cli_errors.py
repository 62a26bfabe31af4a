"""How the command line ends when something goes wrong: one line, and the exit code."""

from __future__ import annotations

import errno
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from moepack import cli, speed
from moepack_formats.errors import ResourceError
from tests.commands import Command


def test_debug_shows_the_traceback(command: Command, tmp_path: Path) -> None:
    result = command("inspect", tmp_path, "--debug")
    assert result.code == 3
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("moepack: not a valid pack")


def test_a_defect_is_one_line(
    command: Command, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("moepack.commands.inspect_command.Pack", broken)
    line = command("inspect", pack).error(1)
    assert "unexpected RuntimeError: first line; --debug" in line
    assert "second line" in command("inspect", pack, "--debug").err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes")]
)
def test_out_of_memory(
    command: Command, pack: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("moepack.commands.inspect_command.Pack", broken)
    assert "out of memory" in command("inspect", pack).error(5)


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["generate", "--prompt", "x", "--max-new-tokens", "50"]],
    ids="/".join,
)
def test_a_reader_that_leaves_is_no_error(pack: Path, arguments: list[str]) -> None:
    words = [sys.executable, "-m", "moepack", arguments[0], str(pack), *arguments[1:]]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read().decode()
    assert child.wait(60) == 0
    assert errors == ""
    child.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "closed", "code", "line"),
    [
        (["verify", "PACK"], ">&-", 5, "moepack: standard output: it is closed"),
        (["inspect", "PACK", "--json"], ">&-", 5, "moepack: standard output: it is closed"),
        (["--help"], ">&-", 5, "moepack: standard output: it is closed"),
        (["verify", "PACK"], "2>&-", 0, "good: "),
        (["verify", "PACK"], ">&- 2>&-", 5, ""),
        (["verify", "PACK"], "<&-", 0, "good: "),
        (["generate", "PACK", "--interactive"], "<&-", 2, "moepack: standard input is closed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_streams_that_were_closed_before(
    pack: Path, arguments: list[str], closed: str, code: int, line: str
) -> None:
    words = [word.replace("PACK", str(pack)) for word in arguments]
    script = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "moepack", *words]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done
    assert (done.stdout + done.stderr).startswith(line)
    assert (done.stdout + done.stderr).count("\n") == bool(line)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 5, "Broken pipe"),
        (EOFError("Ran out of input"), 1, "unexpected EOFError: Ran out of input"),
        (SystemExit("a library gave up"), 1, "a library gave up"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=repr,
)
def test_what_libraries_raise_is_no_good_end(
    command: Command,
    pack: Path,
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("moepack.commands.inspect_command.Pack", broken)
    assert words in command("inspect", pack).error(code)


@pytest.mark.parametrize(("code", "wanted"), [(None, 0), (0, 0), (7, 7)])
def test_a_library_s_exit_code_is_passed_on(
    command: Command,
    pack: Path,
    code: int | None,
    wanted: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ends(*_: object) -> None:
        sys.exit(code)

    monkeypatch.setattr("moepack.commands.inspect_command.Pack", ends)
    assert command("inspect", pack).code == wanted


@pytest.mark.parametrize("before", [True, False], ids=["before", "during"])
def test_a_peer_that_was_killed_is_an_error(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for llama.cpp's process."""
    runner = object.__new__(speed.LlamaRunner)
    runner._pipe, other = multiprocessing.Pipe()
    if before:
        other.close()
    else:
        monkeypatch.setattr(runner._pipe, "send", lambda _: other.close(), raising=False)
    with pytest.raises(ResourceError, match=r"llama\.cpp's process ended"):
        runner.prefill([1, 2])


def test_main_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moepack", "nonsense"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
