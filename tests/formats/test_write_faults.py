"""Every write, sync and rename of the package fails in turn; then the disk is well again."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moepack_formats import osio
from moepack_formats.errors import FormatError, ResourceError
from moepack_formats.journal import JOURNAL_NAME, Journal
from moepack_formats.verify import verify_pack
from tests.formats.builders import build_pack
from tests.formats.hostile import refused

MESSAGES = {
    errno.ENOSPC: "no space left on the disk; free some space",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system refuses a file this large",
    errno.EIO: "the disk reported an input/output error",
    errno.EROFS: "the folder is read-only; choose a folder that you can write to",
}
FUNCTIONS = ("write_at", "sync", "replace")


def failing(
    real: Callable[..., Any], error: int, turn: int, calls: list[int]
) -> Callable[..., Any]:
    """``real``, but its call number ``turn`` fails, a write halfway."""

    def call(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) - 1 != turn:
            return real(*arguments)
        if real is osio.write_at or len(arguments) == 3:
            descriptor, data, offset = arguments
            real(descriptor, data[: len(data) // 2], offset)
        raise OSError(error, os.strerror(error))

    return call


def count_calls(folder: Path, function: str) -> int:
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(osio, function, failing(getattr(osio, function), 0, -1, calls))
        build_pack(folder, num_layers=1, max_nbytes=12_288)
    return len(calls)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("complete")
    build_pack(folder, num_layers=1, max_nbytes=12_288)
    return contents(folder)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("error", MESSAGES, ids=errno.errorcode.get)
def test_every_call_fails_once(
    error: int,
    function: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    complete: dict[str, bytes],
) -> None:
    total = count_calls(tmp_path_factory.mktemp("count"), function)
    assert total >= 5
    for turn in range(total):
        folder, before = tmp_path_factory.mktemp("fault"), open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(osio, function, failing(getattr(osio, function), error, turn, []))
            with pytest.raises(ResourceError, match=MESSAGES[error]) as caught:
                build_pack(folder, num_layers=1, max_nbytes=12_288)
        line = str(caught.value)
        assert caught.value.exit_code == 5
        assert line.isprintable()
        assert str(folder) in line
        left = contents(folder)
        left.pop(JOURNAL_NAME, None)
        # Nothing half written: no .part, and a file under its final name is the right one.
        assert not [name for name in left if name.endswith(".part")], (turn, line)
        assert left.items() <= complete.items()
        assert open_descriptors() - before <= 2  # journal and writer of the dead run
        build_pack(folder, num_layers=1, max_nbytes=12_288)
        assert contents(folder) == complete


def test_the_fault_leaves_no_final_name(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file's writes (2 records, header) and sync fail before it has its name."""
    name = "experts/layer-00000-of-00002-00000.safetensors"
    # Calls of write_at: fingerprint, record, note, record, note, header, note "finished".
    for function, turns in (("write_at", range(6)), ("sync", range(1)), ("replace", range(1))):
        for turn in turns:
            folder = tmp_path_factory.mktemp("fault")
            with monkeypatch.context() as patch, contextlib.suppress(ResourceError):
                fault = failing(getattr(osio, function), errno.ENOSPC, turn, [])
                patch.setattr(osio, function, fault)
                build_pack(folder, num_layers=1, max_nbytes=12_288)
            assert set(contents(folder)) <= {JOURNAL_NAME}, (function, turn, name)


@contextlib.contextmanager
def failing_open(monkeypatch: pytest.MonkeyPatch, error: int, turn: int) -> Iterator[list[str]]:
    real, calls = os.open, []

    def call(path: Any, *arguments: Any, **named: Any) -> int:
        calls.append(str(path))
        if len(calls) - 1 == turn:
            raise OSError(error, os.strerror(error))
        return real(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", call)
        yield calls


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errno.EMFILE, "too many open files; raise the limit, for example `ulimit -n 4096`"),
        (errno.EROFS, "the folder is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENOSPC, "no space left"),
    ],
    ids=str,
)
def test_every_open_fails_once(
    error: int,
    message: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    complete: dict[str, bytes],
) -> None:
    with failing_open(monkeypatch, 0, -1) as calls:
        build_pack(tmp_path_factory.mktemp("count"), num_layers=1, max_nbytes=12_288)
    assert len(calls) > 6
    for turn in range(len(calls)):
        folder = tmp_path_factory.mktemp("fault")
        with failing_open(monkeypatch, error, turn):
            refused(
                ResourceError,
                message,
                lambda folder=folder: build_pack(folder, num_layers=1, max_nbytes=12_288),
                measured=False,
            )
        left = contents(folder)
        left.pop(JOURNAL_NAME, None)
        assert left.items() <= complete.items(), turn
        build_pack(folder, num_layers=1, max_nbytes=12_288)
        assert contents(folder) == complete


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "experts").write_bytes(b"in the way")
    refused(ResourceError, "experts", lambda: build_pack(tmp_path))


def test_failure_after_a_resume_keeps_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: dict[str, bytes]
) -> None:
    """The disk fills up in the second file: the first stays, and is not written again."""
    first = "experts/layer-00000-of-00002-00000.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(osio, "write_at", failing(osio.write_at, errno.ENOSPC, 7, []))
        refused(
            ResourceError,
            "no space left",
            lambda: build_pack(tmp_path, num_layers=1, max_nbytes=12_288),
        )
    before = (tmp_path / first).stat().st_mtime_ns
    build_pack(tmp_path, num_layers=1, max_nbytes=12_288)
    assert (tmp_path / first).stat().st_mtime_ns == before
    assert contents(tmp_path) == complete


def test_write_file_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "moepack.json"
    osio.write_file(path, b"old")
    for function in FUNCTIONS:
        with monkeypatch.context() as patch:
            fault = failing(getattr(osio, function), errno.ENOSPC, 0, [])
            patch.setattr(osio, function, fault)
            refused(ResourceError, "moepack.json: no space", lambda: osio.write_file(path, b"new"))
        assert contents(tmp_path) == {"moepack.json": b"old"}
    osio.write_file(path, b"new")
    assert contents(tmp_path) == {"moepack.json": b"new"}


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    build_pack(tmp_path)
    monkeypatch.undo()
    verify_pack(tmp_path)


def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems answer EINVAL."""
    real = osio.sync

    def sync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(osio, "sync", sync)
    build_pack(tmp_path)
    verify_pack(tmp_path)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_pack(tmp_path)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: real(fd, [to[0][:777]], at))
    verify_pack(tmp_path)


def test_the_file_ends_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "layer-00003.safetensors"
    path.write_bytes(bytes(100))
    descriptor = os.open(path, os.O_RDONLY)
    buffer = memoryview(bytearray(60))
    osio.read_at(descriptor, buffer, 40, path.name)
    os.truncate(path, 70)
    error = refused(
        ResourceError,
        "layer-00003.safetensors: the file ended early: it was truncated while in use",
        lambda: osio.read_at(descriptor, buffer, 40, path.name),
    )
    assert "wanted 60 bytes at 40, got 30" in str(error)
    os.close(descriptor)


def test_read_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    buffer = memoryview(bytearray(1))
    refused(ResourceError, "x: the disk reported", lambda: osio.read_at(0, buffer, 0, "x"))
    # The journal reads too.
    (tmp_path / JOURNAL_NAME).write_bytes(b"{}\n")
    refused(ResourceError, "the disk reported", lambda: Journal(tmp_path, "x"))


def test_open_regular_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(FormatError, "a: file is missing", lambda: osio.open_regular(tmp_path / "a"))
    refused(FormatError, "not a regular file", lambda: osio.open_regular(tmp_path))
    with failing_open(monkeypatch, errno.EMFILE, 0):
        error = refused(ResourceError, "too many", lambda: osio.open_regular(tmp_path / "a"))
    assert isinstance(error.__cause__, OSError)
    unknown = osio.resource_error(OSError(errno.ENOTBLK, "Block device required"), "x")
    assert str(unknown) == "x: Block device required"
