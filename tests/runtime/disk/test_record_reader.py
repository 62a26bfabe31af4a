"""Direct reads, what happens where they are refused, and how many at a time a disk needs."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moepack_formats import osio
from moepack_formats.errors import ResourceError
from moepack_formats.pack import Pack
from moepack_runtime.cache.arena import Arena
from moepack_runtime.disk import reads_at_once
from moepack_runtime.disk.record_reader import RecordReader
from moepack_runtime.loading import load_pack
from moepack_runtime.policies import policy_names
from tests import families


@pytest.fixture
def opened(pack: Path) -> Iterator[Pack]:
    with Pack(pack) as found:
        yield found


def read(reader: RecordReader, pack: Pack, layer: int, expert: int) -> bytes:
    at = pack.layers[layer][expert]
    arena = Arena(at.spec.nbytes, 1)
    reader.read(at, arena.buffer(0), layer, expert)
    return bytes(arena.buffer(0))


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("direct", [True, False])
def test_records_are_the_files_bytes(pack: Path, opened: Pack, direct: bool) -> None:
    reader = RecordReader(opened, direct=direct)
    if direct and not reader.direct:
        pytest.skip("this file system refuses direct reads")
    for layer, records in enumerate(opened.layers):
        for expert, at in enumerate(records):
            assert is_direct(at.descriptor) == direct
            data = (pack / at.file).read_bytes()[at.offset : at.offset + at.spec.nbytes]
            assert read(reader, opened, layer, expert) == data


@pytest.mark.parametrize("refused", ["flag", "read"])
def test_a_file_system_without_direct_reads(
    opened: Pack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: str,
) -> None:
    """Whether it refuses the flag or only the read: the page cache, said once."""
    real_fcntl, real_preadv = fcntl.fcntl, os.preadv

    def no_flag(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "")
        return real_fcntl(descriptor, command, value)

    def no_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "")
        return real_preadv(descriptor, buffers, offset)

    if refused == "flag":
        monkeypatch.setattr(fcntl, "fcntl", no_flag)
    else:
        monkeypatch.setattr(os, "preadv", no_read)
    with caplog.at_level(logging.INFO):
        reader = RecordReader(opened, direct=True)
        for layer, expert in ((0, 1), (1, 2), (2, 7)):
            read(reader, opened, layer, expert)
    assert not reader.direct
    assert caplog.text.count("refuses direct reads") == 1
    assert not any(is_direct(at.descriptor) for layer in opened.layers for at in layer)


def test_other_errors_are_not_taken_for_a_refusal(
    opened: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "")

    reader = RecordReader(opened, direct=True)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ResourceError, match=r"layer 1, expert 2.*input/output error"):
        read(reader, opened, 1, 2)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
def test_short_reads_go_on_at_a_block(
    opened: Pack, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """A direct read that stopped anywhere is continued where direct reads may start."""
    real, offsets = os.preadv, list[int]()

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        done = real(descriptor, buffers, offset)
        count = max(int(share * done), min(done, 4096))
        buffers[0][count:] = bytes(len(buffers[0]) - count)
        return count

    reader = RecordReader(opened, direct=True)
    wanted = read(reader, opened, 0, 3)
    monkeypatch.setattr(os, "preadv", short)
    assert read(reader, opened, 0, 3) == wanted
    if reader.direct:
        assert all(offset % 4096 == 0 for offset in offsets)


def test_a_record_beyond_the_end(damaged: Path) -> None:
    with Pack(damaged) as opened:
        reader, at = RecordReader(opened, direct=True), opened.layers[1][5]
        for end in (at.offset + at.spec.nbytes - 1, at.offset + 4096, at.offset + 10, at.offset, 0):
            os.truncate(damaged / at.file, end)
            with pytest.raises(ResourceError, match=r"layer 1, expert 5.*truncated while in use"):
                read(reader, opened, 1, 5)


# --- how many at a time ---------------------------------------------------------------------------


def test_small_packs_are_not_measured(opened: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads_at_once, "read_speed", lambda *_: pytest.fail("measured"))
    reader = RecordReader(opened, direct=True)
    assert reads_at_once.io_threads(opened, reader) == reads_at_once.DEFAULT_THREADS


@pytest.mark.parametrize(
    ("speeds", "threads"),
    [((5, 5, 5, 5), 2), ((5, 8, 10, 10.2), 4), ((1, 2, 3, 9), 8), ((9, 9.4, 9, 9), 2)],
)
def test_the_fewest_that_are_fast(
    opened: Pack,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    speeds: tuple[float, ...],
    threads: int,
) -> None:
    """Measured once; the next time the cache folder knows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reads_at_once, "_SMALLEST_PACK", 0)
    known = dict(zip(reads_at_once.CANDIDATES, speeds, strict=True))
    monkeypatch.setattr(reads_at_once, "read_speed", lambda _, threads, _seconds: known[threads])
    reader = RecordReader(opened, direct=True)
    if not reader.direct:
        pytest.skip("this file system refuses direct reads")
    assert reads_at_once.io_threads(opened, reader) == threads
    monkeypatch.setattr(reads_at_once, "read_speed", lambda *_: pytest.fail("measured again"))
    assert reads_at_once.io_threads(opened, reader) == threads
    (path,) = tmp_path.rglob("*.json")
    assert list(json.loads(path.read_text()).values()) == [threads]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": -3}', '{"a": "x"}'])
def test_a_cache_file_that_is_damaged(
    opened: Pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reads_at_once, "_SMALLEST_PACK", 0)
    monkeypatch.setattr(reads_at_once, "_SECONDS", 0.001)
    (tmp_path / "moepack").mkdir()
    (tmp_path / "moepack" / "disks.json").write_text(text)
    assert reads_at_once.io_threads(opened, RecordReader(opened, direct=True)) >= 2


def test_a_cache_folder_that_cannot_be_written(
    opened: Pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(reads_at_once, "_SMALLEST_PACK", 0)
    monkeypatch.setattr(reads_at_once, "_SECONDS", 0.001)
    assert reads_at_once.io_threads(opened, RecordReader(opened, direct=True)) >= 2


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_tokens_are_the_same_however_records_come(pack: Path, io: str) -> None:
    """Every policy with every number of slots, and both with and without prefetch."""
    ids = families.tokens(batch=1, length=6)

    def greedy(**options: object) -> list[list[int]]:
        model = load_pack(pack, **options)
        found: list[list[int]] = model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
        return found

    wanted = greedy(io="mmap", prefetch=False)
    for number, policy in enumerate(sorted(set(policy_names()) - {"belady"})):
        for more, slots in enumerate((None,) if io == "mmap" else (1, 5, 23)):
            prefetch = (number + more) % 2 == (io == "direct")
            options = {"slots": slots, "policy": policy, "prefetch": prefetch}
            assert greedy(io=io, **options) == wanted, options


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("slots", [1, 4])
def test_a_prompt_reads_an_expert_at_most_once(
    pack: Path, monkeypatch: pytest.MonkeyPatch, slots: int, prefetch: bool
) -> None:
    """However many of its tokens an expert serves, and however few slots there are."""
    model = load_pack(pack, io="direct", slots=slots, prefetch=prefetch)
    real, reads = osio.read_at, Counter[object]()

    def counting(
        descriptor: int, buffer: memoryview, offset: int, where: object, *, align: int = 1
    ) -> None:
        reads[where] += 1
        real(descriptor, buffer, offset, where, align=align)

    monkeypatch.setattr(osio, "read_at", counting)
    for _ in range(3):
        reads.clear()
        with torch.no_grad():
            model(families.tokens(batch=1, length=24))
        assert len(reads) > 12  # nearly all of the 24 experts
        assert set(reads.values()) == {1}


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_a_file_that_is_overwritten_while_loaded(damaged: Path, io: str) -> None:
    """Other bytes under the same name and of the same size: layer and expert are named."""
    from moepack_formats.errors import IntegrityError

    model = load_pack(damaged, io=io, prefetch=False)
    at = model.moepack.pack.layers[1][6]
    with open(damaged / at.file, "r+b") as file:
        file.seek(at.offset + 1000)
        file.write(b"damage")
        os.fsync(file.fileno())
    with pytest.raises(IntegrityError, match=r"layer 1, expert 6") as error:
        list(model.moepack.residency.fetch(1, range(8)))
    assert error.value.exit_code == 4
