"""Conversions on disks that are full, broken or read-only."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moepack_formats import osio
from tests.commands import (
    Child,
    Command,
    Result,
    hashes,
)
from tests.moepack.conversions import WORDS, Failing, convert


def test_space_is_checked_first(
    command: Command,
    checkpoint: Path,
    damaged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    out = tmp_path / "new" / "out"
    line = convert(command, checkpoint, out).error(5)
    assert "not enough free disk space" in line
    assert "1000 B free" in line
    assert not out.exists()
    # An old pack is not given up for one that cannot be written.
    before = hashes(damaged)
    assert "not enough free" in convert(command, checkpoint, damaged, "--force").error(5)
    assert hashes(damaged) == before
    dry = convert(command, checkpoint, out, "--dry-run", "--json").json
    assert dry["disk_free"] == 1000


def test_what_is_there_already_counts_as_space(
    command: Command, checkpoint: Path, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the user's own do not."""
    need = convert(command, checkpoint, damaged, "--dry-run", "--json").json["disk_needed"]
    ours = sum(p.stat().st_size for p in damaged.rglob("*") if p.name != "README.md")
    (damaged / "mine").write_bytes(bytes(10_000_000))
    usage = shutil.disk_usage(damaged)
    enough = need + 64_000_000 - ours
    for free, code in ((enough - 20_000, 5), (enough + 20_000, 0)):
        with monkeypatch.context() as patch:
            changed = usage._replace(free=free)
            patch.setattr(shutil, "disk_usage", lambda _, changed=changed: changed)
            assert convert(command, checkpoint, damaged, "--force").code == code


TROUBLE = {
    errno.ENOSPC: "no space left on the disk; free some space",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system refuses a file this large",
    errno.EIO: "the disk reported an input/output error",
}


@pytest.mark.parametrize("number", TROUBLE)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 0.97, 1.0])
def test_writes_that_fail(
    command: Command,
    checkpoint: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    number: int,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing half-written stays, and the same command goes on from there."""
    counting = Failing(osio.write_at, 0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(osio, "write_at", counting)
        assert convert(command, checkpoint, tmp_path / "whole").code == 0
    at = 1 + round(share * (counting.calls - 1))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(osio, "write_at", Failing(osio.write_at, at, number))
        line = convert(command, checkpoint, out).error(5)
    assert TROUBLE[number] in line
    assert str(out) in line
    assert not list(out.rglob("*.part"))
    assert not (out / "moepack.json").exists()
    finished = list(out.rglob("*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert convert(command, checkpoint, out).code == 0
    assert hashes(out) == wanted
    assert {path: path.stat().st_mtime_ns for path in finished} == times  # not written again


@pytest.mark.parametrize("name", ["sync", "replace"])
def test_syncs_and_renames_that_fail(
    command: Command,
    checkpoint: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for at in (1, 3, 6):
        out = tmp_path / f"out-{at}"
        with monkeypatch.context() as patch:
            patch.setattr(osio, name, Failing(getattr(osio, name), at, errno.EIO))
            convert(command, checkpoint, out).error(5)
        assert not list(out.rglob("*.part"))
        assert convert(command, checkpoint, out).code == 0
        assert hashes(out) == wanted


def test_reads_of_the_source_that_fail(
    command: Command,
    checkpoint: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    for at in (1, 40):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", Failing(os.preadv, at, errno.EIO))
            line = convert(command, checkpoint, out).error(5)
        assert "the disk reported an input/output error; check the disk" in line
        assert "micro/model-0" in line
    assert convert(command, checkpoint, out).code == 0
    assert hashes(out) == wanted


def test_reads_that_fall_short(
    command: Command,
    checkpoint: Path,
    pack: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A short read is continued; a read of nothing is the end of a file that was longer."""
    real = os.preadv

    def half(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][: -(-len(buffers[0]) // 2)]], offset)

    generate = ("generate", pack, "--prompt", "x", "--greedy", "--max-new-tokens", 3)
    text = command(*generate, "--io", "buffered").out
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", half)
        assert convert(command, checkpoint, tmp_path / "out").code == 0
        assert command(*generate, "--io", "buffered").out == text
    assert hashes(tmp_path / "out") == wanted
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        line = convert(command, checkpoint, tmp_path / "other").error(5)
    assert "the file ended early" in line


def test_a_record_that_cannot_be_read(
    command: Command, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moepack_runtime.disk import record_reader

    real = record_reader.osio.read_at

    def read_at(
        descriptor: int, buffer: memoryview, offset: int, where: object, *, align: int = 1
    ) -> None:
        if "layer 2" in str(where):
            with osio.io_errors(where):
                raise OSError(errno.EIO, "")
        real(descriptor, buffer, offset, where, align=align)

    monkeypatch.setattr(record_reader.osio, "read_at", read_at)
    words = ("generate", pack, "--prompt", "x", "--max-new-tokens", 3, "--io", "buffered")
    line = command(*words).error(5)
    assert "layer-00002.safetensors, layer 2, expert " in line
    assert "the disk reported an input/output error; check the disk" in line


def test_a_limit_of_file_size(checkpoint: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    """The system's own EFBIG, not an imitation."""
    out = tmp_path / "out"
    child = Child(tmp_path, "convert", checkpoint, out, *WORDS, before=_small_files)
    assert "the file system refuses a file this large" in child.wait().error(5)
    assert not list(out.rglob("*.part"))
    assert Child(tmp_path, "convert", checkpoint, out, *WORDS).wait().code == 0
    assert hashes(out) == wanted


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_read_only_output(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **keywords: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **keywords)

    monkeypatch.setattr(os, "open", read_only)
    line = convert(command, checkpoint, tmp_path / "out").error(5)
    assert f"{tmp_path / 'out'}: the folder is read-only; choose a folder" in line


def test_read_only_mount(checkpoint: Path, tmp_path: Path) -> None:
    """A real one, where the system lets us make it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount --bind "{disk}" "{disk}" && mount -o remount,ro,bind "{disk}"'
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    program = f'"{sys.executable}" -m moepack convert "{checkpoint}" "{disk}"'
    script = f"{mount} && {program}/out --quantizer rtn"
    done = subprocess.run([*unshare, script], capture_output=True, text=True)
    line = Result(done.returncode, done.stdout, done.stderr).error(5)
    assert "the folder is read-only; choose a folder that you can write to" in line


def test_permission_denied(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "permission denied" in convert(command, checkpoint, tmp_path / "out").error(5)
