"""A conversion that was killed at any moment goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack_formats.errors import FormatError, ResourceError, UsageError
from moepack_formats.journal import JOURNAL_NAME, FinishedFile, Journal
from moepack_formats.layer import layer_writer
from moepack_formats.tensor_file import TensorPlan
from moepack_formats.verify import verify_pack
from moepack_formats.writer import TensorFileWriter
from tests.formats.builders import build_pack, layer_plan, layer_records, write_layer, write_trunk
from tests.formats.hostile import refused

LAYER = "experts/layer-00000.safetensors"
PLAN = layer_plan()
RECORDS = layer_records(PLAN)
(EXPERTS,) = [experts for _, experts in PLAN.files()]


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("complete")
    write_layer(folder, PLAN, RECORDS, Journal(folder, "x"), 10**9)
    return (folder / LAYER).read_bytes()


def start(folder: Path, count: int) -> None:
    """Write ``count`` records and stop as if killed."""
    journal = Journal(folder, "x")
    writer = layer_writer(folder, PLAN, LAYER, EXPERTS, journal)
    assert writer.resume() == 0
    for record in RECORDS[:count]:
        writer.append(record)
    writer.close()
    journal.close()


def go_on(folder: Path) -> tuple[int, Mapping[str, FinishedFile]]:
    """Resume and finish; how many records were kept."""
    journal = Journal(folder, "x")
    writer = layer_writer(folder, PLAN, LAYER, EXPERTS, journal)
    kept = writer.resume()
    for record in RECORDS[kept:]:
        writer.append(record)
    facts = writer.finish()
    journal.close()
    return kept, {LAYER: facts}


@pytest.mark.parametrize("count", range(4))
def test_killed_between_records(tmp_path: Path, complete: bytes, count: int) -> None:
    start(tmp_path, count)
    assert not (tmp_path / LAYER).exists()
    assert go_on(tmp_path)[0] == count
    assert (tmp_path / LAYER).read_bytes() == complete
    assert not (tmp_path / f"{LAYER}.part").exists()


@settings(max_examples=120)
@given(
    count=st.integers(0, 3),
    part=st.integers(0, 20480) | st.sampled_from([4095, 4096, 8191, 8192, 16383, 16384]),
    noted=st.integers(0, 400),
    garbage=st.binary(max_size=30),
)
def test_killed_at_any_byte(
    tmp_path_factory: pytest.TempPathFactory,
    complete: bytes,
    count: int,
    part: int,
    noted: int,
    garbage: bytes,
) -> None:
    """Partial file and journal are cut anywhere, each by itself, and end in garbage."""
    folder = tmp_path_factory.mktemp("killed")
    start(folder, count)
    path, journal = folder / f"{LAYER}.part", folder / JOURNAL_NAME
    if path.stat().st_size > part:
        os.truncate(path, part)
    with open(path, "ab") as file:
        file.write(garbage)
    journal.write_bytes(journal.read_bytes()[:noted] + garbage)
    kept, facts = go_on(folder)
    assert kept <= count
    assert (folder / LAYER).read_bytes() == complete
    # The journal is whole again: a second resume finds all of it.
    assert go_on(folder) == (len(RECORDS), facts)


@settings(max_examples=40)
@given(at=st.integers(0, 16383), bit=st.integers(0, 7))
def test_damage_in_the_partial_file(
    tmp_path_factory: pytest.TempPathFactory, complete: bytes, at: int, bit: int
) -> None:
    """What the disk lost or changed after a power cut is written again."""
    folder = tmp_path_factory.mktemp("damaged")
    start(folder, 3)
    path = folder / f"{LAYER}.part"
    data = bytearray(path.read_bytes())
    data[4096 + at] ^= 1 << bit
    path.write_bytes(data)
    assert go_on(folder)[0] == (0 if at < 4096 else 1 if at < 12288 else 2)
    assert (folder / LAYER).read_bytes() == complete


def test_partial_file_removed(tmp_path: Path, complete: bytes) -> None:
    start(tmp_path, 2)
    (tmp_path / f"{LAYER}.part").unlink()
    assert go_on(tmp_path)[0] == 0
    assert (tmp_path / LAYER).read_bytes() == complete


def test_finished_file_removed_or_cut(tmp_path: Path, complete: bytes) -> None:
    go_on(tmp_path)
    for damage in (lambda p: p.unlink(), lambda p: os.truncate(p, 100)):
        damage(tmp_path / LAYER)
        assert go_on(tmp_path)[0] == 0
        assert (tmp_path / LAYER).read_bytes() == complete


def test_killed_between_rename_and_note(tmp_path: Path, complete: bytes) -> None:
    _, facts = go_on(tmp_path)
    journal = tmp_path / JOURNAL_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))
    assert go_on(tmp_path) == (0, facts)
    assert (tmp_path / LAYER).read_bytes() == complete


def test_finished_files_are_not_written_again(tmp_path: Path) -> None:
    _, facts = go_on(tmp_path)
    before = (tmp_path / LAYER).stat()
    assert go_on(tmp_path) == (3, facts)
    after = (tmp_path / LAYER).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_other_options_are_refused(tmp_path: Path) -> None:
    start(tmp_path, 2)
    before = contents(tmp_path)
    error = refused(UsageError, "another source or other options", lambda: Journal(tmp_path, "y"))
    assert "--force to start over" in str(error)
    assert contents(tmp_path) == before
    assert go_on(tmp_path)[0] == 2


NOTE = json.dumps({"file": LAYER, "xxh3": "0" * 32}).encode()
TORN = {
    "half a line": NOTE[:20],
    "whole but for the end": NOTE,
    "not JSON": b"\x00\x00\x00\n" + NOTE + b"\n",
    "not an object": b"5\n" + NOTE + b"\n",
    "a list": b"[]\n" + NOTE + b"\n",
    "nested": b'{"file":' + b"[" * 100_000 + b"\n" + NOTE + b"\n",
    "unknown": b'{"file":"a","more":1}\n' + NOTE + b"\n",
    "wrong type": b'{"file":"a","keep":"1"}\n' + NOTE + b"\n",
    "negative": b'{"file":"a","keep":-1}\n' + NOTE + b"\n",
    "facts": b'{"file":"a","finished":{"size":1}}\n' + NOTE + b"\n",
    "no file": b'{"xxh3":"00"}\n' + NOTE + b"\n",
    "empty line": b"\n" + NOTE + b"\n",
    "not UTF-8": b'{"file":"\xff"}\n' + NOTE + b"\n",
}


@pytest.mark.parametrize("case", TORN)
def test_torn_journal(tmp_path: Path, case: str) -> None:
    """Notes before the damage count, those after it do not, and new ones can be read again."""
    journal = Journal(tmp_path, "x")
    journal.add("a", "1" * 32)
    journal.add("b", "2" * 32)
    journal.close()
    with open(tmp_path / JOURNAL_NAME, "ab") as file:
        file.write(TORN[case])
    for count in range(1, 4):
        journal = Journal(tmp_path, "x")
        assert journal.digests("a") == ["1" * 32] * count
        assert journal.digests("b") == ["2" * 32]
        assert journal.digests(LAYER) == []
        journal.add("a", "1" * 32)
        journal.close()


@pytest.mark.parametrize(
    "first", [b"", b'{"finger', b"5\n", b'{"file":"a","xxh3":"0"}\n', b"\0" * 9]
)
def test_journal_without_its_first_line_starts_anew(tmp_path: Path, first: bytes) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(first)
    Journal(tmp_path, "x").close()
    assert (tmp_path / JOURNAL_NAME).read_bytes() == b'{"fingerprint":"x"}\n'
    refused(UsageError, "other options", lambda: Journal(tmp_path, "y"))


def test_rewind_is_remembered(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "x")
    for digest in "abc":
        journal.add("f", digest)
    journal.rewind("f", 5)
    journal.rewind("f", 1)
    journal.add("f", "d")
    journal.close()
    assert Journal(tmp_path, "x").digests("f") == ["a", "d"]


def test_digests_cannot_be_changed_from_outside(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "x")
    journal.digests("f").append("a")
    assert journal.digests("f") == []


def test_partial_file_that_cannot_be_read(
    tmp_path: Path, complete: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, 2)
    journal = Journal(tmp_path, "x")
    writer = layer_writer(tmp_path, PLAN, LAYER, EXPERTS, journal)
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> int:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        refused(ResourceError, "input/output error; check the disk", writer.resume)
    assert len(os.listdir("/proc/self/fd")) == before
    journal.close()
    assert go_on(tmp_path)[0] == 2
    assert (tmp_path / LAYER).read_bytes() == complete


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    writer = layer_writer(tmp_path, PLAN, LAYER, EXPERTS, Journal(tmp_path, "x"))
    writer.resume()
    with pytest.raises(FormatError, match=r"experts.0: wrong size .*wanted 4096, got 8192"):
        writer.append(RECORDS[1])
    writer.append(RECORDS[0])
    with pytest.raises(FormatError, match=r"file is incomplete .*wanted 3, got 1"):
        writer.finish()
    writer.close()
    assert not (tmp_path / LAYER).exists()


def test_a_header_that_grows_is_not_written_over_the_data(tmp_path: Path) -> None:
    plan = [TensorPlan("a", "U8", (4,))]
    lengths = iter([1, 5000])
    writer = TensorFileWriter(
        tmp_path,
        "x.safetensors",
        plan,
        lambda _: {"k": "v" * next(lengths)},
        Journal(tmp_path, "x"),
    )
    writer.resume()
    writer.append(np.arange(4, dtype=np.uint8))
    with pytest.raises(FormatError, match=r"x.safetensors: the header changed its length"):
        writer.finish()
    writer.close()
    assert not (tmp_path / "x.safetensors").exists()


@settings(max_examples=25)
@given(cut=st.integers(0, 2000), seed=st.integers(0, 5))
def test_whole_pack(tmp_path_factory: pytest.TempPathFactory, cut: int, seed: int) -> None:
    """Layers and trunk, the journal cut anywhere: the same files as in one go."""
    folder = tmp_path_factory.mktemp("whole")
    journal = Journal(folder, "tests")
    for index in range(seed // 2):
        plan = layer_plan(index)
        write_layer(folder, plan, layer_records(plan), journal, 10**9)
    if seed % 2:
        write_trunk(folder, journal)
    journal.close()
    path = folder / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:cut])
    build_pack(folder)
    verify_pack(folder)
    reference = tmp_path_factory.mktemp("reference")
    build_pack(reference)
    assert contents(folder) == contents(reference)
