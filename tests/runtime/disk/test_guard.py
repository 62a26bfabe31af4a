"""Mapped files that are cut while they are read: an error, not SIGBUS."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moepack_formats.errors import ResourceError
from moepack_formats.pack import Pack
from moepack_runtime.cache.mapped import MappedRecords
from moepack_runtime.disk.truncation_guard import Guard
from moepack_runtime.kernels import native
from moepack_runtime.statistics import Statistics

LAYER = "experts/layer-00001.safetensors"
PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(native.available() is None, reason="no native library")


def mapped_file(path: Path, pages: int) -> tuple[mmap.mmap, torch.Tensor]:
    path.write_bytes(b"\x07" * (pages * PAGE))
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return mapping, torch.frombuffer(mapping, dtype=torch.uint8)


def test_missing_pages_read_as_zeros(tmp_path: Path) -> None:
    mapping, data = mapped_file(tmp_path / "file", 8)
    guard = Guard()
    guard.add(1, data.data_ptr(), len(mapping))
    assert int(data.long().sum()) == 7 * 8 * PAGE
    assert guard.missing(1) is None
    os.truncate(tmp_path / "file", 3 * PAGE + 10)
    assert int(data.long().sum()) == 7 * (3 * PAGE + 10)
    assert not guard.quiet
    assert guard.missing(1) == 4 * PAGE
    assert guard.missing(1) is None
    guard.close()
    assert guard.missing(1) is None


def test_only_the_mapping_that_was_cut_is_blamed(tmp_path: Path) -> None:
    guard = Guard()
    keep = []
    for key in range(3):
        mapping, data = mapped_file(tmp_path / f"file{key}", 2)
        guard.add(key, data.data_ptr(), len(mapping))
        keep.append(data)
    os.truncate(tmp_path / "file1", 0)
    assert [int(data[0]) for data in keep] == [7, 0, 7]
    assert [guard.missing(key) for key in range(3)] == [None, 0, None]


@pytest.mark.parametrize("handler", ["none", "faulthandler", "python"])
def test_elsewhere_the_signal_does_what_it_did(tmp_path: Path, handler: str) -> None:
    """A mapping that nobody guards still ends the process, by the way that was set before."""
    program = f"""
import faulthandler, mmap, os, signal, torch
from pathlib import Path
from moepack_runtime.disk.truncation_guard import Guard
from tests.runtime.disk.test_guard import mapped_file
if {handler!r} == "faulthandler":
    faulthandler.enable()
if {handler!r} == "python":
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
folder = Path({str(tmp_path)!r})
guarded, bare = mapped_file(folder / "a", 2), mapped_file(folder / "b", 2)
guard = Guard()
guard.add(0, guarded[1].data_ptr(), 1)
guard.remove(0)
guard.add(0, guarded[1].data_ptr(), len(guarded[0]))
for name in "ab":
    os.truncate(folder / name, 0)
assert int(guarded[1][0]) == 0
print("guarded", flush=True)
int(bare[1][0])
print("alive", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "guarded\n"
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == (handler == "faulthandler")


@pytest.mark.parametrize("together", [False, True])
def test_a_record_that_goes_while_it_is_used(damaged: Path, together: bool) -> None:
    with Pack(damaged) as opened:
        mapped = MappedRecords(opened, Statistics())
        list(mapped.fetch(1, range(8)))
        at = opened.layers[1][5]

        def use() -> None:
            turns = mapped.fetch_ready(1, [3, 5]) if together else mapped.fetch(1, [3, 5])
            for turn in turns:
                records = turn if isinstance(turn, dict) else dict([turn])
                if 5 in records:
                    os.truncate(damaged / LAYER, at.offset)
                for record in records.values():
                    int(record.long().sum())

        with pytest.raises(ResourceError, match=r"layer 1, expert 5.*truncated while in use"):
            use()
        with pytest.raises(ResourceError, match=r"layer 1, expert 5.*truncated while in use"):
            list(mapped.fetch(1, [5]))
        assert [e for e, _ in mapped.fetch(1, [3])] == [3]
        mapped.close()


def test_a_record_that_goes_while_its_checksum_is_computed(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moepack_runtime.cache import mapped as module

    real = module.check_record

    def check_record(data: memoryview, at: object, layer: int, expert: int) -> None:
        os.truncate(damaged / LAYER, 4096)
        real(data, at, layer, expert)  # type: ignore[arg-type]

    with Pack(damaged) as opened:
        mapped = MappedRecords(opened, Statistics())
        monkeypatch.setattr(module, "check_record", check_record)
        with pytest.raises(ResourceError, match=r"layer 1, expert 2.*truncated while in use"):
            list(mapped.fetch(1, [2]))
